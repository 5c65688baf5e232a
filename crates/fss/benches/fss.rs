//! Keys a second on one thread: `cargo bench -p veiltune-fss`. Keys are dealt into one buffer again and again, as a dealer
//! does it, and evaluated from memory, each key once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use veiltune_fss::{Block, cmp, dcf, dpf, table};

fn points(n: usize, bits: u32, salt: u64) -> Vec<u64> {
    (0..n as u64)
        .map(|i| (i ^ salt).wrapping_mul(0x9e3779b97f4a7c15) >> (64 - bits))
        .collect()
}

fn roots(n: usize) -> [Vec<Block>; 2] {
    [3, 5].map(|salt| {
        (1..=n as Block)
            .map(|i| i.wrapping_mul(0x2360ed051fc65da44385df649fccf645 ^ salt))
            .collect()
    })
}

fn gates(c: &mut Criterion) {
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build_global()
        .expect("the global pool is not in use yet");
    let n = 1 << 20;
    let [r0, r1] = roots(n);
    for bits in [16, 24, 40] {
        let (alphas, xs) = (points(n, bits, 1), points(n, bits, 2));
        let mut keys = cmp::generate(bits, &alphas, [&r0, &r1]).expect("lengths agree");
        let mut group = c.benchmark_group(format!("cmp{bits}"));
        group.sample_size(20).throughput(Throughput::Elements(n as u64));
        group.bench_function("generate", |b| {
            b.iter(|| cmp::generate_into(bits, &alphas, [&r0, &r1], black_box(&mut keys)))
        });
        group.bench_function("evaluate", |b| {
            b.iter(|| black_box(cmp::evaluate(0, bits, &r0, &keys, &xs)))
        });
    }

    let n = 1 << 18;
    let bits = 24;
    let (r0, r1) = (&r0[..n], &r1[..n]);
    let (alphas, xs) = (points(n, bits, 1), points(n, bits, 2));
    let mut group = c.benchmark_group(format!("dpf{bits}"));
    group.sample_size(20).throughput(Throughput::Elements(n as u64));
    let mut keys = dpf::generate(bits, &alphas, [r0, r1]).expect("lengths agree");
    group.bench_function("generate", |b| {
        b.iter(|| dpf::generate_into(bits, &alphas, [r0, r1], black_box(&mut keys)))
    });
    group.bench_function("evaluate", |b| {
        b.iter(|| black_box(dpf::evaluate(0, bits, r0, &keys, &xs)))
    });
    group.finish();

    let mut group = c.benchmark_group(format!("dcf{bits}"));
    group.sample_size(20).throughput(Throughput::Elements(n as u64));
    let mut keys = dcf::generate(bits, &alphas, &xs, [r0, r1]).expect("lengths agree");
    group.bench_function("generate", |b| {
        b.iter(|| dcf::generate_into(bits, &alphas, &xs, [r0, r1], black_box(&mut keys)))
    });
    group.bench_function("evaluate", |b| {
        b.iter(|| black_box(dcf::evaluate(0, bits, r0, &keys, 1, &xs)))
    });
    group.finish();

    for bits in [8, 12, 16] {
        let n = 1 << (22 - bits);
        let (r0, r1) = (&r0[..n], &r1[..n]);
        let (alphas, offsets) = (points(n, bits, 1), points(n, bits, 2));
        let keys = table::generate(bits, &alphas, [r0, r1]).expect("lengths agree");
        let entries = points(2 << bits, 64, 4);
        let (a, b) = entries.split_at(1 << bits);
        let mut group = c.benchmark_group(format!("table{bits}"));
        group.sample_size(20).throughput(Throughput::Elements(n as u64));
        for tables in [&[a][..], &[a, b]] {
            group.bench_function(format!("lookup in {}", tables.len()), |bench| {
                bench.iter(|| black_box(table::lookup(0, bits, r0, &keys, &offsets, tables)));
            });
        }
    }
}

criterion_group!(benches, gates);
criterion_main!(benches);
