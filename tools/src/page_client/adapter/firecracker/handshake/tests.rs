//! What Firecracker says, to the letter, and what it might say.

use super::*;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::IoSlice;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::thread;

/// As it was captured, of a guest of 4 GiB.
const CAPTURED: &str = r#"[{"base_host_virt_addr":140324097753088,"size":3221225472,"offset":0,"page_size":4096,"page_size_kib":4096},{"base_host_virt_addr":140323024011264,"size":1073741824,"offset":3221225472,"page_size":4096,"page_size_kib":4096}]"#;

fn userfaultfd() -> OwnedFd {
    // SAFETY: the call takes flags only and returns a new descriptor or an error.
    let fd =
        unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1) };
    assert!(fd >= 0, "a userfaultfd for faults of user mode needs no right");
    // SAFETY: a fresh descriptor.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn memfd(bytes: u64) -> OwnedFd {
    let file = std::fs::File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file.into()
}

fn send(socket: &UnixStream, text: &[u8], files: &[&OwnedFd]) {
    let raw: Vec<_> = files.iter().map(|file| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
    let sent =
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text)], rights, MsgFlags::empty(), None);
    assert_eq!(sent.unwrap(), text.len());
}

/// What is taken of a message with these descriptors.
fn taken(text: &str, files: &[&OwnedFd]) -> Result<Vec<RegionOfVmm>, Error> {
    let (vmm, socket) = UnixStream::pair().unwrap();
    send(&vmm, text.as_bytes(), files);
    receive(&socket, Placement::AsInAPc).map(|(_, regions)| regions)
}

fn wrong(text: &str, files: &[&OwnedFd]) -> String {
    match taken(text, files) {
        Err(Error::Wrong(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_captured_message_is_two_regions_though_their_addresses_adjoin() {
    let regions = taken(CAPTURED, &[&userfaultfd()]).unwrap();
    let expected = |guest_address, address, length| RegionOfVmm {
        guest_address,
        address,
        length,
        page_size: 4096,
        file: None,
    };
    assert_eq!(
        regions,
        [
            expected(0, 140_324_097_753_088, 3 << 30),
            expected(4 << 30, 140_323_024_011_264, 1 << 30)
        ]
    );
    assert_eq!(regions[1].address + regions[1].length, regions[0].address);
    let (vmm, socket) = UnixStream::pair().unwrap();
    send(&vmm, CAPTURED.as_bytes(), &[&userfaultfd()]);
    let (_, regions) = receive(&socket, Placement::AsInTheFile).unwrap();
    assert_eq!(regions[1].guest_address, 3 << 30);
}

#[test]
fn page_size_counts_before_page_size_kib_which_is_in_bytes() {
    let of = |more: &str| {
        let text =
            format!(r#"[{{"base_host_virt_addr":2097152,"size":2097152,"offset":0{more}}}]"#);
        taken(&text, &[&userfaultfd()]).unwrap()[0].page_size
    };
    assert_eq!(of(r#","page_size":2097152,"page_size_kib":2048"#), 2 << 20);
    assert_eq!(of(r#","page_size_kib":2097152"#), 2 << 20);
    assert_eq!(of(""), 4096);
    assert_eq!(of(r#","page_size":4096,"gpa_start":0,"fork":{"of":["whom"]}"#), 4096);
}

#[test]
fn a_message_may_come_byte_by_byte_and_be_long() {
    let region = r#"{"base_host_virt_addr":4096,"size":4096,"offset":0,"note":"]"}"#;
    let long = format!("[{}]", vec![region; 3000].join(","));
    for (text, step) in [(CAPTURED, 1), (long.as_str(), 1000), (" [ ] ", 1)] {
        let (vmm, socket) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                send(&vmm, &text.as_bytes()[..1], &[&userfaultfd()]);
                for piece in text.as_bytes()[1..].chunks(step) {
                    (&vmm).write_all(piece).unwrap();
                }
            });
            match receive(&socket, Placement::AsInAPc) {
                Ok((_, regions)) => assert!(regions.len() == 2 || regions.len() == 3000),
                Err(Error::Wrong(reason)) => assert!(reason.contains("0 regions"), "{reason}"),
                Err(other) => panic!("{other:?}"),
            }
        });
    }
}

#[test]
fn files_with_the_memory_may_be_handed_over_beside_the_userfaultfd() {
    let (uffd, whole) = (userfaultfd(), memfd(4 << 30));
    let (low, high) = (memfd(3 << 30), memfd(1 << 30));
    assert_eq!(taken(CAPTURED, &[&uffd, &whole]).unwrap().len(), 2);
    assert_eq!(taken(CAPTURED, &[&uffd, &low, &high]).unwrap().len(), 2);
}

#[test]
fn what_is_not_known_is_refused_with_a_reason() {
    let (uffd, whole) = (userfaultfd(), memfd(4 << 30));
    let other = OwnedFd::from(UnixStream::pair().unwrap().0);
    assert!(wrong(CAPTURED, &[&whole]).contains("no userfaultfd"));
    assert!(wrong(CAPTURED, &[&uffd, &other]).contains("guest_memfd"));
    assert!(wrong(CAPTURED, &[&uffd, &whole, &other]).contains("descriptor 3"));
    assert!(wrong(CAPTURED, &[&uffd, &memfd(4096)]).contains("no such variant"));
    assert!(wrong(CAPTURED, &[&uffd, &whole, &memfd(4096)]).contains("no such variant"));
    assert!(wrong(CAPTURED, &[&uffd, &whole, &whole, &whole]).contains("4 descriptors"));
    assert!(wrong("[1]", &[&uffd]).contains("not understood"));
    assert!(wrong("{}", &[&uffd]).contains("not understood"));
    assert!(wrong(&format!("{CAPTURED}[]"), &[&uffd]).contains("not understood"));
}

#[test]
fn who_hands_nothing_over_is_no_vmm() {
    assert!(matches!(taken(CAPTURED, &[]), Err(Error::Nothing(_))));
    let (vmm, socket) = UnixStream::pair().unwrap();
    send(&vmm, &CAPTURED.as_bytes()[..50], &[&userfaultfd()]);
    drop(vmm);
    // It has ended in the middle.
    assert!(matches!(receive(&socket, Placement::AsInAPc), Err(Error::Nothing(_))));
}
