//! Telling zero pages from others, which a source does with every page that it sends.

use afterimage::internals::is_zero;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use memmap2::MmapMut;
use std::hint::black_box;

const SIZES: [(&str, usize); 2] = [("4KiB", 4096), ("2MiB", 2 << 20)];

/// Memory of its own, with one byte that is not zero, if any.
fn page(length: usize, content_at: Option<usize>) -> MmapMut {
    let mut map = MmapMut::map_anon(length).expect("a mapping");
    // Every page is touched: one that never was is the kernel's page of zeros, and cached.
    map.fill(0);
    if let Some(at) = content_at {
        map[at] = 1;
    }
    map
}

fn zero(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zero");
    for (size, length) in SIZES {
        group.throughput(Throughput::Bytes(length as u64));
        for (content, at) in
            [("all_zero", None), ("first_word", Some(0)), ("last_word", Some(length - 8))]
        {
            let page = page(length, at);
            group.bench_function(BenchmarkId::new(content, size), |bencher| {
                bencher.iter(|| is_zero(black_box(&page)));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, zero);
criterion_main!(benches);
