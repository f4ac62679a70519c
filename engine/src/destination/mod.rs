//! The side that gets the memory.
//!
//! [`DestinationMemory`] says which memory it is and registers it; [`Pages`](pages::Pages)
//! decides who puts which page in place, and does it.

pub(crate) mod memory;
pub(crate) mod pages;
