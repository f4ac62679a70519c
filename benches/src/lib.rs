//! `postcopy-bench`: Afterimage measured against the machine's limits and its peers.
//!
//! - [`cli`]: the command; [`suite`] names what a run measures and which rows come of it
//! - [`run`]: rounds of units; [`pair`] has the two processes that measure, and the
//!   [`namespaces`] between them; [`interrupt`] ends it early
//! - [`mod@unit`]: what can be measured; [`floors`] and [`engine`] do it, in processes that
//!   [`worker`] makes of this program
//! - [`memory`], [`guest`], [`network`], [`sys`]: what they are made of
//! - [`latency`], [`outcome`], [`figures`], [`report`], [`page`], [`machine`]: what comes
//!   of it
//! - [`qemu`]: the peer

pub mod cli;
pub mod engine;
pub mod error;
pub mod figures;
pub mod floors;
pub mod guest;
pub mod interrupt;
pub mod latency;
pub mod machine;
pub mod memory;
pub mod namespaces;
pub mod network;
pub mod outcome;
pub mod page;
pub mod pair;
pub mod qemu;
pub mod report;
pub mod run;
pub mod suite;
pub mod sys;
pub mod unit;
pub mod worker;
