//! The float backbone, in seconds an image: `cargo bench -p veiltune-nn --bench backbone [-- --quick]`.
//!
//! Shapes are those of ViT-B/16 and ViT-S/14 at 224 pixels, weights are random; one thread unless `RAYON_NUM_THREADS`
//! names another number.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use veiltune_engine::{Backend, Owner, Plain};
use veiltune_hub::{Array, Tensors};
use veiltune_nn::load::{inventory, params};
use veiltune_nn::vit::HiddenAct;
use veiltune_nn::{Layout, Variant, Vit, VitConfig};

// What the command-line tool allocates with: fresh pages for every buffer cost as much as the arithmetic.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn base() -> (VitConfig, Variant) {
    let config = VitConfig {
        hidden_size: 768,
        num_hidden_layers: 12,
        num_attention_heads: 12,
        intermediate_size: 3072,
        hidden_act: HiddenAct::Gelu,
        image_size: 224,
        patch_size: 16,
        num_channels: 3,
        layer_norm_eps: 1e-12,
        qkv_bias: true,
        layer_scale: false,
    };
    (config, Variant::default())
}

fn small() -> (VitConfig, Variant) {
    let (base, variant) = base();
    let config = VitConfig {
        hidden_size: 384,
        num_attention_heads: 6,
        intermediate_size: 1536,
        patch_size: 14,
        layer_scale: true,
        ..base
    };
    let layout = Layout::Dinov2;
    (config, Variant { layout, ..variant })
}

/// Values in -scale .. scale from a small congruential generator.
fn noise(count: usize, scale: f32, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..count).map(|_| next()).collect()
}

fn forward(c: &mut Criterion<PerImage>) {
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
        pool.build_global().expect("the first to ask for threads");
    }
    let b = Plain::new();
    for (name, (config, variant), batch) in [
        ("vit-b16", base(), 1),
        ("vit-s14", small(), 1),
        ("vit-s14", small(), 16),
    ] {
        let shapes = inventory(&b, |p| Vit::load_variant(p, &config, variant)).expect("a model");
        let array = |(i, (name, dims)): (usize, (String, Vec<usize>))| {
            let values = noise(dims.iter().product(), 0.05, i as u64);
            (name, Array { dims, values })
        };
        let tensors: Tensors = shapes.into_iter().enumerate().map(array).collect();
        let vit = Vit::load_variant(&params(&b, Owner::Public, &tensors), &config, variant).expect("a model");
        let side = config.image_size;
        let images = noise(batch * 3 * side * side, 1.0, 1);
        let images = b.input(Owner::Public, &[batch, 3, side, side], Some(&images));
        let images = images.expect("pictures");

        let mut group = c.benchmark_group("forward");
        group.throughput(Throughput::Elements(batch as u64));
        let id = BenchmarkId::new(name, format!("batch {batch}"));
        group.bench_function(id, |bencher| {
            bencher.iter(|| black_box(vit.forward(&b, &images).expect("shapes fit")))
        });
    }
}

/// Wall-clock time whose throughput is given in seconds an image.
struct PerImage;

impl Measurement for PerImage {
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

impl ValueFormatter for PerImage {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }

    fn scale_throughputs(&self, typical: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        let Throughput::Elements(images) = throughput else {
            return WallTime
                .formatter()
                .scale_throughputs(typical, throughput, values);
        };
        values
            .iter_mut()
            .for_each(|nanoseconds| *nanoseconds /= 1e9 * *images as f64);
        "s/image"
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}

fn config() -> Criterion<PerImage> {
    let short = Criterion::default().warm_up_time(Duration::from_millis(500));
    short
        .measurement_time(Duration::from_secs(8))
        .sample_size(10)
        .with_measurement(PerImage)
}

criterion_group! { name = benches; config = config(); targets = forward }
criterion_main!(benches);
