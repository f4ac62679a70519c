//! The planes of a destination and the bitmaps of a source: what each page costs them.

use afterimage_protocol::bitmap::{Bitmap, MAX_SEGMENT_PAGES, Planes, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

/// 256 MiB of guest memory.
const PAGES: u64 = 1 << 16;
/// Pages taken in one step: one that was asked for, a piece of a background stream, more.
const RUNS: [u64; 3] = [1, 64, 512];

/// All pages in runs of `pages`.
fn runs(pages: u64) -> impl Iterator<Item = PageRange> {
    (0..PAGES / pages).map(move |run| PageRange::new(PageNumber(run * pages), pages))
}

fn claim(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("planes/claim");
    group.throughput(Throughput::Elements(PAGES));
    for pages in RUNS {
        group.bench_function(BenchmarkId::new("run", pages), |bencher| {
            let claim = |planes: &mut Planes| {
                let won = |run| _ = black_box(run);
                runs(pages).map(|run| planes.claim(run, won)).sum::<u64>()
            };
            bencher.iter_batched_ref(|| Planes::new(PAGES), claim, BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn complete(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("planes/complete");
    group.throughput(Throughput::Elements(PAGES));
    for pages in RUNS {
        group.bench_function(BenchmarkId::new("claimed_run", pages), |bencher| {
            let claimed = || {
                let planes = Planes::new(PAGES);
                planes.claim(PageRange::new(PageNumber(0), PAGES), |_| ());
                planes
            };
            let complete = |planes: &mut Planes| {
                let newly = |run| _ = black_box(run);
                runs(pages).map(|run| planes.complete(run, newly)).sum::<u64>()
            };
            bencher.iter_batched_ref(claimed, complete, BatchSize::LargeInput);
        });
    }
    group.finish();
}

/// Bitmaps by how they look on the wire.
fn shapes(pages: u64) -> [(&'static str, Bitmap); 3] {
    let every = |step: u64, count: u64| {
        let bitmap = Bitmap::new(pages);
        for start in (0..pages).step_by(step as usize) {
            bitmap.set(PageRange::new(PageNumber(start), count), |_| ());
        }
        bitmap
    };
    // Runs of 512 with one page missing; one page in 1024; every other page, which travels
    // as raw words.
    [("dense", every(512, 511)), ("sparse", every(1024, 1)), ("alternating", every(2, 1))]
}

fn count(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("planes/count");
    group.throughput(Throughput::Elements(PAGES));
    for (shape, bitmap) in shapes(PAGES) {
        group.bench_function(shape, |bencher| bencher.iter(|| black_box(&bitmap).count()));
    }
    group.finish();
}

fn wire_form(criterion: &mut Criterion) {
    let range = PageRange::new(PageNumber(0), MAX_SEGMENT_PAGES);
    let mut group = criterion.benchmark_group("planes/wire");
    group.throughput(Throughput::Elements(MAX_SEGMENT_PAGES));
    for (shape, bitmap) in shapes(MAX_SEGMENT_PAGES) {
        group.bench_function(BenchmarkId::new("encode", shape), |bencher| {
            bencher.iter(|| Segment::encode(black_box(&bitmap), range));
        });
        let segment = Segment::encode(&bitmap, range);
        group.bench_function(BenchmarkId::new("decode", shape), |bencher| {
            bencher.iter(|| {
                let set = |run| _ = black_box(run);
                black_box(&segment).decode(range, set).expect("a segment of these pages");
            });
        });
    }
    group.finish();
}

/// How a source finds what to send next.
fn next_free(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("planes/next_free");
    let full = Bitmap::new(PAGES);
    full.set(PageRange::new(PageNumber(0), PAGES - 1), |_| ());
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("behind_all_others", |bencher| {
        bencher.iter(|| black_box(&full).next_clear(PageNumber(0), 64));
    });
    let [_, _, (_, alternating)] = shapes(PAGES);
    group.throughput(Throughput::Elements(PAGES / 2));
    group.bench_function("every_other", |bencher| {
        bencher.iter(|| {
            let mut from = PageNumber(0);
            while let Some(run) = black_box(&alternating).next_clear(from, 64) {
                from = PageNumber(run.start.0 + run.count);
            }
            from
        });
    });
    group.finish();
}

criterion_group!(benches, claim, complete, count, wire_form, next_free);
criterion_main!(benches);
