//! `postcopy-bench`: Afterimage measured against the machine's limits and its peers.

pub mod qemu;
