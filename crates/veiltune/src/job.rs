//! What the roles have in common: calling and meeting each other, agreeing on the run, material, and the private computation.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use veiltune_engine::material::{DealId, FileSource, Label, Source};
use veiltune_engine::session::{MaterialFrom, PartySession, Plan, Report};
use veiltune_engine::{Party, Result as EngineResult};
use veiltune_wire::handshake::{Hello, handshake};
use veiltune_wire::pki::Credentials;
use veiltune_wire::tcp::{self, Listener};
use veiltune_wire::{Identity, Link, Network, Options};

use crate::events::{Event, Stage};
use crate::program::{Batches, Classification};
use crate::roles::{Config, Material, Role, Tell};
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
pub struct Job<'a> {
    role: Role,
    hello: Mutex<Hello>,
    /// None: the others know the session already.
    session: Option<Drawn>,
    tell: Tell<'a>,
    credentials: Credentials,
    /// Between the parties.
    options: Options,
    wait: Duration,
    plan: Plan,
    batches: Batches,
    links: Mutex<Vec<Arc<dyn Link>>>,
}

/// A session that the dealer draws, so that two parties who do not have the same dealer never begin.
#[derive(Clone, Copy)]
enum Drawn {
    /// Here.
    Here([u8; 16]),
    /// At the dealer, who tells when called.
    There,
}

impl<'a> Job<'a> {
    pub fn new<R>(role: Role, c: &Config<R>, program: &Classification, tell: Tell<'a>) -> Result<Job<'a>> {
        let plan = program.plan()?;
        let a = &c.adapter;
        let configuration = format!(
            "classify {} images, {} a pass; width {}, {} tokens, scope {}, rank {}, {} heads, {} classes; network {}; {:?}",
            c.batches.images,
            c.batches.batch,
            a.hidden_size,
            a.tokens,
            a.scope,
            a.rank,
            a.heads,
            a.labels.len(),
            c.network,
            c.comparison
        );
        let session = match (c.session, role) {
            (Some(_), _) => None,
            (None, Role::Dealer) => Some(Drawn::Here(new_session()?)),
            (None, _) => Some(Drawn::There),
        };
        let hello = Hello::new(
            c.session.unwrap_or_default(),
            role.identity(),
            plan.program,
            configuration,
        );
        let wait = Duration::try_from_secs_f64(c.wait).map_err(|e| Error::Input(format!("wait: {e}")))?;
        Ok(Job {
            role,
            hello: Mutex::new(hello),
            session,
            tell,
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

    /// Accepts calls at `address`, and tells where.
    pub fn listen(&self, address: &str) -> Result<Listener> {
        // Callers come when they are ready, the client after it has run the backbone.
        let options = Options {
            connect: self.wait,
            ..self.options_with(Role::Client)
        };
        let listener = Listener::bind(address, &self.credentials, &options)?;
        (self.tell)(Event::Listening {
            address: listener.address(),
        });
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
        let hello = || self.hello.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = hello().clone();
        handshake(&link, &mine, &role.identity())?;
        match self.session {
            Some(Drawn::Here(session)) => link.send(session.to_vec())?,
            Some(Drawn::There) if role == Role::Dealer => link.recv(&mut hello().session)?,
            _ => {}
        }
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
        (self.tell)(Event::Progress {
            stage,
            done,
            total: images,
        });
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

/// A session that no other has.
pub fn new_session() -> Result<[u8; 16]> {
    let mut session = [0; 16];
    getrandom::fill(&mut session)
        .map_err(|e| Error::io("drawing a session number")(std::io::Error::other(e)))?;
    Ok(session)
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

    fn deal(&self) -> DealId {
        self.source.deal()
    }
}
