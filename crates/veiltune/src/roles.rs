//! The three roles of a private classification, each a process of its own. Read top to bottom they are its data flow:
//!
//! image (or text) -> preprocess -> backbone, in the clear at the client -> hidden states -> input of the session -> adapter and head
//! between client and provider, on material from the dealer -> reveal to the client -> label.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use clap::ValueEnum;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use veiltune_adapt::cache::Source;
use veiltune_engine::session::serve_material;
use veiltune_engine::{Comparison, Fixed, Owner};
use veiltune_hub::{AdapterConfig, files};
use veiltune_nn::Method;
use veiltune_nn::load::Served;
use veiltune_wire::{Identity, Link, Network};

use crate::events::{Classified, Event, Measured, Stage};
use crate::inputs::{self, Items};
use crate::prepare::{Preparation, prepared};
use crate::program::{Batches, CLIENT, Classification, PROVIDER};
use crate::service::{Budget, Limits, serve};
use crate::session::{Open, Request, Session, SessionId, Station, check_backbone, new_session};
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
    /// Directory of this role's key and certificates.
    pub credentials: PathBuf,
    /// Emulated on every link.
    pub network: Network,
    /// Longest time to wait for another role to answer or to join a session, seconds.
    pub wait: f64,
    /// What is public of the adapter, as it was trained.
    pub adapter: AdapterConfig<Method>,
    /// What only this role has.
    pub own: R,
}

/// The client's part.
#[derive(Debug, Serialize, Deserialize)]
pub struct ClientConfig {
    /// Image files; None for the embedded ones.
    pub pictures: Option<Vec<PathBuf>>,
    /// A file of texts instead, for an adapter that reads them.
    pub texts: Option<PathBuf>,
    /// Images a pass.
    pub batch: NonZeroUsize,
    /// How the parties compare numbers.
    pub comparison: Comparison,
    /// The backbone, a folder or a model of the hub; None for the embedded one.
    pub backbone: Option<String>,
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
    /// The backbone, for methods that run it privately; as for the client.
    pub backbone: Option<String>,
    /// Where material comes from.
    pub material: Material,
    /// For whom.
    pub limits: Limits,
    /// Images in all, over all sessions; None: any number.
    pub budget: Option<NonZeroUsize>,
    /// Where their count is kept, so that it outlives the service.
    pub budget_file: Option<PathBuf>,
}

/// The dealer's part.
#[derive(Debug, Serialize, Deserialize)]
pub struct DealerConfig {
    /// Where it accepts calls, HOST:PORT.
    pub listen: String,
    /// For whom.
    pub limits: Limits,
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

impl Material {
    /// What a party tells the other of it.
    pub fn source(&self) -> &'static str {
        match self {
            Material::Dealer(_) => "; material from a dealer",
            Material::File(_) => "; material from files",
        }
    }

    /// Refuses a file that is not there, before anybody is called.
    fn check(&self) -> Result<()> {
        match self {
            Material::File(path) if !path.exists() => Err(Error::Input(format!(
                "{}: no such material; a session that has begun has consumed it (it serves exactly once): have the dealer \
                 make another",
                path.display()
            ))),
            _ => Ok(()),
        }
    }
}

/// Who hears what a role has to tell.
pub type Tell<'a> = &'a (dyn Fn(Event) + Sync);

/// Plays `role` as the configuration file says, and tells the process that started it how it ended.
pub fn run(role: Role, config: &Path) -> Result<()> {
    end_with_parent();
    let (emit, open) = (|event: Event| event.emit(), Open::default());
    let result = match role {
        Role::Client => read(config).and_then(|c| client(&c, &emit, &open)),
        Role::Provider => read(config).and_then(|c| provider(&c, &emit, &open)),
        Role::Dealer => read(config).and_then(|c| dealer(&c, &emit, &open)),
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

/// Images in, labels out: one session.
pub fn client(c: &Config<ClientConfig>, tell: Tell, open: &Open) -> Result<()> {
    let own = &c.own;
    let pictures = match (&own.texts, own.pictures.clone()) {
        (None, Some(files)) => Items::Files(files),
        (texts, _) => Items::find(&[], texts.as_deref(), c.adapter.text)?,
    };
    let images =
        NonZeroUsize::new(pictures.len()).ok_or_else(|| Error::Input("there are no images".into()))?;
    own.material.check()?;
    let preparation = Preparation::new(&c.adapter, own.backbone.as_deref())?;
    let named = own.backbone.as_deref().unwrap_or("the embedded one");
    let fingerprint = check_backbone(&c.adapter, Some(preparation.source()), named)?;
    let served = preparation.served(&c.adapter.method)?;
    let station = Station::new(Role::Client, c, fingerprint, tell, open)?;
    let request = Request {
        batches: Batches {
            images: images.get(),
            batch: own.batch.min(images),
        },
        comparison: own.comparison,
    };
    let progress = |done| {
        tell(Event::Progress {
            stage: Stage::Backbone,
            done,
            total: images.get(),
        });
    };

    // image -> preprocess -> backbone, in the clear -> what the private part reads. Nobody is called before: the time that it
    // takes tells of the lengths of texts.
    let batch = request.batches.batch.get();
    prepared(
        &preparation,
        &pictures,
        &c.adapter.method,
        batch,
        progress,
        |inputs, spent| {
            let dealer = match &own.material {
                Material::Dealer(address) => Some(station.call(Role::Dealer, address)?),
                Material::File(_) => None,
            };
            let id = match &dealer {
                Some(dealer) => {
                    request.send(dealer, SessionId::default())?;
                    let mut id = SessionId::default();
                    dealer.recv(&mut id)?;
                    id
                }
                None => new_session()?,
            };
            // inputs of the session -> adapter and head -> reveal to the client -> label
            let program = Classification {
                images: Some(inputs),
                ..request.program(&served)
            };
            let session = Session::new(&station, Role::Client, id, request, Some(&own.material), &served)?;
            session.guard(|| {
                dealer
                    .iter()
                    .try_for_each(|link| session.greet(Role::Dealer, link))?;
                let provider = station.call(Role::Provider, &own.provider)?;
                request.send(&provider, id)?;
                session.greet(Role::Provider, &provider)?;
                provider.recv(&mut READY.clone())?;
                dealer.iter().try_for_each(|link| link.send(READY.to_vec()))?;
                let material = session.material(CLIENT, dealer.clone())?;
                let report = session.compute(CLIENT, &provider, material, &program, |i, logits| {
                    if let Some(result) = Classified::new(i, logits) {
                        tell(Event::Classified(result));
                    }
                })?;
                tell(Event::Finished(Measured::new(
                    CLIENT,
                    &report,
                    images.get(),
                    spent().as_secs_f64(),
                )));
                Ok(())
            })
        },
    )
}

/// The adapter in, nothing out: session after session.
pub fn provider(c: &Config<ProviderConfig>, tell: Tell, open: &Open) -> Result<()> {
    let (own, dir) = (&c.own, c.own.weights.as_deref());
    let classifier = inputs::classifier(dir)?;
    if classifier.config != c.adapter {
        let e = "the adapter is not the one whose public configuration the run was set up with";
        return Err(inputs::bad_weights(e, dir, "--adapter"));
    }
    own.material.check()?;
    let needed = c.adapter.method.needs_backbone();
    let backbone = needed
        .then(|| inputs::backbone(own.backbone.as_deref()))
        .transpose()?;
    let named = own.backbone.as_deref().unwrap_or("the embedded one");
    let fingerprint = check_backbone(&c.adapter, backbone.as_ref().map(Source::Backbone), named)?;
    let served = classifier
        .serve(backbone.as_ref())
        .map_err(|e| inputs::bad_weights(e, dir, "--adapter"))?;
    drop((classifier, backbone));
    // What fixed point cannot hold is found before any client has run its backbone.
    served.load(&Fixed::new()?, Owner::Party(PROVIDER)).map_err(|e| {
        let e = format!("{e}: it cannot be served; train it again, with a lower --rate");
        inputs::bad_weights(e, dir, "--adapter")
    })?;
    let (station, budget) = (
        Station::new(Role::Provider, c, fingerprint, tell, open)?,
        Budget::open(own.budget, own.budget_file.clone())?,
    );

    let play = |client: Arc<dyn Link>, id: SessionId, request: Request| {
        let session = Session::new(
            &station,
            Role::Provider,
            id,
            request,
            Some(&own.material),
            &served,
        )?;
        session.guard(|| {
            session.greet(Role::Client, &client)?;
            let dealer = match &own.material {
                Material::Dealer(address) => {
                    let dealer = station.call(Role::Dealer, address)?;
                    request.send(&dealer, id)?;
                    dealer.recv(&mut READY.clone())?;
                    Some(dealer)
                }
                Material::File(_) => None,
            };
            // Before anything is revealed, but not for a session that the dealer has refused.
            budget.spend(request.batches.images)?;
            client.send(READY.to_vec())?;
            dealer
                .iter()
                .try_for_each(|link| session.greet(Role::Dealer, link))?;
            let material = session.material(PROVIDER, dealer)?;
            let program = request.program(&served);
            let report = session.compute(PROVIDER, &client, material, &program, |_, _| {})?;
            tell(Event::Finished(Measured::new(
                PROVIDER,
                &report,
                request.batches.images,
                0.0,
            )));
            Ok(())
        })
    };
    serve(&station, &station.listen(&own.listen)?, &own.limits, &play, None)
}

/// Randomness to both: session after session.
pub fn dealer(c: &Config<DealerConfig>, tell: Tell, open: &Open) -> Result<()> {
    let limits = &c.own.limits;
    let served = Served::shapes(&c.adapter.method);
    let station = Station::new(Role::Dealer, c, None, tell, open)?;
    // Sessions that wait for their provider.
    let waiting: Mutex<HashMap<SessionId, SyncSender<Arc<dyn Link>>>> = Mutex::default();
    let waiting = || waiting.lock().unwrap_or_else(PoisonError::into_inner);

    let play = |client: Arc<dyn Link>, _: SessionId, request: Request| {
        let id = new_session()?;
        let session = Session::new(&station, Role::Dealer, id, request, None, &served)?;
        // A place for the provider, which calls as soon as the client has told it the number.
        let (send, arrival) = sync_channel(1);
        waiting().insert(id, send);
        let dealt = session.guard(|| {
            client.send(id.to_vec())?;
            session.greet(Role::Client, &client)?;
            // The client's word that the provider has called, or how the session came to nothing before.
            client.recv(&mut READY.clone())?;
            let provider = arrival
                .recv_timeout(station.wait())
                .map_err(|_| Error::Refused("no provider joined the session".into()))?;
            session.greet(Role::Provider, &provider)?;
            let links = [client.clone(), provider];
            let program = request.program(&served);
            serve_material(&program, request.batches.passes(), links.clone(), |passes| {
                session.tell(Stage::Offline, passes);
                // What nobody has taken yet stays within what the network and the parties hold.
                links.iter().try_for_each(|link| Ok(link.flush()?))
            })?;
            links.iter().try_for_each(|link| link.close())?;
            Ok(())
        });
        waiting().remove(&id);
        dealt
    };
    let join = |provider: Arc<dyn Link>, id: SessionId, _: Request| {
        // Taken out: nobody joins a session twice.
        let session = waiting().remove(&id);
        let joined = session.filter(|_| provider.send(READY.to_vec()).is_ok());
        let joined = joined.and_then(|session| session.send(provider.clone()).ok());
        joined.ok_or_else(|| {
            let e = Error::Refused("no client waits for this provider's session".into());
            provider.abort(&e.for_peer());
            e
        })
    };
    serve(
        &station,
        &station.listen(&c.own.listen)?,
        limits,
        &play,
        Some(&join),
    )
}

/// Says that everybody is there: the dealer to the provider that has called, that one to the client, the client to the dealer.
const READY: [u8; 1] = [1];

/// Ends this process when the one that started it is gone: nothing else holds its standard input open.
pub fn end_with_parent() {
    thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        // Nobody is left to tell why.
        std::process::exit(1);
    });
}
