//! The commands of Afterimage, and the guest that they move.
//!
//! - [`ram`]: guest memory of this process, and its regions and files
//! - [`guest`]: workloads whose memory can be verified, on KVM or on plain threads
//! - [`microvm`]: the virtual machine that runs them on KVM
//! - [`handoff`]: handing a stopped guest over to another process of the machine
//! - [`page_server`]: serving the memory of a stopped guest or a snapshot
//! - [`require`]: what tests need of the machine

pub mod guest;
pub mod handoff;
pub mod microvm;
pub mod page_server;
pub mod ram;
pub mod require;
