//! Asynchronous write protection of memory in another process, by a userfaultfd of its own.

use crate::common::children::{Role, argument, say};
use crate::common::memory::PAGE;
use crate::common::{self, Kind, Memory, Random};
use crate::copying::file_of;
use crate::prologue;
use crate::write_protect::tracker_of;
use afterimage::dirty::{DirtyTracker, TrackedRegion, WriteProtectTracker};
use afterimage::{GuestAddress, RegisteredAddress};
use memmap2::{MmapOptions, MmapRaw};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

const PAGES: u64 = 1024;
const WORDS: u64 = PAGE / 8;
/// What the parent has written to the first word.
const STOP: u64 = 1;
const END: u64 = 2;

/// The child: writes random pages but the first until it is told to stop.
#[test]
fn a_process_that_writes() {
    if argument("process::a_process_that_writes").is_none() {
        return;
    }
    let memory = Memory::new(&[(Kind::Memfd, PAGES * PAGE)]);
    let uffd = userfaultfd(WP_ASYNC | WP_UNPOPULATED | WP_SHARED);
    let start = memory.word(0, 0).as_ptr() as u64;
    say(&format!("{} {start} {}", uffd.as_raw_fd(), memory.path_of(0)));
    let command = || memory.word(0, 0).load(Ordering::Acquire);
    let mut random = Random::new(1);
    let watch = std::time::Instant::now();
    while command() == 0 && watch.elapsed() < common::PATIENCE {
        let page = 1 + random.below(PAGES - 1);
        memory.word(page, random.below(WORDS)).fetch_add(1, Ordering::Relaxed);
        memory.word(0, 1).fetch_add(1, Ordering::Relaxed);
    }
    say("stopped");
    common::wait_until("the end", String::new, || command() == END);
}

const WP_SHARED: u64 = 1 << 12;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;

/// As a VMM makes it for a tracker outside.
fn userfaultfd(features: u64) -> OwnedFd {
    #[repr(C)]
    struct Api {
        version: u64,
        features: u64,
        ioctls: u64,
    }
    nix::ioctl_readwrite!(api, 0xAA, 0x3F, Api);
    const USER_MODE_ONLY: i32 = 1;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: takes flags and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut argument = Api { version: 0xAA, features, ioctls: 0 };
    // SAFETY: the argument has the kernel's layout and lives through the call.
    unsafe { api(fd.as_raw_fd(), &raw mut argument) }.expect("Linux 6.7");
    fd
}

/// Duplicates a descriptor of a child.
fn descriptor_of(pid: u32, fd: i32) -> OwnedFd {
    let take = |number| {
        // SAFETY: a fresh descriptor that nobody else owns.
        (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number as i32) })
    };
    // SAFETY: takes numbers and touches no memory.
    let process = take(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }).expect("a child");
    // SAFETY: as above.
    take(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })
        .unwrap_or_else(|| panic!("a child's descriptor: {}", io::Error::last_os_error()))
}

/// The child's memory, through a mapping of this process.
struct Seen(MmapRaw);

impl Seen {
    fn word(&self, page: u64, word: u64) -> &AtomicU64 {
        assert!(page < PAGES && word < WORDS);
        // SAFETY: in the mapping, aligned; both processes use it by atomics only.
        unsafe {
            AtomicU64::from_ptr(self.0.as_mut_ptr().add((page * PAGE + word * 8) as usize).cast())
        }
    }

    fn page(&self, page: u64) -> Vec<u64> {
        (0..WORDS).map(|word| self.word(page, word).load(Ordering::Relaxed)).collect()
    }
}

fn round(tracker: &mut dyn DirtyTracker, seen: &Seen, copy: &mut [Vec<u64>]) -> usize {
    let mut pages = BTreeSet::new();
    let collect = &mut |guest: GuestAddress, length: u64| {
        pages.extend(guest.0 / PAGE..(guest.0 + length) / PAGE);
    };
    tracker.collect(collect).expect("collected");
    for page in &pages {
        copy[*page as usize] = seen.page(*page);
    }
    pages.len()
}

#[test]
fn writes_of_another_process_are_reported_until_it_has_ended() {
    prologue!("writes_of_another_process");
    if tracker_of(&Memory::new(&[(Kind::Memfd, PAGE)])).is_none() {
        return;
    }
    let child = Role::start("process::a_process_that_writes", "");
    let said = child.hear("its memory");
    let mut words = said.split(' ');
    let mut next = || words.next().expect("three words");
    let uffd = descriptor_of(child.id(), next().parse().expect("a number"));
    let start = RegisteredAddress(next().parse().expect("an address"));
    let file = File::options().read(true).write(true).open(next()).expect("a child's file");
    let seen =
        Seen(MmapOptions::new().len((PAGES * PAGE) as usize).map_raw(&file).expect("mapped"));

    let region = TrackedRegion::shared(GuestAddress(0), start, PAGES * PAGE, file.into(), 0);
    let tracker = WriteProtectTracker::of_process(child.id(), uffd, vec![region]);
    let mut tracker = tracker.expect("may look at a child");
    tracker.start().expect("started");
    let mut copy: Vec<_> = (0..PAGES).map(|page| seen.page(page)).collect();
    for _ in 0..50 {
        let written = seen.word(0, 1).load(Ordering::Relaxed);
        let has_more = || seen.word(0, 1).load(Ordering::Relaxed) > written + 50;
        common::wait_until("writes of the child", String::new, has_more);
        assert!(round(&mut tracker, &seen, &mut copy) > 1);
    }
    seen.word(0, 0).store(STOP, Ordering::Release);
    assert_eq!(child.hear("the last write"), "stopped");
    round(&mut tracker, &seen, &mut copy);
    // The first page is written by this process too.
    for page in 1..PAGES {
        assert!(copy[page as usize] == seen.page(page), "page {page}: a write was lost");
    }
    assert_eq!(round(&mut tracker, &seen, &mut copy), 0, "nobody writes any more");

    seen.word(0, 0).store(END, Ordering::Release);
    child.finish();
    let error = tracker.collect(&mut |_, _| ()).expect_err("it has ended");
    assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
}

#[test]
fn a_userfaultfd_without_the_features_is_refused() {
    prologue!("a_userfaultfd_without");
    let memory = Memory::new(&[(Kind::Memfd, PAGE)]);
    if tracker_of(&memory).is_none() {
        return;
    }
    let uffd = userfaultfd(WP_UNPOPULATED | WP_SHARED);
    let start = RegisteredAddress(memory.word(0, 0).as_ptr() as u64);
    let region = TrackedRegion::shared(GuestAddress(0), start, PAGE, file_of(&memory).into(), 0);
    memory.word(0, 0).store(1, Ordering::Relaxed);
    let tracker = WriteProtectTracker::of_process(std::process::id(), uffd, vec![region]);
    let error = tracker.expect("this process").start().expect_err("without WP_ASYNC");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    // Would wait for ever if the page were still protected.
    memory.word(0, 0).store(2, Ordering::Relaxed);
}
