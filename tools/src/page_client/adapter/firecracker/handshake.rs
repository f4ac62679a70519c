//! The one message that Firecracker sends: a JSON array of regions, without a length before it or
//! anything behind it, and descriptors beside it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use serde::Deserialize;

use crate::attachment::{MAX_REGIONS, RegionOfVmm};
use crate::descriptors;
use crate::ram::{HIGH_RAM_START, LOW_RAM_END};

/// How long Firecracker may take to say where its memory lies, all of it.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most bytes of the message.
const MAX_MESSAGE: usize = 4 << 20;
/// What is read at once.
const PIECE: usize = 64 << 10;
/// The most descriptors of any variant: the userfaultfd, and two beside it.
const MAX_DESCRIPTORS: usize = 3;
/// What a userfaultfd is called in `/proc/self/fd`.
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// Where the guest addresses of a source lie, for a page at some offset of the snapshot's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super::super) enum Placement {
    /// At the same number.
    AsInTheFile,
    /// As `page-server --memory` places the file: what a region begins at 3 GiB lies from 4 GiB
    /// on, as in a PC.
    AsInAPc,
}

/// Why no memory was taken.
#[derive(Debug)]
pub(super) enum Error {
    /// None was handed over: a probe, or a VMM that has ended.
    Nothing(String),
    /// It was, and cannot be served.
    Wrong(String),
}

/// A region, in Firecracker's words. More may be said of one.
#[derive(Clone, Debug, Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    /// Where in the snapshot's memory file it begins.
    offset: u64,
    page_size: Option<u64>,
    /// Bytes, despite its name; releases before `page_size` have only this, and the first
    /// neither.
    page_size_kib: Option<u64>,
}

/// Receives what Firecracker hands over.
pub(super) fn receive(
    socket: &UnixStream,
    placement: Placement,
) -> Result<(OwnedFd, Vec<RegionOfVmm>), Error> {
    let (text, mut files) = hear(socket)?;
    // Nobody is left waiting who has handed nothing over.
    if files.is_empty() {
        return Err(Error::Nothing("no descriptor came with the message".to_owned()));
    }
    let mappings = parse(&text).map_err(Error::Wrong)?;
    if !(1..=MAX_REGIONS).contains(&mappings.len()) {
        let count = mappings.len();
        let wrong = format!("it has {count} regions, 1 to {MAX_REGIONS} can be served");
        return Err(Error::Wrong(wrong));
    }
    let uffd = files.remove(0);
    if !is_userfaultfd(&uffd) {
        return Err(Error::Wrong("the first descriptor is no userfaultfd".to_owned()));
    }
    check_others(&files, &mappings).map_err(Error::Wrong)?;
    Ok((uffd, regions_of(&mappings, placement)))
}

/// Reads until the array is whole. The descriptors come with its first byte, which may come in
/// any number of pieces.
fn hear(socket: &UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>), Error> {
    let until = Instant::now() + PATIENCE;
    let (mut text, mut files) = (Vec::new(), Vec::<OwnedFd>::new());
    let mut piece = vec![0; PIECE];
    loop {
        let give_up = |files: &[OwnedFd], why: String| {
            // One that has handed its userfaultfd over waits for somebody to serve it.
            if files.is_empty() { Err(Error::Nothing(why)) } else { Err(Error::Wrong(why)) }
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return give_up(&files, format!("it said nothing whole within {PATIENCE:?}"));
        }
        socket.set_read_timeout(Some(left)).map_err(|error| Error::Nothing(error.to_string()))?;
        let received = match descriptors::receive(socket.as_fd(), &mut piece) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            other => other.map_err(|error| Error::Nothing(error.to_string()))?,
        };
        if received.length == 0 {
            return Err(Error::Nothing("it hung up".to_owned()));
        }
        text.extend_from_slice(&piece[..received.length]);
        files.extend(received.files);
        if received.is_cut {
            return give_up(&files, "descriptors were lost: raise ulimit -n".to_owned());
        }
        if text.len() > MAX_MESSAGE {
            return give_up(&files, format!("its message has more than {MAX_MESSAGE} bytes"));
        }
        if is_whole(&text) {
            socket.set_read_timeout(None).map_err(|error| Error::Nothing(error.to_string()))?;
            return Ok((text, files));
        }
    }
}

/// Whether there is nothing to wait for: the array has ended, or it is none.
fn is_whole(text: &[u8]) -> bool {
    let last = text.iter().rev().find(|byte| !byte.is_ascii_whitespace());
    // Only what ends like an array is looked at as a whole, however small the pieces are.
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    let parse = || serde_json::from_slice::<serde::de::IgnoredAny>(text);
    match (first, last) {
        (Some(b'['), Some(b']')) => parse().map_or_else(|error| !error.is_eof(), |_| true),
        (Some(b'[') | None, _) => false,
        _ => true,
    }
}

fn parse(text: &[u8]) -> Result<Vec<Mapping>, String> {
    serde_json::from_slice(text).map_err(|error| {
        let start: String = String::from_utf8_lossy(text).chars().take(60).collect();
        format!("its message is not understood ({error}): {start:?}")
    })
}

fn is_userfaultfd(file: &OwnedFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    link.is_ok_and(|link| link.as_os_str() == USERFAULTFD)
}

/// Descriptors beside the userfaultfd. Files in memory of which the guest's memory is a mapping
/// are not needed: pages are placed through the userfaultfd. With anything else, faults are told
/// in another way, or pages are to be placed in another.
fn check_others(files: &[OwnedFd], mappings: &[Mapping]) -> Result<(), String> {
    if files.len() >= MAX_DESCRIPTORS {
        let count = files.len() + 1;
        return Err(format!("it hands {count} descriptors over: no variant with so many is known"));
    }
    let sizes = files.iter().enumerate().map(|(index, file)| {
        size_in_memory(file).ok_or_else(|| {
            format!(
                "descriptor {} is no file with its memory (a guest_memfd, perhaps, or a bitmap of \
                 faults): such a variant cannot be served; start it with memory of its own, in \
                 which the userfaultfd alone says what is missing",
                index + 2
            )
        })
    });
    let sizes = sizes.collect::<Result<Vec<u64>, String>>()?;
    let end = |mapping: &Mapping| mapping.offset.saturating_add(mapping.size);
    let whole = mappings.iter().map(end).max().unwrap_or(0);
    let is_one = |sizes: &[u64]| sizes.len() == 1 && sizes[0] >= whole;
    let are_each = sizes.len() == mappings.len()
        && sizes.iter().zip(mappings).all(|(size, mapping)| *size >= mapping.size);
    if sizes.is_empty() || is_one(&sizes) || are_each {
        return Ok(());
    }
    Err(format!(
        "the files that it hands over have {sizes:?} bytes, and its memory has {whole}: no such \
         variant is known"
    ))
}

/// The size of a file that lies in memory.
fn size_in_memory(file: &OwnedFd) -> Option<u64> {
    let stat = fstat(file).ok()?;
    let kind: FsType = fstatfs(file).ok()?.filesystem_type();
    let is_file = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    (is_file && (kind == TMPFS_MAGIC || kind == HUGETLBFS_MAGIC))
        .then(|| u64::try_from(stat.st_size).unwrap_or(0))
}

fn regions_of(mappings: &[Mapping], placement: Placement) -> Vec<RegionOfVmm> {
    let has_hole = placement == Placement::AsInAPc
        && mappings.iter().any(|mapping| mapping.offset == LOW_RAM_END);
    let regions = mappings.iter().map(|mapping| RegionOfVmm {
        guest_address: match mapping.offset {
            offset if has_hole && offset >= LOW_RAM_END => {
                offset.saturating_add(HIGH_RAM_START - LOW_RAM_END)
            }
            offset => offset,
        },
        address: mapping.base_host_virt_addr,
        length: mapping.size,
        page_size: mapping.page_size.or(mapping.page_size_kib).unwrap_or(4096),
        file: None,
    });
    regions.collect()
}

#[cfg(test)]
mod tests;
