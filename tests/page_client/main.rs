//! page-client as a process: it serves the memory of this process, is killed, and goes on.

mod attachment;
mod command;
mod deaths;
mod driven;
mod farewell;
mod giving_back;
mod host;
mod network;
mod precopy;
mod steps;
mod support;
mod words;
