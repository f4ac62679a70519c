//! How the kernel's scheduler treats a thread of the engine.

use crate::threads::ThreadRole;
use std::io;

/// The slice of threads on which the latency of a fault hangs: the shortest there is. Whoever
/// is woken with a shorter slice than the one that runs goes first (EEVDF, since Linux 6.12).
const SHORT_SLICE_NS: u64 = 100_000;

/// The slice of a thread that looks through all of memory: whoever is woken beside it, to hear that
/// the guest has stopped for instance, goes first, also where the kernel believes a halted
/// processor of a virtual machine busy and leaves both on one.
const LONG_SLICE_NS: u64 = 100_000_000;

/// `struct sched_attr` as of Linux 3.14, which later kernels take too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const SIZE: u32 = size_of::<Attributes>() as u32;
const _: () = assert!(SIZE == 48);

/// Asks for the scheduling that a role needs; needs no right. A thread that the VMM has put
/// under another policy than the usual one, which its children inherit, stays as it is.
///
/// # Errors
/// What the kernel says. Nothing depends on it but latency under load.
pub(crate) fn suit(role: ThreadRole) -> io::Result<()> {
    let mut attributes = current()?;
    if attributes.policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    attributes.runtime = SHORT_SLICE_NS;
    match role {
        ThreadRole::Fault | ThreadRole::Request => {}
        // It does not take the core from whoever runs when it is woken, and can itself be
        // stopped soon.
        ThreadRole::Background | ThreadRole::Release | ThreadRole::Map => {
            attributes.policy = libc::SCHED_BATCH as u32;
        }
        ThreadRole::Precopy => attributes.runtime = LONG_SLICE_NS,
        ThreadRole::Acceptor | ThreadRole::Control | ThreadRole::Ledger => return Ok(()),
    }
    attributes.flags = 0;
    // SAFETY: the kernel reads a `sched_attr` of the size that it says; 0 is this thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn current() -> io::Result<Attributes> {
    let mut attributes = Attributes { size: SIZE, ..Attributes::default() };
    // SAFETY: the kernel writes at most `SIZE` bytes; 0 is this thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, SIZE, 0) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.size = SIZE;
    Ok(attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_become_batch_and_those_on_the_fault_path_get_short_slices() {
        let after = |role| {
            let thread = std::thread::spawn(move || {
                suit(role).unwrap();
                current().unwrap()
            });
            thread.join().unwrap()
        };
        let before = current().unwrap();
        assert_eq!(after(ThreadRole::Control).policy, before.policy);
        if before.policy != libc::SCHED_OTHER as u32 {
            return;
        }
        assert_eq!(after(ThreadRole::Fault).policy, before.policy);
        assert_eq!(after(ThreadRole::Background).policy, libc::SCHED_BATCH as u32);
        assert_eq!(after(ThreadRole::Background).nice, before.nice);
        // Kernels before 6.12 keep no slice.
        assert!([0, SHORT_SLICE_NS].contains(&after(ThreadRole::Fault).runtime));
        assert!([0, LONG_SLICE_NS].contains(&after(ThreadRole::Precopy).runtime));
    }
}
