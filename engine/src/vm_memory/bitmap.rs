//! `vm-memory`'s bitmaps as a dirty tracker.

use crate::GuestAddress;
use crate::dirty::{DirtyTracker, PAGE, already_started, each_run, not_started};
use ::vm_memory::bitmap::{AtomicBitmap, Bitmap};
use ::vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};
use std::io;
use std::sync::Arc;

/// A region's bitmap of which the marks can be taken.
pub trait AtomicMarks: Bitmap {
    /// Where the marks are; `None` if there are none.
    fn marks(&self) -> Option<&AtomicBitmap>;
}

impl AtomicMarks for AtomicBitmap {
    fn marks(&self) -> Option<&AtomicBitmap> {
        Some(self)
    }
}

impl AtomicMarks for Option<AtomicBitmap> {
    fn marks(&self) -> Option<&AtomicBitmap> {
        self.as_ref()
    }
}

/// Tells what was written through `vm-memory`: by the VMM's own devices, and by whatever else
/// marks the bitmaps of its regions. In pages of any size.
///
/// **Does not see** what vCPUs write, nor vhost, nor writes through a raw pointer
/// (`get_host_address`, `ptr_guard_mut`) that are not marked by hand, nor memory that is given up:
/// take one of KVM's trackers and this together, as [`Trackers`](crate::dirty::Trackers), and mark
/// the rest in a [`DirtyBitmap`](crate::dirty::DirtyBitmap). Whoever marks by hand does so
/// **after** the write, as `vm-memory` does: a mark that comes first may be taken, and the page
/// read, before the write.
///
/// **Takes** the marks: nobody else may do so between [`start`](DirtyTracker::start) and
/// [`stop`](DirtyTracker::stop), or they are lost for one of the two. Marks from before `start`
/// are dropped; those after the last `collect` are left. Each `collect` has a copy of one bit for
/// each page of the largest region.
///
/// It keeps the regions mapped. Regions that are added later are not tracked.
#[derive(Debug)]
pub struct BitmapTracker<B = AtomicBitmap> {
    regions: Vec<MarkedRegion<B>>,
    is_started: bool,
}

#[derive(Debug)]
struct MarkedRegion<B> {
    guest: GuestAddress,
    memory: Arc<MmapRegion<B>>,
    /// What a bit of the bitmap stands for.
    bytes_a_bit: u64,
}

/// Why the bitmap of a region cannot tell what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapTrackerError {
    /// There is none.
    #[error(
        "the region at guest address {guest_address} has no bitmap: make one when the region is \
         mapped, or use WriteProtectTracker"
    )]
    NoBitmap {
        /// Which region.
        guest_address: GuestAddress,
    },
    /// It ends before the region, and drops marks behind its end.
    #[error(
        "the bitmap of the region at guest address {guest_address} is for {marked} bytes, the \
         region has {length}: make it as long (AtomicBitmap::new, with_len or enlarge)"
    )]
    TooShort {
        /// Which region.
        guest_address: GuestAddress,
        /// For how many bytes it has bits.
        marked: u64,
        /// The region's length.
        length: u64,
    },
    /// The region is not made of whole pages.
    #[error(
        "the region at guest address {guest_address} has {length} bytes: address and length must \
         be multiples of 4096"
    )]
    NoWholePages {
        /// Which region.
        guest_address: GuestAddress,
        /// The region's length.
        length: u64,
    },
}

impl<B: AtomicMarks> BitmapTracker<B> {
    /// For all regions of a guest's memory.
    ///
    /// # Errors
    /// [`BitmapTrackerError`], if marks of a region are, or could be, missing.
    pub fn new<M>(memory: &M) -> Result<Self, BitmapTrackerError>
    where
        M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
    {
        let regions = memory.iter().map(MarkedRegion::of).collect::<Result<_, _>>()?;
        Ok(Self { regions, is_started: false })
    }
}

impl<B> DirtyTracker for BitmapTracker<B>
where
    B: AtomicMarks + std::fmt::Debug + Send + Sync,
{
    fn start(&mut self) -> io::Result<()> {
        if self.is_started {
            return Err(already_started());
        }
        // Taken and not only reset: what is marked by now was written before, and whoever reads
        // memory after this must see it.
        self.regions.iter().for_each(|region| drop(region.take()));
        self.is_started = true;
        Ok(())
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        if !self.is_started {
            return Err(not_started());
        }
        for region in &self.regions {
            each_run(&region.take(), |first, count| {
                let (start, length) = region.pages_of(first, count);
                written(GuestAddress(region.guest.0 + start), length);
            });
        }
        Ok(())
    }

    // Bitmaps belong to the VMM, and mark whether or not anybody tracks.
    fn stop(&mut self) -> io::Result<()> {
        self.is_started = false;
        Ok(())
    }
}

impl<B: AtomicMarks> MarkedRegion<B> {
    fn of(region: &GuestRegionMmap<B>) -> Result<Self, BitmapTrackerError> {
        let guest_address = GuestAddress(region.start_addr().raw_value());
        let length = region.len();
        let memory = region.get_mmap();
        if length == 0 || !length.is_multiple_of(PAGE) || !guest_address.0.is_multiple_of(PAGE) {
            return Err(BitmapTrackerError::NoWholePages { guest_address, length });
        }
        let Some(bitmap) = memory.bitmap().marks() else {
            return Err(BitmapTrackerError::NoBitmap { guest_address });
        };
        let marked = bitmap.byte_size() as u64;
        if marked < length {
            return Err(BitmapTrackerError::TooShort { guest_address, marked, length });
        }
        let bytes_a_bit = bytes_a_bit(bitmap, length);
        Ok(Self { guest: guest_address, memory, bytes_a_bit })
    }

    /// What is marked, which is marked no more.
    fn take(&self) -> Vec<u64> {
        // There are marks, as was looked at when this was made.
        self.memory.bitmap().marks().map(AtomicBitmap::get_and_reset).unwrap_or_default()
    }

    /// The whole pages, in bytes from the region's start, that have a byte of these bits.
    fn pages_of(&self, first: u64, count: u64) -> (u64, u64) {
        let length = self.memory.size() as u64;
        // A bitmap may be longer than its region, and its last bit stand for more than is left.
        let start = first.saturating_mul(self.bytes_a_bit).min(length - 1);
        let end = (first + count).saturating_mul(self.bytes_a_bit).min(length);
        let start = start / PAGE * PAGE;
        (start, end.next_multiple_of(PAGE) - start)
    }
}

/// What a bit stands for: how many bytes, as far as `length` goes. The bitmap does not say, but a
/// copy of it with one mark shows it.
fn bytes_a_bit(bitmap: &AtomicBitmap, length: u64) -> u64 {
    let probe = bitmap.clone();
    probe.reset();
    probe.set_bit(0);
    let (mut least, mut most) = (1, length);
    while least < most {
        let middle = least.midpoint(most);
        if probe.is_addr_set(middle as usize) {
            least = middle + 1;
        } else {
            most = middle;
        }
    }
    least
}
