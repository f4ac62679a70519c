//! The wire format: its golden bytes, what is refused, and what holds for any bytes.

mod golden;
mod greetings;
mod properties;
mod refusals;

use afterimage_protocol::layout::{
    Backing, GuestAddress, GuestLayout, PageNumber, PageRange, PageSize, Region,
};
use afterimage_protocol::wire::{Epoch, Generation, HEADER_BYTES, Header, Stamp, WireError};

/// The stamp of every frame of these tests.
const STAMP: Stamp = Stamp { epoch: Epoch(7), generation: Generation(3) };

fn range(start: u64, count: u64) -> PageRange {
    PageRange::new(PageNumber(start), count)
}

fn region(guest_address: u64, length: u64, page_size: PageSize, backing: Backing) -> Region {
    Region::new(GuestAddress(guest_address), length, page_size, backing)
}

fn layout_of(regions: Vec<Region>) -> GuestLayout {
    GuestLayout::new(regions).unwrap()
}

/// Takes a frame's bytes apart.
fn split(bytes: &[u8]) -> (Header, &[u8]) {
    let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
    (Header::from_bytes(*header), payload)
}

fn is_bad_value(error: &WireError, expected: &str) -> bool {
    matches!(error, WireError::BadValue { field, .. } if *field == expected)
}
