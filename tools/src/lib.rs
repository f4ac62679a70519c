//! The commands of Afterimage, and the guest that they move.
//!
//! - [`demo`]: the front door: a guest moves between two processes
//! - [`migrate`]: guest memory and machine state in the engine's terms
//! - [`ram`]: guest memory of this process, and its regions and files
//! - [`guest`]: workloads whose memory can be verified, on KVM or on plain threads
//! - [`microvm`]: the virtual machine that runs them on KVM
//! - [`handoff`]: handing a stopped guest over to another process of the machine
//! - [`attachment`]: having one's guest memory served by another process
//! - [`page_client`]: serving the memory of a guest that another process runs
//! - [`keeper`]: holding descriptors for processes that may die
//! - [`page_server`]: serving the memory of a stopped guest or a snapshot
//! - [`qemu`]: moving the guest of an unmodified QEMU
//! - [`control`]: driving a migration from a socket, and watching it
//! - [`ctl`]: the client of that socket
//! - [`tracking`]: what an unmodified VMM writes
//! - [`report_page`]: measurements as a page of HTML with pictures
//! - [`sampling`]: samples of a migration as it goes on
//! - [`bandwidth`]: the rate of the background as people write it
//! - [`size`]: sizes of memory as people write and read them
//! - [`require`]: what tests need of the machine

pub mod attachment;
pub mod bandwidth;
pub mod control;
pub mod ctl;
pub mod demo;
mod descriptors;
pub mod guest;
pub mod handoff;
pub mod keeper;
mod logging;
mod metrics;
pub mod microvm;
pub mod migrate;
pub mod page_client;
pub mod page_server;
mod placing;
mod processes;
pub mod qemu;
pub mod ram;
pub mod report_page;
pub mod require;
pub mod sampling;
pub mod size;
pub mod tracking;
