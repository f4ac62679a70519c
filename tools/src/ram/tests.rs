use std::sync::PoisonError;

use super::*;
use crate::require;

const MIB: u64 = 1 << 20;

#[test]
fn ram_above_three_gibibytes_continues_at_four() {
    let ram = GuestRam::allocate(LOW_RAM_END + 64 * MIB, Backing::Anonymous).unwrap();
    let bases: Vec<_> = ram.regions().iter().map(Region::guest_base).collect();
    assert_eq!(bases, [GuestAddress(0), GuestAddress(HIGH_RAM_START)]);
    assert!(ram.contains(GuestAddress(LOW_RAM_END - 1)));
    assert!(!ram.contains(GuestAddress(LOW_RAM_END)));
    assert!(ram.contains(GuestAddress(HIGH_RAM_START + 64 * MIB - 1)));
    assert!(!ram.contains(GuestAddress(HIGH_RAM_START + 64 * MIB)));
}

#[test]
fn allocating_touches_no_page() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let ram = GuestRam::allocate(64 * MIB, backing).unwrap();
        let region = &ram.regions()[0];
        assert!((region.host_base().as_ptr() as u64).is_multiple_of(HUGE_PAGE_BYTES), "aligned");
        let mut resident = vec![1u8; (region.length() / PAGE_BYTES) as usize];
        // SAFETY: the vector has a byte for each page of the mapped range.
        let result = unsafe {
            libc::mincore(
                region.host_base().as_ptr().cast(),
                region.length() as usize,
                resident.as_mut_ptr(),
            )
        };
        assert_eq!(result, 0);
        assert!(resident.iter().all(|page| page & 1 == 0), "{backing:?} has resident pages");
    }
}

#[test]
fn a_second_mapping_of_the_files_shows_the_same_content() {
    let ram = GuestRam::allocate(4 * MIB, Backing::Memfd).unwrap();
    ram.word(GuestAddress(8192)).store(7, Ordering::Relaxed);
    let files = ram.regions().iter().map(|region| {
        let (file, offset) = region.file().unwrap();
        FileRegion {
            guest_base: region.guest_base(),
            length: region.length(),
            file: file.try_clone().unwrap(),
            offset,
        }
    });
    let again = GuestRam::from_files(Backing::Memfd, files).unwrap();
    assert_eq!(again.word(GuestAddress(8192)).load(Ordering::Relaxed), 7);
    assert_ne!(again.regions()[0].host_base(), ram.regions()[0].host_base());
}

#[test]
fn hugetlb_ram_consists_of_two_mebibyte_pages() {
    let _turn = hugepages::tests::TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(_pages) = require::hugetlb(4) else {
        return;
    };
    let ram = GuestRam::allocate(8 * MIB, Backing::Hugetlb).unwrap();
    assert_eq!(ram.regions()[0].page_bytes(), HUGE_PAGE_BYTES);
    ram.byte(GuestAddress(8 * MIB - 1)).store(9, Ordering::Relaxed);
    assert_eq!(ram.read_page(GuestAddress(8 * MIB - 4096))[511] >> 56, 9);
}

#[test]
fn odd_sizes_are_refused() {
    for bytes in [0, 4096, MIB] {
        let error = GuestRam::allocate(bytes, Backing::Anonymous).unwrap_err();
        assert!(matches!(error, RamError::Size { .. }), "{error}");
    }
}

#[test]
#[should_panic(expected = "is not guest RAM")]
fn access_outside_ram_panics() {
    let ram = GuestRam::allocate(2 * MIB, Backing::Anonymous).unwrap();
    let _ = ram.byte(GuestAddress(2 * MIB));
}
