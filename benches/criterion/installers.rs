//! The ways to put pages in place. Each page is placed once: when the memory is full it is
//! emptied and registered anew, which is not measured.

use afterimage::internals::Installer;
use afterimage::{
    DestinationMemory, DestinationRegion, DiscardNotice, FaultScope, GuestAddress, MemoryError,
    PageSize,
};
use criterion::{Bencher, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

const SMALL: u64 = 4096;
const PIECE: u64 = 256 << 10;
const HUGE: u64 = 2 << 20;
const LENGTH: u64 = 64 << 20;
/// Fewer: a machine that runs tests has not many huge pages.
const HUGE_LENGTH: u64 = 16 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Anonymous,
    Memfd,
    Huge,
}

/// Memory that is filled again and again.
struct Guest {
    kind: Kind,
    length: u64,
    map: MmapRaw,
    file: Option<File>,
}

impl Guest {
    fn new(kind: Kind) -> io::Result<Self> {
        let (length, flags) = match kind {
            Kind::Anonymous => (LENGTH, None),
            Kind::Memfd => (LENGTH, Some(MFdFlags::MFD_CLOEXEC)),
            Kind::Huge => (HUGE_LENGTH, Some(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)),
        };
        let file = flags.map(|flags| memfd_create("guest", flags)).transpose()?.map(File::from);
        let mut options = MmapOptions::new();
        options.len(length as usize);
        let map = match &file {
            Some(file) => {
                file.set_len(length)?;
                options.map_raw(file)?
            }
            None => options.map_anon()?.into(),
        };
        Ok(Self { kind, length, map, file })
    }

    /// `None`, after saying so, where this machine has no such memory, or no userfaultfd.
    fn try_new(kind: Kind, what: &str) -> Option<Self> {
        let guest = Self::new(kind).and_then(|guest| {
            guest.empty().map_err(io::Error::other)?;
            Ok(guest)
        });
        guest.inspect_err(|error| eprintln!("skipped: {what}: {error}")).ok()
    }

    /// Nothing of it is there any more.
    fn empty(&self) -> Result<Installer, MemoryError> {
        let start = NonNull::new(self.map.as_mut_ptr()).expect("a mapping is not at address 0");
        let guest = GuestAddress(0);
        let file = self.file.as_ref().map(|file| file.try_clone().expect("a descriptor").into());
        // SAFETY: a mapping of this kind and length, which outlives the installer; no
        // reference into it exists.
        let region = unsafe {
            match (self.kind, file) {
                (Kind::Huge, Some(file)) => {
                    DestinationRegion::hugetlb(guest, start, self.length, PageSize::MIB_2, file, 0)
                }
                (_, Some(file)) => DestinationRegion::shared(guest, start, self.length, file, 0),
                (_, None) => DestinationRegion::anonymous(guest, start, self.length),
            }
        };
        let scope = FaultScope::UserOnly;
        DestinationMemory::register(vec![region], scope, DiscardNotice::Called).map(Installer::new)
    }

    /// Measures `place`, called with an offset of its own each time.
    fn measure(&self, bencher: &mut Bencher<'_>, step: u64, place: impl Fn(&Installer, u64)) {
        bencher.iter_custom(|iterations| {
            let mut left = iterations;
            let mut total = Duration::ZERO;
            while left > 0 {
                let installer = self.empty().expect("registered memory");
                let count = left.min(self.length / step);
                let start = Instant::now();
                for index in 0..count {
                    place(&installer, index * step);
                }
                total += start.elapsed();
                left -= count;
            }
            total
        });
    }
}

fn content(length: u64) -> Vec<u8> {
    (0..length).map(|at| (at >> 5) as u8 | 1).collect()
}

fn name(length: u64) -> String {
    if length < HUGE { format!("{}KiB", length >> 10) } else { format!("{}MiB", length >> 20) }
}

fn anonymous(criterion: &mut Criterion) {
    let Some(guest) = Guest::try_new(Kind::Anonymous, "copy_anonymous, zeropage") else { return };
    let mut group = criterion.benchmark_group("installers");
    for length in [SMALL, PIECE] {
        let content = content(length);
        group.throughput(Throughput::Bytes(length));
        group.bench_function(BenchmarkId::new("copy_anonymous", name(length)), |bencher| {
            guest.measure(bencher, length, |installer, at| installer.copy(at, &content));
        });
        group.bench_function(BenchmarkId::new("zeropage", name(length)), |bencher| {
            guest.measure(bencher, length, |installer, at| installer.zero(at, length));
        });
    }
    group.finish();
}

fn files(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("installers");
    for (kind, text, lengths) in
        [(Kind::Memfd, "alias_memfd", &[SMALL, PIECE][..]), (Kind::Huge, "alias_hugetlb", &[HUGE])]
    {
        let Some(guest) = Guest::try_new(kind, text) else { continue };
        for &length in lengths {
            let content = content(length);
            group.throughput(Throughput::Bytes(length));
            group.bench_function(BenchmarkId::new(text, name(length)), |bencher| {
                guest.measure(bencher, length, |installer, at| {
                    installer.write_and_continue(at, &content);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, anonymous, files);
criterion_main!(benches);
