//! Guest memory in files: which piece of which file lies at which guest address.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use afterimage::{GuestAddress, SessionId, SourceMemory, SourceMemoryError, SourceRegion};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::options::{FilePiece, Hole, parse_bytes};
use crate::placing::Placing;
use crate::ram::PAGE_BYTES;

/// A piece of a file at a guest address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where it begins for the guest.
    pub guest_address: u64,
    /// Its length in bytes.
    pub length: u64,
    /// The file.
    pub path: PathBuf,
    /// Where in the file it begins.
    pub offset: u64,
}

/// Why files cannot be served as guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// A file cannot be opened.
    #[error("could not open {}{}", path.display(), hint(source))]
    Open {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a device, a pipe.
    #[error("{} is no file: give a file with the bytes of guest memory", path.display())]
    NotAFile {
        /// Which.
        path: PathBuf,
    },
    /// A size or an offset that is no multiple of a page.
    #[error(
        "{0}: {what} {bytes} is no multiple of {PAGE_BYTES}: give a piece of it as \
         PATH,OFFSET,SIZE, or fill it up (truncate -s %{PAGE_BYTES} {0})",
        path.display()
    )]
    Unaligned {
        /// Which file.
        path: PathBuf,
        /// Of what.
        what: &'static str,
        /// How many bytes.
        bytes: u64,
    },
    /// An empty file, or a piece without a byte.
    #[error("{}: there are no bytes to serve: give a file or a piece that has some", path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// A piece beyond the end.
    #[error(
        "{} has {size} bytes, and {length} from offset {offset} are to be served: give the whole \
         file, or a piece that lies in it",
        path.display()
    )]
    TooShort {
        /// Which file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// Where the piece begins.
        offset: u64,
        /// How long it is.
        length: u64,
    },
    /// A layout that is no JSON, or lacks something.
    #[error(
        "{} is no layout: it must be like {{\"regions\": [{{\"guest_address\": 0, \"length\": \
         \"1G\", \"file\": \"ram.bin\", \"offset\": 0}}]}}",
        path.display()
    )]
    Layout {
        /// The layout's file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Pieces that do not make up memory.
    #[error("the pieces are no guest memory")]
    Memory(#[from] SourceMemoryError),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (check the path; a piece is written PATH,OFFSET,SIZE)",
        io::ErrorKind::PermissionDenied => {
            " (run as a user who may read it, and with --release write it, or chmod it)"
        }
        _ => "",
    }
}

/// Puts pieces at consecutive guest addresses from 0, around the hole.
///
/// # Errors
/// [`FileError`] where a file is not there or a piece is not in it.
pub fn place(pieces: &[FilePiece], hole: Hole) -> Result<Vec<Placed>, FileError> {
    let mut placed = Vec::new();
    let mut placing = match hole {
        Hole::Pc => Placing::as_in_a_pc(),
        Hole::None => Placing::without_hole(),
    };
    for FilePiece { path, piece } in pieces {
        let (mut offset, mut left) = match *piece {
            Some(piece) => piece,
            None => (0, size_of_file(path)?),
        };
        if left == 0 {
            return Err(FileError::Empty { path: path.clone() });
        }
        while left > 0 {
            let (guest_address, length) = placing.place(left);
            placed.push(Placed { guest_address, length, path: path.clone(), offset });
            (offset, left) = (offset.saturating_add(length), left - length);
        }
    }
    Ok(placed)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LayoutFile {
    regions: Vec<LayoutRegion>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LayoutRegion {
    guest_address: Bytes,
    length: Bytes,
    file: PathBuf,
    #[serde(default)]
    offset: Bytes,
}

/// A number, or text such as "0x100000000" or "1G".
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(try_from = "serde_json::Value")]
struct Bytes(u64);

impl TryFrom<serde_json::Value> for Bytes {
    type Error = String;

    fn try_from(value: serde_json::Value) -> Result<Self, Self::Error> {
        let bytes = value.as_u64().or_else(|| parse_bytes(value.as_str()?));
        bytes.map(Self).ok_or_else(|| format!("{value} is no number of bytes"))
    }
}

/// Reads a layout. Its files are looked for beside it.
///
/// # Errors
/// [`FileError`] where it cannot be read.
pub fn read_layout(path: &Path) -> Result<Vec<Placed>, FileError> {
    let text = fs::read_to_string(path)
        .map_err(|source| FileError::Open { path: path.to_owned(), source })?;
    let layout: LayoutFile = serde_json::from_str(&text)
        .map_err(|source| FileError::Layout { path: path.to_owned(), source })?;
    let beside = path.parent().unwrap_or(Path::new(""));
    let regions = layout.regions.into_iter().map(|region| Placed {
        guest_address: region.guest_address.0,
        length: region.length.0,
        path: beside.join(region.file),
        offset: region.offset.0,
    });
    Ok(regions.collect())
}

/// What is done with files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// They are only read.
    Read,
    /// What has arrived is freed in them.
    Release,
}

/// Guest memory in files, and which it is.
#[derive(Debug)]
pub struct Image {
    /// All pieces together.
    pub memory: SourceMemory,
    /// The session of a snapshot of it: the same as long as these are the same files, of the same
    /// size, that nobody has written. So those who lack pages go on with a server that was started
    /// again, and never with other content.
    pub session: SessionId,
}

/// Opens all pieces and puts them together.
///
/// # Errors
/// [`FileError`].
pub fn map(pieces: &[Placed], access: Access) -> Result<SourceMemory, FileError> {
    Ok(image(pieces, access)?.memory)
}

/// The same, with the session that its files make. What is looked at is what was opened: a path may
/// lead to another file a moment later.
///
/// # Errors
/// [`FileError`].
pub fn image(pieces: &[Placed], access: Access) -> Result<Image, FileError> {
    let mut hash = Sha256::new();
    hash.update(b"afterimage snapshot");
    let mut regions = Vec::new();
    for piece in pieces {
        let Placed { guest_address, length, path, offset } = piece;
        let file = open(path, access)?;
        let failed = |source| FileError::Open { path: path.clone(), source };
        let found = file.metadata().map_err(failed)?;
        check(piece, found.size())?;
        // The device may have another number after a reboot.
        let is_of = [found.ino(), found.size(), found.mtime() as u64, found.mtime_nsec() as u64];
        for number in [*guest_address, *length, *offset].into_iter().chain(is_of) {
            hash.update(number.to_le_bytes());
        }
        let at = GuestAddress(*guest_address);
        regions.push(SourceRegion::file(at, file.into(), *offset, *length)?);
    }
    let mut session = SessionId::UNKNOWN;
    let bytes = session.0.len();
    session.0.copy_from_slice(&hash.finalize()[..bytes]);
    Ok(Image { memory: SourceMemory::new(regions)?, session })
}

fn check(piece: &Placed, size: u64) -> Result<(), FileError> {
    let Placed { path, length, offset, .. } = piece;
    let (path, length, offset) = (path.clone(), *length, *offset);
    for (what, bytes) in [("offset", offset), ("size", length)] {
        if !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(FileError::Unaligned { path, what, bytes });
        }
    }
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(FileError::TooShort { path, size, offset, length });
    }
    Ok(())
}

fn open(path: &Path, access: Access) -> Result<File, FileError> {
    let failed = |source| FileError::Open { path: path.to_owned(), source };
    // Looked at first: opening a pipe would wait for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(FileError::NotAFile { path: path.to_owned() });
    }
    File::options().read(true).write(access == Access::Release).open(path).map_err(failed)
}

fn size_of_file(path: &Path) -> Result<u64, FileError> {
    let found = open(path, Access::Read)?.metadata();
    Ok(found.map_err(|source| FileError::Open { path: path.to_owned(), source })?.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: u64 = 1 << 30;

    fn piece(offset: u64, size: u64) -> FilePiece {
        FilePiece { path: "/ram".into(), piece: Some((offset, size)) }
    }

    fn addresses(pieces: &[FilePiece], hole: Hole) -> Vec<(u64, u64, u64)> {
        let placed = place(pieces, hole).unwrap();
        placed.iter().map(|it| (it.guest_address, it.offset, it.length)).collect()
    }

    #[test]
    fn memory_is_laid_around_the_hole_of_a_pc() {
        assert_eq!(addresses(&[piece(0, 5 * G)], Hole::Pc), [(0, 0, 3 * G), (4 * G, 3 * G, 2 * G)]);
        assert_eq!(
            addresses(&[piece(0, 3 * G), piece(7 * G, G)], Hole::Pc),
            [(0, 0, 3 * G), (4 * G, 7 * G, G)]
        );
        assert_eq!(addresses(&[piece(0, 5 * G)], Hole::None), [(0, 0, 5 * G)]);
        assert_eq!(
            addresses(&[piece(0, G), piece(G, 3 * G)], Hole::Pc),
            [(0, 0, G), (G, G, 2 * G), (4 * G, 3 * G, G)]
        );
    }

    #[test]
    fn a_layout_names_files_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layout.json");
        let text = r#"{"regions": [{"guest_address": "4G", "length": 8192, "file": "ram"}]}"#;
        fs::write(&path, text).unwrap();
        let expected = Placed {
            guest_address: 4 * G,
            length: 8192,
            path: directory.path().join("ram"),
            offset: 0,
        };
        assert_eq!(read_layout(&path).unwrap(), [expected]);
        for text in ["", "[]", r#"{"regions": [{"file": "x"}]}"#, r#"{"regions": [], "x": 1}"#] {
            fs::write(&path, text).unwrap();
            assert!(matches!(read_layout(&path), Err(FileError::Layout { .. })), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_with_a_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        let whole = FilePiece { path: path.clone(), piece: None };
        let of = |piece: FilePiece| {
            place(&[piece], Hole::Pc).and_then(|it| map(&it, Access::Read)).unwrap_err().to_string()
        };
        assert!(of(whole.clone()).contains("check the path"));
        fs::write(&path, [1; 5000]).unwrap();
        assert!(of(whole.clone()).contains("truncate -s %4096"));
        fs::write(&path, []).unwrap();
        assert!(of(whole.clone()).contains("no bytes"));
        fs::write(&path, [1; 8192]).unwrap();
        let beyond = FilePiece { piece: Some((4096, 8192)), ..whole.clone() };
        assert!(of(beyond).contains("has 8192 bytes"));
        let odd = FilePiece { piece: Some((1, 4096)), ..whole };
        assert!(of(odd).contains("offset 1 is no multiple"));
        let directory = FilePiece { path: directory.path().into(), piece: None };
        assert!(of(directory).contains("is no file"));
    }
}
