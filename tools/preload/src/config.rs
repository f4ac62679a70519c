//! What the environment says. It is read once, when a file is mapped for the first time, and
//! copied: the VMM may change it later.

use crate::refusal::{ConfigError, Shown};
use crate::system::{self, MapCall};
use std::ffi::CStr;
use std::sync::OnceLock;

/// Which memory, whose, and where to hand it over.
#[derive(Debug)]
pub(crate) struct Config {
    memory: &'static [u8],
    socket: Option<&'static [u8]>,
    tracking: Option<&'static [u8]>,
    guest: Option<&'static [u8]>,
    hole: Option<&'static [u8]>,
}

/// What is to become of the memory that is named, and at which socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Its content arrives: the path of page-client's socket.
    Serve(&'static [u8]),
    /// It is there; whoever migrates it later connects to a socket at this path.
    Track(&'static [u8]),
}

/// Guest addresses that are no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hole {
    Pc,
    None,
}

/// One of the pieces of memory that are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A file.
    Path(&'static [u8]),
    /// A memfd, by the name that it was given when it was made.
    Memfd(&'static [u8]),
}

impl Entry {
    /// Its name, for people.
    pub(crate) const fn shown(self) -> Shown {
        let (Self::Path(name) | Self::Memfd(name)) = self;
        Shown(name)
    }
}

/// Between the names of memory. It may not be part of a path, whose file can have another name.
const SEPARATOR: u8 = b';';

/// Whether any memory is named. Cheap.
pub(crate) fn is_in_use() -> bool {
    get().is_some()
}

/// `None` if the environment names no memory.
pub(crate) fn get() -> Option<&'static Config> {
    static CONFIG: OnceLock<Option<Config>> = OnceLock::new();
    if let Some(known) = CONFIG.get() {
        return known.as_ref();
    }
    // SAFETY: a pointer that the C library has set when it was initialised.
    if unsafe { libc_environ() }.is_null() {
        return None;
    }
    CONFIG.get_or_init(read).as_ref()
}

/// The environment; null before the C library was initialised.
unsafe fn libc_environ() -> *const *const libc::c_char {
    unsafe extern "C" {
        static environ: *const *const libc::c_char;
    }
    // SAFETY: the pointer itself is only written by whoever changes the environment as a whole.
    unsafe { environ }
}

fn read() -> Option<Config> {
    let memory = variable(c"AFTERIMAGE_MEMORY")?;
    Some(Config {
        memory,
        socket: variable(c"AFTERIMAGE_SOCKET"),
        tracking: variable(c"AFTERIMAGE_TRACKING"),
        guest: variable(c"AFTERIMAGE_GUEST"),
        hole: variable(c"AFTERIMAGE_HOLE"),
    })
}

/// A copy of a variable that is not empty, kept for good.
fn variable(name: &CStr) -> Option<&'static [u8]> {
    // SAFETY: the name ends with a 0. Like everybody who reads the environment this relies on
    // nobody changing it at the same time.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: a value of the environment ends with a 0.
    let value = unsafe { CStr::from_ptr(value) }.to_bytes();
    if value.is_empty() { None } else { Some(copy(value)) }
}

/// Memory of its own, past the allocator, which may be the one that is mapping.
fn copy(value: &[u8]) -> &'static [u8] {
    let call = MapCall {
        address: std::ptr::null_mut(),
        length: value.len(),
        protection: libc::PROT_READ | libc::PROT_WRITE,
        flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        fd: -1,
        offset: 0,
    };
    // SAFETY: new memory, wherever there is room.
    let memory = unsafe { call.make() };
    if memory == libc::MAP_FAILED {
        system::end(&ConfigError::NoMemory);
    }
    // SAFETY: `memory` is a mapping of so many bytes, which nobody else knows, nobody writes after
    // this, and nobody unmaps.
    unsafe {
        std::ptr::copy_nonoverlapping(value.as_ptr(), memory.cast(), value.len());
        std::slice::from_raw_parts(memory.cast(), value.len())
    }
}

impl Config {
    /// The pieces of memory that are named, in the order of their guest addresses.
    pub(crate) fn entries(&self) -> impl Iterator<Item = Result<Entry, ConfigError>> + use<> {
        self.memory.split(|byte| *byte == SEPARATOR).map(entry)
    }

    /// What is done with the memory as it is mapped.
    pub(crate) fn purpose(&self) -> Result<Purpose, ConfigError> {
        // What is wrong is said before anything is begun.
        let tracking = self.tracking().transpose()?;
        match (self.socket, tracking) {
            (Some(given), _) => {
                path(given).map(Purpose::Serve).ok_or(ConfigError::Socket(Shown(given)))
            }
            (None, Some(path)) => Ok(Purpose::Track(path)),
            (None, None) => Err(ConfigError::NoSocket),
        }
    }

    /// Where whoever migrates the memory away connects, once it is complete.
    pub(crate) fn tracking(&self) -> Option<Result<&'static [u8], ConfigError>> {
        let given = self.tracking?;
        Some(path(given).ok_or(ConfigError::Tracking(Shown(given))))
    }

    /// Whose memory it is.
    pub(crate) fn guest(&self) -> Result<&'static str, ConfigError> {
        let given = self.guest.ok_or(ConfigError::NoGuest)?;
        std::str::from_utf8(given).map_err(|_| ConfigError::Guest(Shown(given)))
    }

    pub(crate) fn hole(&self) -> Result<Hole, ConfigError> {
        match self.hole {
            None | Some(b"pc") => Ok(Hole::Pc),
            Some(b"none") => Ok(Hole::None),
            Some(other) => Err(ConfigError::Hole(Shown(other))),
        }
    }
}

fn path(address: &'static [u8]) -> Option<&'static [u8]> {
    address.strip_prefix(b"unix:").filter(|path| !path.is_empty())
}

fn entry(text: &'static [u8]) -> Result<Entry, ConfigError> {
    match text.strip_prefix(b"memfd:") {
        Some(name) if !name.is_empty() => Ok(Entry::Memfd(name)),
        None if text.starts_with(b"/") => Ok(Entry::Path(text)),
        _ => Err(ConfigError::Memory(Shown(text))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn of(memory: &'static [u8]) -> Config {
        Config { memory, socket: None, tracking: None, guest: None, hole: None }
    }

    #[test]
    fn memory_is_named_by_paths_and_memfds() {
        let entries: Result<Vec<_>, _> = of(b"/a:b,c;memfd:x:y;/d").entries().collect();
        let expected = [Entry::Path(b"/a:b,c"), Entry::Memfd(b"x:y"), Entry::Path(b"/d")];
        assert_eq!(entries.unwrap(), expected);
        for wrong in [b"ram".as_slice(), b"/a;", b"memfd:", b"/a;;/b"] {
            let entries: Result<Vec<_>, _> = of(wrong).entries().collect();
            let error = entries.unwrap_err().to_string();
            assert!(error.contains("memfd:NAME"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_says_what_would_be_right() {
        let with = |socket, guest, hole| Config { socket, guest, hole, ..of(b"/a") };
        let right = with(Some(b"unix:/s"), Some(b"vm7"), Some(b"none"));
        assert_eq!(right.purpose().unwrap(), Purpose::Serve(b"/s"));
        assert_eq!(right.guest().unwrap(), "vm7");
        assert_eq!(right.hole().unwrap(), Hole::None);
        let empty = with(None, None, None);
        assert_eq!(empty.hole().unwrap(), Hole::Pc);
        assert!(empty.purpose().unwrap_err().to_string().contains("unix:PATH"));
        assert!(empty.guest().unwrap_err().to_string().contains("AFTERIMAGE_GUEST"));
        let wrong = with(Some(b"tcp:x:1"), Some(b"\xff"), Some(b"isa"));
        assert!(wrong.purpose().unwrap_err().to_string().contains("unix:PATH"));
        assert!(wrong.guest().unwrap_err().to_string().contains("AFTERIMAGE_GUEST"));
        assert!(wrong.hole().unwrap_err().to_string().contains("pc or none"));
    }

    #[test]
    fn memory_is_tracked_where_it_does_not_arrive() {
        let with = |socket, tracking| Config { socket, tracking, ..of(b"/a") };
        let (socket, tracking) = (Some(b"unix:/s".as_slice()), Some(b"unix:/t".as_slice()));
        assert_eq!(with(None, tracking).purpose().unwrap(), Purpose::Track(b"/t"));
        assert_eq!(with(socket, tracking).purpose().unwrap(), Purpose::Serve(b"/s"));
        assert_eq!(with(socket, tracking).tracking().unwrap().unwrap(), b"/t");
        let wrong = with(socket, Some(b"/t")).purpose().unwrap_err().to_string();
        assert!(wrong.contains("AFTERIMAGE_TRACKING") && wrong.contains("unix:PATH"), "{wrong}");
    }

    #[test]
    fn a_copy_holds_what_it_was_made_of() {
        let long = vec![7; 10_000];
        assert_eq!(copy(&long), long);
    }
}
