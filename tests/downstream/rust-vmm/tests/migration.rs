//! Guests of rust-vmm's memory move, whatever it is made of, and every byte is compared.

use adopter_rust_vmm::{Memory, receive, serve};
use afterimage::{DestinationEvent, Events, SourceEvent};
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::time::{Duration, Instant};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

/// A PC's memory: below and above the hole, in huge pages if need be.
const REGIONS: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 16 << 20), (GuestAddress(4 << 30), 8 << 20)];
const PAGE: u64 = 4096;
/// Only a guard: a busy machine needs a tenth of it.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
enum Made {
    Anonymous,
    Memfd,
    HugePages,
}

impl Made {
    /// Guest memory of it; `None`, after saying so, where the machine has not enough.
    fn guest(self) -> Option<Memory> {
        let flags = match self {
            Self::Anonymous => {
                return Some(Memory::from_ranges(&REGIONS).expect("anonymous memory"));
            }
            Self::Memfd => libc::MFD_CLOEXEC,
            Self::HugePages => libc::MFD_CLOEXEC | libc::MFD_HUGETLB,
        };
        // SAFETY: a name that ends with zero; the descriptor is nobody else's.
        let file = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), flags);
            assert!(fd >= 0, "no memfd: {}", std::io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        let bytes: usize = REGIONS.iter().map(|region| region.1).sum();
        file.set_len(bytes as u64).expect("a size");
        let file = FileOffset::new(file, 0);
        let mut offset = 0;
        let ranges: Vec<_> = REGIONS
            .iter()
            .map(|(start, length)| {
                let file = FileOffset::from_arc(file.arc().clone(), offset);
                offset += *length as u64;
                (*start, *length, Some(file))
            })
            .collect();
        // A bitmap of another granularity for huge pages would be possible as well.
        let guest = Memory::from_ranges_with_files(&ranges).map_err(|error| error.to_string());
        let guest = guest.and_then(|guest| self.reserve(&file, bytes).map(|()| guest));
        match (self, guest) {
            (_, Ok(guest)) => Some(guest),
            (Self::HugePages, Err(why)) => {
                skip("hugetlb", &why);
                None
            }
            (_, Err(why)) => panic!("no {self:?} memory: {why}"),
        }
    }

    /// Huge pages that are lacking end a process by SIGBUS when it touches them: so they are
    /// taken now, and freed again where only a place is needed.
    fn reserve(self, file: &FileOffset, bytes: usize) -> Result<(), String> {
        use std::os::fd::AsRawFd;
        let Self::HugePages = self else { return Ok(()) };
        // SAFETY: a descriptor that is open.
        match unsafe { libc::fallocate(file.file().as_raw_fd(), 0, 0, bytes as i64) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().to_string()),
        }
    }
}

/// As everywhere in this project: a skip is heard, and where the machine is said to have what is
/// lacking it is a failure.
fn skip(lacking: &str, why: &str) {
    let required = std::env::var("AFTERIMAGE_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|name| name.trim() == lacking),
        "AFTERIMAGE_REQUIRE names {lacking}, which this machine lacks: {why}"
    );
    let _ = writeln!(std::io::stderr(), "skipped: needs {lacking}: {why}");
}

fn pages() -> impl Iterator<Item = (u64, GuestAddress)> {
    let of = |(start, length): (GuestAddress, usize)| {
        (0..length as u64 / PAGE).map(move |page| GuestAddress(start.0 + page * PAGE))
    };
    REGIONS.into_iter().flat_map(of).enumerate().map(|(number, at)| (number as u64, at))
}

/// What a page holds in a round: a third of them nothing, and never the same twice.
fn content(page: u64, round: u64) -> Vec<u8> {
    let is_zero = page % 3 == 2 && round == 0;
    let word = (page << 8 | round).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..PAGE / 8).map(|index| if is_zero { 0 } else { word ^ index });
    words.flat_map(u64::to_ne_bytes).collect()
}

/// A device of the VMM: writes a part of the pages.
fn write(guest: &Memory, round: u64, is_written: impl Fn(u64) -> bool) {
    for (page, at) in pages().filter(|(page, _)| is_written(*page)) {
        // A page that is zero from the start stays a hole.
        let bytes = content(page, round);
        if bytes.iter().any(|byte| *byte != 0) {
            guest.write_slice(&bytes, at).expect("written");
        }
    }
}

/// Not in all huge pages, so that some of what the passes bring is of use.
fn in_second_round(page: u64) -> bool {
    page % 7 == 3 && page < 3 * 1024
}

fn in_third_round(page: u64) -> bool {
    page % 11 == 5 && page < 2 * 1024
}

fn expected(page: u64) -> Vec<u8> {
    let round = match page {
        _ if in_third_round(page) => 2,
        _ if in_second_round(page) => 1,
        _ => 0,
    };
    content(page, round)
}

fn hear<E: std::fmt::Debug>(events: &Events<E>, until: Instant, what: &str) -> E {
    let left = until.saturating_duration_since(Instant::now());
    events.next_timeout(left).unwrap_or_else(|why| panic!("waiting for {what}: {why:?}"))
}

/// Moves a guest that its devices write before, while and after passes are sent.
fn moves(from: Made, to: Made) {
    let Some(old) = from.guest() else { return };
    let Some(new) = to.guest() else { return };
    write(&old, 0, |_| true);
    let until = Instant::now() + PATIENCE;
    // SAFETY: written no more after the last `write` below, which is before the switchover;
    // dropped after the source.
    let (source, at_source, address) = unsafe { serve(&old, 2) }.expect("a source");
    // SAFETY: dropped after the destination.
    let (destination, at_destination) = unsafe { receive(&new, address) }.expect("a destination");

    let mut passes = Vec::new();
    loop {
        match hear(&at_source, until, "the end of the passes") {
            SourceEvent::PassEnded(report) => {
                passes.push(report);
                // The first has been sent: what is written now goes with the second.
                if report.number == 1 {
                    write(&old, 1, in_second_round);
                }
            }
            SourceEvent::SwitchoverDue(_) => break,
            SourceEvent::Attached(_) => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
    write(&old, 2, in_third_round);
    source.switch_over(Vec::new()).expect("switched over");

    loop {
        match hear(&at_destination, until, "the destination's end") {
            DestinationEvent::State(_) => destination.ready().expect("ready"),
            DestinationEvent::Run => verify(&new),
            DestinationEvent::Finished => break,
            DestinationEvent::Attached(_)
            | DestinationEvent::SourceStopped
            | DestinationEvent::AllArrived => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
    while hear(&at_source, until, "the source's end") != SourceEvent::Finished {}
    verify(&new);
    assert!(passes.len() >= 2, "{passes:?}");
    let stats = destination.stats();
    assert!(stats.pages_precopy > 0, "precopy brought nothing: {stats:?}");
}

/// Every byte, by faults where it has not arrived.
fn verify(guest: &GuestMemoryMmap<AtomicBitmap>) {
    let mut found = vec![0; PAGE as usize];
    // Backwards, to be ahead of the background.
    for (page, at) in pages().collect::<Vec<_>>().into_iter().rev() {
        guest.read_slice(&mut found, at).expect("read");
        assert!(found == expected(page), "page {page} at {:#x} is wrong", at.0);
    }
}

#[test]
fn anonymous_memory_moves() {
    moves(Made::Anonymous, Made::Anonymous);
}

#[test]
fn memory_with_a_file_moves() {
    moves(Made::Memfd, Made::Memfd);
}

#[test]
fn huge_pages_move() {
    moves(Made::HugePages, Made::HugePages);
}

#[test]
fn backings_may_differ() {
    moves(Made::Anonymous, Made::Memfd);
    moves(Made::Memfd, Made::HugePages);
    moves(Made::HugePages, Made::Anonymous);
}

#[test]
fn a_private_mapping_of_a_file_is_refused_before_anything_happens() {
    let Some(shared) = Made::Memfd.guest() else { return };
    let file = shared.iter().next().and_then(GuestMemoryRegion::file_offset).cloned();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let mapping = vm_memory::MmapRegion::build(file, 16 << 20, protection, libc::MAP_PRIVATE);
    let region = vm_memory::GuestRegionMmap::new(mapping.expect("mapped"), GuestAddress(0));
    let private = Memory::from_regions(vec![region.expect("a region")]).expect("a guest");
    // SAFETY: refused.
    let error = unsafe { serve(&private, 1) }.map(drop).expect_err("a private mapping of a file");
    let why = error.source().map(ToString::to_string).unwrap_or_default();
    assert!(why.contains("private mapping of a file"), "{error}: {why}");
}
