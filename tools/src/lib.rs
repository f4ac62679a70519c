//! The commands of Afterimage, and the guest that they move.
//!
//! - [`ram`]: guest memory of this process, and its regions and files
//! - [`guest`]: workloads whose memory can be verified, on KVM or on plain threads
//! - [`microvm`]: the virtual machine that runs them on KVM
//! - [`require`]: what tests need of the machine

pub mod guest;
pub mod microvm;
pub mod ram;
pub mod require;
