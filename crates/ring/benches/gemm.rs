//! Matrix products, in multiply-adds a second: `cargo bench -p veiltune-ring --bench gemm [-- FILTER]`.
//!
//! Each product runs on one thread and on all cores; `nn` is `matmul`, `nt` is `matmul_nt`, `packed` is `matmul_packed`,
//! `zeros` is `nt` with a left side that ends in 18 zeros.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_ring::{Packed, Ring};

/// Batch, rows, inner dimension, columns.
const SHAPES: [[usize; 4]; 8] = [
    [1, 128, 768, 3072],
    [1, 512, 1024, 4096],
    [1, 128, 3072, 768],
    [12, 128, 64, 128],
    [12, 128, 128, 64],
    [1, 197, 768, 240],
    [1, 8, 768, 3072],
    [1, 1, 768, 3072],
];

type Product<'a> = Box<dyn Fn() -> Ring + Sync + 'a>;

fn products(c: &mut Criterion<MacRate>) {
    let mut prg = Prg::new(&Seed::from_bytes([0; 16]), 0, 0);
    for [batch, m, k, n] in SHAPES {
        let a = prg.ring([batch, m, k]);
        let zeros = a.map(|x| x << 18);
        let b = prg.ring([batch, k, n]);
        let bt = b.transpose(1, 2).expect("three dimensions");
        let packed = Packed::new_nt(
            &bt.narrow(0, 0, 1)
                .and_then(|b| b.reshape([n, k]))
                .expect("a matrix"),
        );
        let packed = packed.expect("a matrix");
        let mut kinds: Vec<(&str, Product)> = vec![
            ("nn", Box::new(|| a.matmul(&b).expect("shapes fit"))),
            ("nt", Box::new(|| a.matmul_nt(&bt).expect("shapes fit"))),
            ("zeros", Box::new(|| zeros.matmul_nt(&bt).expect("shapes fit"))),
        ];
        if batch == 1 {
            kinds.push((
                "packed",
                Box::new(|| a.matmul_packed(&packed).expect("shapes fit")),
            ));
        }
        let mut group = c.benchmark_group(format!("{batch}x{m}x{k}x{n}"));
        group.throughput(Throughput::Elements((batch * m * k * n) as u64));
        for (kind, run) in &kinds {
            for threads in [1, std::thread::available_parallelism().map_or(2, usize::from)] {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .expect("threads");
                let id = BenchmarkId::new(*kind, format!("{threads} threads"));
                group.bench_function(id, |bencher| pool.install(|| bencher.iter(|| black_box(run()))));
            }
        }
    }
}

/// Wall-clock time whose throughput counts multiply-adds.
struct MacRate;

impl Measurement for MacRate {
    type Intermediate = <WallTime as Measurement>::Intermediate;
    type Value = Duration;

    fn start(&self) -> Self::Intermediate {
        WallTime.start()
    }

    fn end(&self, start: Self::Intermediate) -> Duration {
        WallTime.end(start)
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        self
    }
}

impl ValueFormatter for MacRate {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }

    fn scale_throughputs(&self, typical: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        let Throughput::Elements(macs) = throughput else {
            return WallTime
                .formatter()
                .scale_throughputs(typical, throughput, values);
        };
        values
            .iter_mut()
            .for_each(|nanoseconds| *nanoseconds = *macs as f64 / *nanoseconds);
        "Gmac/s"
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}

fn config() -> Criterion<MacRate> {
    let quick = Criterion::default().warm_up_time(Duration::from_millis(300));
    quick
        .measurement_time(Duration::from_secs(2))
        .sample_size(30)
        .with_measurement(MacRate)
}

criterion_group! { name = benches; config = config(); targets = products }
criterion_main!(benches);
