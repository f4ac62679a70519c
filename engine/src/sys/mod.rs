//! Everything that needs `unsafe` or is Linux's own: userfaultfd, mappings, holes, sockets.
//!
//! The rest of the engine calls these and knows no system call. Each wrapper reports
//! exactly what the kernel said; what to make of it is left to the caller.

pub(crate) mod fill;
pub(crate) mod holes;
pub(crate) mod mapping;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod uffd;
pub(crate) mod words;
