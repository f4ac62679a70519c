//! page-client as a process: it serves the memory of this process, is killed, and goes on.

mod command;
mod deaths;
mod steps;
mod support;
