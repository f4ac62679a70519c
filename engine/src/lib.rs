//! Postcopy memory for virtual machines.
//!
//! A guest's vCPUs move first; its memory follows while it runs. What it touches comes at
//! once over a request channel, the rest over background streams, each page once. A VMM
//! links this crate on both sides and keeps everything else: its vCPUs, its devices, its
//! event loop.
//!
//! | to do | use |
//! | --- | --- |
//! | describe memory at the source | [`SourceRegion`], [`SourceMemory`] |
//! | see what the death of its process would leave of it | [`MemoryLifetime`] |
//! | serve it in a migration | [`Source`], [`SourceOptions`], [`SourceEvent`] |
//! | limit what nobody has asked for | [`Background`] |
//! | free at the source what has arrived | [`Release`], [`ReleaseLedger`] |
//! | serve one image to many | [`SnapshotServer`] |
//! | describe and register memory at the destination | [`DestinationRegion`], [`DestinationMemory`] |
//! | get it | [`Destination`], [`DestinationOptions`], [`DestinationEvent`] |
//! | connect or listen | [`Endpoint`], [`Address`], [`Listener`], [`Plaintext`] |
//! | remember across restarts who owns the guest | [`SourceStateFile`], [`DestinationStateFile`] |
//! | wait for events, in a thread or an event loop | [`Events`] |
//! | see how it goes | [`SourceStats`], [`DestinationStats`] |
//! | see what a machine lacks | [`probe()`], [`Probe`], [`Finding`] |
//! | take all of it from rust-vmm's guest memory | module `vm_memory`, with the feature `vm-memory` |
//! | pin and confine the engine's threads | [`ThreadHook`] |
//!
//! # A migration
//!
//! Both sides in one process here; two processes work the same way. The memory is plain and
//! so are the threads that touch it, which is why a userfaultfd for user faults is enough; a
//! guest on KVM needs [`FaultScope::KernelAndUser`].
//!
//! ```
//! use afterimage::*;
//! use std::{ptr::NonNull, sync::Arc};
//!
//! const LENGTH: u64 = 8 << 20;
//! let map = || memmap2::MmapMut::map_anon(LENGTH as usize).unwrap();
//!
//! // The source: memory with something in it.
//! let mut old = map();
//! for (page, bytes) in old.chunks_mut(4096).enumerate() {
//!     bytes.fill(page as u8);
//! }
//! let start = NonNull::new(old.as_mut_ptr()).unwrap();
//! // SAFETY: `old` outlives the source and is not written any more.
//! let region = unsafe { SourceRegion::anonymous(GuestAddress(0), start, LENGTH) };
//! let memory = Arc::new(SourceMemory::new(vec![region])?);
//! let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?, Plaintext::LoopbackOnly)?;
//! let address = listener.address().clone();
//! let (source, at_source) =
//!     Source::start(memory, Endpoint::Listen(listener), SourceOptions::default())?;
//!
//! // The destination: as much memory, of which nothing has arrived.
//! let mut new = map();
//! let start = NonNull::new(new.as_mut_ptr()).unwrap();
//! // SAFETY: `new` outlives the destination, and is only read below.
//! let region = unsafe { DestinationRegion::anonymous(GuestAddress(0), start, LENGTH) };
//! let memory = DestinationMemory::register(
//!     vec![region], FaultScope::UserOnly, DiscardNotice::Called)?;
//! let (destination, at_destination) =
//!     Destination::start(memory, Endpoint::Connect(address), DestinationOptions::default())?;
//!
//! // The source stops its vCPUs, and sends their state.
//! let state = StateSection { name: "vcpus".into(), version: 1, bytes: vec![1, 2, 3] };
//! source.switch_over(vec![state])?;
//!
//! // The destination restores it, and runs when it is told to.
//! while let Some(event) = at_destination.next() {
//!     match event {
//!         DestinationEvent::State(sections) => {
//!             assert_eq!(sections[0].bytes, [1, 2, 3]);
//!             destination.ready()?;
//!         }
//!         DestinationEvent::Run => {
//!             // A fault: this page comes at once, before the others.
//!             assert_eq!(new[5000 * 4096 % LENGTH as usize], (5000 % 2048) as u8);
//!         }
//!         DestinationEvent::Finished => break,
//!         _ => {}
//!     }
//! }
//! assert!(new[..] == old[..]);
//! while let Some(event) = at_source.next() {
//!     if event == SourceEvent::Finished {
//!         break;
//!     }
//! }
//! assert_eq!(destination.stats().pages_complete, LENGTH / 4096);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Rules
//!
//! - Memory belongs to the guest and to the engine at once; keep no Rust reference into it
//!   while a destination serves it.
//! - The source's memory is final from [`Source::switch_over`] on: stop vCPUs and device DMA
//!   first.
//! - A page that is missing is waited for: no thread of the VMM that must not wait (an event
//!   loop, a vCPU's exit handler with a lock held) should touch guest memory of an
//!   unfinished destination. A vCPU that waits does not leave for a signal.
//! - The process must not fork while a destination is unfinished, or keep guest memory out of
//!   its children (`MADV_DONTFORK`).

mod agreed;
mod destination;
pub mod dirty;
mod events;
mod inbox;
mod ledger;
mod patience;
mod polling;
mod probe;
mod reconnect;
mod session_link;
mod slots;
mod source;
mod state_file;
mod stats;
mod steps;
mod sys;
mod threads;
mod transport;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;

#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;

pub use afterimage_protocol::layout::{
    Backing, GuestAddress, GuestLayout, LayoutError, LocalAddress, PageNumber, PageRange, PageSize,
    Region, RegisteredAddress,
};
pub use agreed::Agreed;
pub use destination::{
    Destination, DestinationEvent, DestinationLedger, DestinationMemory, DestinationOptions,
    DestinationOwnership, DestinationRecord, DestinationRegion, DiscardNotice, MemoryError,
    StateDelivery, UnreadablePages,
};
pub use events::{Events, NoEvent, Stamped};
pub use probe::{Finding, FindingState, Need, Probe, probe};
pub use reconnect::{FirstConnection, Reconnect};
pub use source::{
    AfterRefusal, Background, CallError, Checksums, Endpoint, Incarnation, MemoryLifetime,
    PassReport, Passes, Precopy, Release, ReleaseError, ReleaseLedger, SessionId, SnapshotServer,
    SnapshotStats, Source, SourceEvent, SourceLedger, SourceMemory, SourceMemoryError,
    SourceOptions, SourceOwnership, SourcePages, SourceRecord, SourceRegion, StartError,
    StateSection, SwitchoverCause,
};
pub use state_file::{
    DestinationStateFile, LayoutDigest, SourceStateFile, StateFile, StateFileError, StateRecord,
};
pub use stats::{DestinationStats, FaultLatency, SourceStats};
pub use sys::maps::MappingError;
pub use sys::uffd::{FaultScope, UffdError};
pub use threads::{ThreadHook, ThreadRole};
pub use transport::{Address, AddressError, Listener, Plaintext};
