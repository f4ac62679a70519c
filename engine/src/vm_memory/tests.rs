use super::*;
use crate::{DestinationMemory, DiscardNotice, FaultScope, SourceMemory};
use ::vm_memory::{GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::error::Error;
use std::fs::File;

const LENGTH: usize = 8 << 20;

fn memfd(flags: MFdFlags) -> File {
    let file = File::from(memfd_create("ram", flags).expect("a memfd"));
    file.set_len(2 * LENGTH as u64).expect("long enough");
    file
}

fn guest(file: Option<FileOffset>, flags: i32) -> GuestMemoryMmap {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let mapping = MmapRegion::build(file, LENGTH, protection, flags).expect("mapped");
    let region = GuestRegionMmap::new(mapping, ::vm_memory::GuestAddress(1 << 32));
    GuestMemoryMmap::from_regions(vec![region.expect("in the address space")]).expect("a guest")
}

/// What both sides say of it.
fn refusal(memory: &GuestMemoryMmap) -> String {
    // SAFETY: nothing is begun with the regions.
    let (source, destination) = unsafe { (source_regions(memory), destination_regions(memory)) };
    let said = |error: RegionError| {
        let why = error.source().map(ToString::to_string).unwrap_or_default();
        format!("{error}: {why}")
    };
    let at_source = said(source.expect_err("a source refuses it"));
    assert_eq!(at_source, said(destination.expect_err("a destination refuses it")));
    assert!(at_source.contains("guest address 0x100000000"), "{at_source}");
    at_source
}

#[test]
fn private_and_shared_memory_are_taken_as_they_are_mapped() {
    let file = FileOffset::new(memfd(MFdFlags::empty()), 4096);
    for (file, flags, backing) in [
        (None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, crate::Backing::Anonymous),
        (Some(file), libc::MAP_SHARED, crate::Backing::Shared),
    ] {
        let memory = guest(file, flags);
        // SAFETY: `memory` lives to the end of this round, and nobody uses it.
        let (source, destination) =
            unsafe { (source_regions(&memory), destination_regions(&memory)) };
        let source = SourceMemory::new(source.expect("a source's")).expect("a layout");
        let region = source.layout().regions()[0];
        assert_eq!(region.backing, backing);
        assert_eq!(region.guest_address, GuestAddress(1 << 32));
        assert_eq!(region.length, LENGTH as u64);
        let destination = destination.expect("a destination's");
        let registered =
            DestinationMemory::register(destination, FaultScope::UserOnly, DiscardNotice::Called)
                .expect("registered: what was looked up is what the kernel has");
        assert_eq!(registered.layout().regions()[0].backing, backing);
        registered.all_arrived();
    }
}

#[test]
fn a_private_mapping_of_a_file_is_refused_with_the_reason() {
    let file = FileOffset::new(memfd(MFdFlags::empty()), 0);
    let said = refusal(&guest(Some(file), libc::MAP_PRIVATE));
    assert!(said.contains("map it shared"), "{said}");
}

#[test]
fn shared_memory_without_its_file_is_refused_with_the_reason() {
    let said = refusal(&guest(None, libc::MAP_SHARED | libc::MAP_ANONYMOUS));
    assert!(said.contains("describe it with its file"), "{said}");
}

#[test]
fn a_file_offset_that_is_not_what_is_mapped_is_refused() {
    let file = FileOffset::new(memfd(MFdFlags::empty()), 0);
    let shared = guest(Some(file), libc::MAP_SHARED);
    let start = shared.iter().next().expect("a region").as_ptr();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let other = FileOffset::new(memfd(MFdFlags::empty()), 0);
    // SAFETY: the mapping of `shared`, which outlives it.
    let mapping = unsafe {
        ::vm_memory::mmap::MmapRegionBuilder::<()>::new(LENGTH)
            .with_raw_mmap_pointer(start)
            .with_mmap_prot(protection)
            .with_file_offset(other)
            .build()
    };
    let region = GuestRegionMmap::new(mapping.expect("built"), ::vm_memory::GuestAddress(1 << 32));
    let lying = GuestMemoryMmap::from_regions(vec![region.expect("a region")]).expect("a guest");
    let said = refusal(&lying);
    assert!(said.contains("not a shared mapping of the file given"), "{said}");
}

mod bitmaps {
    use super::super::*;
    use crate::dirty::DirtyTracker;
    use ::vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use ::vm_memory::mmap::MmapRegionBuilder;
    use ::vm_memory::{Bytes, GuestMemoryMmap, GuestRegionMmap};
    use std::fmt::Debug;
    use std::num::NonZeroUsize;

    const BASE: u64 = 1 << 32;

    fn guest<B: Bitmap>(pages: usize, bitmap: B) -> GuestMemoryMmap<B> {
        let mapping = MmapRegionBuilder::new_with_bitmap(pages * 4096, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
            .build();
        let region =
            GuestRegionMmap::new(mapping.expect("mapped"), ::vm_memory::GuestAddress(BASE));
        GuestMemoryMmap::from_regions(vec![region.expect("a region")]).expect("a guest")
    }

    fn bitmap(bytes: usize, page: usize) -> AtomicBitmap {
        AtomicBitmap::new(bytes, NonZeroUsize::new(page).expect("not zero"))
    }

    fn write(memory: &GuestMemoryMmap<impl Bitmap>, offset: u64, length: usize) {
        let bytes = vec![7; length];
        memory.write_slice(&bytes, ::vm_memory::GuestAddress(BASE + offset)).expect("written");
    }

    fn pages<B: AtomicMarks + Debug + Send + Sync>(tracker: &mut BitmapTracker<B>) -> Vec<u64> {
        let mut pages = Vec::new();
        let collected = tracker.collect(&mut |guest, length| {
            let first = (guest.0 - BASE) / 4096;
            pages.extend(first..first + length / 4096);
        });
        collected.expect("collected");
        pages.dedup();
        pages
    }

    #[test]
    fn pages_that_a_device_writes_are_told_once_whatever_the_bits_stand_for() {
        for (page, expected) in [
            (128, vec![1, 2, 9]),
            (4096, vec![1, 2, 9]),
            // Not even a power of two, and across pages.
            (6000, vec![1, 2, 8, 9]),
            (16384, vec![0, 1, 2, 3, 8, 9]),
            (1 << 20, (0..10).collect()),
            (usize::MAX, (0..10).collect()),
        ] {
            let memory = guest(10, bitmap(10 * 4096, page));
            let mut tracker = BitmapTracker::new(&memory).expect("a tracker");
            write(&memory, 5 * 4096, 1);
            tracker.start().expect("started");
            write(&memory, 2 * 4096 - 1, 2);
            write(&memory, 10 * 4096 - 1, 1);
            assert_eq!(pages(&mut tracker), expected, "bits of {page} bytes");
            assert!(pages(&mut tracker).is_empty(), "told once");
            tracker.stop().expect("stopped");
        }
    }

    #[test]
    fn a_bitmap_that_is_longer_than_its_region_tells_of_nothing_outside() {
        let memory = guest(10, bitmap(1 << 20, 4096));
        let mut tracker = BitmapTracker::new(&memory).expect("a tracker");
        tracker.start().expect("started");
        memory.iter().next().expect("a region").bitmap().mark_dirty(0, 1 << 20);
        assert_eq!(pages(&mut tracker), (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn a_bitmap_that_would_drop_marks_is_refused() {
        let short = guest(10, bitmap(9 * 4096, 4096));
        let error = BitmapTracker::new(&short).expect_err("too short");
        assert!(matches!(error, BitmapTrackerError::TooShort { marked: 36864, .. }), "{error}");
        let none = guest(10, None::<AtomicBitmap>);
        let error = BitmapTracker::new(&none).expect_err("no bitmap");
        assert!(matches!(error, BitmapTrackerError::NoBitmap { .. }), "{error}");
        let some = guest(10, Some(bitmap(10 * 4096, 4096)));
        BitmapTracker::new(&some).expect("a bitmap for all of it");
    }

    #[test]
    fn a_tracker_begins_once_and_may_begin_again() {
        let memory = guest(10, bitmap(10 * 4096, 4096));
        let mut tracker = BitmapTracker::new(&memory).expect("a tracker");
        tracker.collect(&mut |_, _| ()).expect_err("not started");
        tracker.start().expect("started");
        tracker.start().expect_err("started already");
        write(&memory, 0, 1);
        tracker.stop().expect("stopped");
        tracker.start().expect("started again");
        assert!(pages(&mut tracker).is_empty(), "written before");
    }

    #[test]
    fn a_tracker_keeps_its_regions_mapped() {
        let memory = guest(10, bitmap(10 * 4096, 4096));
        let mut tracker = BitmapTracker::new(&memory).expect("a tracker");
        tracker.start().expect("started");
        write(&memory, 0, 1);
        drop(memory);
        assert_eq!(pages(&mut tracker), [0]);
    }
}
