//! Other processes, as descriptors that become readable when they end.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

/// `SO_PEERPIDFD`, since Linux 6.5.
const PEER_PIDFD: i32 = 77;

/// The process that has connected a Unix socket: its id, and a descriptor of it.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> io::Result<(i32, OwnedFd)> {
    let pid = getsockopt(&socket, sockopt::PeerCredentials)?.pid();
    let descriptor = match peer_descriptor(socket) {
        // An older kernel. Otherwise the number may be another's by now.
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => open(pid)?,
        other => other?,
    };
    Ok((pid, descriptor))
}

/// The number of a process now; `None` if it has ended.
///
/// # Errors
/// Also if it is in no name space of numbers that this one sees.
pub(crate) fn number(process: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd()))?;
    let number =
        info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
    match number {
        Some(-1) => Ok(None),
        Some(number @ 1..) => Ok(Some(number.unsigned_abs())),
        _ => Err(io::Error::other("it is in another name space of processes")),
    }
}

/// Kills a process.
pub(crate) fn kill(process: BorrowedFd<'_>) -> io::Result<()> {
    let (fd, signal) = (process.as_raw_fd(), libc::SIGKILL);
    // SAFETY: the call takes numbers, and no information about the signal.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<u8>(), 0)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a process ends within `most`.
pub(crate) fn has_ended(process: BorrowedFd<'_>, most: Duration) -> bool {
    let until = Instant::now() + most;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(process, PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            other => return other.is_ok_and(|ready| ready > 0),
        }
    }
}

fn peer_descriptor(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: i32 = -1;
    let mut length = size_of::<i32>() as u32;
    // SAFETY: the option writes one descriptor, an int, and its length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            PEER_PIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An older kernel: the process may have ended, and another have its number, in between.
fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
