//! Registering memory of this process, and taking over that of another.

use super::{DestinationMemory, DestinationRegion, DiscardNotice, MemoryError};
use crate::destination::pages::{FaultAnswer, Pages, Urgent};
use crate::sys::testing::{self, Area, Child, Kind, receive, send};
use crate::sys::uffd::{Features, UffdError};
use afterimage_protocol::layout::{GuestAddress, PageNumber, PageRange, RegisteredAddress};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use userfaultfd::RegisterMode;

fn register(regions: Vec<DestinationRegion>) -> Option<Result<DestinationMemory, MemoryError>> {
    match DestinationMemory::register(regions, testing::scope(), DiscardNotice::Called) {
        Err(MemoryError::Uffd(error @ UffdError::Unavailable(_))) => {
            testing::skip("userfaultfd", error);
            None
        }
        result => Some(result),
    }
}

#[test]
fn nothing_of_what_was_there_before_can_be_read() {
    for kind in Kind::ALL {
        let Some(area) = Area::new(kind, 4) else { continue };
        for page in 0..4 {
            area.word(page * area.page_bytes()).store(9, Ordering::Relaxed);
        }
        let Some(memory) = register(vec![area.region()]) else { return };
        let pages = Pages::new(memory.unwrap()).unwrap();
        pages.zero(PageRange::new(PageNumber(0), 4));
        pages.memory().unregister();
        for page in 0..4 {
            assert_eq!(area.word(page * area.page_bytes()).load(Ordering::Relaxed), 0, "{kind:?}");
        }
    }
}

#[test]
fn memory_of_which_a_part_cannot_be_registered_is_free_again() {
    let area = Area::new(Kind::Anonymous, 4).unwrap();
    let taken = Area::new(Kind::Anonymous, 4).unwrap();
    let Some(other) = testing::userfaultfd(Features::default()) else { return };
    other.register(taken.address() as *mut _, taken.length as usize).unwrap();
    let start = NonNull::new(taken.address() as *mut u8).unwrap();
    // SAFETY: the area outlives the attempt, and nobody touches it.
    let wrong = unsafe { DestinationRegion::anonymous(GuestAddress(1 << 30), start, taken.length) };
    let Some(result) = register(vec![area.region(), wrong]) else { return };
    assert!(matches!(result, Err(MemoryError::Register { .. })), "{result:?}");
    let again = register(vec![area.region()]).unwrap();
    again.expect("the failure left nothing registered").unregister();
    assert_eq!(area.word(0).load(Ordering::Relaxed), 0);
}

#[test]
fn the_memory_of_a_forked_child_stays_missing() {
    const EVENT_FORK: Features = Features(1 << 1);
    if !nix::unistd::geteuid().is_root() {
        return testing::skip("ptrace", "events of fork need CAP_SYS_PTRACE");
    }
    let Some(uffd) = testing::userfaultfd(EVENT_FORK) else { return };
    let area = Area::new(Kind::Anonymous, 1).unwrap();
    uffd.register(area.address() as *mut _, area.length as usize).unwrap();
    let region = DestinationRegion::handed_over(
        GuestAddress(0),
        RegisteredAddress(area.address()),
        area.length,
        Kind::Anonymous.page_size(),
        None,
    );
    let descriptor = uffd.as_fd().try_clone_to_owned().unwrap();
    let memory = DestinationMemory::attach(descriptor, vec![region]).unwrap();
    let pages = Pages::new(memory).unwrap();
    let kept = || {
        let kept = super::KEPT.lock().unwrap();
        let link = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
        let targets = kept.iter().map(|fd| std::fs::read_link(link(fd)));
        targets.filter(|target| target.as_ref().is_ok_and(|target| is_uffd(target))).count()
    };
    let before = kept();
    let parent = std::thread::spawn(|| {
        // Not `fork` of libc: it holds the allocator's locks until the kernel returns, and the
        // kernel returns when another thread of this process has read the event.
        // SAFETY: the child, a copy with this thread alone, does nothing but end.
        let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } as i32;
        if child == 0 {
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(0) };
        }
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).unwrap();
    });
    testing::await_that("the fork has been read", || {
        pages.read_events(&mut Vec::new()).unwrap();
        parent.is_finished()
    });
    parent.join().unwrap();
    // Other tests may have kept some meanwhile, but none lets one go.
    assert!(kept() > before, "the child's userfaultfd was closed");
    pages.memory().unregister();
}

fn is_uffd(target: &std::path::Path) -> bool {
    target.as_os_str() == "anon_inode:[userfaultfd]"
}

const TEST: &str = "destination::memory::tests::memory_of_another_process_is_filled";

/// In which memory of the other process, and how much of it we get.
const CASES: [(Kind, bool); 6] = [
    (Kind::Anonymous, false),
    (Kind::Memfd, false),
    (Kind::Memfd, true),
    (Kind::TmpfsHuge, true),
    (Kind::Hugetlb, false),
    (Kind::Hugetlb, true),
];

#[test]
fn memory_of_another_process_is_filled() {
    if let Some(socket) = testing::child_socket() {
        return run_guest(&socket);
    }
    let Some(_) = testing::userfaultfd(Features::default()) else { return };
    let child = Child::start(TEST);
    for case in CASES {
        let (words, descriptors) = receive(&child.socket);
        match words.as_slice() {
            &[address, length] => {
                fill_guest(case, &child.socket, address, length, descriptors);
            }
            _ => {
                testing::skip("hugetlb", format_args!("the other process has no {case:?}"));
                send(&child.socket, &[1], &[]);
            }
        }
    }
    assert!(child.end(), "the guest found something wrong");
}

const PAGES: u64 = 6;

/// The other process: maps memory, registers it, hands it over, and looks at every page.
fn run_guest(socket: &UnixStream) {
    for (kind, with_file) in CASES {
        let features = Features::EVENT_REMOVE
            .with(Features::MISSING_SHMEM)
            .with(Features::MISSING_HUGETLBFS)
            .with(Features::MINOR_SHMEM)
            .with(Features::MINOR_HUGETLBFS);
        let uffd = testing::userfaultfd(features).expect("the parent has one");
        let Some(area) = Area::new(kind, PAGES) else {
            send(socket, &[0], &[]);
            // Or the next message could be read together with this one.
            assert_eq!(receive(socket).0, [1]);
            continue;
        };
        if with_file {
            // What a file holds that was used before, all of which is stale.
            for page in 0..PAGES {
                area.word(page * area.page_bytes()).store(0xdead, Ordering::Relaxed);
            }
        }
        let mode = if with_file {
            RegisterMode::MISSING | RegisterMode::MINOR
        } else {
            RegisterMode::MISSING
        };
        let start = area.address() as *mut _;
        uffd.register_with_mode(start, area.length as usize, mode).unwrap();
        let mut descriptors = vec![uffd.as_fd()];
        if with_file {
            descriptors.extend(area.file.as_ref().map(AsFd::as_fd));
        }
        send(socket, &[area.address(), area.length], &descriptors);
        // It has been taken over.
        assert_eq!(receive(socket).0, [1]);
        // Discarded before it has come, so that it is zero whatever is sent.
        let page = area.page_bytes();
        let advice = if kind == Kind::Anonymous { libc::MADV_DONTNEED } else { libc::MADV_REMOVE };
        area.advise(4 * page, page, advice).unwrap();
        let got: Vec<u64> =
            (0..PAGES).map(|number| area.word(number * page).load(Ordering::Relaxed)).collect();
        assert_eq!(got, [10, 11, 12, 0, 0, 15], "{kind:?}, file: {with_file}");
        send(socket, &[2], &[]);
    }
}

/// This process: pages 0 and 1 come by themselves, 2 and 5 when asked for; 3 is zero.
fn fill_guest(
    (kind, with_file): (Kind, bool),
    socket: &UnixStream,
    address: u64,
    length: u64,
    mut descriptors: Vec<OwnedFd>,
) {
    let page_bytes = kind.page_bytes();
    let uffd = descriptors.remove(0);
    let file = with_file.then(|| (descriptors.remove(0), 0));
    let region = DestinationRegion::handed_over(
        GuestAddress(0),
        RegisteredAddress(address),
        length,
        kind.page_size(),
        file,
    );
    let pages = Pages::new(DestinationMemory::attach(uffd, vec![region]).unwrap()).unwrap();
    let content = |page: u64| (10 + page).to_le_bytes().repeat(page_bytes as usize / 8);
    pages.zero(PageRange::one(PageNumber(3)));
    let claim = pages.claim(PageRange::new(PageNumber(0), 2));
    let bytes = [content(0), content(1)].concat();
    let mut at = 0;
    for target in claim.targets().unwrap().unwrap_or_default() {
        let crate::destination::pages::Target::Memory(run) = target else {
            panic!("nobody else has claimed a page")
        };
        // SAFETY: claimed, mapped, and written by this thread alone.
        unsafe { run.write(&bytes[at..at + run.length]) };
        at += run.length;
    }
    claim.finish(&bytes, |_| ()).unwrap();
    send(socket, &[1], &[]);
    let (mut faults, mut due) = (Vec::new(), Vec::new());
    socket.set_nonblocking(true).unwrap();
    testing::await_that(
        &format!("the guest has seen its pages, {kind:?}, file: {with_file}"),
        || {
            pages.read_events(&mut faults).unwrap();
            faults.retain(|&fault| match pages.answer(fault) {
                FaultAnswer::Answered => false,
                FaultAnswer::EventPending => true,
                FaultAnswer::Ask => {
                    due.push(fault.page);
                    false
                }
                other => panic!("nobody is writing, and there is room: {other:?}"),
            });
            due.retain(|&page: &PageNumber| {
                pages.urgent(page, &content(page.0)).unwrap() == Urgent::EventPending
            });
            let mut byte = [0; 8];
            nix::sys::socket::recv(
                socket.as_raw_fd(),
                &mut byte,
                nix::sys::socket::MsgFlags::empty(),
            )
            .is_ok_and(|received| {
                assert_eq!((received, byte[0]), (8, 2), "the guest has ended");
                true
            })
        },
    );
    socket.set_nonblocking(false).unwrap();
    assert_eq!(pages.remaining(), 0);
    pages.memory().unregister();
}
