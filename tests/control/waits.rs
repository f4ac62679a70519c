//! Answers come in time, also while the session does not move.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use afterimage::{DestinationMemory, DestinationRegion, DiscardNotice, FaultScope, GuestAddress};
use afterimage_tools::attachment::{Attachment, AttachmentEvent};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::metrics;
use crate::support::{Daemon, LIMIT, Manager, PAGE, PAGES, PROMPT, Server, socket_argument};

/// A guest of this process that a page-client serves.
struct Guest {
    attachment: Attachment,
    memory: DestinationMemory,
    map: MmapRaw,
}

impl Guest {
    fn attach(path: &Path) -> Self {
        let length = PAGES * PAGE;
        let map = MmapRaw::from(MmapOptions::new().len(length as usize).map_anon().unwrap());
        let start = NonNull::new(map.as_mut_ptr()).unwrap();
        // SAFETY: the mapping is kept beside the memory, and nobody has a reference into it.
        let region = unsafe { DestinationRegion::anonymous(GuestAddress(0), start, length) };
        let (scope, notice) = (FaultScope::UserOnly, DiscardNotice::Events);
        let memory = DestinationMemory::register(vec![region], scope, notice).unwrap();
        let attachment = Attachment::attach(path, "guest", &memory).unwrap();
        Self { attachment, memory, map }
    }

    fn run(&self) {
        until(&self.attachment, |event| matches!(event, AttachmentEvent::State(_)));
        self.attachment.ready();
        until(&self.attachment, |event| *event == AttachmentEvent::Run);
    }

    fn finish(self) {
        let Self { attachment, memory, map } = self;
        until(&attachment, |event| *event == AttachmentEvent::AllArrived);
        memory.all_arrived();
        until(&attachment, |event| *event == AttachmentEvent::Finished);
        // SAFETY: inside the mapping; volatile because another process has filled it.
        assert_eq!(unsafe { map.as_ptr().read_volatile() }, 1);
    }
}

fn until(attachment: &Attachment, is_it: impl Fn(&AttachmentEvent) -> bool) {
    let until = Instant::now() + LIMIT;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if is_it(&attachment.next(left).expect("an event in time")) {
            return;
        }
    }
}

/// A page-client with a control socket.
struct Client {
    daemon: Daemon,
    control: PathBuf,
    guest: Guest,
}

impl Client {
    fn start(server: &Server, source: &str, more: &[&str]) -> Self {
        let at = |name: &str| server.directory.path().join(name);
        let (attach, control) = (at("attach.sock"), at("client.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_page-client"));
        command.args(["--connect", source, "--attach", &socket_argument(&attach)]);
        command.args(["--control", &socket_argument(&control)]).args(more);
        let mut daemon = Daemon::spawn(command);
        daemon.line("a VMM can have its memory served at");
        Self { daemon, control, guest: Guest::attach(&attach) }
    }
}

/// The state, which must come in time.
fn prompt(manager: &mut Manager) -> Value {
    let begun = Instant::now();
    let state = manager.query();
    let took = begun.elapsed();
    assert!(took < PROMPT, "a query took {took:?}");
    state
}

#[test]
fn both_sides_tell_and_end_the_same_migration() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let mut source = server.begun();
    let path = server.directory.path().join("metrics.sock");
    let argument = socket_argument(&path);
    let client = Client::start(&server, &server.address.to_string(), &["--metrics", &argument]);
    let mut destination = Manager::connect(&client.control);
    assert_eq!(destination.greeting["role"], "destination");
    destination.ok(json!({"do": "subscribe"}));
    client.guest.run();
    let running = destination.event("run");
    assert_eq!((&running["phase"], &running["link"]), (&json!("running"), &json!("up")));
    assert_eq!(running["session"], source.query()["session"]);
    // A fault, to be seen in the counts.
    let last = client.guest.map.as_ptr().wrapping_add((PAGES * PAGE - 1) as usize);
    // SAFETY: inside the mapping; volatile because another process fills it.
    unsafe { last.read_volatile() };
    // It is counted after the guest was woken.
    let until = Instant::now() + LIMIT;
    while destination.query()["counts"]["fault_latency_us"]["count"] != 1 {
        assert!(Instant::now() < until, "{}", destination.query());
        thread::yield_now();
    }
    let samples = metrics::samples(&path);
    assert_eq!(metrics::count(&samples, "afterimage_fault_latency_seconds_count"), 1);
    assert_eq!(metrics::count(&samples, "afterimage_fault_latency_seconds_bucket{le=\"+Inf\"}"), 1);
    assert_eq!(destination.refused(json!({"do": "set", "bandwidth": "1G"})).0, "not_now");
    // Paused by the destination this time.
    destination.ok(json!({"do": "pause"}));
    destination.event("paused");
    source.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    assert_eq!(destination.query()["link"], "paused");
    destination.ok(json!({"do": "recover"}));
    destination.event("attached");
    destination.event("all_arrived");
    client.guest.finish();
    assert_eq!(destination.event("closing")["outcome"], "finished");
    assert_eq!(client.daemon.end().0, 0);
    assert_eq!(server.daemon.end().0, 0);
}

#[test]
fn a_query_is_answered_while_the_destination_is_stopped() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let mut source = server.begun();
    source.ok(json!({"do": "subscribe"}));
    let client = Client::start(&server, &server.address.to_string(), &[]);
    client.guest.run();
    source.event("running");
    client.daemon.signal(Signal::SIGSTOP);
    source.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    source.event("disconnected");
    assert_eq!(prompt(&mut source)["link"], "down");
    assert_eq!(prompt(&mut server.manager())["phase"], "running");
    client.daemon.signal(Signal::SIGCONT);
    source.event("attached");
    client.guest.finish();
    assert_eq!(server.daemon.end().0, 0);
}

/// A network that can be made to hold everything back.
struct Network {
    address: String,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    is_shut: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let shut = self.is_shut.lock().unwrap();
        drop(self.opened.wait_while(shut, |is_shut| *is_shut).unwrap());
    }

    fn set(&self, is_shut: bool) {
        *self.is_shut.lock().unwrap() = is_shut;
        self.opened.notify_all();
    }
}

impl Network {
    fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let (gate, target) = (Arc::new(Gate::default()), target.to_owned());
        let inside = Arc::clone(&gate);
        // It ends with the test's process.
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let pairs = [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)];
                for (from, to) in pairs {
                    let gate = Arc::clone(&inside);
                    thread::spawn(move || carry(from, to, &gate));
                }
            }
        });
        Self { address, gate }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, gate: &Gate) {
    let mut bytes = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        gate.pass();
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    // The other direction may have ended already.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

#[test]
fn queries_are_answered_on_both_sides_while_the_link_is_stuck() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let mut source = server.begun();
    let target = server.address.to_string();
    let network = Network::to(target.strip_prefix("tcp:").unwrap());
    let client = Client::start(&server, &network.address, &[]);
    let mut destination = Manager::connect(&client.control);
    for manager in [&mut source, &mut destination] {
        manager.ok(json!({"do": "subscribe"}));
    }
    client.guest.run();
    destination.event("run");
    // Or it would hear of that only when the link is free again.
    source.event("running");
    network.gate.set(true);
    source.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    let state = prompt(&mut source);
    assert!(state["counts"]["pages_missing"].as_u64() > Some(0), "{state}");
    prompt(&mut destination);
    destination.event("disconnected");
    for manager in [&mut source, &mut destination] {
        let state = prompt(manager);
        assert_eq!(state["phase"], "running", "{state}");
        // What may wait for the session is answered as well.
        assert!(manager.ok(json!({"do": "capabilities"})).is_object());
    }
    network.gate.set(false);
    client.guest.finish();
    assert_eq!(client.daemon.end().0, 0);
    assert_eq!(server.daemon.end().0, 0);
}
