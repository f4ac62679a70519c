use super::*;

const MIB: u64 = 1 << 20;

fn region(guest_address: u64, length: u64) -> Region {
    Region::new(GuestAddress(guest_address), length, PageSize::KIB_4, Backing::Anonymous)
}

#[test]
fn pages_are_numbered_over_regions_of_different_page_sizes() {
    let huge = Region::new(GuestAddress(64 * MIB), 4 * MIB, PageSize::MIB_2, Backing::Hugetlb);
    let layout = GuestLayout::new(vec![huge, region(0, MIB)]).unwrap();
    assert_eq!(layout.page_count(), 256 + 2);
    assert_eq!(layout.bytes(), 5 * MIB);
    assert_eq!(layout.region_of(PageNumber(255)), Some(0));
    assert_eq!(layout.region_of(PageNumber(256)), Some(1));
    assert_eq!(layout.region_of(PageNumber(258)), None);
    assert_eq!(layout.page_at_guest(GuestAddress(66 * MIB + 5)), Some(PageNumber(257)));
    assert_eq!(layout.page_at_guest(GuestAddress(MIB)), None);
}

#[test]
fn a_run_never_crosses_a_region_even_where_two_touch_in_host_memory() {
    // Region 1 ends in host memory exactly where region 0 begins.
    let first = region(0, 4 * MIB).registered_at(RegisteredAddress(0x7000_0040_0000));
    let second = region(16 * MIB, 4 * MIB).registered_at(RegisteredAddress(0x7000_0000_0000));
    let layout = GuestLayout::new(vec![first, second]).unwrap();
    let runs: Vec<_> = layout.split(layout.all_pages()).collect();
    assert_eq!(runs.len(), 2);
    assert_eq!((runs[0].region, runs[0].offset, runs[0].length), (0, 0, 4 * MIB));
    assert_eq!((runs[1].region, runs[1].pages.start), (1, PageNumber(1024)));

    let at = |address| layout.page_at_registered(RegisteredAddress(address));
    assert_eq!(at(0x7000_003f_ffff), Some(PageNumber(2047)));
    assert_eq!(at(0x7000_0040_0000), Some(PageNumber(0)));
    assert_eq!(at(0x6fff_ffff_ffff), None);
    assert_eq!(at(0x7000_0080_0000), None);

    // A discard over the seam comes out as one run per region.
    let seam: Vec<_> =
        layout.pages_at_registered(RegisteredAddress(0x7000_003f_f000), 8192).collect();
    assert_eq!(seam.len(), 2);
    assert!(seam.iter().any(|run| run.pages == PageRange::one(PageNumber(2047))));
    assert!(seam.iter().any(|run| run.pages == PageRange::one(PageNumber(0))));
}

#[test]
fn a_range_of_bytes_means_the_pages_that_lie_wholly_in_it() {
    let layout = GuestLayout::new(vec![region(0, MIB)]).unwrap();
    let pages = |address, length| {
        let runs: Vec<_> = layout.pages_at_guest(GuestAddress(address), length).collect();
        runs.first().map(|run| run.pages)
    };
    assert_eq!(pages(4095, 4098), Some(PageRange::one(PageNumber(1))));
    assert_eq!(pages(4095, 4096), None);
    assert_eq!(pages(0, 0), None);
    assert_eq!(pages(1, 4096), None);
    assert_eq!(pages(0, u64::MAX), Some(layout.all_pages()));
    assert_eq!(pages(2 * MIB, MIB), None);
}

#[test]
fn every_fault_of_a_layout_is_named() {
    let refused = |regions: Vec<Region>| GuestLayout::new(regions).unwrap_err().to_string();
    assert!(refused(vec![]).contains("no region"));
    assert!(refused(vec![region(0, 0)]).contains("length 0"));
    assert!(refused(vec![region(0, 5000)]).contains("0x1388"));
    assert!(refused(vec![region(100, 4096)]).contains("guest address 0x64"));
    assert!(refused(vec![region(0u64.wrapping_sub(4096), 8192)]).contains("beyond 2^64"));
    let overlap = refused(vec![region(0, MIB), region(MIB - 4096, MIB)]);
    assert!(overlap.contains("0x0") && overlap.contains("0xff000"), "{overlap}");
    let twice = region(0, MIB).registered_at(RegisteredAddress(MIB));
    let same = region(MIB, MIB).registered_at(RegisteredAddress(MIB));
    assert!(refused(vec![twice, same]).contains("registered address"));
    let local = refused(vec![
        region(0, MIB).local_at(LocalAddress(MIB)),
        region(MIB, MIB).local_at(LocalAddress(MIB + 4096)),
    ]);
    assert!(local.contains("local mapping"), "{local}");
    let small = Region::new(GuestAddress(0), MIB, PageSize::KIB_4, Backing::Hugetlb);
    assert!(refused(vec![small]).contains("huge pages"));
}

#[test]
fn a_mismatch_names_both_values() {
    let ours = GuestLayout::new(vec![region(0, MIB), region(4 * MIB, MIB)]).unwrap();
    let differ = |regions: Vec<Region>| {
        ours.serving(&GuestLayout::new(regions).unwrap()).unwrap_err().to_string()
    };
    assert!(differ(vec![region(0, MIB)]).contains("2 memory regions, the destination 1"));
    assert!(differ(vec![region(0, MIB), region(8 * MIB, MIB)]).contains("0x800000"));
    let length = differ(vec![region(0, 2 * MIB), region(4 * MIB, MIB)]);
    assert!(length.contains("0x100000") && length.contains("0x200000"), "{length}");
}

#[test]
fn a_source_serves_in_the_pages_of_the_destination() {
    let ours = GuestLayout::new(vec![region(0, 4 * MIB).local_at(LocalAddress(MIB))]).unwrap();
    let huge = Region::new(GuestAddress(0), 4 * MIB, PageSize::MIB_2, Backing::Hugetlb)
        .registered_at(RegisteredAddress(2 * MIB));
    let served = ours.serving(&GuestLayout::new(vec![huge]).unwrap()).unwrap();
    assert_eq!(served.page_count(), 2);
    assert_eq!(served.regions()[0].local, Some(LocalAddress(MIB)));
    assert_eq!(served.regions()[0].backing, Backing::Anonymous);
    assert_eq!(served.regions()[0].registered, None);
}

#[test]
fn page_sizes_are_powers_of_two_from_4_kib_to_1_gib() {
    assert_eq!(PageSize::from_bytes(4096), Some(PageSize::KIB_4));
    assert_eq!(PageSize::from_bytes(1 << 30), Some(PageSize::GIB_1));
    for bad in [0, 1, 2048, 4097, 3 << 12, 1 << 31] {
        assert_eq!(PageSize::from_bytes(bad), None, "{bad}");
    }
}
