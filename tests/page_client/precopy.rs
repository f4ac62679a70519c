//! Memory that is sent while its guest still runs at the source: page-client keeps the early
//! copies, and may be killed at each step of it.

use std::num::NonZeroU64;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage::dirty::DirtyBitmap;
use afterimage::{
    Background, Endpoint, Events, GuestAddress, Listener, Passes, Plaintext, Precopy, Source,
    SourceEvent, SourceMemory, SourceOptions, SourceRegion, StateSection,
};
use afterimage_tools::attachment::{AttachError, Attachment, AttachmentEvent};
use memmap2::{MmapOptions, MmapRaw};

use crate::host::Host;
use crate::support::{Daemon, LIMIT, PAGE, at, memfd, register};

const PAGES: u64 = 2048;
/// Between two looks at what is no event.
const LOOK: Duration = Duration::from_millis(2);

/// The steps of page-client that only precopy has, and those after it.
const STEPS: &[&str] = &[
    "destination:SendReceived",
    "destination:Pass",
    "destination:Send(PassTaken",
    "destination:EarlyCounts",
    "destination:EarlyCounts#40",
    "destination:Stale",
    "destination:Pass#2",
    "destination:EarlyCounts#80",
    "destination:Stale#2",
    "destination:Pass+last: true",
    "destination:Send(PassTaken+last: true",
    "destination:Event(Stopped",
    "destination:Event(StateComplete",
    "destination:Persist+Running",
    "destination:Event(Run",
    "destination:Send(Running",
    "destination:Completed",
    "destination:Send(Complete",
];

/// A guest that runs in this process, and its source.
struct Origin {
    map: Arc<MmapRaw>,
    source: Source,
    events: Events<SourceEvent>,
    address: String,
    writer: Writer,
}

/// What the guest does: it adds to random pages until it is stopped.
struct Writer {
    is_stopped: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Writer {
    fn start(map: &Arc<MmapRaw>, written: Arc<DirtyBitmap>) -> Self {
        let is_stopped = Arc::new(AtomicBool::new(false));
        let (map, stop) = (Arc::clone(map), Arc::clone(&is_stopped));
        let thread = thread::spawn(move || {
            let (mut state, mut count) = (1_u64, 0);
            while !stop.load(Ordering::Acquire) {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(12345);
                // A quarter of memory, so that the rest stays as it is.
                let page = (state >> 33) % (PAGES / 4);
                at(&map, page, state >> 55).fetch_add(1, Ordering::Relaxed);
                written.mark(GuestAddress(page * PAGE), PAGE);
                count += 1;
                if count % 64 == 0 {
                    thread::yield_now();
                }
            }
            count
        });
        Self { is_stopped, thread }
    }

    fn stop(self) -> u64 {
        self.is_stopped.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

impl Origin {
    fn start() -> Self {
        let file = memfd(PAGES * PAGE);
        let map = MmapOptions::new().len((PAGES * PAGE) as usize).map_raw(&file).unwrap();
        // Some pages are zero, of those that change too.
        for page in (0..PAGES).filter(|page| page % 5 != 1) {
            for word in [0, 100, 511] {
                at(&map, page, word).store(page << 20 | word, Ordering::Relaxed);
            }
        }
        let map = Arc::new(map);
        let written = Arc::new(DirtyBitmap::new(&[(GuestAddress(0), PAGES * PAGE)]).unwrap());
        let region = SourceRegion::file(GuestAddress(0), file, 0, PAGES * PAGE).unwrap();
        let memory = Arc::new(SourceMemory::new(vec![region]).unwrap());
        let mut precopy = Precopy::new(Box::new(Arc::clone(&written)));
        precopy.passes = Passes::Count(3);
        let mut options = SourceOptions::default();
        options.precopy = Some(precopy);
        // So that there is time to die in.
        let bytes_per_second = NonZeroU64::new(32 << 20).expect("not zero");
        options.precopy_background = Some(Background::Limited { bytes_per_second });
        let address = "tcp:127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind(&address, Plaintext::LoopbackOnly).unwrap();
        let address = listener.address().to_string();
        let (source, events) = Source::start(memory, Endpoint::Listen(listener), options).unwrap();
        let writer = Writer::start(&map, written);
        Self { map, source, events, address, writer }
    }
}

fn attach(host: &Host, memory: &afterimage::DestinationMemory, step: &str) -> Attachment {
    let begun = Instant::now();
    loop {
        match Attachment::attach(&host.attach_path(), "guest", memory) {
            Ok(attachment) => return attachment,
            Err(AttachError::Refused { reason }) => panic!("{step}: refused: {reason}"),
            // It is not there yet.
            Err(error) => assert!(begun.elapsed() < LIMIT, "{step}: {error}"),
        }
        thread::sleep(LOOK);
    }
}

/// Every page is as the source's guest left it.
fn check(there: &MmapRaw, here: &MmapRaw, step: &str) {
    for page in 0..PAGES {
        for word in 0..PAGE / 8 {
            let wanted = at(there, page, word).load(Ordering::Relaxed);
            let found = at(here, page, word).load(Ordering::Relaxed);
            assert_eq!(found, wanted, "{step}: page {page}, word {word}");
        }
    }
}

/// Moves a guest; page-client dies at a step, if one is given. What page-client reported.
fn moves(step: Option<&str>) -> serde_json::Value {
    let name = step.unwrap_or("nobody dies");
    let origin = Origin::start();
    let host = Host::with_keeper(&origin.address);
    let mut client = step.map_or_else(|| host.client(), |step| host.dying_client(step));
    let (map, memory) = register(PAGES, true);
    let attachment = attach(&host, &memory, name);
    let Origin { map: there, source, events, writer, .. } = origin;
    let (mut writer, mut guest) = (Some(writer), None);
    let (mut has_died, begun) = (step.is_none(), Instant::now());
    let mut said = Vec::new();
    loop {
        assert!(begun.elapsed() < LIMIT, "{name}: {said:?}, {:?}", source.stats());
        if !has_died && let Some(status) = client.child.try_wait().unwrap() {
            assert_eq!(status.signal(), Some(9), "{name}: {status}; {:#?}", client.lines_so_far());
            has_died = true;
            client = host.client();
        }
        while let Some(event) = events.try_next() {
            said.push(format!("source: {event:?}"));
            if let SourceEvent::SwitchoverDue(_) = event
                && let Some(writer) = writer.take()
            {
                assert!(writer.stop() > 0, "{name}: it was a guest at work");
                source.stopped().unwrap();
                let state = StateSection { name: "cpu".into(), version: 1, bytes: vec![7; 5000] };
                source.switch_over(vec![state]).unwrap();
            }
        }
        let Some(event) = attachment.next(LOOK) else { continue };
        said.push(format!("{event:?}").chars().take(60).collect());
        match event {
            AttachmentEvent::State(_) => attachment.ready(),
            AttachmentEvent::Run => {
                assert!(guest.is_none(), "{name}: the guest was told to run twice");
                let (here, there, name) = (Arc::clone(&map), Arc::clone(&there), name.to_owned());
                guest = Some(thread::spawn(move || check(&there, &here, &name)));
            }
            AttachmentEvent::Finished if has_died => break,
            AttachmentEvent::NotHere(reason) | AttachmentEvent::Failed(reason) => {
                panic!("{name}: {reason}; {said:?}")
            }
            // The victim dies of what it does last.
            _ => {}
        }
    }
    guest.expect("it runs").join().expect("every page is what it must be");
    let report = ended_well(client, name);
    assert_eq!(report["pages_complete"], PAGES, "{name}: {report}");
    memory.all_arrived();
    report
}

fn ended_well(client: Daemon, name: &str) -> serde_json::Value {
    let (status, report, lines) = client.end();
    assert_eq!(status, 0, "{name}: {lines:#?}");
    serde_json::from_str(&report).unwrap()
}

#[test]
fn what_comes_before_the_switchover_is_kept_and_needs_no_fault() {
    let report = moves(None);
    // All but what was written after the pass before the last: at most the quarter that changes.
    let early = report["pages_precopy"].as_u64().unwrap();
    assert!(early >= PAGES / 2, "{report}");
}

#[test]
fn page_client_may_die_at_each_step_of_precopy() {
    for step in STEPS {
        moves(Some(step));
    }
}
