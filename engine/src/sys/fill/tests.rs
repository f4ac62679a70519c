//! Each answer that the kernel gives to a fill, from the kernel itself.

use super::{Fill, Filled, Stopped, run};
use crate::sys::mapping::Alias;
use crate::sys::presence::Presence;
use crate::sys::testing::{self, Area, Child, Kind};
use crate::sys::uffd::Features;
use afterimage_protocol::layout::RegisteredAddress;
use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::atomic::Ordering;
use userfaultfd::{Event, RegisterMode, Uffd};

struct Registered {
    uffd: Uffd,
    area: Area,
}

impl Registered {
    fn new(kind: Kind, pages: u64) -> Option<Self> {
        Self::with(kind, pages, Features::default())
    }

    fn with(kind: Kind, pages: u64, features: Features) -> Option<Self> {
        let features = match kind {
            Kind::Anonymous => features,
            Kind::Hugetlb => {
                features.with(Features::MINOR_HUGETLBFS).with(Features::MISSING_HUGETLBFS)
            }
            _ => features.with(Features::MINOR_SHMEM).with(Features::MISSING_SHMEM),
        };
        let registered =
            Self { uffd: testing::userfaultfd(features)?, area: Area::new(kind, pages)? };
        registered.register();
        Some(registered)
    }

    fn register(&self) {
        let mode = match self.area.kind {
            Kind::Anonymous => RegisterMode::MISSING,
            _ => RegisterMode::MISSING | RegisterMode::MINOR,
        };
        let start = self.area.address() as *mut _;
        self.uffd.register_with_mode(start, self.area.length as usize, mode).unwrap();
    }

    /// Writes a byte into each of these pages, through another mapping.
    fn write_behind(&self, pages: &[u64]) {
        let alias = Alias::new(self.area.file.as_ref().unwrap(), 0, self.area.length).unwrap();
        for page in pages {
            let place = alias.run(page * self.area.page_bytes(), 8);
            // SAFETY: mapped; nobody else writes it.
            unsafe { place.write(&page.to_le_bytes()) };
        }
    }

    /// Fills these pages; the content of a copy is `page + 1` in each page's first byte.
    fn fill(&self, how: How, first: u64, count: u64) -> Filled {
        let page = self.area.page_bytes();
        let mut content = vec![0; (count * page) as usize];
        for (index, place) in content.chunks_mut(page as usize).enumerate() {
            place[0] = (first + index as u64 + 1) as u8;
        }
        let fill = match how {
            How::Copy => Fill::Copy(&content),
            How::Zero => Fill::Zero,
            How::Continue => Fill::Continue,
        };
        let start = RegisteredAddress(self.area.address() + first * page);
        run(&self.uffd, fill, start, count * page, page, None)
    }

    fn first_word(&self, page: u64) -> u64 {
        self.area.word(page * self.area.page_bytes()).load(Ordering::Relaxed)
    }

    fn pages(&self, installed: u64, present: u64, holes: u64) -> Filled {
        let page = self.area.page_bytes();
        Filled {
            installed: installed * page,
            present: present * page,
            holes: holes * page,
            stopped: None,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum How {
    Copy,
    Zero,
    Continue,
}

#[test]
fn a_run_of_missing_pages_is_placed_whole() {
    for kind in Kind::ALL {
        let Some(memory) = Registered::new(kind, 8) else { continue };
        assert_eq!(memory.fill(How::Copy, 0, 4), memory.pages(4, 0, 0), "{kind:?}");
        assert_eq!([0, 1, 2, 3].map(|page| memory.first_word(page)), [1, 2, 3, 4], "{kind:?}");
        if kind != Kind::Hugetlb {
            assert_eq!(memory.fill(How::Zero, 4, 4), memory.pages(4, 0, 0), "{kind:?}");
            assert_eq!([4, 7].map(|page| memory.first_word(page)), [0, 0], "{kind:?}");
        }
    }
}

#[test]
fn what_the_page_cache_holds_is_shown_whole() {
    for kind in [Kind::Memfd, Kind::TmpfsHuge, Kind::Hugetlb] {
        let Some(memory) = Registered::new(kind, 4) else { continue };
        memory.write_behind(&[0, 1, 2, 3]);
        assert_eq!(memory.fill(How::Continue, 0, 4), memory.pages(4, 0, 0), "{kind:?}");
        assert_eq!([0, 1, 2, 3].map(|page| memory.first_word(page)), [0, 1, 2, 3], "{kind:?}");
    }
}

#[test]
fn pages_already_there_are_stepped_over_and_kept() {
    for kind in Kind::ALL {
        let Some(memory) = Registered::new(kind, 8) else { continue };
        memory.fill(How::Copy, 2, 2);
        memory.fill(How::Copy, 5, 1);
        memory.area.word(2 * memory.area.page_bytes()).store(77, Ordering::Relaxed);
        assert_eq!(memory.fill(How::Copy, 0, 8), memory.pages(5, 3, 0), "{kind:?}");
        let words = [0, 1, 2, 3, 4, 5, 6, 7].map(|page| memory.first_word(page));
        assert_eq!(words, [1, 2, 77, 4, 5, 6, 7, 8], "{kind:?}");
        assert_eq!(memory.fill(How::Copy, 0, 8), memory.pages(0, 8, 0), "{kind:?}");
    }
}

#[test]
fn a_zero_page_never_covers_what_the_page_cache_holds() {
    for kind in [Kind::Memfd, Kind::TmpfsHuge] {
        let Some(memory) = Registered::new(kind, 1024) else { continue };
        memory.write_behind(&[1]);
        let filled = memory.fill(How::Zero, 0, 3);
        let huge = kind == Kind::TmpfsHuge;
        // Where it is huge, the neighbours are in the page cache too.
        let expected = if huge { memory.pages(0, 3, 0) } else { memory.pages(2, 1, 0) };
        assert_eq!(filled, expected, "{kind:?}");
        assert_eq!(memory.fill(How::Continue, 1, 1), memory.pages(1, 0, 0), "{kind:?}");
        assert_eq!(memory.first_word(1), 1, "{kind:?}");
    }
}

#[test]
fn holes_are_counted_and_stepped_over() {
    for kind in [Kind::Memfd, Kind::Hugetlb] {
        let Some(memory) = Registered::new(kind, 6) else { continue };
        memory.write_behind(&[1, 4]);
        assert_eq!(memory.fill(How::Continue, 0, 6), memory.pages(2, 0, 4), "{kind:?}");
        assert_eq!(memory.fill(How::Continue, 0, 6), memory.pages(0, 2, 4), "{kind:?}");
        assert_eq!([1, 4].map(|page| memory.first_word(page)), [1, 4], "{kind:?}");
    }
}

#[test]
fn zeros_cannot_be_placed_on_hugetlbfs() {
    let Some(memory) = Registered::new(Kind::Hugetlb, 2) else { return };
    let refused = Filled { stopped: Some(Stopped::NotRegistered), ..Filled::default() };
    assert_eq!(memory.fill(How::Zero, 0, 2), refused);
}

#[test]
fn nothing_is_placed_while_a_discard_is_unread() {
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::Hugetlb] {
        let Some(memory) = Registered::with(kind, 4, Features::EVENT_REMOVE) else { continue };
        if kind != Kind::Anonymous {
            memory.write_behind(&[0]);
        }
        std::thread::scope(|scope| {
            let page = memory.area.page_bytes();
            let area = &memory.area;
            let discard = scope.spawn(move || area.advise(page, page, libc::MADV_DONTNEED));
            testing::await_readable(&memory.uffd, "the discard's event");
            let refused = Filled { stopped: Some(Stopped::EventPending), ..Filled::default() };
            assert_eq!(memory.fill(How::Copy, 1, 3), refused, "{kind:?}");
            if kind != Kind::Hugetlb {
                assert_eq!(memory.fill(How::Zero, 1, 3), refused, "{kind:?}");
            }
            if kind != Kind::Anonymous {
                assert_eq!(memory.fill(How::Continue, 0, 1), refused, "{kind:?}");
            }
            let event = memory.uffd.read_event().unwrap().unwrap();
            assert!(matches!(event, Event::Remove { .. }), "{event:?}");
            discard.join().unwrap().unwrap();
        });
        assert_eq!(memory.fill(How::Copy, 1, 3), memory.pages(3, 0, 0), "{kind:?}");
    }
}

#[test]
fn memory_that_is_not_registered_is_named_as_such() {
    for kind in Kind::ALL {
        let Some(memory) = Registered::new(kind, 4) else { continue };
        memory
            .uffd
            .unregister(memory.area.address() as *mut _, memory.area.length as usize)
            .unwrap();
        let refused = Filled { stopped: Some(Stopped::NotRegistered), ..Filled::default() };
        assert_eq!(memory.fill(How::Copy, 0, 4), refused, "{kind:?}");
        if kind != Kind::Anonymous {
            assert_eq!(memory.fill(How::Continue, 0, 4), refused, "{kind:?}");
        }
    }
}

#[test]
fn content_that_cannot_be_read_is_the_callers_failure() {
    let Some(memory) = Registered::new(Kind::Anonymous, 2) else { return };
    // SAFETY: never read by this program; the kernel finds that nothing is mapped there.
    let nowhere = unsafe { std::slice::from_raw_parts(4096 as *const u8, 8192) };
    let start = RegisteredAddress(memory.area.address());
    let filled = run(&memory.uffd, Fill::Copy(nowhere), start, 8192, 4096, None);
    assert_eq!(filled.stopped, Some(Stopped::Failed(Errno::EFAULT)));
}

#[test]
fn a_process_that_has_ended_is_told_from_memory_that_is_not_registered() {
    if let Some(socket) = testing::child_socket() {
        let Some(memory) = Registered::new(Kind::Anonymous, 4) else { return };
        testing::send(&socket, &[memory.area.address()], &[memory.uffd.as_fd()]);
        // Until the other end is closed.
        assert!(testing::receive(&socket).0.is_empty());
        return;
    }
    let Some(_) = testing::userfaultfd(Features::default()) else { return };
    let child = Child::start(
        "sys::fill::tests::a_process_that_has_ended_is_told_from_memory_that_is_not_registered",
    );
    let (words, mut descriptors) = testing::receive(&child.socket);
    // SAFETY: the child has just handed over a userfaultfd; ownership moves.
    let uffd = unsafe { Uffd::from_raw_fd(descriptors.remove(0).into_raw_fd()) };
    let start = RegisteredAddress(words[0]);
    let placed = run(&uffd, Fill::Copy(&[1; 4096]), start, 4096, 4096, None);
    assert_eq!(placed, Filled { installed: 4096, ..Filled::default() });
    assert!(child.end());
    for fill in [Fill::Copy(&[1; 4096]), Fill::Zero] {
        let filled = run(&uffd, fill, start, 4096, 4096, None);
        assert_eq!(filled, Filled { stopped: Some(Stopped::ProcessGone), ..Filled::default() });
    }
}

#[test]
fn a_run_over_several_mappings_is_placed_whole() {
    let Some(memory) = Registered::new(Kind::Anonymous, 16) else { return };
    // Advice about a part of the memory makes the kernel cut its mapping in three.
    memory.area.advise(5 * 4096, 3 * 4096, libc::MADV_DONTFORK).unwrap();
    assert_eq!(memory.fill(How::Copy, 0, 12), memory.pages(12, 0, 0));
    assert_eq!(memory.fill(How::Zero, 0, 16), memory.pages(4, 12, 0));
    let words: Vec<u64> = (0..16).map(|page| memory.first_word(page)).collect();
    assert_eq!(words, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0]);
}

#[test]
fn a_run_that_loses_its_registration_half_way_says_where() {
    let Some(memory) = Registered::new(Kind::Anonymous, 16) else { return };
    memory.uffd.unregister((memory.area.address() + 11 * 4096) as *mut _, 4096).unwrap();
    let expected = Filled { stopped: Some(Stopped::NotRegistered), ..memory.pages(11, 0, 0) };
    assert_eq!(memory.fill(How::Copy, 0, 16), expected);
}

#[test]
fn a_huge_page_for_which_there_is_no_room_is_not_taken_for_one_that_is_there() {
    const HUGE: u64 = 2 << 20;
    let Some(uffd) = testing::userfaultfd(Features::MISSING_HUGETLBFS) else { return };
    let Some(area) = Area::narrow(6, 4) else { return };
    uffd.register(area.address() as *mut _, area.length as usize).unwrap();
    let presence = Presence::of(std::process::id()).unwrap();
    let content = vec![7; area.length as usize];
    let copy = |first: u64, pages: u64| {
        let start = RegisteredAddress(area.address() + first * HUGE);
        let content = Fill::Copy(&content[..(pages * HUGE) as usize]);
        run(&uffd, content, start, pages * HUGE, HUGE, Some(&presence))
    };
    let no_room = Some(Stopped::Failed(Errno::ENOMEM));
    let full = Filled { installed: 4 * HUGE, stopped: no_room, ..Filled::default() };
    assert_eq!(copy(0, 6), full);
    // What is there is still told from it.
    let again = Filled { present: 4 * HUGE, stopped: no_room, ..Filled::default() };
    assert_eq!(copy(0, 6), again);
    // Two give way.
    let file = area.file.as_ref().unwrap();
    crate::sys::mapping::punch_hole(file, 0, 2 * HUGE).unwrap();
    assert_eq!(copy(4, 2), Filled { installed: 2 * HUGE, ..Filled::default() });
    assert_eq!(area.word(5 * HUGE).load(Ordering::Relaxed), u64::from_le_bytes([7; 8]));
}

#[test]
fn a_huge_page_that_was_made_to_fail_is_there() {
    const HUGE: u64 = 2 << 20;
    let Some(uffd) = testing::userfaultfd(Features::MISSING_HUGETLBFS) else { return };
    let Some(area) = Area::narrow(1, 1) else { return };
    uffd.register(area.address() as *mut _, area.length as usize).unwrap();
    let presence = Presence::of(std::process::id()).unwrap();
    let start = RegisteredAddress(area.address());
    let poison = || run(&uffd, Fill::Poison, start, HUGE, HUGE, Some(&presence));
    let first = poison();
    if first.stopped == Some(Stopped::Failed(Errno::EINVAL)) {
        return testing::skip("poison", "an older kernel");
    }
    assert_eq!(first, Filled { installed: HUGE, ..Filled::default() });
    assert_eq!(poison(), Filled { present: HUGE, ..Filled::default() });
}

#[test]
fn nothing_is_there_of_a_process_that_has_ended() {
    let is_gone = |process: u32| {
        let error = Presence::of(process).unwrap().is_there(RegisteredAddress(0)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    };
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let id = Id::Pid(Pid::from_raw(child.id() as i32));
    // Its parent has not taken note of its end.
    waitid(id, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
    is_gone(child.id());
    child.wait().unwrap();
    // No process has this number.
    is_gone(u32::MAX);
}
