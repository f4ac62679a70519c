//! Performs the handshake with the running kernel and reads real events through the
//! structs of this crate. A user-mode-only userfaultfd is enough and needs no rights.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::mpsc;
use std::{ptr, slice, thread};

use userfaultfd_sys::*;

const PATIENCE_MS: i32 = 10_000;

#[test]
fn a_write_to_a_missing_page_is_read_as_a_fault_and_mended_by_a_copy() {
    let Some(uffd) = open(UFFD_FEATURE_THREAD_ID) else {
        return;
    };
    let memory = Mapping::new(2);
    register(&uffd, &memory);
    let page = page_size();
    let second = memory.address + page;

    let (send_thread, receive_thread) = mpsc::channel();
    let guest = thread::spawn(move || {
        // SAFETY: gettid has no preconditions.
        send_thread.send(unsafe { libc::gettid() }).unwrap();
        let inside = (second + 8) as *mut u8;
        // SAFETY: the mapping outlives this thread, and nobody else uses this byte
        // before it is joined.
        unsafe { inside.write_volatile(0x5a) };
    });

    let message = read_message(&uffd);
    assert_eq!(message.event, UFFD_EVENT_PAGEFAULT);
    // SAFETY: the kernel wrote all of the message, and says that it is a fault.
    let fault = unsafe { message.arg.pagefault };
    assert_eq!(fault.address, second as u64);
    assert_eq!(fault.flags, UFFD_PAGEFAULT_FLAG_WRITE);
    let faulting = receive_thread.recv().unwrap();
    // SAFETY: as above; `ptid` is the only field.
    assert_eq!(unsafe { fault.feat.ptid }, u32::try_from(faulting).unwrap());

    let content = vec![0xc3_u8; page];
    let mut copy = uffdio_copy {
        dst: second as u64,
        src: content.as_ptr() as u64,
        len: page as u64,
        mode: 0,
        copy: 0,
    };
    ioctl(&uffd, UFFDIO_COPY, &mut copy).expect("UFFDIO_COPY");
    assert_eq!(copy.copy, i64::try_from(page).unwrap());
    guest.join().unwrap();

    // SAFETY: the page is there, and the only other thread has been joined.
    let arrived = unsafe { slice::from_raw_parts(second as *const u8, page) };
    for (offset, byte) in arrived.iter().enumerate() {
        let expected = if offset == 8 { 0x5a } else { 0xc3 };
        assert_eq!(*byte, expected, "at offset {offset}");
    }
}

#[test]
fn a_discard_is_read_with_its_first_address_and_the_one_after_its_last() {
    let Some(uffd) = open(UFFD_FEATURE_EVENT_REMOVE) else {
        return;
    };
    let page = page_size();
    let memory = Mapping::new(4);
    register(&uffd, &memory);
    let start = memory.address + page;

    let discarder = thread::spawn(move || {
        // SAFETY: the range lies in a mapping that outlives this thread and that
        // nobody reads.
        unsafe { libc::madvise(start as *mut _, 2 * page, libc::MADV_DONTNEED) }
    });

    let message = read_message(&uffd);
    assert_eq!(message.event, UFFD_EVENT_REMOVE);
    // SAFETY: the kernel wrote all of the message, and says that it is a discard.
    let remove = unsafe { message.arg.remove };
    assert_eq!(remove.start, start as u64);
    assert_eq!(remove.end, (start + 2 * page) as u64);
    assert_eq!(discarder.join().unwrap(), 0);
}

#[test]
fn the_handshake_reports_every_request_that_a_descriptor_has() {
    let Some(uffd) = create() else {
        return;
    };
    let mut api = uffdio_api { api: UFFD_API, ..uffdio_api::default() };
    ioctl(&uffd, UFFDIO_API, &mut api).expect("UFFDIO_API");
    assert_eq!(api.api, UFFD_API);
    assert_eq!(api.ioctls & UFFD_API_IOCTLS, UFFD_API_IOCTLS);
    assert_eq!(api.features & UFFD_API_FEATURES, UFFD_API_FEATURES);
}

/// Anonymous memory of whole pages.
struct Mapping {
    address: usize,
    length: usize,
}

impl Mapping {
    fn new(pages: usize) -> Self {
        let length = pages * page_size();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { address: address as usize, length }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made by `new`, and no reference to it is left.
        unsafe { libc::munmap(self.address as *mut _, self.length) };
    }
}

/// A userfaultfd after its handshake, or `None` (said aloud) where the machine has none.
fn open(features: u64) -> Option<File> {
    let uffd = create()?;
    let mut api = uffdio_api { api: UFFD_API, features, ioctls: 0 };
    ioctl(&uffd, UFFDIO_API, &mut api).expect("UFFDIO_API");
    Some(uffd)
}

fn create() -> Option<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY.cast_signed();
    // SAFETY: the call takes flags only and touches no memory of ours.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if descriptor < 0 {
        let error = io::Error::last_os_error();
        let required = std::env::var("AFTERIMAGE_REQUIRE").unwrap_or_default();
        assert!(
            !required.split(',').any(|name| name == "userfaultfd"),
            "userfaultfd is required here, but: {error}"
        );
        // Past the test harness, which would keep it to itself.
        let _ = writeln!(io::stderr(), "SKIPPED: no userfaultfd: {error}");
        return None;
    }
    let descriptor = i32::try_from(descriptor).expect("descriptors are int");
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Some(unsafe { File::from_raw_fd(descriptor) })
}

fn register(uffd: &File, memory: &Mapping) {
    let mut register = uffdio_register {
        range: uffdio_range { start: memory.address as u64, len: memory.length as u64 },
        mode: UFFDIO_REGISTER_MODE_MISSING,
        ioctls: 0,
    };
    ioctl(uffd, UFFDIO_REGISTER, &mut register).expect("UFFDIO_REGISTER");
    assert_eq!(register.ioctls & UFFD_API_RANGE_IOCTLS_BASIC, UFFD_API_RANGE_IOCTLS_BASIC);
}

fn ioctl<T>(uffd: &File, request: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller passes the struct that belongs to the request, and
    // addresses of memory that it owns.
    match unsafe { libc::ioctl(uffd.as_raw_fd(), request.into(), ptr::from_mut(argument)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for one event; panics rather than waiting for ever.
fn read_message(mut uffd: &File) -> uffd_msg {
    let mut poll = libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, as said.
    let ready = unsafe { libc::poll(&raw mut poll, 1, PATIENCE_MS) };
    assert_eq!(ready, 1, "no event within {PATIENCE_MS} ms");
    assert_eq!(poll.revents, libc::POLLIN);

    let mut message = MaybeUninit::<uffd_msg>::zeroed();
    // SAFETY: zeroed memory of exactly this size, borrowed only here.
    let bytes = unsafe {
        slice::from_raw_parts_mut(message.as_mut_ptr().cast::<u8>(), size_of::<uffd_msg>())
    };
    let length = uffd.read(bytes).expect("reading an event");
    assert_eq!(length, size_of::<uffd_msg>());
    // SAFETY: all of it is initialised, and every pattern of bits is valid.
    unsafe { message.assume_init() }
}

fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("a page size")
}
