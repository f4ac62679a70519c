//! Both state machines of a session, driven by hand.

mod books;
mod harness;
mod migration;
mod ownership;
mod persistence;
mod pulse;
mod refusals;
mod release;
mod snapshot;
