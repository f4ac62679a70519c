//! A second process that runs the same test in another role, and descriptors handed over
//! between the two.

use super::{DEADLINE, await_readable};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Instant;

const SOCKET: &str = "AFTERIMAGE_TEST_SOCKET";

/// The socket to the parent, in a process that [`Child::start`] made.
pub(crate) fn child_socket() -> Option<UnixStream> {
    let path = std::env::var_os(SOCKET)?;
    let socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    Some(socket)
}

/// This test again, in a process of its own.
#[derive(Debug)]
pub(crate) struct Child {
    process: std::process::Child,
    pub(crate) socket: UnixStream,
}

impl Child {
    /// Runs the test of this full name once more; there [`child_socket`] is the other end.
    pub(crate) fn start(test: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(SOCKET, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        await_readable(&listener, "the child to connect");
        let socket = listener.accept().unwrap().0;
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { process, socket }
    }

    /// Closes the socket, waits for the child's end and says whether it was content.
    pub(crate) fn end(mut self) -> bool {
        drop(self.socket);
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.success();
            }
            if start.elapsed() > DEADLINE {
                self.process.kill().unwrap();
                panic!("the child did not end");
            }
            std::thread::yield_now();
        }
    }
}

/// Sends words and descriptors in one message.
pub(crate) fn send(socket: &UnixStream, words: &[u64], descriptors: &[BorrowedFd<'_>]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let content = [IoSlice::new(&bytes)];
    let sent = sendmsg::<UnixAddr>(socket.as_raw_fd(), &content, control, MsgFlags::empty(), None);
    assert_eq!(sent.unwrap(), bytes.len());
}

/// Receives what one [`send`] sent.
pub(crate) fn receive(socket: &UnixStream) -> (Vec<u64>, Vec<OwnedFd>) {
    let mut bytes = [0; 512];
    let mut room = nix::cmsg_space!([i32; 8]);
    let mut content = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message =
        recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut content, Some(&mut room), flags).unwrap();
    let mut descriptors = Vec::new();
    for control in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for us.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let length = message.bytes;
    let words = bytes[..length].chunks_exact(8);
    (words.map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect(), descriptors)
}
