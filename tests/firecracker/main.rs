//! page-client as the page fault handler of Firecracker, against a client that speaks
//! Firecracker's side exactly, in a process of its own.

mod crowd;
mod deaths;
mod discards;
mod docs;
mod memory;
mod real;
mod refusals;
mod restores;
#[path = "../page_client/support.rs"]
#[allow(dead_code, reason = "a part of it is for guests of this process")]
mod support;
mod vm;
mod vmm;
