//! `libafterimage_preload.so`: has the memory of an unmodified VMM served by page-client.
//!
//! Preloaded into a VMM whose guest memory is a shared file, it notices the mapping of the files
//! that `AFTERIMAGE_MEMORY` names, registers each with userfaultfd before the VMM gets it, and
//! hands the userfaultfd, the files and the addresses over when all of them are there. What it is
//! told by the environment, and what it refuses, is described in docs/preload.md; the protocol in
//! docs/page-client.md. Serving pages is page-client's affair, starting vCPUs that of whoever
//! drives the VMM.
//!
//! Invariant: the VMM never gets an address of named memory that is not registered, and the
//! userfaultfd is open here until every page has arrived. Where that cannot be kept the process
//! ends before its guest runs; once it may run, the call fails instead.
//!
//! Nothing else of the process is changed. Of what it maps, only files are looked at; errno is
//! kept; and nothing is allocated before all named memory is there, and then only for the thread
//! that talks to page-client and for what that is given.
//!
//! It is no library to link: whoever does has its `mmap` replaced.

#![cfg_attr(test, allow(dead_code, reason = "what only the hooks use, which tests are without"))]

mod attachment;
mod config;
mod connection;
// The test harness maps files, too.
#[cfg(not(test))]
mod hooks;
mod maps;
mod memory;
mod named;
mod pinned;
#[path = "../../src/placing.rs"]
#[expect(unreachable_pub, reason = "what is public there is so in afterimage-tools")]
mod placing;
mod refusal;
mod system;
mod table;
mod tracking;
mod uffd;
