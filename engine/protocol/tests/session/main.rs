//! Both state machines of a session, driven by hand.

mod books;
mod harness;
mod holds;
mod migration;
mod ownership;
mod passes;
mod persistence;
mod pulse;
mod refusals;
mod release;
mod snapshot;
