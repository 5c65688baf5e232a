//! The embedded demonstration, from the data to the weights: a compact vision transformer pretrained without labels on
//! Fashion-MNIST, and a private adapter that learns its ten classes.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use veiltune_adapt::adapter::{self, States};
use veiltune_adapt::data::{self, LABELS, Pictures, SIDE, Split};
use veiltune_adapt::probe::Probe;
use veiltune_adapt::{Result, pretrain};
use veiltune_engine::Plain;
use veiltune_hub::{AdapterConfig, Precision, files, image, safetensors};
use veiltune_nn::load::{Backbone, BackboneConfig};
use veiltune_nn::vit::HiddenAct;
use veiltune_nn::{OwcConfig, VitConfig, owc};

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
    // Threads share a batch, each with its own products: threads within a product would only get in the way. The
    // tensor library takes their number from the environment, which has to be set before the process starts.
    const INNER: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(INNER).is_none()
        && let Ok(program) = std::env::current_exe()
    {
        let status = std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .env(INNER, "1")
            .status();
        std::process::exit(status.ok().and_then(|s| s.code()).unwrap_or(1));
    }
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
            let (train, validation) = pictures(&common)?;
            let (train, validation) = (
                states(&backbone, &train, scope, true)?,
                states(&backbone, &validation, scope, false)?,
            );
            let config = adapter::config(
                backbone.config.hidden_size,
                backbone.config.tokens(),
                &LABELS,
                scope,
                rank,
                heads,
            );
            let settings = adapter::Settings {
                epochs,
                batch,
                rate,
                decay: 5e-4,
                threads: common.threads,
                seed: common.seed,
            };
            let bar = steps();
            let tensors = adapter::train(&config, &train, &settings, |step, steps, loss| {
                show(&bar, step, steps, loss)
            })?;
            bar.finish();
            let method = adapter::calibrate(&config, &tensors, &train, MARGIN)?;
            println!(
                "training accuracy {:.4}",
                adapter::accuracy(&method, &tensors, &train)?
            );
            println!(
                "validation accuracy {:.4}",
                adapter::accuracy(&method, &tensors, &validation)?
            );
            let config = AdapterConfig {
                peft_type: owc::PEFT_TYPE.into(),
                base_model_name_or_path: "fashion-mnist-vit".into(),
                method,
            };
            veiltune_hub::adapter::write(&common.out.join("adapter"), &config, &tensors, Precision::F32)?;
        }
        Command::Probe(common) => {
            let backbone = Backbone::open(&common.out)?;
            let (train, validation) = pictures(&common)?;
            let (train, validation) = (
                states(&backbone, &train, 0, false)?,
                states(&backbone, &validation, 0, false)?,
            );
            println!(
                "validation accuracy of the linear probe {:.4}",
                probe(&train, common.seed)?.accuracy(&validation)?
            );
        }
        Command::Evaluate(common) => {
            let backbone = Backbone::open(&common.out)?;
            let (config, weights) =
                veiltune_hub::adapter::read::<OwcConfig>(&common.out.join("adapter"), owc::PEFT_TYPE)?;
            let (tensors, scope) = (weights.arrays()?, config.method.scope);
            let (train, _) = pictures(&common)?;
            let test = states(
                &backbone,
                &Pictures::open(&common.data, Split::Test)?,
                scope,
                false,
            )?;
            let adapter = adapter::accuracy(&config.method, &tensors, &test)?;
            let (folded, served) = owc::fold(&config.method, &tensors)?;
            let served = adapter::accuracy(&folded, &served, &test)?;
            let probe = probe(&states(&backbone, &train, 0, false)?, common.seed)?.accuracy(&test)?;
            println!("test accuracy, {} pictures", test.len());
            println!("  adapter as trained  {adapter:.4}");
            println!("  adapter as served   {served:.4}");
            println!("  linear probe        {probe:.4}");
        }
        Command::Samples(common) => samples(&common.data, &common.out.join("images"))?,
    }
    Ok(())
}

/// By how much calibrated ranges are widened.
const MARGIN: f64 = 1.5;

fn pictures(common: &Common) -> Result<(Pictures, Pictures)> {
    let (train, validation) = Pictures::open(&common.data, Split::Train)?.with_validation();
    let kept = common.limit.unwrap_or(train.len()).min(train.len());
    Ok((train.select(&(0..kept).collect::<Vec<_>>()), validation))
}

/// Hidden states of the pictures and, if `mirrored`, of their mirror images.
fn states(backbone: &Backbone, pictures: &Pictures, scope: usize, mirrored: bool) -> Result<States> {
    let vit = backbone.load(&Plain::new())?;
    let bar = ProgressBar::new(pictures.len() as u64 * if mirrored { 2 } else { 1 })
        .with_style(style("backbone {bar:40} {pos}/{len} pictures, {eta} left"));
    let compute =
        |p: &Pictures| States::compute(&vit, p, &backbone.preprocess, scope, |done| bar.inc(done as u64));
    let states = compute(pictures)?;
    let states = if mirrored {
        states.join(compute(&pictures.mirrored())?)?
    } else {
        states
    };
    bar.finish_and_clear();
    Ok(states)
}

fn probe(train: &States, seed: u64) -> Result<Probe> {
    let settings = adapter::Settings {
        epochs: 30,
        batch: 512,
        rate: 0.1,
        decay: 1e-4,
        threads: 1,
        seed,
    };
    Probe::fit(train, LABELS.len(), &settings)
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
