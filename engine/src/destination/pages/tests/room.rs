//! Huge pages that are copied, and for which there is no room: the kernel says then that they are
//! there already.

use super::*;
use crate::destination::memory::DestinationRegion;
use crate::sys::mapping::punch_hole;
use crate::sys::uffd::Features;
use afterimage_protocol::bitmap::PageState;
use afterimage_protocol::layout::{GuestAddress, PageSize, RegisteredAddress};
use std::os::fd::AsFd;
use userfaultfd::RegisterMode;

const HUGE: u64 = PageSize::MIB_2.bytes();

/// Memory of huge pages that was handed over without its file.
fn handed_over(pages: u64, room: u64) -> Option<(DestinationMemory, Area)> {
    let uffd = testing::userfaultfd(Features::MISSING_HUGETLBFS)?;
    let area = Area::narrow(pages, room)?;
    let start = area.address() as *mut _;
    uffd.register_with_mode(start, area.length as usize, RegisterMode::MISSING).unwrap();
    let region = DestinationRegion::handed_over(
        GuestAddress(0),
        RegisteredAddress(area.address()),
        area.length,
        PageSize::MIB_2,
        None,
    );
    let descriptor = uffd.as_fd().try_clone_to_owned().unwrap();
    Some((DestinationMemory::attach(descriptor, vec![region]).unwrap(), area))
}

#[test]
fn huge_pages_that_were_handed_over_without_a_file_need_their_process() {
    let Some((memory, _area)) = handed_over(1, 1) else { return };
    let error = memory.check_presence().unwrap_err().to_string();
    assert!(error.contains("of_process"), "{error}");
    memory.of_process(std::process::id()).unwrap().check_presence().unwrap();
}

#[test]
fn a_page_for_which_there_is_no_room_stays_missing_until_there_is() {
    let Some((memory, area)) = handed_over(6, 4) else { return };
    let memory = memory.of_process(std::process::id()).unwrap();
    let guest = Guest { pages: Arc::new(Pages::new(memory).unwrap()), area: Arc::new(area) };
    let gives_way = |page: u64| {
        punch_hole(guest.area.file.as_ref().unwrap(), page * HUGE, HUGE).unwrap();
    };
    guest.pages.zero(range(5, 1));
    for page in 0..4 {
        assert_eq!(guest.urgent(page, 10 + page), Urgent::Installed);
    }
    // Asked for, in background, and as zeros.
    let content = guest.page_of(14);
    let refused = guest.pages.urgent(PageNumber(4), &content).unwrap_err();
    assert!(matches!(refused, InstallError::NoMemory { page: PageNumber(4), .. }), "{refused}");
    let claim = guest.pages.claim(range(4, 1));
    let refused = claim.finish(&content, |run| panic!("{run} is not there")).unwrap_err();
    assert!(matches!(refused, InstallError::NoMemory { page: PageNumber(4), .. }), "{refused}");
    assert_eq!(guest.pages.planes().state(PageNumber(4)), PageState::Free);
    assert_eq!(guest.pages.remaining(), 1);
    let waiting = guest.touch(5);
    let fault = guest.faults()[0];
    let answer = guest.pages.answer(fault);
    assert!(matches!(answer, FaultAnswer::NoRoom(InstallError::NoMemory { .. })), "{answer:?}");

    gives_way(0);
    assert_eq!(guest.pages.answer(fault), FaultAnswer::Answered);
    assert_eq!(testing::await_message(&waiting, "the page of zeros"), (0, 0));
    gives_way(1);
    assert_eq!(guest.urgent(4, 14), Urgent::Installed);
    assert_eq!((guest.read(4), guest.read(2)), ((14, 14), (12, 12)));
    assert_eq!(guest.pages.remaining(), 0);
    guest.assert_books_balance();
}
