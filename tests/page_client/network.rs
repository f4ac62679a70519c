//! A network that fails while a guest runs: between page-server and page-client on two hosts
//! (network namespaces), and between them and processes that stand still.
//!
//! Invariant: whoever needs no missing page never stops, whoever needs one gets it once the
//! network is back, and every page is what it must be.

mod hosts;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage_tools::attachment::AttachmentEvent;
use afterimage_tools::require;
use nix::sys::signal::Signal;

use crate::support::{CLIENT, Daemon, LIMIT, SERVER, Vcpu, Vmm, at, check, write_image};
use hosts::{Hosts, Place};

const PAGES: u64 = 2048;
/// Pages that the guest reads at random come before this one; those that follow are asked for
/// one by one.
const FRESH: u64 = 1024;
/// The guest's own counter, in a page that has arrived.
const COUNTER: (u64, u64) = (0, 7);

/// A guest in this process, between page-server and page-client.
struct Scene {
    server: Daemon,
    client: Daemon,
    vmm: Vmm,
    _directory: tempfile::TempDir,
}

impl Scene {
    /// On two hosts, or on this one.
    fn start(hosts: Option<&Hosts>, bandwidth: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        write_image(&directory.path().join("ram"), PAGES);
        let (attach, ram) = (format!("unix:{}", path("attach")), path("ram"));
        let listen = match hosts {
            Some(_) => format!("tcp:{}:4000", Place::Source.address()),
            None => format!("unix:{}", path("pages")),
        };
        let mut serve = vec!["--listen", &listen, "--memory", &ram, "--bandwidth", bandwidth];
        serve.extend(["--streams", "2", "--insecure-plaintext", "--json"]);
        let mut server = start(hosts, Place::Source, SERVER, &serve);
        server.line("listening on");
        let fetch = ["--attach", &attach, "--connect", &listen, "--insecure-plaintext", "--json"];
        let mut client = start(hosts, Place::Destination, CLIENT, &fetch);
        client.line("a VMM can have its memory served");
        let vmm = Vmm::attach(&directory.path().join("attach"), "guest", PAGES, true);
        vmm.run();
        Self { server, client, vmm, _directory: directory }
    }

    /// A page that nobody has asked for before, on a thread of its own.
    fn ask_for(&self, page: u64) -> Receiver<()> {
        let (map, (sender, arrived)) = (Arc::clone(&self.vmm.map), channel());
        thread::spawn(move || {
            check(&map, page);
            // The test may have failed.
            let _ = sender.send(());
        });
        arrived
    }

    /// The network fails for longer than the silence, and comes back: how a guest lives
    /// through that.
    fn fails(
        &mut self,
        resident: &Resident,
        fresh: u64,
        fail: impl Fn(&Self),
        mend: impl Fn(&Self),
    ) {
        has_arrived(&self.ask_for(fresh), "before the failure");
        self.client.lines_so_far();
        self.server.lines_so_far();
        fail(self);
        let waiting = self.ask_for(fresh + 1);
        resident.goes_on();
        self.noticed();
        assert!(waiting.try_recv().is_err(), "nobody can have brought it");
        resident.goes_on();
        mend(self);
        has_arrived(&waiting, "when the network is back");
    }

    /// Both sides say that the other is away, if they can speak.
    fn noticed(&mut self) {
        for side in [&mut self.client, &mut self.server] {
            if !side.is_stopped() {
                side.line("is away");
            }
        }
    }

    /// The rest, with everything verified.
    fn finish(self) {
        self.vmm.check();
        self.vmm.until(|event| *event == AttachmentEvent::Finished);
        let (status, report, said) = self.client.end();
        assert_eq!(status, 0, "{said:#?}");
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["pages_complete"], PAGES, "{report}");
        let ways = ["pages_requested", "pages_background", "pages_zero"];
        let once = ways.map(|way| report[way].as_u64().unwrap()).iter().sum::<u64>();
        assert_eq!(once, PAGES, "each page is counted once: {report}");
        let (status, _, said) = self.server.end();
        assert_eq!(status, 0, "{said:#?}");
        let Vmm { map, memory, .. } = self.vmm;
        memory.all_arrived();
        (0..PAGES).for_each(|page| check(&map, page));
    }
}

fn start(hosts: Option<&Hosts>, place: Place, program: &str, arguments: &[&str]) -> Daemon {
    let Some(hosts) = hosts else { return Daemon::start(program, arguments) };
    let inside = ["netns", "exec", hosts.name(place), program];
    Daemon::start("ip", &[&inside[..], arguments].concat())
}

fn has_arrived(page: &Receiver<()>, when: &str) {
    page.recv_timeout(LIMIT).unwrap_or_else(|error| panic!("a page, {when}: {error}"));
}

/// A vCPU that needs nothing but a page that is there.
struct Resident {
    /// Outside of guest memory, so that whoever looks at it does not wait there.
    rounds: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Resident {
    /// Returns when its page has arrived.
    fn start(vmm: &Vmm) -> Self {
        let (rounds, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (map, counting, stop) =
            (Arc::clone(&vmm.map), Arc::clone(&rounds), Arc::clone(&is_over));
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                at(&map, COUNTER.0, COUNTER.1).fetch_add(1, Ordering::Relaxed);
                counting.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        let resident = Self { rounds, is_over, thread };
        resident.goes_on();
        resident
    }

    fn goes_on(&self) {
        let count = || self.rounds.load(Ordering::Relaxed);
        let (before, begun) = (count(), Instant::now());
        while count() - before < 1000 {
            assert!(begun.elapsed() < LIMIT, "a vCPU that needs no missing page stands still");
            thread::sleep(Duration::from_micros(100));
        }
    }

    fn stop(self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// A guest of which `FRESH` pages are read at random while the rest waits to be asked for.
fn lives_through(hosts: Option<&Hosts>, failures: &[Failure<'_>]) {
    let mut scene = Scene::start(hosts, "on-request");
    let resident = Resident::start(&scene.vmm);
    let load = Load::start(&scene.vmm);
    for (number, failure) in (0..).zip(failures) {
        scene.fails(&resident, FRESH + 2 * number, &failure.0, &failure.1);
    }
    load.stop();
    resident.stop();
    scene.finish();
}

type Step<'a> = Box<dyn Fn(&Scene) + 'a>;

/// What breaks the network, and what mends it.
struct Failure<'a>(Step<'a>, Step<'a>);

/// vCPUs that read at random all the time.
struct Load {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(vmm: &Vmm) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let threads = (1..3_u64).map(|seed| {
            let (map, stop) = (Arc::clone(&vmm.map), Arc::clone(&is_over));
            let mut state = seed;
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(12345);
                    check(&map, (state >> 33) % FRESH);
                    thread::yield_now();
                }
            })
        });
        let threads = threads.collect();
        Self { is_over, threads }
    }

    fn stop(self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("every page is what it must be");
        }
    }
}

#[test]
fn links_that_go_down_and_links_of_one_way_lose_nothing() {
    if !require::network_namespaces() {
        return;
    }
    let hosts = Hosts::new();
    let hosts = &hosts;
    let mut failures = Vec::new();
    for place in [Place::Source, Place::Destination] {
        let failure = |fail: fn(&Hosts, Place), mend: fn(&Hosts, Place)| {
            Failure(Box::new(move |_| fail(hosts, place)), Box::new(move |_| mend(hosts, place)))
        };
        failures.push(failure(Hosts::link_down, Hosts::link_up));
        failures.push(failure(Hosts::lose_what_leaves, Hosts::find_what_leaves));
        failures.push(failure(Hosts::no_way, Hosts::a_way));
    }
    lives_through(Some(hosts), &failures);
}

#[test]
fn a_link_that_flaps_during_a_migration_loses_nothing() {
    if !require::network_namespaces() {
        return;
    }
    let hosts = Hosts::new();
    let scene = Scene::start(Some(&hosts), "4M");
    let resident = Resident::start(&scene.vmm);
    let vcpu = Vcpu::start(&scene.vmm, 11);
    for place in [Place::Source, Place::Destination].into_iter().cycle().take(12) {
        vcpu.may_go_on(40);
        hosts.link_down(place);
        // Shorter than the silence: connections live on, and send again what was lost.
        resident.goes_on();
        hosts.link_up(place);
        vcpu.has_gone_on();
    }
    vcpu.stop();
    resident.stop();
    scene.finish();
}

#[test]
fn a_link_that_drops_packets_loses_nothing() {
    if !require::network_namespaces() {
        return;
    }
    let hosts = Hosts::new();
    if require::or_skip("tbf", hosts.try_dropping(Place::Source)).is_none() {
        return;
    }
    let scene = Scene::start(Some(&hosts), "unlimited");
    let vcpu = Vcpu::start(&scene.vmm, 12);
    vcpu.may_go_on(2000);
    vcpu.has_gone_on();
    vcpu.stop();
    scene.finish();
    assert!(hosts.dropped(Place::Source) > 0, "nothing was dropped");
}

#[test]
fn helpers_that_stand_still_for_longer_than_the_silence_lose_nothing() {
    let stands_still = |who: fn(&Scene) -> &Daemon| {
        let stop = move |scene: &Scene| {
            who(scene).signal(Signal::SIGSTOP);
            let begun = Instant::now();
            while !who(scene).is_stopped() {
                assert!(begun.elapsed() < LIMIT, "it does not stop");
                thread::yield_now();
            }
        };
        Failure(Box::new(stop), Box::new(move |scene| who(scene).signal(Signal::SIGCONT)))
    };
    let failures: Vec<_> = (0..2)
        .flat_map(|_| [stands_still(|scene| &scene.server), stands_still(|scene| &scene.client)])
        .collect();
    lives_through(None, &failures);
}
