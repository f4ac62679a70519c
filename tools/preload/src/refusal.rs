//! Why named memory cannot be served: one line each, of what, where, and how to mend it.

use crate::uffd::UffdError;
use libc::c_int;
use std::fmt::{self, Write};

/// What the environment lacks.
#[derive(Debug)]
pub(crate) enum ConfigError {
    Memory(Shown),
    NoSocket,
    Socket(Shown),
    Tracking(Shown),
    NoGuest,
    Guest(Shown),
    Hole(Shown),
    NoMemory,
    NoDescriptors,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(text) => write!(
                f,
                "AFTERIMAGE_MEMORY names {text}: name each piece of memory by an absolute path or \
                 memfd:NAME, with ; between them"
            ),
            Self::NoSocket => f.write_str(
                "neither AFTERIMAGE_SOCKET nor AFTERIMAGE_TRACKING is set: where the guest \
                 arrives set the first to unix:PATH, as given to page-client --attach; where it \
                 runs the second",
            ),
            Self::Tracking(text) => {
                write!(f, "AFTERIMAGE_TRACKING is {text}: write unix:PATH")
            }
            Self::Socket(text) => {
                write!(f, "AFTERIMAGE_SOCKET is {text}: write unix:PATH")
            }
            Self::NoGuest => f.write_str(
                "AFTERIMAGE_GUEST is not set: set it to the guest's name, the same whenever it is \
                 started",
            ),
            Self::Guest(text) => {
                write!(f, "AFTERIMAGE_GUEST is {text}: give a name in UTF-8")
            }
            Self::Hole(text) => write!(f, "AFTERIMAGE_HOLE is {text}: write pc or none"),
            Self::NoDescriptors => f.write_str(
                "guest memory cannot be handed over: there are no descriptors left; raise the \
                 limit of open files (ulimit -n)",
            ),
            Self::NoMemory => f.write_str("there is no memory for a copy of the environment"),
        }
    }
}

/// What is wrong with a mapping of named memory.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// What it was named.
    pub(crate) name: Shown,
    pub(crate) why: Why,
}

#[derive(Debug)]
pub(crate) enum Why {
    Private,
    NotWritable,
    NoMemoryFile,
    PageSize(u64),
    Unaligned { offset: u64, length: u64, page: u64 },
    BeyondTheEnd { end: u64, size: u64 },
    NotFresh { bytes: u64 },
    Again { at: u64 },
    Elsewhere { at: u64 },
    MoreOfThatName,
    NamedTwice,
    TooMuch { most: usize },
    OfAChild { parent: c_int },
    Moved { at: u64 },
    Tracked { at: u64 },
    Uffd(UffdError),
    Register { length: u64, error: c_int },
    Advise { error: c_int },
    Maps { error: c_int },
    Descriptor { error: c_int },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.name)?;
        match &self.why {
            Why::Private => f.write_str(
                "is mapped privately, and only shared memory can be served: add share=on to the \
                 memory backend of QEMU, or map it with MAP_SHARED",
            ),
            Why::NotWritable => f.write_str(
                "is mapped without the right to read and to write, so not as guest memory; pages \
                 that have not arrived would read as zeros there: map it when all have arrived",
            ),
            Why::NoMemoryFile => f.write_str(
                "is on no file system whose faults can be served: put it on tmpfs (as /dev/shm) \
                 or hugetlbfs, or use a memfd",
            ),
            Why::PageSize(page) => {
                write!(f, "has pages of {page} bytes: use pages of 4 KiB, 2 MiB or 1 GiB")
            }
            Why::Unaligned { offset, length, page } => write!(
                f,
                "is mapped from {offset:#x} for {length:#x} bytes, which are not whole pages of \
                 {page} bytes: give the file a size that is a multiple of them"
            ),
            Why::BeyondTheEnd { end, size } => write!(
                f,
                "is mapped up to {end:#x} and has only {size:#x} bytes: give it its size before"
            ),
            Why::NotFresh { bytes } => write!(
                f,
                "holds {bytes} bytes already, which would be lost: guest memory that arrives needs \
                 a new file; remove it, if it is not the source's"
            ),
            Why::Again { at } => write!(
                f,
                "is mapped at {at:#x} already; pages that have not arrived would read as zeros \
                 in a second place: map it when all have arrived"
            ),
            Why::Elsewhere { at } => write!(
                f,
                "was mapped at {at:#x} when it was handed over, and its pages come there: map it \
                 there (MAP_FIXED), or when all have arrived"
            ),
            Why::MoreOfThatName => f.write_str(
                "is what more memory is called than AFTERIMAGE_MEMORY names: name it there once \
                 for each",
            ),
            Why::NamedTwice => f.write_str("is named twice in AFTERIMAGE_MEMORY: name it once"),
            Why::TooMuch { most } => {
                write!(f, "is too much: {most} pieces of memory can be served")
            }
            Why::OfAChild { parent } => write!(
                f,
                "is the memory of process {parent}; pages that have not arrived would read as \
                 zeros in this child of it: map it when all have arrived"
            ),
            Why::Moved { at } => write!(
                f,
                "at {at:#x} is not to be moved: pages that have not arrived would read as zeros, \
                 and writes would not be seen; move it when it is migrated"
            ),
            Why::Tracked { at } => write!(
                f,
                "at {at:#x} is being tracked for a migration: writes in a second place would not \
                 be seen; map it when it is migrated"
            ),
            Why::Uffd(error) => write!(f, "cannot be served: {error}"),
            Why::Register { length, error } => write!(
                f,
                "cannot be registered with userfaultfd for {length:#x} bytes ({}): is it mapped \
                 for writing, and by no other userfaultfd?",
                Failed(*error)
            ),
            Why::Advise { error } => {
                write!(f, "cannot be kept from children (MADV_DONTFORK: {})", Failed(*error))
            }
            Why::Descriptor { error } => write!(
                f,
                "cannot be kept open ({}): raise the limit of open files (ulimit -n)",
                Failed(*error)
            ),
            Why::Maps { error } => write!(
                f,
                "cannot be looked for in /proc/self/maps ({}): mount /proc",
                Failed(*error)
            ),
        }
    }
}

/// Bytes of the environment, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shown(pub(crate) &'static [u8]);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                if character.is_control() {
                    write!(f, "{}", character.escape_default())?;
                } else {
                    f.write_char(character)?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// An error number, in words where they are known without asking the C library, which allocates.
pub(crate) struct Failed(pub(crate) c_int);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(nix::errno::Errno::from_raw(self.0).desc())
    }
}
