//! What the roles have in common: calling and accepting each other, agreeing on a session, material, the private computation.
//!
//! A client begins: it tells the dealer what it asks for and is given the session's number, tells the provider the same, and
//! the provider calls the dealer under that number. On each link, before anything else, both sides compare what they are about
//! to run.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use sha2::{Digest, Sha256};
use veiltune_adapt::cache::Source as HiddenStates;
use veiltune_engine::material::{DealId, FileSource, Label, Source};
use veiltune_engine::session::{MaterialFrom, PartySession, Plan, Report};
use veiltune_engine::{Comparison, Cost, Party, Result as EngineResult};
use veiltune_hub::AdapterConfig;
use veiltune_nn::Method;
use veiltune_nn::load::Served;
use veiltune_wire::handshake::{Hello, PROTOCOL_VERSION, handshake};
use veiltune_wire::pki::Credentials;
use veiltune_wire::tcp::{self, Listener};
use veiltune_wire::{Link, Options};

use crate::events::{Event, Stage};
use crate::program::{Batches, Classification};
use crate::roles::{Config, Material, Role, Tell};
use crate::{Error, Result};

/// Material of more bytes than this at either party is consumed as it comes.
const PREPARED: u64 = 1 << 30;
/// Gates that the preparation then runs ahead: memory is that of so many gates.
const AHEAD: usize = 8;
/// How often somebody who accepts calls looks around.
const POLL: Duration = Duration::from_millis(50);

/// Whether there is too much material to be all prepared before the online phase begins: the two phases then overlap.
pub fn overlaps(total: &Cost) -> bool {
    total.dealer_bytes.into_iter().max() > Some(PREPARED)
}

/// How many gates the preparation then runs ahead; None where it comes first.
pub fn ahead(total: &Cost) -> Option<usize> {
    overlaps(total).then_some(AHEAD)
}

/// A number that no other session has.
pub type SessionId = [u8; 16];

/// Draws one.
pub fn new_session() -> Result<SessionId> {
    let mut session = [0; 16];
    getrandom::fill(&mut session)
        .map_err(|e| Error::io("drawing a session number")(std::io::Error::other(e)))?;
    Ok(session)
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Images, and how many share a pass.
    pub batches: Batches,
    /// How the parties compare numbers.
    pub comparison: Comparison,
}

/// The first message of whoever calls: magic 8, version 4, session 16, images 8, batch 8, comparison 1.
const CALL: usize = 8 + 4 + 16 + 8 + 8 + 1;
const MAGIC: &[u8; 8] = b"veilcall";

impl Request {
    /// What all who have the adapter know of it.
    pub fn program<'a>(&self, served: &'a Served) -> Classification<'a> {
        Classification {
            comparison: self.comparison,
            ..Classification::public(served, self.batches)
        }
    }

    /// Asks whoever is at the other end; zeros where the dealer has yet to number the session.
    pub fn send(&self, link: &dyn Link, session: SessionId) -> Result<()> {
        let mut message = Vec::with_capacity(CALL);
        message.extend_from_slice(MAGIC);
        message.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        message.extend_from_slice(&session);
        for number in [self.batches.images, self.batches.batch.get()] {
            message.extend_from_slice(&(number as u64).to_le_bytes());
        }
        message.push(u8::from(self.comparison == Comparison::MaskedBits));
        Ok(link.send(message)?)
    }

    /// What is asked for on a link that was just accepted, and in which session.
    pub fn receive(link: &dyn Link) -> Result<(SessionId, Request)> {
        let mut message = [0; CALL];
        link.recv(&mut message)?;
        let refuse = |why: &str| Err(Error::Refused(format!("{} asks for {why}", link.peer())));
        let number = |at: usize| {
            let bytes: [u8; 8] = message[at..][..8].try_into().expect("eight bytes");
            usize::try_from(u64::from_le_bytes(bytes))
                .ok()
                .and_then(NonZeroUsize::new)
        };
        if message[..8] != *MAGIC || message[8..12] != PROTOCOL_VERSION.to_le_bytes() {
            return refuse("something of another release: install the same one everywhere");
        }
        let comparison = match message[CALL - 1] {
            0 => Comparison::Fss,
            1 => Comparison::MaskedBits,
            _ => return refuse("an unknown comparison"),
        };
        let (Some(images), Some(batch)) = (number(28), number(36)) else {
            return refuse("no images");
        };
        let session = message[12..28].try_into().expect("sixteen bytes");
        let batches = Batches {
            images: images.get(),
            batch: batch.min(images),
        };
        Ok((session, Request { batches, comparison }))
    }
}

/// The links of a process that are in use, so that an interruption is told to whoever is at their other ends.
#[derive(Clone, Default)]
pub struct Open(Arc<Mutex<Vec<Weak<dyn Link>>>>);

impl Open {
    fn add(&self, link: &Arc<dyn Link>) {
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(link));
    }

    /// Ends them all.
    pub fn abort(&self, reason: &str) {
        let links = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        links
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|link| link.abort(reason));
    }
}

/// A role and all that it has for any number of sessions.
pub struct Station<'a> {
    credentials: Credentials,
    options: Options,
    adapter: &'a AdapterConfig<Method>,
    /// The part of the backbone in what the parties agree on.
    backbone: String,
    /// Hears what the role has to tell.
    pub tell: Tell<'a>,
    open: Open,
}

impl<'a> Station<'a> {
    /// `backbone` is the one that this role has, if the adapter is for a certain one.
    pub fn new<R>(
        role: Role,
        c: &'a Config<R>,
        backbone: Option<[u8; 32]>,
        tell: Tell<'a>,
        open: &Open,
    ) -> Result<Station<'a>> {
        let wait = Duration::try_from_secs_f64(c.wait).map_err(|e| Error::Input(format!("wait: {e}")))?;
        Ok(Station {
            credentials: Credentials::load(&c.credentials, &role.identity())?,
            options: Options {
                network: c.network,
                idle: wait.min(Duration::from_secs(30)),
                connect: wait,
                handshake: Duration::from_secs(5),
                ..Options::default()
            },
            adapter: &c.adapter,
            backbone: match (backbone, &c.adapter.base_model_sha256) {
                (Some(fingerprint), _) => short(&hex(&fingerprint)),
                (None, Some(stated)) => short(stated),
                (None, None) => "any".into(),
            },
            tell,
            open: open.clone(),
        })
    }

    /// Accepts calls at `address`, and tells where.
    pub fn listen(&self, address: &str) -> Result<Listener> {
        let options = Options {
            connect: POLL,
            ..self.options.clone()
        };
        let listener = Listener::bind(address, &self.credentials, &options)?;
        (self.tell)(Event::Listening {
            address: listener.address(),
        });
        Ok(listener)
    }

    /// The next call by one of `roles`; None if nobody has called for a moment. Strangers are sent away.
    pub fn accept(&self, listener: &Listener, roles: &[Role]) -> Option<Arc<dyn Link>> {
        let expected: Vec<_> = roles.iter().map(|role| role.identity()).collect();
        match listener.accept(&expected) {
            Ok(link) => {
                let link: Arc<dyn Link> = Arc::new(link);
                self.open.add(&link);
                Some(link)
            }
            Err(veiltune_wire::Error::NobodyCame { .. }) => None,
            Err(e) => {
                tracing::warn!("sent a caller away: {e}");
                // Lest a system without means to accept is asked for it without end.
                if matches!(e, veiltune_wire::Error::Io { .. }) {
                    std::thread::sleep(POLL);
                }
                None
            }
        }
    }

    /// Calls a role that accepts calls.
    pub fn call(&self, role: Role, address: &str) -> Result<Arc<dyn Link>> {
        let link = tcp::connect(address, &self.credentials, &role.identity(), &self.options)?;
        let link: Arc<dyn Link> = Arc::new(link);
        self.open.add(&link);
        Ok(link)
    }

    /// Ends all links that are open.
    pub fn end(&self, reason: &str) {
        self.open.abort(reason);
    }

    /// Longest time to wait for others.
    pub fn wait(&self) -> Duration {
        self.options.connect
    }
}

/// One session: what this role has to agree on with the others, and its links to them.
pub struct Session<'a> {
    station: &'a Station<'a>,
    role: Role,
    id: SessionId,
    request: Request,
    /// Where this party's material comes from; None at the dealer.
    material: Option<&'a Material>,
    plan: Plan,
    links: Mutex<Vec<Arc<dyn Link>>>,
}

impl<'a> Session<'a> {
    /// Of `role` for what was asked.
    pub fn new(
        station: &'a Station<'a>,
        role: Role,
        id: SessionId,
        request: Request,
        material: Option<&'a Material>,
        served: &Served,
    ) -> Result<Session<'a>> {
        Ok(Session {
            station,
            role,
            id,
            request,
            material,
            plan: request.program(served).plan()?,
            links: Mutex::default(),
        })
    }

    /// Does the work; if it fails, the other roles are told why at once.
    pub fn guard<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        work().inspect_err(|e| {
            let links = self.links.lock().unwrap_or_else(PoisonError::into_inner).clone();
            links.iter().for_each(|link| link.abort(&e.for_peer()));
        })
    }

    /// Before anything else both sides make sure that they are about to run the same thing.
    pub fn greet(&self, role: Role, link: &Arc<dyn Link>) -> Result<()> {
        self.links
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(link.clone());
        let mine = Hello::new(
            self.id,
            self.role.identity(),
            self.plan.program,
            self.configuration(role),
        );
        handshake(link, &mine, &role.identity())?;
        tracing::info!("agreed with {role:?}");
        Ok(())
    }

    /// What this role has in common with `peer`. The dealer has no backbone. Parties that have their material from different
    /// sources find out here, before any of it is consumed.
    fn configuration(&self, peer: Role) -> String {
        let (adapter, Batches { images, batch }) = (self.station.adapter, self.request.batches);
        let (backbone, material) = match self.material {
            Some(material) if peer != Role::Dealer => (self.station.backbone.clone(), material.source()),
            _ => (
                adapter.base_model_sha256.as_deref().map_or("any".into(), short),
                "",
            ),
        };
        format!(
            "{}, {} classes, adapter {}, backbone {backbone}; {images} images, {batch} a pass; network {}; {:?}{material}",
            adapter.method.peft_type(),
            adapter.method.labels().len(),
            public_hash(adapter),
            self.station.options.network,
            self.request.comparison
        )
    }

    /// The dealer's stream, or the file, which is then gone.
    pub fn material(&self, party: Party, dealer: Option<Arc<dyn Link>>) -> Result<Supply> {
        let taken = Arc::new(AtomicU64::new(0));
        let from = match (self.material, dealer) {
            (Some(Material::File(path)), _) => {
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
            (_, Some(link)) => MaterialFrom::Dealer(link),
            (_, None) => return Err(Error::Input("there is no link to a dealer".into())),
        };
        Ok(Supply { from, taken })
    }

    /// So many passes are done.
    pub fn tell(&self, stage: Stage, passes: usize) {
        let Batches { images, batch } = self.request.batches;
        (self.station.tell)(Event::Progress {
            stage,
            done: passes.saturating_mul(batch.get()).min(images),
            total: images,
        });
    }

    /// The private part, between the two parties.
    pub fn compute(
        &self,
        party: Party,
        peer: &Arc<dyn Link>,
        material: Supply,
        program: &Classification,
        mut learn: impl FnMut(usize, Vec<f64>),
    ) -> Result<Report> {
        let session = PartySession {
            party,
            peer: peer.clone(),
            material: material.from,
            ahead: ahead(&self.plan.tally.total()),
            outside: Box::new(VecDeque::new()),
        };
        let batches = self.request.batches;
        let classes = program.served.method.labels().len();
        let mut report = session.run(program, batches.passes(), |pass, revealed| {
            if let Some(logits) = revealed {
                let each = logits.values.chunks(classes.max(1));
                batches
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

/// The hash of what is public of an adapter in the form in which it is served, short.
fn public_hash(adapter: &AdapterConfig<Method>) -> String {
    let served = AdapterConfig {
        method: adapter.method.served(),
        ..adapter.clone()
    };
    // A structure of numbers and strings always has a JSON form.
    let text = serde_json::to_vec(&served).unwrap_or_default();
    short(&hex(&Sha256::digest(text)))
}

/// The backbone's fingerprint, where the adapter is for a certain backbone or runs one privately.
///
/// # Errors
/// If the adapter was trained on another one.
pub fn check_backbone(
    adapter: &AdapterConfig<Method>,
    backbone: Option<HiddenStates>,
    named: &str,
) -> Result<Option<[u8; 32]>> {
    let (Some(backbone), true) = (
        backbone,
        adapter.base_model_sha256.is_some() || adapter.method.needs_backbone(),
    ) else {
        return Ok(None);
    };
    let found = backbone
        .fingerprint()
        .map_err(|e| Error::Input(format!("{e}; give a complete, undamaged backbone to --backbone")))?;
    let Some(found) = found else { return Ok(None) };
    match &adapter.base_model_sha256 {
        Some(wanted) if *wanted != hex(&found) => Err(Error::Input(format!(
            "an adapter for another backbone: it was trained on {} (parameters {}), {named} has parameters {}; give the \
             backbone that it was trained on to --backbone",
            adapter.base_model_name_or_path,
            short(wanted),
            short(&hex(&found))
        ))),
        _ => Ok(Some(found)),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Enough of a hash to tell two apart by eye.
fn short(hash: &str) -> String {
    hash.chars().take(16).collect()
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
