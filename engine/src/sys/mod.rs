//! Everything that needs `unsafe` or is Linux's own: userfaultfd, mappings, holes, sockets.
//!
//! The rest of the engine calls these and knows no system call. Each wrapper reports
//! exactly what the kernel said; what to make of it is left to the caller.

pub(crate) mod cached;
pub(crate) mod fill;
pub(crate) mod holes;
pub(crate) mod kvm;
pub(crate) mod kvm_ring;
pub(crate) mod machine;
pub(crate) mod mapping;
pub(crate) mod maps;
pub(crate) mod messages;
pub(crate) mod pagemap_scan;
pub(crate) mod presence;
pub(crate) mod scheduling;
pub(crate) mod socket;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod uffd;
pub(crate) mod words;
pub(crate) mod write_protect;

use std::io;
use std::os::fd::AsFd;

/// Makes calls on a descriptor, and on its duplicates, return instead of waiting.
pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Makes them wait again.
pub(crate) fn set_blocking(fd: impl AsFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Sixteen random bytes.
pub(crate) fn random_id() -> [u8; 16] {
    let mut id = [0; 16];
    // SAFETY: the buffer is writable for its length. Sixteen bytes come whole once the
    // kernel's generator is seeded, which the call waits for.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    assert_eq!(got, 16, "the kernel has no random numbers");
    id
}
