//! The frames of data channels: what a header costs to write, to read and to check.

use afterimage_protocol::layout::{
    Backing, GuestAddress, GuestLayout, PageNumber, PageRange, PageSize, Region,
};
use afterimage_protocol::wire::{DataFrame, Epoch, Generation, Header, Stamp};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const GIB: u64 = 1 << 30;
/// One page, and a piece of a background stream.
const CONTENTS: [(&str, u64); 2] = [("4KiB", 1), ("256KiB", 64)];

fn stamp() -> Stamp {
    Stamp { epoch: Epoch(3), generation: Generation(1) }
}

fn content_frame(pages: u64) -> DataFrame {
    DataFrame::Content(PageRange::new(PageNumber(4711), pages), pages as u32 * 4096)
}

/// A guest as KVM has it: a hole below 4 GiB.
fn layout() -> GuestLayout {
    let region = |start, length| {
        Region::new(GuestAddress(start), length, PageSize::KIB_4, Backing::Anonymous)
    };
    GuestLayout::new(vec![region(0, 3 * GIB), region(4 * GIB, 13 * GIB)]).expect("a layout")
}

fn header(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/header");
    let frame = content_frame(64);
    group.bench_function("to_bytes", |bencher| {
        bencher.iter(|| black_box(frame).header(black_box(stamp())).to_bytes());
    });
    let bytes = frame.header(stamp()).to_bytes();
    group.bench_function("from_bytes", |bencher| {
        bencher.iter(|| Header::from_bytes(black_box(bytes)));
    });
    let layout = layout();
    for (name, frame) in [
        ("request", DataFrame::Request(PageRange::one(PageNumber(1_000_000)))),
        ("content", frame),
        ("zero", DataFrame::Zero(PageRange::new(PageNumber(0), 1 << 20))),
    ] {
        let bytes = frame.header(stamp()).to_bytes();
        group.bench_function(BenchmarkId::new("parse", name), |bencher| {
            bencher.iter(|| {
                let header = Header::from_bytes(black_box(bytes));
                DataFrame::parse(&header, &layout, "background").expect("a frame")
            });
        });
    }
    group.finish();
}

fn checksum(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/crc32c");
    for (name, pages) in CONTENTS {
        let content: Vec<u8> = (0..pages * 4096).map(|at| ((at * 31) >> 3) as u8).collect();
        let header = content_frame(pages).header(stamp());
        group.throughput(Throughput::Bytes(pages * 4096));
        group.bench_function(BenchmarkId::new("sealed", name), |bencher| {
            bencher.iter(|| black_box(header).sealed([black_box(&content[..])]));
        });
        let sealed = header.sealed([&content[..]]);
        group.bench_function(BenchmarkId::new("verify", name), |bencher| {
            bencher.iter(|| black_box(sealed).verify([black_box(&content[..])]));
        });
    }
    group.finish();
}

criterion_group!(benches, header, checksum);
criterion_main!(benches);
