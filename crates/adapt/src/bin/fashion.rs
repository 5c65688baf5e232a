//! The embedded demonstration, from the data to the weights: a compact vision transformer pretrained without labels on
//! Fashion-MNIST, and a private adapter that learns its ten classes.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use veiltune_adapt::cache::{Examples, Request, Source, States};
use veiltune_adapt::data::{self, LABELS, Pictures, SIDE, Split};
use veiltune_adapt::evaluate::{self, Arithmetic, evaluate};
use veiltune_adapt::train::{self, Task, Trained};
use veiltune_adapt::{Result, cache, pretrain};
use veiltune_engine::{NormKind, NormSpec};
use veiltune_hub::dataset::Split as Part;
use veiltune_hub::{AdapterConfig, Augment, Dataset, Precision, files, image, safetensors};
use veiltune_nn::load::BackboneConfig;
use veiltune_nn::owc::Design;
use veiltune_nn::vit::HiddenAct;
use veiltune_nn::{Backbone, HeadConfig, Method, OwcConfig, VitConfig};

/// Trains and measures the embedded demonstration on Fashion-MNIST.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pretrain the backbone, without labels.
    Pretrain {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        shape: Shape,
        /// Passes over the pictures.
        #[arg(long, default_value_t = 5)]
        epochs: usize,
        /// Pictures a step.
        #[arg(long, default_value_t = 128)]
        batch: usize,
        /// Peak learning rate.
        #[arg(long, default_value_t = 1.5e-3)]
        rate: f32,
        /// Patches of a view that the encoder sees.
        #[arg(long, default_value_t = 16)]
        visible: usize,
    },
    /// Train and calibrate the private adapter; accuracy on the validation split.
    Adapter {
        #[command(flatten)]
        common: Common,
        /// Adapters, beside the last blocks.
        #[arg(long, default_value_t = 1)]
        scope: usize,
        /// Width within an adapter.
        #[arg(long, default_value_t = 64)]
        rank: usize,
        /// Attention heads.
        #[arg(long, default_value_t = 4)]
        heads: usize,
        /// Passes over the pictures.
        #[arg(long, default_value_t = 8)]
        epochs: usize,
        /// Pictures a step.
        #[arg(long, default_value_t = 128)]
        batch: usize,
        /// Peak learning rate.
        #[arg(long, default_value_t = 0.05)]
        rate: f32,
    },
    /// Fit a linear probe on the class token; accuracy on the validation split.
    Probe(Common),
    /// Measure adapter and linear probe on the test set.
    Evaluate(Common),
    /// Write twenty test pictures, two a class.
    Samples(Common),
}

#[derive(Args, Clone)]
struct Common {
    /// Directory of the four IDX files.
    #[arg(long)]
    data: PathBuf,
    /// Directory of the backbone, the adapter and the samples.
    #[arg(long)]
    out: PathBuf,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Directory of the backbone's hidden states; they are computed once.
    #[arg(long, default_value_os_t = std::env::temp_dir().join("veiltune-fashion"))]
    cache: PathBuf,
    /// Use only so many training pictures.
    #[arg(long)]
    limit: Option<usize>,
}

#[derive(Args)]
struct Shape {
    /// Width of the hidden states.
    #[arg(long, default_value_t = 96)]
    width: usize,
    /// Blocks.
    #[arg(long, default_value_t = 4)]
    depth: usize,
    /// Attention heads.
    #[arg(long, default_value_t = 4)]
    heads: usize,
}

fn main() {
    veiltune_adapt::workers::restart_with(&[veiltune_adapt::workers::UNSPLIT]);
    if let Err(e) = run(Cli::parse().command) {
        eprintln!("fashion: {e}");
        std::process::exit(1);
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Pretrain {
            common,
            shape,
            epochs,
            batch,
            rate,
            visible,
        } => {
            let vit = VitConfig {
                hidden_size: shape.width,
                num_hidden_layers: shape.depth,
                num_attention_heads: shape.heads,
                intermediate_size: 4 * shape.width,
                hidden_act: HiddenAct::Relu,
                image_size: SIDE,
                patch_size: 4,
                num_channels: 1,
                layer_norm_eps: 1e-6,
                qkv_bias: true,
                layer_scale: false,
            };
            let (train, _) = pictures(&common)?;
            let settings = pretrain::Settings {
                epochs,
                batch,
                rate,
                visible,
                threads: common.threads,
                seed: common.seed,
            };
            let bar = steps();
            let tensors = pretrain::pretrain(&vit, &train, &settings, |step, steps, loss| {
                show(&bar, step, steps, loss)
            })?;
            bar.finish();
            safetensors::write(&common.out.join("backbone.safetensors"), &tensors, Precision::F16)?;
            let config = BackboneConfig {
                vit,
                preprocess: Some(data::preprocess()),
            };
            files::write_json(&common.out.join("config.json"), &config)?;
            println!(
                "{} parameters",
                tensors.values().map(|a| a.values.len()).sum::<usize>()
            );
        }
        Command::Adapter {
            common,
            scope,
            rank,
            heads,
            epochs,
            batch,
            rate,
        } => {
            let backbone = Backbone::open(&common.out)?;
            let design = Design::new(heads, rank, scope);
            let (width, tokens) = (backbone.config.hidden_size, backbone.tokens());
            let method = Method::Owc(OwcConfig::new(&design, width, tokens, labels()));
            let settings = train::Settings {
                epochs,
                batch,
                rate,
                dropout: 0.0,
                shard: batch.div_ceil(common.threads.max(1)),
                seed: common.seed,
                ..train::Settings::default()
            };
            let trained = fit(&common, &backbone, &method, &settings, 2)?;
            println!("training accuracy {:.4}", trained.report.train_accuracy);
            let validation = trained.report.validation_accuracy;
            println!("validation accuracy {:.4}", validation.unwrap_or(f64::NAN));
            let config = AdapterConfig {
                base_model_name_or_path: "fashion-mnist-vit".into(),
                base_model_sha256: None,
                text: None,
                method: trained.method,
            };
            let dir = common.out.join("adapter");
            veiltune_hub::adapter::write(&dir, &config, &trained.tensors, Precision::F32)?;
        }
        Command::Probe(common) => {
            let backbone = Backbone::open(&common.out)?;
            let validation = probe(&common, &backbone)?.report.validation_accuracy;
            println!(
                "validation accuracy of the linear probe {:.4}",
                validation.unwrap_or(f64::NAN)
            );
        }
        Command::Evaluate(common) => {
            let backbone = Backbone::open(&common.out)?;
            let (config, weights) = veiltune_hub::adapter::read::<Method>(&common.out.join("adapter"))?;
            let (adapter, tensors) = (config.method, weights.arrays()?);
            let probe = probe(&common, &backbone)?;
            println!("test accuracy");
            for (name, method, tensors, arithmetic) in [
                ("adapter as trained", &adapter, &tensors, Arithmetic::Float),
                ("adapter as served", &adapter, &tensors, Arithmetic::Served),
                ("linear probe", &probe.method, &probe.tensors, Arithmetic::Float),
            ] {
                let test = Dataset::open(&common.data, Part::Test)?;
                let states = states(&common, &backbone, &test, method, 1)?;
                let model = evaluate::Model {
                    method,
                    tensors,
                    backbone: Some(&backbone),
                };
                let all: Vec<usize> = (0..states.len()).collect();
                let pictures = train::Pictures {
                    states: &states,
                    which: &all,
                };
                let result = evaluate(&model, pictures, arithmetic, common.threads, &mut |_| (), &NEVER)?;
                println!("  {name:<18}  {:.4}", result.accuracy);
            }
        }
        Command::Samples(common) => samples(&common.data, &common.out.join("images"))?,
    }
    Ok(())
}

/// Nothing stops a command but the end of its process, and the caches bear that.
static NEVER: AtomicBool = AtomicBool::new(false);

fn labels() -> Vec<String> {
    LABELS.map(str::to_owned).to_vec()
}

fn pictures(common: &Common) -> Result<(Pictures, Pictures)> {
    let (train, validation) = Pictures::open(&common.data, Split::Train)?.with_validation();
    let kept = common.limit.unwrap_or(train.len()).min(train.len());
    Ok((train.select(&(0..kept).collect::<Vec<_>>()), validation))
}

/// What `method` reads of the pictures and, as the second of two views, of their mirror images.
fn states(
    common: &Common,
    backbone: &Backbone,
    dataset: &Dataset,
    method: &Method,
    views: usize,
) -> Result<States> {
    let bar = ProgressBar::new(0).with_style(style("backbone {bar:40} {pos}/{len} pictures, {eta} left"));
    let request = Request {
        dir: &common.cache,
        source: Source::Backbone(backbone),
        examples: Examples::Pictures(dataset),
        views,
        augment: Augment {
            scale: [1.0; 2],
            ratio: [1.0; 2],
            flip: 1.0,
        },
        seed: 0,
        threads: common.threads,
    };
    let reads = method.reads(backbone.config.num_hidden_layers)?;
    let show = &mut |p: cache::Progress| {
        bar.set_length(p.total as u64);
        bar.set_position(p.done as u64);
    };
    let states = States::open_or_compute(&request, &reads, show, &NEVER)?.named(labels())?;
    bar.finish_and_clear();
    Ok(states)
}

/// Trains on nine tenths of the training pictures and measures on the last.
fn fit(
    common: &Common,
    backbone: &Backbone,
    method: &Method,
    settings: &train::Settings,
    views: usize,
) -> Result<Trained> {
    let dataset = Dataset::open(&common.data, Part::Train)?;
    let states = states(common, backbone, &dataset, method, views)?;
    let (mut own, held) = states.split_validation(0.1, 0);
    own.truncate(common.limit.unwrap_or(own.len()));
    let bar = steps();
    let task = Task {
        method,
        backbone: Some(backbone),
        train: train::Pictures {
            states: &states,
            which: &own,
        },
        validation: train::Pictures {
            states: &states,
            which: &held,
        },
        settings,
        threads: common.threads,
        dir: None,
    };
    let watch = &mut |event| {
        if let train::Event::Trained(p) = event
            && p.ended.is_none()
        {
            show(&bar, p.step, p.steps, p.loss as f32);
        }
    };
    let trained = train::train(&task, watch, &NEVER)?;
    bar.finish();
    Ok(trained)
}

fn probe(common: &Common, backbone: &Backbone) -> Result<Trained> {
    let method = Method::Head(HeadConfig {
        hidden_size: backbone.config.hidden_size,
        norm: NormSpec {
            kind: NormKind::Layer,
            eps: 1e-6,
            sigma: (1e-3, 1e3),
        },
        labels: labels(),
    });
    let settings = train::Settings {
        seed: common.seed,
        ..train::Settings::of(&method)
    };
    fit(common, backbone, &method, &settings, 1)
}

/// The first two test pictures of each class, their true label in the name.
fn samples(data: &Path, out: &Path) -> Result<()> {
    let test = Pictures::open(data, Split::Test)?;
    let mut number = 0;
    for (class, label) in LABELS.iter().enumerate() {
        let name = label.to_lowercase().replace([' ', '/'], "-");
        let own = (0..test.len()).filter(|&i| test.labels[i] as usize == class);
        for i in own.take(2) {
            number += 1;
            let png = image::grey_png(test.picture(i), SIDE as u32)?;
            files::write_atomic(&out.join(format!("{number:02}_{name}.png")), &png)?;
        }
    }
    println!("{number} pictures in {}", out.display());
    Ok(())
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn steps() -> ProgressBar {
    ProgressBar::new(0).with_style(style(
        "{bar:40} {pos}/{len} steps, {elapsed} gone, {eta} left, {msg}",
    ))
}

fn show(bar: &ProgressBar, step: usize, steps: usize, loss: f32) {
    bar.set_length(steps as u64);
    bar.set_position(step as u64);
    if step.is_multiple_of(10) || step == steps {
        bar.set_message(format!("loss {loss:.4}"));
    }
    // Without a terminal there is no bar: a line now and then.
    if bar.is_hidden() && (step.is_multiple_of(100) || step == steps) {
        eprintln!(
            "step {step} of {steps}, loss {loss:.4}, {} s",
            bar.elapsed().as_secs()
        );
    }
}
