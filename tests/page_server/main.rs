//! The page server as a process, with real destinations in this one.

mod command;
mod handoff;
mod migration;
mod release;
mod restart;
mod snapshot;
mod stress;
mod support;
