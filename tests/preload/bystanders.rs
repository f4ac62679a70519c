//! What has nothing to do with guest memory is as without the library.

use std::fmt::Write;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::thread;

use libc::{c_int, c_void};
use nix::sys::signal::SigSet;

use crate::process::{Process, library, role};
use crate::vmm::{errno, set_errno};

const PAGE: usize = 4096;
const BOTH: c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Maps, remaps, forks and runs threads, and says what it finds.
pub(crate) fn act() -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(mappings());
    lines.push(failures());
    lines.push(moves());
    lines.push(forks());
    lines.push(threads());
    let blocked: Vec<_> = SigSet::thread_get_mask().unwrap().iter().collect();
    lines.push(format!("blocked {blocked:?}"));
    lines
}

/// How many descriptors this process has.
pub(crate) fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The flags that the kernel has for the mapping that begins at an address.
pub(crate) fn flags_of(start: usize) -> String {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut flags = String::new();
    let mut is_it = false;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap();
        if let Some((from, to)) = first.split_once('-') {
            let number = |text| usize::from_str_radix(text, 16);
            if let (Ok(from), Ok(to)) = (number(from), number(to)) {
                is_it = (from..to).contains(&start);
                if is_it {
                    let _ = write!(flags, "{} ", line.split(' ').nth(1).unwrap());
                }
            }
        }
        if is_it && let Some(found) = line.strip_prefix("VmFlags:") {
            flags.push_str(found.trim());
        }
    }
    flags
}

fn map(length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void {
    // SAFETY: new memory, wherever there is room.
    unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, offset) }
}

fn unmap(start: *mut c_void, length: usize) {
    // SAFETY: a mapping of the caller's, which nobody uses.
    assert_eq!(unsafe { libc::munmap(start, length) }, 0);
}

/// A byte of a mapping, written and read again.
fn write_and_read(start: *mut c_void, at: usize, byte: u8) -> u8 {
    let place = start.cast::<u8>().wrapping_add(at);
    // SAFETY: the caller's mapping is longer, and nobody else uses it.
    unsafe {
        place.write_volatile(byte);
        place.read_volatile()
    }
}

fn mappings() -> Vec<String> {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(1 << 20).unwrap();
    let fd = file.as_raw_fd();
    let (private, shared) = (libc::MAP_PRIVATE, libc::MAP_SHARED);
    let ways = [
        ("anonymous", private | libc::MAP_ANONYMOUS, -1, 0),
        ("anonymous shared", shared | libc::MAP_ANONYMOUS, -1, 0),
        // Some programs give a descriptor with it.
        ("anonymous with a file", private | libc::MAP_ANONYMOUS, fd, 0),
        ("populated", private | libc::MAP_ANONYMOUS | libc::MAP_POPULATE, -1, 0),
        ("file", shared, fd, 0),
        ("file from the middle", shared, fd, 8192),
        ("file private", private, fd, 0),
        ("file populated", shared | libc::MAP_POPULATE, fd, 0),
        ("file validated", libc::MAP_SHARED_VALIDATE, fd, 0),
    ];
    let lines = ways.into_iter().map(|(name, flags, fd, offset)| {
        set_errno(77);
        let start = map(65536, BOTH, flags, fd, offset);
        assert_ne!(start, libc::MAP_FAILED, "{name}");
        assert_eq!(errno(), 77, "{name}");
        assert_eq!(write_and_read(start, 5000, 42), 42, "{name}");
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset as u64 + 5000).unwrap();
        let writes_the_file = flags & libc::MAP_ANONYMOUS == 0 && flags & private != private;
        let is_validated = flags == libc::MAP_SHARED_VALIDATE;
        assert_eq!(byte[0] == 42, writes_the_file || is_validated, "{name}");
        let flags = flags_of(start as usize);
        unmap(start, 65536);
        file.write_all_at(&[0], offset as u64 + 5000).unwrap();
        format!("{name}: {flags}")
    });
    lines.collect()
}

fn failures() -> String {
    let directory = File::open("/").unwrap();
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    let fails = |length, fd, offset| {
        assert_eq!(map(length, BOTH, libc::MAP_SHARED, fd, offset), libc::MAP_FAILED);
        errno()
    };
    let errors = [
        fails(PAGE, 1_000_000, 0),
        fails(0, file.as_raw_fd(), 0),
        fails(PAGE, file.as_raw_fd(), 1),
        fails(PAGE, directory.as_raw_fd(), 0),
    ];
    assert_eq!(errors, [libc::EBADF, libc::EINVAL, libc::EINVAL, libc::EACCES]);
    format!("errors {errors:?}")
}

fn moves() -> String {
    let start = map(PAGE, BOTH, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
    write_and_read(start, 7, 9);
    // SAFETY: a mapping of ours, which nobody else uses; it is used where it is afterwards.
    let moved = unsafe {
        set_errno(77);
        libc::mremap(start, PAGE, 64 * PAGE, libc::MREMAP_MAYMOVE)
    };
    assert_ne!(moved, libc::MAP_FAILED);
    assert_eq!(errno(), 77);
    // SAFETY: a byte of it.
    assert_eq!(unsafe { moved.cast::<u8>().add(7).read_volatile() }, 9);
    let flags = flags_of(moved as usize);
    unmap(moved, 64 * PAGE);
    // SAFETY: nothing is there, so that nothing is moved.
    let failed = unsafe { libc::mremap(moved, PAGE, 2 * PAGE, 0) };
    assert_eq!((failed, errno()), (libc::MAP_FAILED, libc::EFAULT));
    format!("moved: {flags}")
}

fn forks() -> String {
    let private = map(PAGE, BOTH, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
    let shared = map(PAGE, BOTH, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0);
    write_and_read(private, 0, 3);
    // SAFETY: the child touches the two mappings only, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            let has = private.cast::<u8>().read_volatile() == 3;
            write_and_read(private, 0, 4);
            write_and_read(shared, 0, 5);
            libc::_exit(c_int::from(!has));
        }
    }
    let mut status = 0;
    // SAFETY: waits for the child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    // SAFETY: our own mappings.
    let found = unsafe { [private, shared].map(|it| it.cast::<u8>().read_volatile()) };
    assert_eq!((status, found), (0, [3, 5]));
    unmap(private, PAGE);
    unmap(shared, PAGE);
    "forked".to_owned()
}

fn threads() -> String {
    thread::scope(|scope| {
        for number in 0..4_u8 {
            scope.spawn(move || {
                let file = tempfile::tempfile_in("/dev/shm").unwrap();
                file.set_len(1 << 20).unwrap();
                for round in 0..100_u8 {
                    let start = map(1 << 20, BOTH, libc::MAP_SHARED, file.as_raw_fd(), 0);
                    assert_ne!(start, libc::MAP_FAILED);
                    let at = usize::from(round) * PAGE;
                    assert_eq!(write_and_read(start, at, round ^ number), round ^ number);
                    let flags = libc::MREMAP_MAYMOVE;
                    // SAFETY: a mapping of this thread's.
                    let start = unsafe { libc::mremap(start, 1 << 20, 1 << 19, flags) };
                    unmap(start, 1 << 19);
                }
            });
        }
    });
    "threads".to_owned()
}

/// What a bystander says.
fn said(mut command: Command) -> Vec<String> {
    command.env_remove("AFTERIMAGE_SOCKET");
    let (status, said, errors) = Process::start(command).end();
    assert_eq!((status, errors.as_slice()), (0, &[][..]), "{errors:#?}");
    said
}

#[test]
fn a_program_that_maps_nothing_named_is_as_without_the_library() {
    let alone = said(role("bystander", &[]));
    assert!(alone.len() > 12, "{alone:#?}");
    let mut preloaded = role("bystander", &[]);
    preloaded.env("LD_PRELOAD", library());
    assert_eq!(said(preloaded), alone, "no memory is named");
    let mut named = role("bystander", &[]);
    named.env("LD_PRELOAD", library()).env("AFTERIMAGE_MEMORY", "/dev/shm/vm7;memfd:ram");
    assert_eq!(said(named), alone, "memory is named that it does not map");
}

/// A program of the system, written by others.
#[test]
fn other_programs_run_as_ever() {
    for command in [["sh", "-c", "echo one | tr o x"], ["grep", "root", "/etc/passwd"]] {
        let output = |preload: bool| {
            let mut command_line = Command::new(command[0]);
            command_line.args(&command[1..]);
            if preload {
                command_line.env("LD_PRELOAD", library()).env("AFTERIMAGE_MEMORY", "memfd:ram");
            }
            let output = command_line.output().unwrap();
            (output.status.code(), output.stdout, output.stderr)
        };
        assert_eq!(output(true), output(false));
    }
}
