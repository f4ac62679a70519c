//! What a VMM with rust-vmm's guest memory does to move it: one call on each side.

use afterimage::dirty::{DirtyBitmap, Trackers};
use afterimage::vm_memory::{BitmapTracker, destination_regions, source_regions};
use afterimage::{
    Destination, DestinationEvent, DestinationMemory, DestinationOptions, DiscardNotice, Endpoint,
    Events, FaultScope, Listener, Passes, Plaintext, Precopy, Source, SourceEvent, SourceMemory,
    SourceOptions,
};
use std::error::Error;
use std::sync::Arc;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Guest memory that remembers what the VMM's devices wrote.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// A source that serves all of `memory`, and an address at which it can be reached.
///
/// # Errors
/// The engine's.
///
/// # Safety
/// Nobody may write `memory` from the switchover on. The source that is given back must be
/// dropped before the memory.
pub unsafe fn serve(
    memory: &Memory,
    passes: u32,
) -> Result<(Source, Events<SourceEvent>, afterimage::Address), Box<dyn Error>> {
    // SAFETY: the caller's promise.
    let regions = unsafe { source_regions(memory) }?;
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?, Plaintext::LoopbackOnly)?;
    let address = listener.address().clone();
    // A VMM on KVM would have `KvmDirtyLog` or `KvmDirtyRing` in place of the empty bitmap.
    let all: Vec<_> = memory
        .iter()
        .map(|region| (afterimage::GuestAddress(region.start_addr().0), region.len()))
        .collect();
    let vcpus = Arc::new(DirtyBitmap::new(&all)?);
    let devices = BitmapTracker::new(memory)?;
    let tracker = Trackers::new(vec![Box::new(vcpus), Box::new(devices)]);
    let mut precopy = Precopy::new(Box::new(tracker));
    precopy.passes = Passes::Count(passes);
    let mut options = SourceOptions::default();
    options.precopy = Some(precopy);
    let memory = Arc::new(SourceMemory::new(regions)?);
    let (source, events) = Source::start(memory, Endpoint::Listen(listener), options)?;
    Ok((source, events, address))
}

/// A destination that fills all of `memory`.
///
/// # Errors
/// The engine's.
///
/// # Safety
/// The destination that is given back must be dropped before the memory.
pub unsafe fn receive<B: vm_memory::bitmap::Bitmap>(
    memory: &GuestMemoryMmap<B>,
    address: afterimage::Address,
) -> Result<(Destination, Events<DestinationEvent>), Box<dyn Error>> {
    // SAFETY: the caller's promise; `vm-memory` makes no references into its memory.
    let regions = unsafe { destination_regions(memory) }?;
    let memory = DestinationMemory::register(regions, FaultScope::UserOnly, DiscardNotice::Called)?;
    let options = DestinationOptions::default();
    Ok(Destination::start(memory, Endpoint::Connect(address), options)?)
}
