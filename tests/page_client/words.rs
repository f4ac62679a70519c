//! The attachment protocol without the library: a VMM that hangs up when it likes.

use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use afterimage::DestinationMemory;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

use crate::support::LIMIT;

const PREFIX: &[u8] = b"AIMGATCH\x01\0\0\0";

/// One connection, of either side.
pub(crate) struct Words(pub(crate) UnixStream);

impl Words {
    pub(crate) fn over(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self(socket)
    }

    fn connect(path: &Path) -> Self {
        let mut words = Self::over(UnixStream::connect(path).unwrap());
        words.0.write_all(PREFIX).unwrap();
        words
    }

    /// A VMM that offers memory of one region in a file.
    pub(crate) fn attach(path: &Path, memory: &DestinationMemory) -> Self {
        Self::offer(path, memory, false)
    }

    /// The same, and another process drives it.
    pub(crate) fn attach_driven(path: &Path, memory: &DestinationMemory) -> Self {
        Self::offer(path, memory, true)
    }

    fn offer(path: &Path, memory: &DestinationMemory, driven: bool) -> Self {
        let mut words = Self::connect(path);
        let region = &memory.layout().regions()[0];
        let (file, offset) = memory.file(0).unwrap().expect("it has a file");
        words.say(
            &json!({"say": "attach", "name": "guest", "files": 1, "driven": driven, "regions": [{
                "guest_address": region.guest_address.0,
                "address": region.registered.unwrap().0,
                "length": region.length,
                "page_size": region.page_size.bytes(),
                "file": [0, offset],
            }]}),
        );
        let uffd = memory.userfaultfd().unwrap();
        let files = [uffd.as_raw_fd(), file.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&files)];
        let carrier = [IoSlice::new(b"D")];
        sendmsg::<()>(words.0.as_raw_fd(), &carrier, &rights, MsgFlags::empty(), None).unwrap();
        words
    }

    /// A VMM that returns to a successor.
    pub(crate) fn back(path: &Path) -> Self {
        let mut words = Self::connect(path);
        words.say(&json!({"say": "return", "name": "guest"}));
        words
    }

    /// A process that drives a guest.
    pub(crate) fn drive(path: &Path, name: &str) -> Self {
        let mut words = Self::connect(path);
        words.say(&json!({"say": "drive", "name": name}));
        words
    }

    pub(crate) fn say(&mut self, word: &Value) {
        let text = word.to_string();
        self.0.write_all(&(text.len() as u32).to_le_bytes()).unwrap();
        self.0.write_all(text.as_bytes()).unwrap();
    }

    /// The next word; `None` at the end of the connection.
    pub(crate) fn hear(&mut self) -> Option<Value> {
        let mut length = [0; 4];
        match self.0.read_exact(&mut length) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return None,
            Err(error) => panic!("no word: {error}"),
        }
        let mut text = vec![0; u32::from_le_bytes(length) as usize];
        self.0.read_exact(&mut text).unwrap();
        Some(serde_json::from_slice(&text).unwrap())
    }

    /// What is said until the end of the connection.
    pub(crate) fn all(&mut self) -> Vec<String> {
        let words = std::iter::from_fn(|| self.hear());
        words.map(|word| word["say"].as_str().unwrap().to_owned()).collect()
    }

    /// Hears these, in this order.
    pub(crate) fn expect(&mut self, expected: &[&str]) {
        for say in expected {
            let word = self.hear().unwrap_or_else(|| panic!("the end instead of {say}"));
            assert_eq!(word["say"], *say, "{word}");
        }
    }
}

/// Reads what a VMM says before its first word.
pub(crate) fn read_prefix(socket: &mut UnixStream) {
    let mut prefix = [0; PREFIX.len()];
    socket.read_exact(&mut prefix).unwrap();
    assert_eq!(prefix, PREFIX);
}
