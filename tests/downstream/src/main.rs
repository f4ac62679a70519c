//! The smallest VMM there is: no vCPUs, no devices, some memory, and nothing but std and the
//! engine. It moves its memory to itself.

use afterimage::{
    Destination, DestinationEvent, DestinationMemory, DestinationOptions, DestinationRegion,
    DiscardNotice, Endpoint, FaultScope, GuestAddress, Listener, Plaintext, Source, SourceEvent,
    SourceMemory, SourceOptions, SourceRegion, StateSection,
};
use std::alloc::{Layout, alloc_zeroed};
use std::error::Error;
use std::ptr::NonNull;
use std::sync::Arc;

const PAGE: usize = 4096;
const LENGTH: usize = 4 << 20;

/// Page-aligned memory that is never freed.
fn memory() -> NonNull<u8> {
    let layout = Layout::from_size_align(LENGTH, PAGE).expect("a valid layout");
    // SAFETY: the layout has a size.
    NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory")
}

fn main() -> Result<(), Box<dyn Error>> {
    let (old, new) = (memory(), memory());
    for page in 0..LENGTH / PAGE {
        // SAFETY: in bounds, and nobody else knows this memory yet.
        unsafe { old.add(page * PAGE).write(page as u8) };
    }

    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?, Plaintext::LoopbackOnly)?;
    let address = listener.address().clone();
    // SAFETY: never freed, and not written any more.
    let region = unsafe { SourceRegion::anonymous(GuestAddress(0), old, LENGTH as u64) };
    let (source, source_events) = Source::start(
        Arc::new(SourceMemory::new(vec![region])?),
        Endpoint::Listen(listener),
        SourceOptions::default(),
    )?;

    // SAFETY: never freed, and only read through the pointer.
    let region = unsafe { DestinationRegion::anonymous(GuestAddress(0), new, LENGTH as u64) };
    let memory =
        DestinationMemory::register(vec![region], FaultScope::UserOnly, DiscardNotice::Called)?;
    let (destination, events) =
        Destination::start(memory, Endpoint::Connect(address), DestinationOptions::default())?;

    let state = StateSection { name: "vmm".to_owned(), version: 1, bytes: b"state".to_vec() };
    source.switch_over(vec![state])?;
    loop {
        match events.next().ok_or("the destination ended")? {
            DestinationEvent::State(sections) if sections[0].bytes == b"state" => {
                destination.ready()?;
            }
            DestinationEvent::Run => {
                for page in (0..LENGTH / PAGE).rev() {
                    // SAFETY: in bounds; a page that has not arrived is waited for.
                    let byte = unsafe { new.add(page * PAGE).read_volatile() };
                    assert_eq!(byte, page as u8, "page {page}");
                }
            }
            DestinationEvent::Finished => break,
            DestinationEvent::Attached(_) | DestinationEvent::AllArrived => {}
            other => return Err(format!("unexpected: {other:?}").into()),
        }
    }
    while source_events.next().ok_or("the source ended")? != SourceEvent::Finished {}
    println!("{} pages moved", destination.stats().pages_complete);
    Ok(())
}
