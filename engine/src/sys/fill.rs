//! Putting pages in place (`UFFDIO_COPY`, `UFFDIO_ZEROPAGE`, `UFFDIO_CONTINUE`,
//! `UFFDIO_POISON`) over runs, with exact results.
//!
//! The kernel stops a run at the first page it cannot place and says how far it came;
//! [`run`] steps over pages that are there already, and over borders of mappings, which the
//! kernel refuses to cross in one call. It never retries what
//! only time or another thread can change; it returns instead, saying where it stands.

use super::presence::Presence;
use afterimage_protocol::layout::RegisteredAddress;
use nix::errno::Errno;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;
use userfaultfd::Uffd;

/// How the pages of a run come to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fill<'a> {
    /// From these bytes, as long as the run. They should be resident: for others the
    /// kernel drops its locks and starts again.
    Copy(&'a [u8]),
    /// The same, and whoever waits goes on waiting.
    Early(&'a [u8]),
    /// As zeros. Not on hugetlbfs.
    Zero,
    /// From the page cache, where the content already is.
    Continue,
    /// As memory that has failed: whoever touches it gets SIGBUS. Since Linux 6.6.
    Poison,
}

/// What became of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filled {
    /// Bytes that this call put in place.
    pub(crate) installed: u64,
    /// Bytes that were there already.
    pub(crate) present: u64,
    /// Bytes without content behind them: a hole where CONTINUE was asked for.
    pub(crate) holes: u64,
    /// Why it ended early, if it did; the bytes above say where.
    pub(crate) stopped: Option<Stopped>,
}

impl Filled {
    /// Bytes dealt with from the start of the run.
    pub(crate) const fn reached(&self) -> u64 {
        self.installed + self.present + self.holes
    }
}

/// Why a run ended before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// An event (discard, unmap, fork) waits to be read; until then nothing can be placed.
    EventPending,
    /// The range is not registered or not mapped there any more.
    NotRegistered,
    /// The process whose memory it is has ended.
    ProcessGone,
    /// Something else.
    Failed(Errno),
}

/// `UFFDIO_COPY_MODE_DONTWAKE`.
const COPY_DONTWAKE: u64 = 1;

#[repr(C)]
struct CopyArgument {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// The argument of ZEROPAGE, CONTINUE and POISON, which agree in layout.
#[repr(C)]
struct RangeArgument {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

const _: () = assert!(size_of::<CopyArgument>() == 40 && size_of::<RangeArgument>() == 32);

nix::ioctl_readwrite!(uffdio_copy, 0xAA, 0x03, CopyArgument);
nix::ioctl_readwrite!(uffdio_zeropage, 0xAA, 0x04, RangeArgument);
nix::ioctl_readwrite!(uffdio_continue, 0xAA, 0x07, RangeArgument);
nix::ioctl_readwrite!(uffdio_poison, 0xAA, 0x08, RangeArgument);

/// How long it is waited, each time twice as long as before, for a page that is said to be there,
/// and is not: it may have been dropped in between, or be on its way to another place in memory.
const DOUBT: Duration = Duration::from_millis(1);
/// How often.
const DOUBTS: u32 = 6;

/// Places `length` bytes from `start`, whole pages of `page_size` bytes, and wakes whoever
/// waits for a page that this call placed. Who waits for a page that was there already is
/// left to the caller to wake.
///
/// That a page is there already is believed where no `presence` is given, and else looked up before
/// it is copied to. (What was made to fail is there too, and no page map shows it.)
pub(crate) fn run(
    uffd: &Uffd,
    fill: Fill<'_>,
    start: RegisteredAddress,
    length: u64,
    page_size: u64,
    presence: Option<&Presence>,
) -> Filled {
    let presence = presence.filter(|_| matches!(fill, Fill::Copy(_) | Fill::Early(_)));
    let mut filled = Filled::default();
    let mut limit = length;
    let mut doubts = 0;
    while filled.reached() < length {
        let at = filled.reached();
        let asked = limit.min(length - at);
        let (placed, result) = once(uffd, fill, start.0 + at, at, asked);
        filled.installed += placed;
        if placed > 0 {
            doubts = 0;
        }
        match result {
            Ok(()) => limit = limit.saturating_mul(2),
            // Fewer than asked for, and some: the next call says what is in the way.
            Err(Errno::EAGAIN) if placed > 0 => {}
            // One call serves one mapping, and advice about a part of the memory cuts it in
            // several: the border is found by halves.
            Err(Errno::ENOENT) if asked > page_size => {
                limit = (asked / 2).next_multiple_of(page_size);
            }
            Err(Errno::EEXIST) => {
                let there = RegisteredAddress(start.0 + at + placed);
                match presence.map_or(Ok(true), |it| it.is_there(there)) {
                    Ok(true) => (filled.present, doubts) = (filled.present + page_size, 0),
                    Ok(false) if doubts < DOUBTS => {
                        std::thread::sleep(DOUBT * 2_u32.pow(doubts));
                        doubts += 1;
                    }
                    Ok(false) => {
                        filled.stopped = Some(Stopped::Failed(Errno::ENOMEM));
                        return filled;
                    }
                    // Its page map ends with its memory.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        filled.stopped = Some(Stopped::ProcessGone);
                        return filled;
                    }
                    Err(error) => {
                        tracing::error!(%error, address = %there, "a page map cannot be read");
                        filled.stopped = Some(Stopped::Failed(Errno::EIO));
                        return filled;
                    }
                }
            }
            Err(Errno::EFAULT) if matches!(fill, Fill::Continue) => filled.holes += page_size,
            Err(errno) => {
                filled.stopped = Some(match errno {
                    Errno::EAGAIN => Stopped::EventPending,
                    // An older kernel.
                    Errno::EINVAL if matches!(fill, Fill::Poison) => Stopped::Failed(errno),
                    Errno::ENOENT | Errno::EINVAL => Stopped::NotRegistered,
                    Errno::ESRCH => Stopped::ProcessGone,
                    other => Stopped::Failed(other),
                });
                return filled;
            }
        }
    }
    filled
}

/// One call: how many bytes it placed, and what it said.
fn once(uffd: &Uffd, fill: Fill<'_>, start: u64, at: u64, len: u64) -> (u64, Result<(), Errno>) {
    let fd = uffd.as_raw_fd();
    let mut range = RangeArgument { start, len, mode: 0, done: 0 };
    let (done, result) = match fill {
        Fill::Copy(content) | Fill::Early(content) => {
            let content = &content[at as usize..];
            assert!(content.len() as u64 >= len, "content shorter than its pages");
            let src = content.as_ptr() as u64;
            let mode = if matches!(fill, Fill::Early(_)) { COPY_DONTWAKE } else { 0 };
            let mut copy = CopyArgument { dst: start, src, len, mode, copy: 0 };
            // SAFETY: the argument has the kernel's layout and lives through the call;
            // `content` is readable for `len` bytes; the kernel writes only to pages that
            // are registered with this descriptor and were missing.
            let result = unsafe { uffdio_copy(fd, &raw mut copy) };
            (copy.copy, result)
        }
        Fill::Zero => {
            // SAFETY: as above; no memory of ours is read.
            let result = unsafe { uffdio_zeropage(fd, &raw mut range) };
            (range.done, result)
        }
        Fill::Continue => {
            // SAFETY: as above; no memory of ours is read.
            let result = unsafe { uffdio_continue(fd, &raw mut range) };
            (range.done, result)
        }
        Fill::Poison => {
            // SAFETY: as above; no memory of ours is read.
            let result = unsafe { uffdio_poison(fd, &raw mut range) };
            (range.done, result)
        }
    };
    // A negative count repeats the error; kernels differ in whether they write one.
    (u64::try_from(done).unwrap_or(0), result.map(drop))
}

#[cfg(test)]
mod tests;
