//! Letting whoever migrates the guest away find out what it writes: memory that is complete is
//! handed, with a userfaultfd for asynchronous write protection, to a process that connects.
//!
//! Registering, and looking at the page map, is that process's affair: the other side of the
//! protocol of docs/preload.md is `afterimage_tools::tracking`. Nothing is tracked before somebody
//! connects, nor after he has gone: the userfaultfd is his alone.
//!
//! Invariant: as long as somebody is connected, no memory that he tracks is mapped a second time
//! for writing, nor moved: what is written there he would not see.

use crate::config;
use crate::connection::{Connection, RegionOfVmm};
use crate::maps;
use crate::memory;
use crate::named::OpenFile;
use crate::pinned;
use crate::refusal::{Failed, Refusal, Shown, Why};
use crate::system::{MapCall, last_error};
use crate::table::Table;
use crate::uffd;
use libc::{c_int, c_void};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use serde::Serialize;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Somebody tracks the memory, or is about to. Changed and used under the lock of the table.
static IS_TRACKED: AtomicBool = AtomicBool::new(false);

/// The first bytes of a connection, and the version.
const PREFIX: &[u8] = b"AIMGTRCK\x01\0\0\0";
const STACK: usize = 256 << 10;
/// After somebody could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens at a path from here on. Must be called with all signals blocked.
///
/// # Errors
/// A line that says what is wrong and how to mend it.
pub(crate) fn begin(path: &'static [u8]) -> Result<(), String> {
    drop(uffd::for_tracking().map_err(|error| {
        format!("guest memory cannot be tracked: {error}; without AFTERIMAGE_TRACKING it is not")
    })?);
    let at = Shown(path);
    let listener = listen(Path::new(OsStr::from_bytes(path))).map_err(|error| {
        format!("could not listen at unix:{at} ({error}): is it another VMM's, or its directory missing?")
    })?;
    let thread = thread::Builder::new().name("afterimage".to_owned()).stack_size(STACK);
    thread
        .spawn(move || serve(&listener))
        .map(drop)
        .map_err(|error| format!("guest memory cannot be tracked: no thread is to be had: {error}"))
}

/// A mapping of named memory that is complete. Called with the lock of the table, under which
/// nobody begins to track.
pub(crate) fn map(
    table: &Table,
    call: &MapCall,
    file: &OpenFile,
    name: Shown,
) -> Option<Result<*mut c_void, c_int>> {
    if !call.is_shared() || !call.is_writable() {
        return None;
    }
    let is_in_place = call.flags & libc::MAP_FIXED != 0
        && table.regions().any(|region| {
            let place = call.address as u64;
            (region.address..region.address + region.length).contains(&place)
        });
    let region = table.regions().find(|region| region.file == file.id)?;
    if IS_TRACKED.load(Ordering::Acquire) && !is_in_place {
        let refusal = Refusal { name, why: Why::Tracked { at: region.address } };
        return Some(Err(memory::refuse(&refusal)));
    }
    // SAFETY: the caller's promises, which it has made to mmap.
    let address = unsafe { call.make() };
    Some(if address == libc::MAP_FAILED { Err(last_error()) } else { Ok(address) })
}

/// A socket that a process left behind that died is replaced.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = fs::symlink_metadata(path)?.file_type().is_socket();
            let is_dead = UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if !(is_socket && is_dead) {
                return Err(error);
            }
            fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    // Who connects before is looked at as well.
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// What is said to who connects.
#[derive(Serialize)]
#[serde(tag = "say", rename_all = "snake_case")]
enum Word {
    /// Here it is; the userfaultfd and the files follow.
    Tracked {
        files: usize,
        regions: Vec<RegionOfVmm>,
    },
    Refused {
        reason: String,
    },
}

fn serve(listener: &UnixListener) {
    let mut holder: Option<Connection> = None;
    loop {
        let held = holder.as_ref().map(|it| it.socket().as_fd());
        let wanted = [Some(listener.as_fd()), held].into_iter().flatten();
        let mut waiting: Vec<_> = wanted.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        if poll(&mut waiting, PollTimeout::NONE).is_err() {
            thread::sleep(PAUSE);
            continue;
        }
        let has_news = |at: usize| waiting.get(at).and_then(PollFd::any).unwrap_or(false);
        let (somebody_comes, holder_goes) = (has_news(0), has_news(1));
        // A holder has nothing to say.
        if holder_goes {
            release();
            holder = None;
        }
        if somebody_comes {
            match listener.accept() {
                // Who gets nothing is told why, or has gone.
                Ok((socket, _)) => holder = greet(socket, holder),
                // No descriptors, perhaps: there may be some later.
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
}

/// Hands the memory to who comes, unless somebody has it.
fn greet(socket: UnixStream, holder: Option<Connection>) -> Option<Connection> {
    let peer = getsockopt(&socket, sockopt::PeerCredentials).ok()?;
    let mut connection = Connection::over(socket).ok()?;
    let own = nix::unistd::geteuid().as_raw();
    let reason = if ![own, 0].contains(&peer.uid()) {
        "only its own user and root may track a guest".to_owned()
    } else if holder.is_some() {
        "another process tracks this guest already: wait until it is done".to_owned()
    } else {
        match lend() {
            Ok((word, descriptors)) => {
                let sent = connection
                    .greet(PREFIX, &word)
                    .and_then(|()| connection.send_descriptors(&descriptors));
                if sent.is_ok() {
                    return Some(connection);
                }
                release();
                return None;
            }
            Err(reason) => {
                release();
                reason
            }
        }
    };
    // He may have gone.
    let _ = connection.greet(PREFIX, &Word::Refused { reason });
    holder
}

/// From here on memory stays where it is.
fn lend() -> Result<(Word, Vec<OwnedFd>), String> {
    let config = config::get().ok_or("no memory is named")?;
    let uffd = uffd::for_tracking().map_err(|error| error.to_string())?;
    memory::with_table(|table| {
        IS_TRACKED.store(true, Ordering::Release);
        pinned::set(table);
        check(table)?;
        let hole = config.hole().map_err(|error| error.to_string())?;
        let regions = table.layout(hole).iter().map(RegionOfVmm::from).collect();
        let files = table.files().into_iter().map(|file| file.try_clone_to_owned());
        let files = files.collect::<io::Result<Vec<_>>>().map_err(|error| error.to_string())?;
        let word = Word::Tracked { files: files.len(), regions };
        Ok((word, std::iter::once(uffd).chain(files).collect()))
    })
}

/// All of it is where it was, and nowhere else.
fn check(table: &Table) -> Result<(), String> {
    let failed = |error| format!("/proc/self/maps of the VMM cannot be read: {}", Failed(error));
    for region in table.regions() {
        if !maps::is_there(region).map_err(failed)? {
            let at = region.address;
            return Err(format!("the VMM has guest memory not mapped at {at:#x} any more"));
        }
    }
    match maps::second_writable(table).map_err(failed)? {
        Some(at) => Err(format!(
            "the VMM has guest memory mapped a second time for writing, at {at:#x}: what is \
             written there would not be seen"
        )),
        None => Ok(()),
    }
}

fn release() {
    memory::with_table(|_| {
        IS_TRACKED.store(false, Ordering::Release);
        pinned::clear();
    });
}
