//! System calls by what they are for, and counts of them.

use std::collections::BTreeMap;
use std::fmt;

/// What a system call is for. Calls of one meaning and two numbers are one kind, because
/// which of them is made depends on the architecture and the C library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Call {
    /// Sleeps until one of several descriptors has something (`epoll_wait`).
    Wait,
    /// Looks at a few descriptors (`poll`).
    Poll,
    /// Reads events, or a wake-up.
    Read,
    /// Reads a file at a place.
    ReadAt,
    /// Asks a file where its content is.
    Seek,
    /// Asks what a file is.
    Status,
    /// Wakes another thread's poll.
    Write,
    /// Receives what there is, without waiting.
    ReceiveNow,
    /// Receives, and waits for it.
    Receive,
    Send,
    /// Ends a connection.
    Shutdown,
    /// On a userfaultfd or a page map.
    Ioctl,
    /// `madvise`: the engine's, on guest memory, or the allocator's.
    Advise,
    /// Waits for a lock or a condition, or wakes who does.
    Lock,
    /// Maps and unmaps memory: the allocator's.
    Memory,
    /// The time, on a machine whose clock cannot be read without the kernel.
    Clock,
    Other(u64),
}

impl Call {
    /// What a call with this number and these arguments is.
    pub(crate) fn of(number: u64, arguments: &[u64; 6]) -> Self {
        #[cfg(target_arch = "x86_64")]
        match number as i64 {
            libc::SYS_epoll_wait => return Self::Wait,
            libc::SYS_poll => return Self::Poll,
            _ => {}
        }
        match number as i64 {
            libc::SYS_epoll_pwait => Self::Wait,
            libc::SYS_ppoll => Self::Poll,
            libc::SYS_read => Self::Read,
            libc::SYS_pread64 | libc::SYS_preadv2 => Self::ReadAt,
            libc::SYS_lseek => Self::Seek,
            libc::SYS_statx | libc::SYS_fstat | libc::SYS_newfstatat => Self::Status,
            libc::SYS_write => Self::Write,
            libc::SYS_recvfrom if arguments[3] & libc::MSG_DONTWAIT as u64 != 0 => Self::ReceiveNow,
            libc::SYS_recvfrom => Self::Receive,
            libc::SYS_sendto | libc::SYS_sendmsg => Self::Send,
            libc::SYS_shutdown => Self::Shutdown,
            libc::SYS_ioctl => Self::Ioctl,
            libc::SYS_madvise => Self::Advise,
            libc::SYS_futex => Self::Lock,
            libc::SYS_brk
            | libc::SYS_mmap
            | libc::SYS_munmap
            | libc::SYS_mremap
            | libc::SYS_mprotect => Self::Memory,
            libc::SYS_clock_gettime | libc::SYS_gettimeofday => Self::Clock,
            _ => Self::Other(number),
        }
    }
}

/// Calls of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) calls: u64,
    /// Calls that brought nothing: nothing was there, or the time was up.
    pub(crate) in_vain: u64,
    /// What the others returned, all together: of calls that move bytes, how many.
    pub(crate) bytes: u64,
}

/// What a thread has called.
#[derive(Clone, Default)]
pub(crate) struct Tally {
    counts: BTreeMap<Call, Count>,
    /// How often which call ended with which error.
    errors: BTreeMap<(Call, i64), u64>,
}

impl Tally {
    pub(crate) fn entered(&mut self, call: Call) {
        self.counts.entry(call).or_default().calls += 1;
    }

    pub(crate) fn returned(&mut self, call: Call, value: i64) {
        let count = self.counts.entry(call).or_default();
        match value {
            1.. => count.bytes += value as u64,
            _ => count.in_vain += 1,
        }
        if value < 0 {
            *self.errors.entry((call, -value)).or_default() += 1;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (call, count) in &other.counts {
            let sum = self.counts.entry(*call).or_default();
            sum.calls += count.calls;
            sum.in_vain += count.in_vain;
            sum.bytes += count.bytes;
        }
        for (error, count) in &other.errors {
            *self.errors.entry(*error).or_default() += count;
        }
    }

    pub(crate) fn of(&self, call: Call) -> Count {
        self.counts.get(&call).copied().unwrap_or_default()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (Call, Count)> {
        self.counts.iter().map(|(call, count)| (*call, *count))
    }

    /// All calls but those for the time: whether there are any is the machine's affair.
    pub(crate) fn total(&self) -> u64 {
        self.counts
            .iter()
            .filter(|(call, _)| **call != Call::Clock)
            .map(|(_, count)| count.calls)
            .sum()
    }

    pub(crate) fn sent(&self) -> u64 {
        self.of(Call::Send).bytes
    }

    pub(crate) fn received(&self) -> u64 {
        self.of(Call::Receive).bytes + self.of(Call::ReceiveNow).bytes
    }
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for (call, Count { calls, in_vain, bytes }) in &self.counts {
            map.entry(call, &format_args!("{calls} ({in_vain} in vain, {bytes} bytes)"));
        }
        for ((call, error), count) in &self.errors {
            map.entry(call, &format_args!("{count} with error {error}"));
        }
        map.finish()
    }
}
