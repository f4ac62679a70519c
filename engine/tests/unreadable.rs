//! Pages that the source cannot read.

mod common;

use afterimage::{
    Background, Destination, DestinationEvent, DiscardNotice, Endpoint, GuestAddress, Source,
    SourceEvent, SourceMemory, SourceRegion, UnreadablePages,
};
use afterimage_protocol::wire::Channel;
use common::proxy::{Cut, Proxy};
use common::{Content, EventLog, Kind, Memory, Setup, Toucher};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const PAGES: u64 = 256;
/// The first page that is cut off.
const CUT: u64 = 200;

/// The system takes one byte from a page; what it says otherwise.
fn take_byte(memory: &Memory, page: u64) -> Result<(), Option<i32>> {
    let (_reader, writer) = std::io::pipe().expect("a pipe");
    let start = std::ptr::from_ref(memory.word(page, 3));
    // SAFETY: the address is mapped; whether it can be read is what the call says.
    let written = unsafe { libc::write(writer.as_raw_fd(), start.cast(), 1) };
    if written == 1 { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error()) }
}

fn fails_where_the_file_was_cut(kind: Kind) {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(&vec![7; MIB as usize], 0).expect("written");
    let same = file.try_clone().expect("a descriptor").into();
    let region = SourceRegion::file(GuestAddress(0), same, 0, MIB).expect("a region");
    let memory = Arc::new(SourceMemory::new(vec![region]).expect("a layout"));
    file.set_len(CUT * 4096).expect("cut");

    let listener = common::session::listen();
    let address = listener.address().clone();
    let setup = Setup::default();
    let options = common::session::source_options(&setup);
    let (source, at_source) =
        Source::start(memory, Endpoint::Listen(listener), options).expect("a source");
    source.switch_over(Vec::new()).expect("may switch over");

    let new = Memory::new(&[(kind, MIB)]);
    let registered = new.register(DiscardNotice::Called).expect("registered");
    let mut options = common::session::destination_options(&setup);
    options.unreadable = UnreadablePages::Poison;
    let (destination, events) =
        Destination::start(registered, Endpoint::Connect(address), options).expect("started");
    let (events, at_source) = (EventLog::new(events), EventLog::new(at_source));
    let dump = || format!("{:?}", destination.stats());
    events.wait("state", dump, |event| matches!(event, DestinationEvent::State(_)));
    destination.ready().expect("may be ready");
    // It ends, though nobody has ever read these pages.
    events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
    at_source.wait("the end", dump, |event| *event == SourceEvent::Finished);
    let stats = destination.stats();
    assert_eq!((stats.pages_poisoned, stats.pages_unreadable), (PAGES - CUT, PAGES - CUT));
    for page in 0..PAGES {
        let expected = if page < CUT { Ok(()) } else { Err(Some(libc::EFAULT)) };
        assert_eq!(take_byte(&new, page), expected, "page {page} of {kind:?}");
    }
    for page in 0..CUT {
        let found = new.word(page, 9).load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(found, u64::from_ne_bytes([7; 8]), "page {page} of {kind:?}");
    }
}

#[test]
fn who_has_declared_to_handle_it_gets_an_error_instead_of_a_wait() {
    prologue!("who_has_declared_to_handle_it");
    fails_where_the_file_was_cut(Kind::Anonymous);
    fails_where_the_file_was_cut(Kind::Memfd);
}

#[repr(C)]
struct PoisonArgument {
    start: u64,
    length: u64,
    mode: u64,
    updated: i64,
}

nix::ioctl_readwrite!(
    /// Makes missing pages fail: `UFFDIO_POISON`.
    uffdio_poison,
    0xAA,
    0x08,
    PoisonArgument
);

/// Makes pages that were never touched fail, as memory does that the kernel has taken out of
/// use: whoever touches one is ended by SIGBUS. `false`, said aloud, before Linux 6.6.
fn make_fail(memory: &Memory, pages: &[u64]) -> bool {
    let uffd = userfaultfd::UffdBuilder::new().user_mode_only(true).create().expect("one");
    for &page in pages {
        let start = std::ptr::from_ref(memory.word(page, 0)) as *mut _;
        uffd.register(start, 4096).expect("registered");
        let (address, length) = (start as u64, 4096);
        let mut poison = PoisonArgument { start: address, length, mode: 0, updated: 0 };
        // SAFETY: the argument has the kernel's layout; the page is ours, and missing.
        if let Err(error) = unsafe { uffdio_poison(uffd.as_raw_fd(), &raw mut poison) } {
            common::skip("userfaultfd-poison", &error.to_string());
            return false;
        }
        uffd.unregister(start, 4096).expect("registered before");
        assert_eq!(take_byte(memory, page), Err(Some(libc::EFAULT)));
    }
    true
}

#[test]
fn memory_that_has_failed_at_the_source_is_told_and_ends_nobody() {
    prologue!("memory_that_has_failed_at_the_source");
    let (content, seed) = (Content::Scattered, 3);
    let old = Memory::new(&[(Kind::Anonymous, MIB)]);
    // One that is asked for, and one that comes to its turn between others.
    let (asked, other) = (5, 101);
    if !make_fail(&old, &[asked, other]) {
        return;
    }
    old.fill(seed, content);
    let listener = common::session::listen();
    let address = listener.address().clone();
    let setup = Setup::default();
    let mut options = common::session::source_options(&setup);
    options.background = Background::OnRequest;
    let (source, _at_source) =
        Source::start(old.as_source(), Endpoint::Listen(listener), options).expect("a source");
    source.switch_over(Vec::new()).expect("may switch over");
    let new = Memory::new(&[(Kind::Anonymous, MIB)]);
    let registered = new.register(DiscardNotice::Called).expect("registered");
    let options = common::session::destination_options(&setup);
    let (destination, events) =
        Destination::start(registered, Endpoint::Connect(address), options).expect("started");
    let events = EventLog::new(events);
    let dump = || format!("{:?} {:?}", source.stats(), destination.stats());
    events.wait("state", dump, |event| matches!(event, DestinationEvent::State(_)));
    destination.ready().expect("may be ready");
    let touched = Arc::clone(&new);
    let waits = Toucher::start(move || touched.word(asked, 0).load(Ordering::Relaxed));
    let told = |page| DestinationEvent::Unreadable { first_page: page, pages: 1 };
    events.wait("the page that was asked for", dump, |event| *event == told(asked));
    source.set_background(Background::Unlimited);
    events.wait("the other", dump, |event| *event == told(other));
    common::wait_until("the rest", dump, || destination.stats().pages_complete == PAGES - 2);
    for page in (0..PAGES).filter(|page| ![asked, other].contains(page)) {
        new.check_pages(seed, content, page, page + 1);
    }
    assert!(waits.is_waiting(), "whoever touches it waits");
}

/// A file full of sevens, as a region; all but its first bytes are cut off.
fn sevens(at: u64, length: u64, left: u64) -> SourceRegion {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(&vec![7; length as usize], 0).expect("written");
    let same = file.try_clone().expect("a descriptor").into();
    let region = SourceRegion::file(GuestAddress(at), same, 0, length).expect("a region");
    file.set_len(left).expect("cut");
    region
}

#[test]
fn a_silent_stream_is_replaced_where_pages_cannot_be_read() {
    prologue!("a_silent_stream_is_replaced_where_pages_cannot_be_read");
    let (small, large) = (64 << 10, 24 * MIB);
    let regions = vec![sevens(0, small, small / 2), sevens(1 << 32, large, large)];
    let memory = Arc::new(SourceMemory::new(regions).expect("a layout"));
    let listener = common::session::listen();
    let proxy = Proxy::start(listener.address());
    let setup = Setup::default();
    let mut options = common::session::source_options(&setup);
    options.silence = Duration::from_secs(1);
    let (source, at_source) =
        Source::start(memory, Endpoint::Listen(listener), options).expect("a source");
    proxy.hold_at(1);
    source.switch_over(Vec::new()).expect("may switch over");
    let new = Memory::new(&[(Kind::Anonymous, small), (Kind::Anonymous, large)]);
    let registered = new.register(DiscardNotice::Called).expect("registered");
    let options = common::session::destination_options(&setup);
    let (destination, events) =
        Destination::start(registered, Endpoint::Connect(proxy.address()), options)
            .expect("started");
    let (events, at_source) = (EventLog::new(events), EventLog::new(at_source));
    let dump = || format!("{:?} {:?}", source.stats(), destination.stats());
    events.wait("state", dump, |event| matches!(event, DestinationEvent::State(_)));
    destination.ready().expect("may be ready");
    proxy.hold_at(4 * MIB);
    let is_wanted = |channel| channel == Channel::Background(0);
    common::wait_until("bytes", dump, || proxy.bytes() >= 4 * MIB);
    assert_eq!(source.stats().pages_unreadable, 8, "they were first");
    let seen = proxy.seen(is_wanted);
    assert_eq!(proxy.cut(Cut::Vanish, is_wanted), 1);
    proxy.hold_at(6 * MIB);
    common::wait_until("the next one", dump, || proxy.seen(is_wanted) > seen);
    proxy.hold_at(u64::MAX);
    let readable = (small / 2 + large) / 4096;
    common::wait_until("the rest", dump, || destination.stats().pages_complete == readable);
    for page in (0..small / 2 / 4096).chain(small / 4096..(small + large) / 4096) {
        let found = new.word(page, 9).load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(found, u64::from_ne_bytes([7; 8]), "page {page}");
    }
    assert_eq!(destination.stats().recoveries, 0);
    assert!(!at_source.rest().contains(&SourceEvent::Disconnected));
}
