//! Dirty tracking: no write is ever lost, whoever writes and however often is asked; what was
//! reported is armed again; and nothing is left behind.

#[path = "../common/mod.rs"]
mod common;

mod bitmap;
mod copying;
mod kvm;
mod machine;
mod process;
#[cfg(feature = "vm-memory")]
mod vm_memory;
mod write_protect;
