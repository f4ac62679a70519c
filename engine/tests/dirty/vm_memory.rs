//! The bitmaps of rust-vmm's guest memory, while others write.

use crate::common::memory::PAGE;
use crate::common::{Kind, Memory, Random};
use crate::copying::no_write_is_lost;
use afterimage::dirty::DirtyTracker;
use afterimage::vm_memory::BitmapTracker;
use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

const PAGES: u64 = 300;

/// The test's memory as a VMM would have it, with a bit for so many bytes.
fn as_guest(memory: &Memory, bytes_a_bit: usize) -> GuestMemoryMmap<AtomicBitmap> {
    let length = (PAGES * PAGE) as usize;
    let bytes_a_bit = NonZeroUsize::new(bytes_a_bit).expect("not zero");
    let bitmap = AtomicBitmap::new(length, bytes_a_bit);
    let start = memory.word(0, 0).as_ptr().cast();
    // SAFETY: the mapping of `memory`, which outlives it.
    let mapping = unsafe {
        MmapRegionBuilder::new_with_bitmap(length, bitmap).with_raw_mmap_pointer(start).build()
    };
    let region = GuestRegionMmap::new(mapping.expect("built"), GuestAddress(0)).expect("a region");
    GuestMemoryMmap::from_regions(vec![region]).expect("a guest")
}

#[test]
fn no_mark_of_a_device_is_lost_while_others_are_taken() {
    let mut random = Random::seeded("no_mark_of_a_device_is_lost");
    for round in 0..50 {
        let memory = Memory::new(&[(Kind::Anonymous, PAGES * PAGE)]);
        let guest = as_guest(&memory, [4096, 128, 5000, 65536][round % 4]);
        let mut tracker = BitmapTracker::new(&guest).expect("a tracker");
        let wrote = |page: u64| {
            let region = vm_memory::GuestMemoryBackend::iter(&guest).next().expect("a region");
            region.bitmap().mark_dirty((page * PAGE) as usize, PAGE as usize);
        };
        no_write_is_lost(&mut tracker, &memory, &wrote, &mut random);
    }
}

/// A page that is marked but once, at the very moment in which marks are taken, is told all the
/// same: nobody marks it again.
#[test]
fn a_page_that_is_marked_once_is_told() {
    const WRITERS: u64 = 2;
    // Of which only the marks are used.
    let ranges = [(GuestAddress(0), 1 << 30)];
    let guest = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).expect("a guest");
    let region = vm_memory::GuestMemoryBackend::iter(&guest).next().expect("a region");
    let pages = region.len() / PAGE;
    let mut tracker = BitmapTracker::new(&guest).expect("a tracker");
    tracker.start().expect("started");
    let (mut told, marked) = (BTreeSet::new(), AtomicU64::new(0));
    let mut collect = || {
        let written = &mut |guest: afterimage::GuestAddress, length: u64| {
            told.extend(guest.0 / PAGE..(guest.0 + length) / PAGE);
        };
        tracker.collect(written).expect("collected");
    };
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let marked = &marked;
            scope.spawn(move || {
                for page in (writer..pages).step_by(WRITERS as usize) {
                    region.bitmap().mark_dirty((page * PAGE) as usize, 1);
                    marked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while marked.load(Ordering::Relaxed) < pages {
            collect();
        }
    });
    collect();
    let lost: Vec<_> = (0..pages).filter(|page| !told.contains(page)).collect();
    assert!(
        lost.is_empty(),
        "{} marks were lost, of pages {:?}",
        lost.len(),
        &lost[..3.min(lost.len())]
    );
}
