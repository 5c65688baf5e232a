//! Elementwise arithmetic, rearrangement, the codec, bit-packing and the generator, on one thread:
//! `cargo bench -p veiltune-ring --bench elementwise [-- FILTER]`. Bytes are those of the result.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use veiltune_ring::codec;
use veiltune_ring::pack::{pack_into, packed_len, unpack};
use veiltune_ring::prg::{Prg, Seed};

/// A layer's activations: 128 tokens of 3072 words, 3 MB.
const DIMS: [usize; 2] = [128, 3072];
const WORDS: usize = DIMS[0] * DIMS[1];

fn tensors(c: &mut Criterion) {
    let mut prg = Prg::new(&Seed::from_bytes([0; 16]), 0, 0);
    let (a, b, row, column) = (
        prg.ring(DIMS),
        prg.ring(DIMS),
        prg.ring([3072]),
        prg.ring([128, 1]),
    );
    let heads = a.reshape([128, 48, 64]).expect("as many words");
    let mut group = c.benchmark_group("tensor");
    group.throughput(Throughput::Bytes(8 * WORDS as u64));
    group.bench_function("add", |t| t.iter(|| black_box(a.add(&b))));
    group.bench_function("mul", |t| t.iter(|| black_box(a.mul(&b))));
    group.bench_function("add row", |t| t.iter(|| black_box(a.add(&row))));
    group.bench_function("mul column", |t| t.iter(|| black_box(a.mul(&column))));
    group.bench_function("mul scalar", |t| t.iter(|| black_box(a.mul_scalar(3))));
    group.bench_function("map shift and mask", |t| {
        t.iter(|| black_box(a.map(|x| (x >> 16) & 0xffff)))
    });
    group.bench_function("sum rows", |t| t.iter(|| black_box(a.sum(1))));
    group.bench_function("transpose", |t| t.iter(|| black_box(a.transpose(0, 1))));
    group.bench_function("split heads", |t| t.iter(|| black_box(heads.permute(&[1, 0, 2]))));
    let mut sum = a.clone();
    group.bench_function("add assign", |t| t.iter(|| sum.add_assign(&b)));
}

fn fixed_point(c: &mut Criterion) {
    let values: Vec<f32> = (0..WORDS).map(|i| (i as f32).sin()).collect();
    let words = codec::encode(&values, 16).expect("small values");
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(8 * WORDS as u64));
    group.bench_function("encode", |t| t.iter(|| black_box(codec::encode(&values, 16))));
    group.bench_function("decode", |t| t.iter(|| black_box(codec::decode(&words, 16))));
}

fn packing(c: &mut Criterion) {
    let mut prg = Prg::new(&Seed::from_bytes([0; 16]), 0, 0);
    // They fit into the cache, as the ones just computed do.
    let mut values = prg.vec(1 << 15);
    let mut group = c.benchmark_group("pack");
    group.throughput(Throughput::Bytes(8 * values.len() as u64));
    for bits in [1, 8, 20, 38, 64] {
        let mut packed = Vec::with_capacity(packed_len(values.len(), bits));
        group.bench_function(format!("pack {bits} bits"), |t| {
            t.iter(|| {
                packed.clear();
                pack_into(black_box(&values), bits, &mut packed);
            })
        });
        group.bench_function(format!("unpack {bits} bits"), |t| {
            t.iter(|| unpack(black_box(&packed), bits, &mut values))
        });
    }
}

fn generator(c: &mut Criterion) {
    let mut prg = Prg::new(&Seed::from_bytes([0; 16]), 0, 0);
    let mut words = vec![0; WORDS];
    let mut group = c.benchmark_group("prg");
    group.throughput(Throughput::Bytes(8 * WORDS as u64));
    group.bench_function("fill", |t| t.iter(|| prg.fill_u64(black_box(&mut words))));
    group.bench_function("ring", |t| t.iter(|| black_box(prg.ring(DIMS))));
    group.bench_function("blocks", |t| t.iter(|| black_box(prg.blocks(WORDS / 2))));
    group.bench_function("16 bits", |t| t.iter(|| black_box(prg.bits(WORDS, 16))));
    group.bench_function("1 bit", |t| t.iter(|| black_box(prg.bits(WORDS, 1))));
}

fn config() -> Criterion {
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build_global()
        .expect("no pool was built before");
    let quick = Criterion::default().warm_up_time(Duration::from_millis(300));
    quick.measurement_time(Duration::from_secs(1)).sample_size(30)
}

criterion_group! { name = benches; config = config(); targets = tensors, fixed_point, packing, generator }
criterion_main!(benches);
