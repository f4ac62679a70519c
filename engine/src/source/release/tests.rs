use super::releaser::{Arrived, Releaser};
use super::*;
use crate::inbox::Inbox;
use crate::session_link::INBOX;
use crate::source::memory::SourceRegion;
use crate::source::serving::{Serving, ServingOptions};
use crate::source::{SourceOwnership, SourceShared};
use crate::sys::testing::{Area, Kind};
use afterimage_protocol::layout::{Backing, GuestAddress, PageSize, Region};
use afterimage_protocol::wire::Epoch;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::time::Duration;

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
const SESSION: SessionId = SessionId([3; 16]);

fn range(start: u64, count: u64) -> PageRange {
    PageRange::new(PageNumber(start), count)
}

fn whole() -> SourceRecord {
    SourceRecord { ownership: SourceOwnership::Given, ..SourceRecord::new(SESSION) }
}

fn released() -> SourceRecord {
    SourceRecord { pages: SourcePages::Released, ..whole() }
}

fn layout(regions: &[(u64, u64, PageSize)]) -> GuestLayout {
    let region = |(at, length, size): &(u64, u64, PageSize)| {
        Region::new(GuestAddress(*at), *length, *size, Backing::Shared)
    };
    GuestLayout::new(regions.iter().map(region).collect()).unwrap()
}

fn book(pages: u64) -> Arc<Book<LazyWords>> {
    let words = || LazyWords::new(pages).unwrap();
    Arc::new(Book::over(words(), words(), pages))
}

fn ledger_in(file: &File) -> ReleaseLedger {
    ReleaseLedger::file(file.try_clone().unwrap().into())
}

#[test]
fn what_was_noted_in_a_file_is_there_for_the_next_process() {
    let file = tempfile::tempfile().unwrap();
    let pages = 3_000_001;
    let first = ledger_in(&file).open(&whole(), pages).unwrap();
    let runs = [range(0, 1), range(63, 2), range(2_999_990, 11)];
    assert_eq!(first.note(&runs).unwrap(), 14);
    assert_eq!(first.note(&runs).unwrap(), 0, "noted already");
    let again = ledger_in(&file).open(&released(), pages).unwrap();
    assert_eq!(again.bitmap.runs().collect::<Vec<_>>(), runs);
    assert_eq!(again.freed(), 14);
    assert!(again.is_in_doubt.load(Ordering::Acquire));
}

#[test]
fn a_clone_of_a_volatile_ledger_remembers() {
    let ledger = ReleaseLedger::volatile();
    ledger.open(&whole(), 100).unwrap().note(&[range(5, 5)]).unwrap();
    let again = ledger.clone().open(&released(), 100).unwrap();
    assert_eq!(again.bitmap.runs().collect::<Vec<_>>(), [range(5, 5)]);
}

#[test]
fn what_cannot_be_written_is_not_noted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    std::fs::write(&path, []).unwrap();
    let writable = File::options().read(true).write(true).open(&path).unwrap();
    ledger_in(&writable).open(&whole(), 1000).unwrap();
    let read_only = File::open(&path).unwrap();
    let ledger = ledger_in(&read_only).open(&whole(), 1000).unwrap();
    ledger.note(&[range(1, 5)]).expect_err("it is read-only");
    assert_eq!(ledger.noted(), 0);
}

#[test]
fn record_and_ledger_must_tell_one_story() {
    let error = |ledger: &ReleaseLedger, record: &SourceRecord, pages| {
        let error = ledger.open(record, pages).expect_err("they do not fit");
        let text = error.to_string();
        assert!(!text.contains('\n') && text.contains("give"), "{text}");
        error
    };
    let new = || tempfile::tempfile().unwrap();
    assert!(matches!(error(&ReleaseLedger::volatile(), &released(), 9), ReleaseError::Forgotten));
    assert!(matches!(error(&ledger_in(&new()), &released(), 9), ReleaseError::Forgotten));
    let file = new();
    ledger_in(&file).open(&whole(), 9).unwrap().note(&[range(2, 3)]).unwrap();
    let noted = error(&ledger_in(&file), &whole(), 9);
    assert!(matches!(noted, ReleaseError::NoRecord { noted: 3 }), "{noted}");
    let other = SourceRecord { session: SessionId([4; 16]), ..released() };
    assert!(matches!(error(&ledger_in(&file), &other, 9), ReleaseError::OtherSession { .. }));
    let larger = error(&ledger_in(&file), &released(), 10);
    assert!(matches!(larger, ReleaseError::OtherMemory { theirs: 9, ours: 10 }));
    file.set_len(WORDS_AT_LEAST).unwrap();
    assert!(matches!(error(&ledger_in(&file), &released(), 9), ReleaseError::NotALedger));
    let text = new();
    text.write_all_at(&[b'x'; 5000], 0).unwrap();
    assert!(matches!(error(&ledger_in(&text), &whole(), 9), ReleaseError::NotALedger));
    let short = new();
    short.write_all_at(b"something else", 0).unwrap();
    assert!(matches!(error(&ledger_in(&short), &whole(), 9), ReleaseError::NotALedger));
}

/// The header alone.
const WORDS_AT_LEAST: u64 = 4096;

#[test]
fn a_ledger_whose_making_was_cut_short_is_made_again() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096 + 8).unwrap();
    ledger_in(&file).open(&whole(), 9).unwrap();
}

#[test]
fn what_a_destination_lacks_is_counted_in_its_own_pages() {
    let small = PageSize::KIB_4;
    let own = layout(&[(0, 2 * HUGE, small), (1 << 32, 2 * HUGE, small)]);
    let released = ReleaseLedger::volatile().open(&whole(), own.page_count()).unwrap();
    let in_second = 1024;
    released.note(&[range(10, 3), range(500, 20), range(in_second + 7, 1)]).unwrap();
    let check = |served: &GuestLayout, acked: &[PageRange]| {
        let book = book(served.page_count());
        for run in acked {
            book.acknowledge(*run);
        }
        released.lost(&own, served, &book).map(|lost| (lost.first.0, lost.count))
    };
    assert_eq!(check(&own, &[range(0, 2048)]), None);
    assert_eq!(check(&own, &[range(10, 3), range(500, 20), range(in_second + 7, 1)]), None);
    assert_eq!(check(&own, &[range(10, 2), range(500, 20)]), Some((12, 2)));
    assert_eq!(check(&own, &[]), Some((10, 24)));
    // In huge pages: 10..13 and 500..512 lie in the first, the rest in the second and third.
    let huge = layout(&[(0, 2 * HUGE, PageSize::MIB_2), (1 << 32, 2 * HUGE, PageSize::MIB_2)]);
    assert_eq!(check(&huge, &[range(0, 3)]), None);
    assert_eq!(check(&huge, &[range(1, 2)]), Some((0, 1)));
    assert_eq!(check(&huge, &[]), Some((0, 3)));
}

/// A source's memory with something in every page, and one connection that serves it.
struct Bench {
    area: Area,
    serving: Arc<Serving>,
    released: Arc<Released>,
    arrived: Arrived,
}

impl Bench {
    fn new(kind: Kind, pages: u64, served_size: PageSize) -> Option<Self> {
        let area = Area::new(kind, pages)?;
        let length = area.length;
        for page in 0..length / PAGE {
            area.word(page * PAGE).store(page + 1, Ordering::Relaxed);
        }
        let region = match &area.file {
            Some(file) => {
                let file = file.try_clone().unwrap().into();
                SourceRegion::file(GuestAddress(0), file, 0, length).unwrap()
            }
            None => {
                let start = area.word(0).as_ptr().cast::<u8>();
                // SAFETY: the area outlives the memory; only its owner reads it.
                unsafe {
                    SourceRegion::anonymous(GuestAddress(0), NonNull::new(start).unwrap(), length)
                }
            }
        };
        let memory = Arc::new(SourceMemory::new(vec![region]).unwrap());
        memory.check_release().unwrap();
        let destination = layout(&[(0, length, served_size)]);
        let served = memory.layout().serving(&destination).unwrap();
        let book = book(served.page_count());
        let serving = connection(&memory, served, book);
        let released = ReleaseLedger::volatile().open(&whole(), length / PAGE).unwrap();
        let arrived = Arrived::everything(length / PAGE);
        Some(Self { area, serving, released, arrived })
    }

    /// The connection has ended, and there is another.
    fn reconnect(&mut self) {
        let Serving { memory, layout, book, .. } = &*self.serving;
        self.serving = connection(memory, layout.clone(), Arc::clone(book));
    }

    /// Pages of the destination's have arrived.
    fn arrive(&self, pages: PageRange) {
        self.serving.book.acknowledge(pages);
        self.arrived.add(&self.serving, pages);
    }

    fn releaser(&self) -> Releaser {
        let (serving, released) = (Arc::clone(&self.serving), Arc::clone(&self.released));
        Releaser::new(serving, released, self.arrived.clone())
    }

    /// Which pages of 4 KiB are gone, by what is read.
    fn gone(&self) -> Vec<u64> {
        let pages = 0..self.area.length / PAGE;
        let is_gone = |page: &u64| self.area.word(page * PAGE).load(Ordering::Relaxed) == 0;
        pages.filter(is_gone).collect()
    }

    fn noted(&self) -> Vec<u64> {
        self.released.bitmap.runs().flat_map(|run| run.iter()).map(|page| page.0).collect()
    }
}

fn connection(
    memory: &Arc<SourceMemory>,
    served: GuestLayout,
    book: Arc<Book<LazyWords>>,
) -> Arc<Serving> {
    let poll = mio::Poll::new().unwrap();
    let (_inbox, outlet) = Inbox::new(&poll, INBOX).unwrap();
    let options = ServingOptions { checksums: false, polling: Duration::ZERO };
    let (memory, shared) = (Arc::clone(memory), SourceShared::default());
    Arc::new(Serving::new(memory, served, book, Epoch(1), options, &shared, outlet))
}

#[test]
fn what_has_arrived_is_freed_and_nothing_else() {
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::TmpfsHuge] {
        let Some(bench) = Bench::new(kind, 5000, PageSize::KIB_4) else { continue };
        bench.arrive(range(0, 1));
        bench.arrive(range(2040, 20));
        bench.arrive(range(4999, 1));
        let mut releaser = bench.releaser();
        assert!(releaser.pass());
        let expected: Vec<u64> = [0].into_iter().chain(2040..2060).chain([4999]).collect();
        assert_eq!(bench.noted(), expected, "{kind:?}");
        assert_eq!(bench.released.freed(), 22);
        assert_eq!(bench.gone(), expected, "{kind:?}");
        // Later arrivals in a chunk that was looked at.
        bench.arrive(range(1, 2));
        assert!(releaser.pass());
        assert_eq!(bench.gone().len(), 24);
        assert!(releaser.pass(), "nothing new");
        assert_eq!(bench.released.freed(), 24);
    }
}

#[test]
fn locked_memory_is_freed_too() {
    let Some(bench) = Bench::new(Kind::Anonymous, 10, PageSize::KIB_4) else { return };
    let start = bench.area.word(0).as_ptr().cast::<libc::c_void>();
    // SAFETY: locks our own mapping, of ten pages: less than any limit.
    let locked = unsafe { libc::mlock(start, bench.area.length as usize) };
    assert_eq!(locked, 0, "{}", std::io::Error::last_os_error());
    bench.arrive(range(2, 5));
    assert!(bench.releaser().pass());
    assert_eq!(bench.gone(), (2..7).collect::<Vec<_>>());
}

#[test]
fn huge_pages_of_the_source_are_freed_whole_or_not_at_all() {
    let Some(bench) = Bench::new(Kind::Hugetlb, 4, PageSize::KIB_4) else { return };
    let file = bench.area.file.as_ref().unwrap();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    let before = blocks();
    let mut releaser = bench.releaser();
    // All of the second but its last page, and the end of the third.
    bench.arrive(range(512, 511));
    bench.arrive(range(1100, 400));
    assert!(releaser.pass());
    assert_eq!((bench.released.freed(), blocks()), (0, before));
    bench.arrive(range(1023, 1));
    assert!(releaser.pass());
    assert_eq!(bench.noted(), (512..1024).collect::<Vec<_>>());
    assert_eq!(blocks(), before - HUGE / 512);
    bench.arrive(range(0, 2048));
    assert!(releaser.pass());
    assert_eq!(blocks(), 0);
    assert_eq!(bench.released.freed(), 2048);
}

#[test]
fn pages_of_the_destination_may_be_larger_than_those_of_the_source() {
    let Some(bench) = Bench::new(Kind::Memfd, 4096, PageSize::MIB_2) else { return };
    bench.arrive(range(3, 2));
    assert!(bench.releaser().pass());
    assert_eq!(bench.gone(), (3 * 512..5 * 512).collect::<Vec<_>>());
}

#[test]
fn nothing_is_freed_while_a_channel_takes_and_what_it_sends_is_left_for_later() {
    let Some(bench) = Bench::new(Kind::Anonymous, 100, PageSize::KIB_4) else { return };
    let hand = bench.serving.hands.join();
    let taking = hand.take();
    assert!(bench.serving.book.take_urgent(PageNumber(7)), "it is being read");
    bench.arrive(range(0, 50));
    let mut releaser = bench.releaser();
    let thread = std::thread::spawn(move || (releaser.pass(), releaser));
    let sending = taking.sends([range(7, 2)].into_iter());
    let (is_noted, mut releaser) = thread.join().unwrap();
    assert!(is_noted);
    assert_eq!(bench.gone(), (0..7).chain(9..50).collect::<Vec<_>>());
    assert_eq!(bench.noted(), bench.gone());
    drop(sending);
    assert!(releaser.pass());
    assert_eq!(bench.gone().len(), 50, "nothing is forgotten");

    // Nor at the end of the connection.
    let _taking = hand.take();
    bench.arrive(range(50, 50));
    bench.serving.close();
    assert!(bench.releaser().pass());
    assert_eq!((bench.released.noted(), bench.gone().len()), (50, 50));
}

#[test]
fn a_huge_page_is_not_freed_while_a_part_of_it_is_sent() {
    let Some(bench) = Bench::new(Kind::Hugetlb, 2, PageSize::KIB_4) else { return };
    let hand = bench.serving.hands.join();
    bench.arrive(range(0, 1024));
    let sending = hand.take().sends([range(700, 1)].into_iter());
    let mut releaser = bench.releaser();
    assert!(releaser.pass());
    assert_eq!(bench.noted(), (0..512).collect::<Vec<_>>());
    drop(sending);
    assert!(releaser.pass());
    assert_eq!(bench.released.freed(), 1024);
}

#[test]
fn what_an_earlier_process_noted_is_freed_at_once() {
    let Some(bench) = Bench::new(Kind::Memfd, 100, PageSize::KIB_4) else { return };
    bench.released.note(&[range(20, 5)]).unwrap();
    bench.serving.book.acknowledge(range(0, 100));
    bench.released.is_in_doubt.store(true, Ordering::Release);
    let releaser = bench.releaser();
    let thread = std::thread::spawn(move || releaser.run());
    while bench.released.is_in_doubt.load(Ordering::Acquire) {
        assert!(!thread.is_finished());
        std::thread::yield_now();
    }
    bench.serving.close();
    thread.join().unwrap();
    let gone = bench.gone();
    assert!((20..25).all(|page| gone.contains(&page)), "{gone:?}");
}

#[test]
fn nothing_is_freed_once_the_connection_has_ended_and_the_next_frees_what_was_noted() {
    let Some(mut bench) = Bench::new(Kind::Anonymous, 100, PageSize::KIB_4) else { return };
    bench.arrive(range(0, 50));
    let mut releaser = bench.releaser();
    // It ends between noting and freeing.
    let thread = bench.serving.while_open(|| {
        let thread = std::thread::spawn(move || releaser.pass());
        while bench.released.noted() < 50 {
            assert!(!thread.is_finished());
            std::thread::yield_now();
        }
        bench.serving.close();
        thread
    });
    bench.serving.wait_for_freeing();
    assert!(thread.unwrap().join().unwrap());
    assert_eq!((bench.gone().len(), bench.released.freed()), (0, 0));
    assert!(bench.released.is_in_doubt.load(Ordering::Acquire));
    bench.reconnect();
    let releaser = bench.releaser();
    let thread = std::thread::spawn(move || releaser.run());
    while bench.released.is_in_doubt.load(Ordering::Acquire) {
        assert!(!thread.is_finished());
        std::thread::yield_now();
    }
    bench.serving.close();
    thread.join().unwrap();
    assert_eq!((bench.gone().len(), bench.released.freed()), (50, 50));
}

#[test]
fn memory_that_cannot_be_freed_is_refused_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ram");
    std::fs::write(&path, vec![1; 8192]).unwrap();
    let memory_of = |pieces: &[(u64, u64)], file: &File| {
        let regions = pieces.iter().map(|(at, offset)| {
            let file = file.try_clone().unwrap().into();
            SourceRegion::file(GuestAddress(*at), file, *offset, 4096).unwrap()
        });
        SourceMemory::new(regions.collect()).unwrap()
    };
    let read_only = memory_of(&[(0, 0)], &File::open(&path).unwrap());
    let error = read_only.check_release().unwrap_err();
    assert!(matches!(error, ReleaseError::Memory { .. }), "{error}");
    let writable = File::options().read(true).write(true).open(&path).unwrap();
    let error = memory_of(&[(0, 0), (1 << 20, 0)], &writable).check_release().unwrap_err();
    assert!(matches!(error, ReleaseError::Shared { .. }), "{error}");
    memory_of(&[(0, 4096), (1 << 20, 0)], &writable).check_release().unwrap();
    assert_eq!(writable.metadata().unwrap().len(), 8192, "checking changes nothing");
}
