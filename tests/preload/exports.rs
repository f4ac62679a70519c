//! What the library brings into a process: three symbols, and nothing to load that is not there
//! anyway.

use std::ffi::CStr;

use crate::process::library;

/// The parts of an ELF file for 64 bits, little-endian, that this test needs.
struct Elf(Vec<u8>);

/// A section: its type, what it holds, and which section has its texts.
struct Section {
    kind: u32,
    bytes: Vec<u8>,
    link: usize,
}

const DYNAMIC: u32 = 6;
const DYNSYM: u32 = 11;
const DT_NEEDED: u64 = 1;

impl Elf {
    fn number(&self, at: usize, bytes: usize) -> u64 {
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(&self.0[at..at + bytes]);
        u64::from_le_bytes(number)
    }

    fn sections(&self) -> Vec<Section> {
        assert_eq!(&self.0[..6], b"\x7fELF\x02\x01");
        let start = self.number(0x28, 8) as usize;
        let (size, count) = (self.number(0x3a, 2) as usize, self.number(0x3c, 2) as usize);
        let section = |number: usize| {
            let at = start + number * size;
            let kind = self.number(at + 4, 4) as u32;
            let (offset, length) = (self.number(at + 0x18, 8), self.number(at + 0x20, 8));
            // A section of nothing but zeros is not in the file.
            let range = if kind == 8 { 0..0 } else { offset as usize..(offset + length) as usize };
            let link = self.number(at + 0x28, 4) as usize;
            Section { kind, bytes: self.0[range].to_vec(), link }
        };
        (0..count).map(section).collect()
    }
}

fn text(section: &Section, at: u64) -> String {
    let text = CStr::from_bytes_until_nul(&section.bytes[at as usize..]).unwrap();
    text.to_str().unwrap().to_owned()
}

fn number(bytes: &[u8]) -> u64 {
    let mut number = [0; 8];
    number[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(number)
}

#[test]
fn only_the_functions_that_are_hooked_are_exported() {
    let sections = Elf(std::fs::read(library()).unwrap()).sections();
    let symbols = sections.iter().find(|section| section.kind == DYNSYM).unwrap();
    let mut exported: Vec<_> = symbols
        .bytes
        .as_chunks::<24>()
        .0
        .iter()
        // Where it is defined; none of another library.
        .filter(|symbol| number(&symbol[6..8]) != 0)
        .map(|symbol| text(&sections[symbols.link], number(&symbol[..4])))
        .collect();
    exported.sort();
    assert_eq!(exported, ["mmap", "mmap64", "mremap"]);
}

#[test]
fn nothing_is_loaded_beside_the_c_library() {
    let sections = Elf(std::fs::read(library()).unwrap()).sections();
    let dynamic = sections.iter().find(|section| section.kind == DYNAMIC).unwrap();
    let needed = dynamic.bytes.as_chunks::<16>().0.iter();
    for entry in needed.filter(|entry| number(&entry[..8]) == DT_NEEDED) {
        let name = text(&sections[dynamic.link], number(&entry[8..]));
        let known = ["libc.so.6", "libgcc_s.so.1", "ld-linux-"];
        assert!(known.iter().any(|it| name.starts_with(it)), "{name}");
    }
}
