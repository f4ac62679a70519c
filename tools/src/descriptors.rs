//! Receiving descriptors beside bytes, without losing one.
//!
//! Invariant: each descriptor that the kernel has installed in this process has an owner when
//! a call here returns, whatever it returns. The wrapper of the system call gives none of them
//! out if some were cut off, so the control messages are read here.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};

/// The most descriptors that one message can carry.
const MOST: usize = 253;
/// Bytes of a control message before its content: length, level, type.
const HEADER: usize = size_of::<usize>() + 2 * size_of::<i32>();

/// What one call has received.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes, at the start of the buffer; 0 at the end of the connection.
    pub(crate) length: usize,
    pub(crate) files: Vec<OwnedFd>,
    /// The bytes did not fit, or descriptors were lost because this process can have no more.
    pub(crate) is_cut: bool,
}

/// Receives bytes and the descriptors beside them, which children do not inherit. Blocks if
/// the socket does.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = vec![0; HEADER + MOST * size_of::<RawFd>() + HEADER];
    let mut pieces = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let (length, flags) = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut control), flags) {
            Ok(message) => break (message.bytes, message.flags),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    // What was not written is zero, which ends the reading.
    let files = descriptors(&control);
    let is_cut = flags.intersects(MsgFlags::MSG_CTRUNC | MsgFlags::MSG_TRUNC);
    Ok(Received { length, files, is_cut })
}

/// All descriptors in control messages.
fn descriptors(mut control: &[u8]) -> Vec<OwnedFd> {
    let mut files = Vec::new();
    while let Some((header, rest)) = control.split_at_checked(HEADER) {
        let (length, kind) = header.split_at(size_of::<usize>());
        let length = usize::from_ne_bytes(length.try_into().expect("as long as a length"));
        let Some(length) = length.checked_sub(HEADER).filter(|it| *it <= rest.len()) else { break };
        let kind =
            [0, 4].map(|at| i32::from_ne_bytes(kind[at..][..4].try_into().expect("four bytes")));
        if kind == [libc::SOL_SOCKET, libc::SCM_RIGHTS] {
            files.extend(rest[..length].chunks_exact(size_of::<RawFd>()).map(|raw| {
                let raw = RawFd::from_ne_bytes(raw.try_into().expect("as long as a descriptor"));
                // SAFETY: the kernel has just installed it for this call's buffer, which is
                // read once; nobody else owns it yet.
                unsafe { OwnedFd::from_raw_fd(raw) }
            }));
        }
        control = &rest[length.next_multiple_of(size_of::<usize>()).min(rest.len())..];
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    fn send(socket: &UnixStream, file: BorrowedFd<'_>, count: usize) {
        let raw = vec![file.as_raw_fd(); count];
        let rights = [ControlMessage::ScmRights(&raw)];
        let bytes = [IoSlice::new(b"x")];
        sendmsg::<()>(socket.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn as_many_as_there_are_come_and_children_get_none() {
        let (one, other) = UnixStream::pair().unwrap();
        for count in [1, 2, MOST] {
            send(&one, one.as_fd(), count);
            let mut byte = [0];
            let received = receive(other.as_fd(), &mut byte).unwrap();
            assert_eq!((received.length, received.is_cut), (1, false));
            assert_eq!(received.files.len(), count);
            let flags = nix::fcntl::fcntl(&received.files[0], nix::fcntl::FcntlArg::F_GETFD);
            assert_eq!(flags.unwrap(), libc::FD_CLOEXEC);
        }
        drop(one);
        let end = receive(other.as_fd(), &mut [0]).unwrap();
        assert_eq!((end.length, end.files.len()), (0, 0));
    }

    /// In a process of its own, because the limit is the whole process's.
    #[test]
    fn role_of_a_process_with_few_descriptors() {
        if std::env::var_os("AFTERIMAGE_TEST_ROLE").is_none() {
            return;
        }
        let (one, other) = UnixStream::pair().unwrap();
        send(&one, one.as_fd(), 20);
        let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = count();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let next = one.try_clone().unwrap().as_raw_fd() as u64;
        setrlimit(Resource::RLIMIT_NOFILE, next + 5, hard).unwrap();
        let received = receive(other.as_fd(), &mut [0]).unwrap();
        assert!(received.is_cut);
        assert_eq!(received.files.len(), 5, "those that were installed have an owner");
        drop(received);
        assert_eq!(count(), before, "none is left behind");
    }

    #[test]
    fn none_is_left_behind_where_some_are_cut_off() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let role = "descriptors::tests::role_of_a_process_with_few_descriptors";
        command.args(["--exact", role, "--test-threads=1"]).env("AFTERIMAGE_TEST_ROLE", "1");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
    }
}
