//! `postcopy-bench`: Afterimage measured against the machine's limits and its peers.
//!
//! - [`unit`]: what can be measured; [`floors`] and [`engine`] do it, in processes that
//!   [`worker`] makes of this program
//! - [`memory`], [`guest`], [`network`], [`sys`]: what they are made of
//! - [`latency`], [`outcome`]: what comes of it

pub mod engine;
pub mod error;
pub mod floors;
pub mod guest;
pub mod latency;
pub mod memory;
pub mod network;
pub mod outcome;
pub mod sys;
pub mod unit;
pub mod worker;
