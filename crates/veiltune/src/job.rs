//! What the roles have in common: calling and meeting each other, agreeing on the run, material, and the private computation.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use veiltune_engine::material::{FileSource, Label, Source};
use veiltune_engine::session::{MaterialFrom, PartySession, Plan, Report};
use veiltune_engine::{Party, Result as EngineResult};
use veiltune_wire::handshake::{Hello, handshake};
use veiltune_wire::pki::Credentials;
use veiltune_wire::tcp::{self, Listener};
use veiltune_wire::{Identity, Link, Network, Options};

use crate::events::{Event, Stage};
use crate::program::{Batches, Classification};
use crate::roles::{Config, Material, Role};
use crate::{Error, Result};

/// Material of more bytes than this at either party is consumed as it comes.
const PREPARED: u64 = 1 << 30;
/// Gates that the preparation then runs ahead.
const AHEAD: usize = 64;

/// Whether there is too much material to be all prepared before the online phase begins: the two phases then overlap.
pub fn overlaps(plan: &Plan) -> bool {
    plan.tally.total().dealer_bytes.into_iter().max() > Some(PREPARED)
}

/// What a role has to agree on with the others, and its links to them.
pub struct Job {
    role: Role,
    hello: Hello,
    credentials: Credentials,
    /// Between the parties.
    options: Options,
    wait: Duration,
    plan: Plan,
    batches: Batches,
    links: Mutex<Vec<Arc<dyn Link>>>,
}

impl Job {
    pub fn new<R>(role: Role, c: &Config<R>, program: &Classification) -> Result<Job> {
        let plan = program.plan()?;
        let a = &c.adapter;
        let configuration = format!(
            "classify {} images, {} a pass; width {}, {} tokens, scope {}, rank {}, {} heads, {} classes; network {}",
            c.batches.images,
            c.batches.batch,
            a.hidden_size,
            a.tokens,
            a.scope,
            a.rank,
            a.heads,
            a.labels.len(),
            c.network
        );
        let wait = Duration::try_from_secs_f64(c.wait).map_err(|e| Error::Input(format!("wait: {e}")))?;
        Ok(Job {
            role,
            hello: Hello::new(c.session, role.identity(), plan.program, configuration),
            credentials: Credentials::load(&c.credentials, &role.identity())?,
            options: Options {
                network: c.network,
                idle: wait.min(Duration::from_secs(30)),
                handshake: Duration::from_secs(5),
                ..Options::default()
            },
            wait,
            plan,
            batches: c.batches,
            links: Mutex::default(),
        })
    }

    /// Does the work; if it fails, the other roles are told why at once.
    pub fn guard(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        work().inspect_err(|e| {
            let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            links.iter().for_each(|link| link.abort(&e.to_string()));
        })
    }

    /// Tells where this role can be called.
    pub fn listen(&self) -> Result<Listener> {
        // Callers come when they are ready, the client after it has run the backbone.
        let options = Options {
            connect: self.wait,
            ..self.options_with(Role::Client)
        };
        let listener = Listener::bind("127.0.0.1:0", &self.credentials, &options)?;
        Event::Listening {
            address: listener.address(),
        }
        .emit();
        Ok(listener)
    }

    /// Waits until each of `roles` has called. Strangers are sent away, and do not end the run.
    pub fn meet<const N: usize>(&self, listener: &Listener, roles: [Role; N]) -> Result<[Arc<dyn Link>; N]> {
        let start = Instant::now();
        let mut links = roles.map(|_| None);
        while let Some(missing) = (0..N).find(|&i| links[i].is_none()) {
            let expected: Vec<Identity> = (missing..N)
                .filter(|&i| links[i].is_none())
                .map(|i| roles[i].identity())
                .collect();
            match listener.accept(&expected) {
                Ok(link) => {
                    let place = roles.iter().position(|r| r.identity() == *link.peer());
                    let place = place.expect("accept returns one of the expected");
                    links[place] = Some(self.greet(roles[place], Arc::new(link))?);
                }
                Err(e)
                    if matches!(e, veiltune_wire::Error::NobodyCame { .. })
                        || start.elapsed() > self.wait =>
                {
                    return Err(e.into());
                }
                Err(e) => tracing::warn!("sent a caller away: {e}"),
            }
        }
        Ok(links.map(|link| link.expect("all have called")))
    }

    /// Calls a role that listens.
    pub fn call(&self, role: Role, address: &str) -> Result<Arc<dyn Link>> {
        let link = tcp::connect(
            address,
            &self.credentials,
            &role.identity(),
            &self.options_with(role),
        )?;
        self.greet(role, Arc::new(link))
    }

    /// Calls the dealer, if material comes from one.
    pub fn call_dealer(&self, material: &Material) -> Result<Option<Arc<dyn Link>>> {
        match material {
            Material::Dealer(address) => self.call(Role::Dealer, address).map(Some),
            Material::File(_) => Ok(None),
        }
    }

    /// The network is emulated between the parties; the dealer's link is as it is.
    fn options_with(&self, peer: Role) -> Options {
        let dealing = self.role == Role::Dealer || peer == Role::Dealer;
        Options {
            network: if dealing {
                Network::NONE
            } else {
                self.options.network
            },
            ..self.options.clone()
        }
    }

    /// Before anything else both sides make sure that they are about to run the same thing.
    fn greet(&self, role: Role, link: Arc<dyn Link>) -> Result<Arc<dyn Link>> {
        self.links
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(link.clone());
        handshake(&link, &self.hello, &role.identity())?;
        tracing::info!("agreed with {role:?}");
        Ok(link)
    }

    /// The dealer's stream, or the file, which is then gone.
    pub fn material(&self, party: Party, from: &Material, dealer: Option<Arc<dyn Link>>) -> Result<Supply> {
        let taken = Arc::new(AtomicU64::new(0));
        let from = match (from, dealer) {
            (Material::File(path), _) => {
                let (source, seed) = FileSource::open(
                    path,
                    &Label {
                        party,
                        program: self.plan.program,
                    },
                )?;
                MaterialFrom::Source(
                    Box::new(Counted {
                        source,
                        taken: taken.clone(),
                    }),
                    seed,
                )
            }
            (Material::Dealer(_), Some(link)) => MaterialFrom::Dealer(link),
            (Material::Dealer(address), None) => {
                return Err(Error::Input(format!("no link to the dealer at {address}")));
            }
        };
        Ok(Supply { from, taken })
    }

    /// So many passes are done.
    pub fn tell(&self, stage: Stage, passes: usize) {
        let images = self.batches.images;
        let done = passes.saturating_mul(self.batches.batch.get()).min(images);
        Event::Progress {
            stage,
            done,
            total: images,
        }
        .emit();
    }

    /// Adapter and head, between the two parties.
    pub fn compute(
        &self,
        party: Party,
        peer: Arc<dyn Link>,
        material: Supply,
        program: &Classification,
        mut learn: impl FnMut(usize, Vec<f64>),
    ) -> Result<Report> {
        let ahead = overlaps(&self.plan).then_some(AHEAD);
        let session = PartySession {
            party,
            peer: peer.clone(),
            material: material.from,
            ahead,
            shares: VecDeque::new(),
        };
        let mut report = session.run(program, self.batches.passes(), |pass, revealed| {
            if let Some(logits) = revealed {
                let each = logits.values.chunks(program.config.labels.len());
                self.batches
                    .pass(pass)
                    .zip(each)
                    .for_each(|(i, logits)| learn(i, logits.to_vec()));
                self.tell(Stage::Online, pass + 1);
            }
            Ok(())
        })?;
        report.dealer_bytes += material.taken.load(Relaxed);
        peer.close()?;
        Ok(report)
    }
}

/// Material on its way in, and the bytes that were taken from a file so far.
pub struct Supply {
    from: MaterialFrom,
    taken: Arc<AtomicU64>,
}

/// A file of material that counts what is taken.
struct Counted {
    source: FileSource,
    taken: Arc<AtomicU64>,
}

impl Source for Counted {
    fn take(&mut self, buf: &mut [u8]) -> EngineResult<()> {
        self.taken.fetch_add(buf.len() as u64, Relaxed);
        self.source.take(buf)
    }
}
