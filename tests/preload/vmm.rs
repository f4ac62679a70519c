//! A program that maps memory as it is told to.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::Error;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Barrier;
use std::thread::{self, JoinHandle};

use libc::c_int;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::bystanders;
use crate::content::{self, PAGE};
use crate::process;

/// Files and mappings by the names that the test gives them.
#[derive(Default)]
pub(crate) struct Vmm {
    files: HashMap<String, OwnedFd>,
    maps: HashMap<String, Map>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Clone, Copy)]
struct Map {
    start: usize,
    length: usize,
}

impl Map {
    fn page(self, page: u64) -> *mut u8 {
        assert!(page * PAGE < self.length as u64);
        (self.start + (page * PAGE) as usize) as *mut u8
    }
}

impl Vmm {
    /// Does what a line says, and answers.
    pub(crate) fn take(&mut self, line: &str) -> String {
        let words: Vec<_> = line.split(' ').collect();
        match words.as_slice() {
            ["open", name, path, bytes] => self.open(name, path, number(bytes)),
            ["memfd", name, called, bytes] => self.memfd(name, called, number(bytes), false),
            ["huge", name, called, bytes] => self.memfd(name, called, number(bytes), true),
            ["held", name] => {
                return nix::sys::stat::fstat(&self.files[*name]).unwrap().st_blocks.to_string();
            }
            ["close", name] => drop(self.files.remove(*name)),
            ["map", map, name, offset, bytes, how] => {
                return self.map(map, name, number(offset), number(bytes), how);
            }
            ["together", names @ ..] => self.map_together(names),
            ["unmap", map] => self.unmap(map),
            ["move", map] => return self.remap(map, self.maps[*map].length),
            ["copy", map] => return self.remap(map, 0),
            ["check", map, at, first, pages] => {
                check(self.maps[*map], number(at), number(first), number(pages));
            }
            ["start", map, at, first, pages] => {
                let (map, at, first, pages) =
                    (self.maps[*map], number(at), number(first), number(pages));
                self.threads.push(thread::spawn(move || check(map, at, first, pages)));
            }
            ["wait"] => self.threads.drain(..).for_each(|thread| thread.join().unwrap()),
            ["send", map, page, first] => self.send(map, number(page), number(first)),
            ["write", map, page] => {
                // SAFETY: a page of a mapping that is there.
                unsafe { self.maps[*map].page(number(page)).write_bytes(0x5a, PAGE as usize) };
            }
            ["read", map, page] => {
                // SAFETY: a page of a mapping that is there.
                let byte = unsafe { self.maps[*map].page(number(page)).read_volatile() };
                return format!("{byte:#x}");
            }
            ["discard", map, page] => self.discard(map, number(page)),
            ["smaps", map] => return bystanders::flags_of(self.maps[*map].start),
            ["fork", map, name] => return self.fork(map, name),
            ["exec"] => return exec(),
            ["others"] => return bystanders::act().join(", "),
            ["threads"] => return thread_names(),
            ["userfaultfds"] => return userfaultfds().to_string(),
            // SAFETY: takes numbers only.
            ["nobody"] => assert_eq!(unsafe { libc::setresuid(65534, 65534, 65534) }, 0),
            _ => panic!("not understood: {line}"),
        }
        "ok".to_owned()
    }

    fn open(&mut self, name: &str, path: &str, bytes: u64) {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.unwrap();
        file.set_len(bytes).unwrap();
        self.files.insert(name.to_owned(), file.into());
    }

    fn memfd(&mut self, name: &str, called: &str, bytes: u64, is_huge: bool) {
        let huge = if is_huge { MFdFlags::MFD_HUGETLB } else { MFdFlags::empty() };
        let called = CString::new(called).unwrap();
        let file =
            File::from(memfd_create(called.as_c_str(), MFdFlags::MFD_CLOEXEC | huge).unwrap());
        file.set_len(bytes).unwrap();
        self.files.insert(name.to_owned(), file.into());
    }

    fn map(&mut self, map: &str, name: &str, offset: u64, bytes: u64, how: &str) -> String {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let mut at = 0;
        let (protection, flags) = match how {
            "shared" => (both, libc::MAP_SHARED),
            "private" => (both, libc::MAP_PRIVATE),
            "read-only" => (libc::PROT_READ, libc::MAP_SHARED),
            "populate" => (both, libc::MAP_SHARED | libc::MAP_POPULATE),
            "in-place" => {
                at = self.maps[map].start + offset as usize;
                (both, libc::MAP_SHARED | libc::MAP_FIXED)
            }
            // As QEMU does: the addresses are reserved first.
            "reserved" => {
                at = reserve(bytes);
                (both, libc::MAP_SHARED | libc::MAP_FIXED)
            }
            _ => panic!("no way to map: {how}"),
        };
        let fd = self.files[name].as_raw_fd();
        // SAFETY: new memory, or in the place of memory that nobody uses.
        let start = unsafe {
            set_errno(77);
            libc::mmap(at as *mut _, bytes as usize, protection, flags, fd, offset as i64)
        };
        if start == libc::MAP_FAILED {
            return format!("errno {}", errno());
        }
        assert_eq!(errno(), 77, "errno is kept");
        if how != "in-place" {
            let mapped = Map { start: start as usize, length: bytes as usize };
            self.maps.insert(map.to_owned(), mapped);
        }
        "ok".to_owned()
    }

    /// Maps whole files, each from a thread of its own.
    fn map_together(&mut self, names: &[&str]) {
        let start = Barrier::new(names.len());
        let mapped = thread::scope(|scope| {
            let threads = names.iter().map(|&name| {
                let (file, start) = (&self.files[name], &start);
                scope.spawn(move || {
                    let length = nix::sys::stat::fstat(file).unwrap().st_size as usize;
                    start.wait();
                    let map = memmap2::MmapOptions::new().len(length).map_raw(file).unwrap();
                    let start = map.as_mut_ptr() as usize;
                    // As long as this process lives.
                    std::mem::forget(map);
                    (name.to_owned(), Map { start, length })
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        self.maps.extend(mapped);
    }

    fn unmap(&mut self, map: &str) {
        let Map { start, length } = self.maps.remove(map).unwrap();
        // SAFETY: a mapping of ours, which nobody uses.
        assert_eq!(unsafe { libc::munmap(start as *mut _, length) }, 0);
    }

    /// Moves a mapping, or makes a second one of it if its length is given as 0.
    fn remap(&mut self, map: &str, old: usize) -> String {
        let Map { start, length } = self.maps[map];
        let to = reserve(length as u64);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: a mapping of ours moves to where nothing else is.
        let moved =
            unsafe { libc::mremap(start as *mut _, old, length, flags, to as *mut libc::c_void) };
        if moved == libc::MAP_FAILED {
            return format!("errno {}", errno());
        }
        self.maps.insert(map.to_owned(), Map { start: moved as usize, length });
        "ok".to_owned()
    }

    /// Lets the kernel read a page.
    fn send(&self, map: &str, page: u64, first: u64) {
        let start = self.maps[map].page(page);
        let file = File::from(memfd_create(c"sent", MFdFlags::MFD_CLOEXEC).unwrap());
        // SAFETY: a page of a mapping that is there.
        let sent = unsafe { libc::write(file.as_raw_fd(), start.cast(), PAGE as usize) };
        assert_eq!(sent, PAGE as isize, "{}", Error::last_os_error());
        let mut bytes = vec![0; PAGE as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        content::check_bytes(&bytes, first + page);
    }

    fn discard(&self, map: &str, page: u64) {
        let start = self.maps[map].page(page);
        // SAFETY: a page of ours whose content is not needed.
        let result = unsafe { libc::madvise(start.cast(), PAGE as usize, libc::MADV_REMOVE) };
        assert_eq!(result, 0, "{}", Error::last_os_error());
    }

    /// A child that goes on without exec: it has none of the memory, and gets none.
    fn fork(&self, map: &str, name: &str) -> String {
        let (fd, start) = (self.files[name].as_raw_fd(), self.maps[map].start);
        // SAFETY: the child makes system calls only, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let (both, mut core) = (libc::PROT_READ | libc::PROT_WRITE, 0_u8);
            // SAFETY: as above.
            unsafe {
                let found = libc::mincore(start as *mut _, PAGE as usize, &raw mut core);
                let is_there = found == 0 || errno() != libc::ENOMEM;
                let null = std::ptr::null_mut();
                let again = libc::mmap(null, PAGE as usize, both, libc::MAP_SHARED, fd, 0);
                let is_mapped = again != libc::MAP_FAILED || errno() != libc::EBUSY;
                libc::_exit(c_int::from(is_there) + 2 * c_int::from(is_mapped));
            }
        }
        let mut status = 0;
        // SAFETY: waits for the child.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(libc::WIFEXITED(status), "the child ended by a signal");
        format!("the child ended with {}", libc::WEXITSTATUS(status))
    }
}

/// A program that this one starts: it inherits the environment.
fn exec() -> String {
    let mut command: Command = process::role("bystander", &[]);
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    format!("{} {errors:?}", output.status)
}

fn userfaultfds() -> usize {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = descriptors.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    targets.filter(|target| target.to_string_lossy().contains("userfaultfd")).count()
}

fn thread_names() -> String {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // Threads may end meanwhile.
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let mut names: Vec<_> = names.map(|name| name.trim().to_owned()).collect();
    names.sort();
    names.join(" ")
}

fn check(map: Map, at: u64, first: u64, pages: u64) {
    (0..pages).for_each(|page| content::check(map.page(at + page), first + page));
}

fn reserve(bytes: u64) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let null = std::ptr::null_mut();
    // Aligned to what huge pages need.
    let align = 2 << 20;
    // SAFETY: new memory.
    let start = unsafe { libc::mmap(null, bytes as usize + align, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    (start as usize).next_multiple_of(align)
}

fn number(text: &str) -> u64 {
    text.parse().unwrap()
}

pub(crate) fn errno() -> c_int {
    Error::last_os_error().raw_os_error().unwrap()
}

pub(crate) fn set_errno(number: c_int) {
    // SAFETY: the address of this thread's error number is valid.
    unsafe { *libc::__errno_location() = number };
}
