//! The three roles of a private classification, each a process of its own. Read top to bottom they are its data flow:
//!
//! image -> preprocess -> backbone, in the clear at the client -> hidden states -> input of the session -> adapter and head
//! between client and provider, on material from the dealer -> reveal to the client -> label.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use veiltune_engine::session::serve_material;
use veiltune_engine::{Comparison, Plain};
use veiltune_hub::files;
use veiltune_nn::{OwcConfig, load::Classifier};
use veiltune_wire::{Identity, Network};

use crate::events::{Classified, Event, Measured, Stage};
use crate::inputs::{self, Pictures};
use crate::job::Job;
use crate::program::{Batches, CLIENT, Classification, PROVIDER, hidden_states};
use crate::{Error, Result};

/// The part that a process plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Has the images, runs the public backbone, learns the logits.
    Client,
    /// Has the adapter and the head, learns nothing.
    Provider,
    /// Makes correlated randomness, sees neither images nor adapter.
    Dealer,
}

impl Role {
    /// Its name, also in certificates.
    pub fn name(self) -> &'static str {
        match self {
            Role::Client => "client",
            Role::Provider => "provider",
            Role::Dealer => "dealer",
        }
    }

    /// Its name in certificates.
    pub fn identity(self) -> Identity {
        Identity::new(self.name()).expect("the names of roles are valid")
    }
}

/// What a role is told: what all of them agree on, and its own part.
#[derive(Debug, Serialize, Deserialize)]
pub struct Config<R> {
    /// The session, the same at all roles. None: the dealer draws it, and tells the others when they call.
    pub session: Option<[u8; 16]>,
    /// Directory of this role's key and certificates.
    pub credentials: PathBuf,
    /// Emulated between client and provider.
    pub network: Network,
    /// Longest time to wait for another role to call or to give a sign of life, seconds.
    pub wait: f64,
    /// Number of images, and of images a pass.
    pub batches: Batches,
    /// How the parties compare numbers.
    pub comparison: Comparison,
    /// Public configuration of the adapter, folded.
    pub adapter: OwcConfig,
    /// What only this role has.
    pub own: R,
}

impl<R> Config<R> {
    /// What all roles know of the run.
    pub fn program(&self) -> Classification<'_> {
        Classification {
            comparison: self.comparison,
            ..Classification::public(&self.adapter, self.batches)
        }
    }
}

/// The client's part.
#[derive(Debug, Serialize, Deserialize)]
pub struct ClientConfig {
    /// Image files; None for the embedded ones.
    pub pictures: Option<Vec<PathBuf>>,
    /// Directory of the backbone; None for the embedded one.
    pub backbone: Option<PathBuf>,
    /// Address of the provider.
    pub provider: String,
    /// Where material comes from.
    pub material: Material,
}

/// The provider's part.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProviderConfig {
    /// Where it accepts calls, HOST:PORT.
    pub listen: String,
    /// Directory of the adapter; None for the embedded one.
    pub weights: Option<PathBuf>,
    /// Where material comes from.
    pub material: Material,
}

/// The dealer's part.
#[derive(Debug, Serialize, Deserialize)]
pub struct DealerConfig {
    /// Where it accepts calls, HOST:PORT.
    pub listen: String,
}

/// Where a party's material comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Material {
    /// The dealer at this address streams it.
    Dealer(String),
    /// A file that the dealer has written; consumed.
    File(PathBuf),
}

/// Who hears what a role has to tell.
pub type Tell<'a> = &'a dyn Fn(Event);

/// Plays `role` as the configuration file says, and tells the process that started it how it ended.
pub fn run(role: Role, config: &Path) -> Result<()> {
    end_with_parent();
    let emit = |event: Event| event.emit();
    let result = match role {
        Role::Client => read(config).and_then(|c| client(&c, &emit)),
        Role::Provider => read(config).and_then(|c| provider(&c, &emit)),
        Role::Dealer => read(config).and_then(|c| dealer(&c, &emit)),
    };
    if let Err(e) = &result {
        let message = e.to_string().replace(['\n', '\r'], " ");
        Event::Failed {
            message,
            code: e.exit_code(),
            rank: e.rank(),
        }
        .emit();
    }
    result
}

fn read<R: DeserializeOwned>(path: &Path) -> Result<Config<R>> {
    files::read_json(path).map_err(|e| Error::Input(format!("{e}; give a role's configuration file")))
}

/// Images in, labels out.
pub fn client(c: &Config<ClientConfig>, tell: Tell) -> Result<()> {
    // image -> preprocess -> backbone, in the clear -> hidden states
    let pictures = c.own.pictures.clone().map_or(Pictures::Embedded, Pictures::Files);
    if pictures.len() != c.batches.images {
        let detail = format!(
            "the run is for {} images, there are {}",
            c.batches.images,
            pictures.len()
        );
        return Err(Error::Input(format!(
            "{detail}; set all roles up for as many images as the client has"
        )));
    }
    let job = Job::new(Role::Client, c, &c.program(), tell)?;
    let backbone = inputs::backbone(c.own.backbone.as_deref())?;
    inputs::check_fit(&backbone, &c.adapter)?;
    let vit = backbone.load(&Plain::new())?;
    let (mut images, mut spent) = (Vec::new(), Duration::ZERO);
    for i in 0..c.batches.images {
        let pixels = pictures.load(i, &backbone)?;
        let start = Instant::now();
        images.push(hidden_states(&backbone, &vit, &pixels, c.adapter.scope)?);
        spent += start.elapsed();
        tell(Event::Progress {
            stage: Stage::Backbone,
            done: i + 1,
            total: c.batches.images,
        });
    }

    // hidden states -> input of the session -> adapter and head -> reveal to the client -> label
    let program = Classification {
        images: Some(&images),
        ..c.program()
    };
    job.guard(|| {
        let dealer = job.call_dealer(&c.own.material)?;
        let provider = job.call(Role::Provider, &c.own.provider)?;
        let material = job.material(CLIENT, &c.own.material, dealer)?;
        let report = job.compute(CLIENT, provider, material, &program, |i, logits| {
            if let Some(result) = Classified::new(i, logits) {
                tell(Event::Classified(result));
            }
        })?;
        tell(Event::Finished(Measured::new(
            CLIENT,
            &report,
            spent.as_secs_f64(),
        )));
        Ok(())
    })
}

/// The adapter in, nothing out.
pub fn provider(c: &Config<ProviderConfig>, tell: Tell) -> Result<()> {
    let dir = c.own.weights.as_deref();
    let Classifier { config, weights } = inputs::classifier(dir)?;
    if config != c.adapter {
        let e = "the adapter is not the one whose public configuration the run was set up with";
        return Err(inputs::bad_weights(e, dir, "--adapter"));
    }
    let program = Classification {
        weights: Some(&weights),
        ..c.program()
    };
    let job = Job::new(Role::Provider, c, &program, tell)?;
    job.guard(|| {
        let listener = job.listen(&c.own.listen)?;
        let dealer = job.call_dealer(&c.own.material)?;
        let [client] = job.meet(&listener, [Role::Client])?;
        let material = job.material(PROVIDER, &c.own.material, dealer)?;
        let report = job.compute(PROVIDER, client, material, &program, |_, _| {})?;
        tell(Event::Finished(Measured::new(PROVIDER, &report, 0.0)));
        Ok(())
    })
}

/// Randomness to both.
pub fn dealer(c: &Config<DealerConfig>, tell: Tell) -> Result<()> {
    let program = c.program();
    let job = Job::new(Role::Dealer, c, &program, tell)?;
    job.guard(|| {
        let links = job.meet(&job.listen(&c.own.listen)?, [Role::Client, Role::Provider])?;
        serve_material(&program, c.batches.passes(), links.clone(), |passes| {
            job.tell(Stage::Offline, passes);
            // What nobody has taken yet stays within what the network and the parties hold.
            links.iter().try_for_each(|link| Ok(link.flush()?))
        })?;
        links.iter().try_for_each(|link| link.close())?;
        Ok(())
    })
}

/// Ends this process when the one that started it is gone: nothing else holds its standard input open.
fn end_with_parent() {
    thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        // Nobody is left to tell why.
        std::process::exit(1);
    });
}
