//! The files behind a QEMU's guest RAM, as its neighbour on the same host finds them.
//!
//! Invariant: a file that is served is the one that QEMU has mapped, wherever that can be seen.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::machine::{Backend, Kind, Machine};
use crate::page_server::Failure;
use crate::page_server::options::FilePiece;

/// What QEMU calls its memfds.
const MEMFD: &str = "/memfd:memory-backend-memfd";
/// What it calls files without a name, in a directory.
const NAMELESS: &str = "qemu_back_mem.";

/// The pieces of guest RAM in the order of their backends: those named on the command line, or
/// else those that are found.
pub(super) fn pieces(machine: &Machine, named: &[PathBuf]) -> Result<Vec<FilePiece>, Failure> {
    let backends = &machine.backends;
    if !named.is_empty() && named.len() != backends.len() {
        let ids: Vec<_> = backends.iter().map(|it| it.id.as_str()).collect();
        return Err(Failure::usage(format!(
            "--memory is given {} times, and guest RAM is in {} pieces: give one for each of {}, \
             in this order",
            named.len(),
            backends.len(),
            ids.join(", ")
        )));
    }
    let pieces = backends.iter().enumerate().map(|(index, backend)| {
        let path = match named.get(index) {
            Some(path) => path.clone(),
            None => find(machine, backend)?,
        };
        check(machine, backend, &path)?;
        Ok(FilePiece { path, piece: Some((0, backend.size)) })
    });
    pieces.collect()
}

/// Where QEMU has it.
fn find(machine: &Machine, backend: &Backend) -> Result<PathBuf, Failure> {
    let id = &backend.id;
    let wanted = match (&backend.path, backend.kind) {
        (Some(path), Kind::File) if !path.is_dir() => return Ok(path.clone()),
        (Some(path), Kind::File) => path.join(NAMELESS).display().to_string(),
        _ => MEMFD.to_owned(),
    };
    let Some(pid) = machine.pid else {
        return Err(Failure::new(format!(
            "guest RAM {id} is a file without a name, and QEMU's process is not known: give \
             --memory /proc/PID/fd/N"
        )));
    };
    let all = fs::read_dir(format!("/proc/{pid}/fd")).map_err(|error| {
        Failure::new(format!(
            "could not look for guest RAM {id} in /proc/{pid}/fd: {error}; run as QEMU's user or \
             root, or give --memory"
        ))
    })?;
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    for path in all.flatten().map(|it| it.path()) {
        let is_it = fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with(&wanted));
        if let (true, Ok(file)) = (is_it, fs::metadata(&path))
            && file.len() == backend.size
            && found.iter().all(|(inode, _)| *inode != file.ino())
        {
            found.push((file.ino(), path));
        }
    }
    match found.as_slice() {
        [(_, path)] => Ok(path.clone()),
        [] => Err(Failure::new(format!(
            "process {pid} has no file of {} bytes that could be guest RAM {id}: is it QEMU? Else \
             give --memory",
            backend.size
        ))),
        many => Err(Failure::new(format!(
            "process {pid} has {} files of {} bytes that could be guest RAM {id}: say which by \
             --memory /proc/{pid}/fd/N",
            many.len(),
            backend.size
        ))),
    }
}

/// Whether it is what QEMU has mapped.
fn check(machine: &Machine, backend: &Backend, path: &Path) -> Result<(), Failure> {
    let shown = path.display();
    let file = fs::metadata(path)
        .map_err(|error| Failure::new(format!("could not open {shown}: {error}; give --memory")))?;
    if file.len() < backend.size {
        return Err(Failure::new(format!(
            "{shown} has {} bytes, and guest RAM {} has {}: give the file that QEMU has",
            file.len(),
            backend.id,
            backend.size
        )));
    }
    let maps = machine.pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/maps")).ok());
    match maps {
        Some(maps) if !is_mapped(&maps, file.ino()) => Err(Failure::new(format!(
            "{shown} is not mapped by QEMU (process {}): give the file that is guest RAM {}",
            machine.pid.unwrap_or_default(),
            backend.id
        ))),
        _ => Ok(()),
    }
}

/// Whether a file is among shared mappings. Devices are not compared: a file system may give
/// another number here than `stat` does.
fn is_mapped(maps: &str, inode: u64) -> bool {
    let inode = inode.to_string();
    maps.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        let (permissions, number) = (words.nth(1), words.nth(2));
        permissions.is_some_and(|it| it.ends_with('s')) && number == Some(inode.as_str())
    })
}

#[cfg(test)]
mod tests {
    use super::is_mapped;

    #[test]
    fn only_shared_mappings_of_the_file_count() {
        let maps = "7f00-7f10 rw-s 00000000 00:1a 4711   /dev/shm/vm\n\
                    7f20-7f30 rw-p 00000000 00:1a 4712   /dev/shm/other\n";
        assert!(is_mapped(maps, 4711));
        assert!(!is_mapped(maps, 4712));
        assert!(!is_mapped(maps, 471));
    }
}
