//! The files behind a QEMU's guest RAM, as its neighbour on the same host finds them.
//!
//! Invariant: a file that is served is the one that QEMU has mapped, wherever that can be seen.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::machine::{Backend, Kind, Machine};
use crate::page_server::Failure;
use crate::page_server::options::FilePiece;

/// What QEMU calls its memfds.
const MEMFD: &str = "/memfd:memory-backend-memfd";
/// What it calls files without a name, in a directory.
const NAMELESS: &str = "qemu_back_mem.";
/// What names memory to the library, and what is between two names.
const VARIABLE: &[u8] = b"AFTERIMAGE_MEMORY=";
const SEPARATOR: u8 = b';';

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
    // Two of the same size, named in another order, would change places.
    let own = machine.pid.zip(backend.path.as_deref()).and_then(|(pid, it)| file_of(pid, it));
    if own.is_some_and(|own| own != (file.dev(), file.ino())) {
        return Err(Failure::new(format!(
            "{shown} is another file than guest RAM {}, which is {}: give --memory once for each \
             backend, in the order of their names",
            backend.id,
            backend.path.as_deref().unwrap_or(path).display()
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

/// The library that a QEMU was started with must take the backends in the order of their names,
/// as the other side does: two of the same size would change places, and nobody would notice.
/// Memfds are all called the same, and cannot be told apart by it.
pub(super) fn check_order(name: &str, pid: i32, backends: &[Backend]) -> Result<(), Failure> {
    // Without the library's variable, or the right to see it, there is nothing to compare.
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut variables = environment.split(|byte| *byte == 0);
    let memory = variables.find_map(|it| it.strip_prefix(VARIABLE)).unwrap_or_default();
    for (entry, backend) in memory.split(|byte| *byte == SEPARATOR).zip(backends) {
        let Some(path) = backend.path.as_deref() else { continue };
        let entry = Path::new(OsStr::from_bytes(entry));
        let [named, is] = [entry, path].map(|it| file_of(pid, it));
        if named.zip(is).is_some_and(|(named, is)| named != is) {
            let ids: Vec<_> = backends.iter().map(|it| it.id.as_str()).collect();
            return Err(Failure::new(format!(
                "{name}: AFTERIMAGE_MEMORY has {} in the place of guest RAM {}, which is {}: name \
                 the memory backends in the order of their names, {}",
                entry.display(),
                backend.id,
                path.display(),
                ids.join(", ")
            )));
        }
    }
    Ok(())
}

/// Which file a process finds at a path: file system and number.
fn file_of(pid: i32, path: &Path) -> Option<(u64, u64)> {
    let from = if path.is_absolute() { "root" } else { "cwd" };
    let path = path.strip_prefix("/").unwrap_or(path);
    let file = fs::metadata(Path::new("/proc").join(pid.to_string()).join(from).join(path)).ok()?;
    file.is_file().then(|| (file.dev(), file.ino()))
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
