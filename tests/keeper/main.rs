//! The keeper as a process, with clients in this one and in others.

mod claims;
mod command;
mod guest;
mod hostile;
mod support;
