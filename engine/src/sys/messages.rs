//! Reading a userfaultfd into memory that may outlive the process.
//!
//! What has been read is never told again, and whoever discards goes on as soon as his
//! message has been read. A process that dies between reading a discard and noting it would
//! bring the page back: so messages are read straight to where a successor finds them, and
//! are wiped only when they have been dealt with. (The `userfaultfd` crate reads into a
//! buffer of its own.)
//!
//! Invariant: a message that has been read is in these words until [`wipe`](Messages::wipe).

use super::words::LazyWords;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use userfaultfd::Uffd;

/// Messages read in one call.
const BATCH: usize = 32;
/// Words of a `struct uffd_msg`: what happened in the lowest byte of the first, then three
/// arguments.
const MESSAGE_WORDS: usize = 4;

const PAGEFAULT: u8 = 0x12;
const FORK: u8 = 0x13;
const REMAP: u8 = 0x14;
const REMOVE: u8 = 0x15;
const UNMAP: u8 = 0x16;
const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// What a userfaultfd tells.
#[derive(Debug)]
pub(crate) enum Message {
    /// Somebody waits for a page.
    Fault { address: u64, is_minor: bool },
    /// Memory was given up: by madvise, or unmapped.
    Gone { start: u64, end: u64 },
    /// The process has forked; the child's memory hangs on this descriptor.
    Forked(RawFd),
    /// Memory was moved.
    Moved { from: u64, to: u64, length: u64 },
    /// Nothing that was asked for.
    Unknown(u8),
}

/// Room for the messages of one read.
#[derive(Debug)]
pub(crate) struct Messages(LazyWords);

impl Messages {
    /// How many words it needs.
    pub(crate) const WORDS: usize = BATCH * MESSAGE_WORDS;

    /// In these words, with the messages that they hold.
    ///
    /// # Panics
    /// If there are too few.
    pub(crate) fn over(words: LazyWords) -> Self {
        assert!(words.as_ref().len() >= Self::WORDS);
        Self(words)
    }

    /// Reads what there is without blocking, and says how many; more may be there if
    /// [`are_full`](Self::are_full). What was read before must have been wiped.
    pub(crate) fn read(&self, uffd: &Uffd) -> io::Result<usize> {
        let words = &self.0.as_ref()[..Self::WORDS];
        // Resident before the kernel writes: a dying process may not be able to wait for a
        // page, and the message would be lost between the kernel's hands and ours.
        words[0].store(0, Ordering::Release);
        let (start, room) = (words.as_ptr().cast_mut(), size_of_val(words));
        // SAFETY: the words are writable, lie in one mapping that `self` holds, and are read
        // only after the call.
        let got = unsafe { libc::read(uffd.as_raw_fd(), start.cast(), room) };
        match usize::try_from(got) {
            Ok(bytes) => Ok(bytes / (MESSAGE_WORDS * 8)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error => Err(error),
            },
        }
    }

    /// Whether a read that brought so many may have left some.
    pub(crate) const fn are_full(count: usize) -> bool {
        count >= BATCH
    }

    /// One of those read.
    pub(crate) fn get(&self, index: usize) -> Message {
        let words = &self.0.as_ref()[index * MESSAGE_WORDS..][..MESSAGE_WORDS];
        let word = |at: usize| words[at].load(Ordering::Acquire);
        match word(0) as u8 {
            PAGEFAULT => {
                Message::Fault { address: word(2), is_minor: word(1) & PAGEFAULT_FLAG_MINOR != 0 }
            }
            REMOVE | UNMAP => Message::Gone { start: word(1), end: word(2) },
            FORK => Message::Forked(word(1) as u32 as RawFd),
            REMAP => Message::Moved { from: word(1), to: word(2), length: word(3) },
            other => Message::Unknown(other),
        }
    }

    /// What a process before this one has read and may not have dealt with.
    pub(crate) fn left_behind(&self) -> impl Iterator<Item = Message> {
        (0..BATCH).map(|index| self.get(index)).filter(|it| !matches!(it, Message::Unknown(0)))
    }

    /// All that was read has been dealt with, durably.
    pub(crate) fn wipe(&self, count: usize) {
        for message in self.0.as_ref()[..Self::WORDS].chunks(MESSAGE_WORDS).take(count) {
            // After everything that dealing with it has written.
            AtomicU64::store(&message[0], 0, Ordering::Release);
        }
    }

    /// The same for whatever is there.
    pub(crate) fn wipe_all(&self) {
        self.wipe(BATCH);
    }
}

/// Takes the descriptor of a child's memory.
pub(crate) fn child_of(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel has made it for the message that named it, which is read once.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}
