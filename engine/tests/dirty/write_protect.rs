//! Asynchronous write protection, in this process.

use crate::common::memory::PAGE;
use crate::common::{self, Kind, Memory, Random};
use crate::copying::{collected, file_of, no_write_is_lost, region_of};
use crate::prologue;
use afterimage::dirty::{DirtyTracker, TrackedRegion, WriteProtectTracker};
use afterimage::{DiscardNotice, GuestAddress, RegisteredAddress};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const KINDS: [(Kind, u64); 3] =
    [(Kind::Anonymous, 2 * MIB), (Kind::Memfd, 4 * MIB), (Kind::Huge, 8 * MIB)];

/// `None`, after saying so, where this kernel cannot do it.
pub(crate) fn tracker_of(memory: &Memory) -> Option<WriteProtectTracker> {
    let mut tracker = WriteProtectTracker::new(vec![region_of(memory)]).expect("good regions");
    match tracker.start().and_then(|()| tracker.stop()) {
        Ok(()) => Some(tracker),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            common::skip("wp_async", &error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Calls `test` with a tracker for each kind of memory that this machine has.
fn for_each_kind(test: impl Fn(Kind, WriteProtectTracker, Arc<Memory>)) {
    for (kind, length) in KINDS {
        let Some(memory) = Memory::try_new(&[(kind, length)]) else { continue };
        let Some(tracker) = tracker_of(&memory) else { return };
        test(kind, tracker, memory);
    }
}

fn write(memory: &Memory, page: u64) {
    memory.word(page, page % 512).fetch_add(1, Ordering::Relaxed);
}

/// What is reported where a page was written: the page, or the huge page it lies in.
fn reported(kind: Kind, page: u64) -> std::ops::Range<u64> {
    if kind == Kind::Huge { page / 512 * 512..page / 512 * 512 + 512 } else { page..page + 1 }
}

#[test]
fn no_write_of_several_threads_is_lost() {
    prologue!("no_write_is_lost");
    let random = Random::seeded("no_write_is_lost");
    for_each_kind(|_, mut tracker, memory| {
        let mut random = random.clone();
        for _ in 0..50 {
            no_write_is_lost(&mut tracker, &memory, &|_| (), &mut random);
        }
    });
}

#[test]
fn exactly_what_was_written_is_reported_each_time() {
    prologue!("exactly_what_was_written");
    for_each_kind(|kind, mut tracker, memory| {
        (0..memory.small_pages()).for_each(|page| write(&memory, page));
        tracker.start().expect("started");
        assert!(collected(&mut tracker, &memory).is_empty(), "{kind:?}: written before");
        for round in 0..3 {
            let pages = [0, 3 + round, 4 + round, memory.small_pages() - 1];
            for page in &pages {
                write(&memory, *page);
            }
            let expected = pages.iter().flat_map(|page| reported(kind, *page)).collect();
            assert_eq!(collected(&mut tracker, &memory), expected, "{kind:?}, round {round}");
        }
        assert!(collected(&mut tracker, &memory).is_empty(), "{kind:?}: told once");
    });
}

#[test]
fn what_is_written_for_the_first_time_is_reported() {
    prologue!("what_is_written_for_the_first_time");
    for_each_kind(|kind, mut tracker, memory| {
        tracker.start().expect("started");
        let page = memory.small_pages() / 2 + 5;
        write(&memory, page);
        let found = collected(&mut tracker, &memory);
        assert!(found.contains(&page), "{kind:?}: {found:?}");
        write(&memory, page);
        let expected = reported(kind, page).collect();
        assert_eq!(collected(&mut tracker, &memory), expected, "{kind:?}: once more");
    });
}

#[test]
fn what_page_tables_forget_of_shared_memory_is_reported() {
    prologue!("what_page_tables_forget");
    let memory = Memory::new(&[(Kind::Memfd, 8 * MIB)]);
    let Some(mut tracker) = tracker_of(&memory) else { return };
    (0..1024).for_each(|page| write(&memory, page));
    tracker.start().expect("started");
    // As the kernel does when it needs memory: the content is kept, the page table not. The
    // first block was written in part, the second wholly, the third was a hole before.
    let written: Vec<u64> = [7, 8, 9].into_iter().chain(512..1024).chain([1500]).collect();
    for page in &written {
        write(&memory, *page);
    }
    memory.advise(0, 2048, libc::MADV_DONTNEED).expect("advised");
    let found = collected(&mut tracker, &memory);
    let lost: Vec<_> = written.iter().filter(|page| !found.contains(page)).collect();
    assert!(lost.is_empty(), "lost {lost:?}");
    assert!(!found.contains(&6) && !found.contains(&511), "{found:?}");
    assert!(collected(&mut tracker, &memory).is_empty(), "told once");
}

#[test]
fn writes_of_system_calls_are_reported() {
    prologue!("writes_of_system_calls");
    for_each_kind(|kind, mut tracker, memory| {
        (0..memory.small_pages()).for_each(|page| write(&memory, page));
        tracker.start().expect("started");
        let zeros = File::open("/dev/zero").expect("zeros");
        let at = memory.word(5, 100).as_ptr();
        // SAFETY: eight bytes of a mapping of ours that only atomics and the kernel reach.
        let read = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zeros), at.cast(), 8) };
        assert_eq!(read, 8);
        let expected = reported(kind, 5).collect();
        assert_eq!(collected(&mut tracker, &memory), expected, "{kind:?}");
    });
}

/// What /proc says of the mapping at an address: the flags of its line `VmFlags`.
fn flags_at(address: u64) -> String {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let mut is_here = false;
    for line in text.lines() {
        let range = line.split(' ').next().and_then(|it| it.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = range.map(|(a, b)| (number(a), number(b))) {
            is_here = (start..end).contains(&address);
        } else if is_here && line.starts_with("VmFlags:") {
            return line.to_owned();
        }
    }
    panic!("{address:#x} is not mapped")
}

#[test]
fn stopping_leaves_nothing_behind() {
    prologue!("stopping_leaves_nothing");
    for_each_kind(|kind, mut tracker, memory| {
        let address = memory.word(0, 0).as_ptr() as u64;
        let is_tracked = || flags_at(address).split(' ').any(|flag| flag == "uw");
        write(&memory, 1);
        for _ in 0..3 {
            tracker.start().expect("started");
            assert!(is_tracked(), "{kind:?}: the flag that is looked for");
            tracker.stop().expect("stopped");
            assert!(!is_tracked(), "{kind:?}: {}", flags_at(address));
            tracker.stop().expect("stopped twice");
        }
        tracker.start().expect("started");
        tracker.start().expect_err("started twice");
        assert!(is_tracked(), "{kind:?}: goes on");
        drop(tracker);
        assert!(!is_tracked(), "{kind:?}: dropped");
        write(&memory, 1);
        // Not even a protected entry: soft-dirty's neighbour, bit 57.
        assert_eq!(page_map_entry(address + PAGE) & (1 << 57), 0, "{kind:?}");
    });
}

fn page_map_entry(address: u64) -> u64 {
    use std::os::unix::fs::FileExt;
    let mut entry = [0; 8];
    let pagemap = File::open("/proc/self/pagemap").expect("the page map");
    pagemap.read_exact_at(&mut entry, address / PAGE * 8).expect("an entry");
    u64::from_le_bytes(entry)
}

/// Kibibytes of page tables.
fn page_tables() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|line| line.starts_with("VmPTE:")).expect("VmPTE");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

#[test]
fn a_sparse_terabyte_starts_at_once_and_takes_no_page_tables() {
    prologue!("a_sparse_terabyte");
    if tracker_of(&Memory::new(&[(Kind::Memfd, PAGE)])).is_none() {
        return;
    }
    for file in [None, Some(memfd(TERABYTE))] {
        let mut options = MmapOptions::new();
        options.len(TERABYTE as usize).no_reserve_swap();
        let map = match &file {
            None => options.map_anon().map(MmapRaw::from),
            Some(file) => options.map_raw(file),
        };
        let map = map.expect("a mapping without a reserve");
        map.advise(memmap2::Advice::NoHugePage).expect("advised");
        let (guest, start) = (GuestAddress(0), RegisteredAddress(map.as_mut_ptr() as u64));
        let region = match file {
            None => TrackedRegion::private(guest, start, TERABYTE),
            Some(file) => TrackedRegion::shared(guest, start, TERABYTE, file.into(), 0),
        };
        let mut tracker = WriteProtectTracker::new(vec![region]).expect("a good region");
        touch(&map, &[5, 200_000_000]);
        let before = page_tables();
        let begun = Instant::now();
        tracker.start().expect("started");
        let expected = [6, 100_000_000, 200_000_001];
        touch(&map, &expected);
        let mut found = BTreeSet::new();
        let collect = &mut |guest: GuestAddress, length: u64| {
            found.extend(guest.0 / PAGE..(guest.0 + length) / PAGE);
        };
        tracker.collect(collect).expect("collected");
        tracker.stop().expect("stopped");
        // Milliseconds; page tables for all of it would take seconds and 2 GiB.
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        assert!(expected.iter().all(|page| found.contains(page)), "{} pages", found.len());
        // Of a file, the block in which there is content for the first time is told whole.
        assert!(found.len() <= 2 + 512, "{} pages", found.len());
        // Other tests of this process run meanwhile.
        assert!(page_tables() < before + 4096, "{} KiB", page_tables() - before);
    }
}

const TERABYTE: u64 = 1 << 40;

fn touch(map: &MmapRaw, pages: &[u64]) {
    for page in pages {
        assert!(*page < TERABYTE / PAGE);
        // SAFETY: in the mapping, which nobody else uses.
        unsafe { map.as_mut_ptr().add((page * PAGE) as usize).write_volatile(1) };
    }
}

fn memfd(length: u64) -> File {
    let file = File::from(memfd_create("sparse", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.set_len(length).expect("a length");
    file
}

#[test]
fn what_cannot_be_tracked_is_refused_with_the_reason() {
    prologue!("what_cannot_be_tracked");
    let memory = Memory::new(&[(Kind::Memfd, MIB)]);
    let start = RegisteredAddress(memory.word(0, 0).as_ptr() as u64);
    let guest = GuestAddress(0);
    let refuse = |region, why: &str| {
        let error = WriteProtectTracker::new(vec![region]).expect_err(why);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{why}: {error}");
    };
    refuse(TrackedRegion::private(guest, start, MIB), "a file called private");
    let file = || file_of(&memory).into();
    refuse(TrackedRegion::shared(guest, start, MIB, file(), PAGE), "another offset");
    refuse(TrackedRegion::hugetlb(guest, start, 100), "no whole page");
    refuse(TrackedRegion::hugetlb(GuestAddress(1), start, MIB), "no whole page");

    let Some(mut tracker) = tracker_of(&memory) else { return };
    tracker.collect(&mut |_, _| ()).expect_err("not started");
    let registered = memory.register(DiscardNotice::Called).expect("a destination's memory");
    let error = tracker.start().expect_err("registered for another").to_string();
    assert!(error.contains("another userfaultfd"), "{error}");
    tracker.collect(&mut |_, _| ()).expect_err("not started");
    // Still registered: its missing pages are not zeros now.
    assert!(flags_at(start.0).contains(" um"), "{}", flags_at(start.0));
    drop(registered);
}

#[test]
fn memory_that_was_mapped_anew_is_an_error() {
    prologue!("memory_mapped_anew");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let memory = Memory::new(&[(kind, MIB)]);
        let Some(mut tracker) = tracker_of(&memory) else { return };
        write(&memory, 3);
        tracker.start().expect("started");
        let at = memory.word(0, 0).as_ptr();
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: takes the place of a mapping of ours, of which no reference is alive.
        let mapped = unsafe { libc::mmap(at.cast(), MIB as usize, access, flags, -1, 0) };
        assert_eq!(mapped, at.cast());
        let error = tracker.collect(&mut |_, _| ()).expect_err("nobody tracks it");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{kind:?}: {error}");
        tracker.stop().expect("stopped");
    }
}
