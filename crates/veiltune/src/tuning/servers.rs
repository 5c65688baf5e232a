//! The model owner, the two servers and the assistant. Read top to bottom: a model is shared once; then runs of data owners
//! come, one at a time.
//!
//! What each sees of a run: the servers and the assistant the model's architecture and calibration and the run's
//! [`Shape`](super::program::Shape); nobody but the data owner a text, a label, a prompt or a logit, nobody but the model's owner
//! a parameter. See `docs/tuning.md`.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use veiltune_engine::session::{self, MaterialFrom, PartySession};
use veiltune_engine::{Comparison, Error as EngineError, Outside, Party, Result as EngineResult};
use veiltune_hub::Tensors;
use veiltune_nn::language::{LanguageCheckpoint, LanguageConfig};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_ring::{Ring, codec};
use veiltune_wire::handshake::{Hello, handshake};
use veiltune_wire::pki::Credentials;
use veiltune_wire::tcp::{self, Listener};
use veiltune_wire::{Identity, Link, Network, Options};
use zeroize::Zeroizing;

use super::lookup::{self, Holder};
use super::program::{PASSES, Shape, TERMS, Tuning, table_rows, table_width};
use super::store::{Part, PublicModel, Reader, Store, Writer};
use super::talk;
use crate::progress::tell;
use crate::{Error, Result};

/// The five roles, by their names in certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Has the language model.
    ModelOwner,
    /// The first compute party.
    Server0,
    /// The second compute party.
    Server1,
    /// Deals correlated randomness.
    Assistant,
    /// Has the texts.
    DataOwner,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 5] = [
        Role::ModelOwner,
        Role::Server0,
        Role::Server1,
        Role::Assistant,
        Role::DataOwner,
    ];

    /// Its name, also of its folder of keys.
    pub fn name(self) -> &'static str {
        match self {
            Role::ModelOwner => "model-owner",
            Role::Server0 => "server0",
            Role::Server1 => "server1",
            Role::Assistant => "assistant",
            Role::DataOwner => "data-owner",
        }
    }

    /// Its name in certificates.
    pub fn identity(self) -> Identity {
        Identity::new(self.name()).expect("the names of roles are valid")
    }

    fn server(party: Party) -> Role {
        match party {
            Party::P0 => Role::Server0,
            Party::P1 => Role::Server1,
        }
    }
}

/// What whoever calls a server or the assistant asks for.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// A model's owner shares it.
    Share(Box<PublicModel>),
    /// A data owner asks which models there are.
    Models,
    /// A data owner asks what is public of the one with this fingerprint.
    Model(String),
    /// A data owner begins a run.
    Run(Run),
}

/// One run, as all roles know it.
#[derive(Clone, Serialize, Deserialize)]
pub struct Run {
    /// A number that no other run has.
    pub number: [u8; 16],
    /// Fingerprint of the model.
    pub model: String,
    /// Sizes.
    pub shape: Shape,
    /// Whether comparisons are by function secret sharing or by masked bits.
    pub masked_bits: bool,
}

impl Run {
    fn comparison(&self) -> Comparison {
        match self.masked_bits {
            true => Comparison::MaskedBits,
            false => Comparison::Fss,
        }
    }

    /// The program that it runs.
    pub fn program<'a>(&'a self, model: &'a LanguageConfig) -> Tuning<'a> {
        Tuning::public(model, &self.shape, self.comparison())
    }
}

/// This process among the others: who it is and how it calls.
pub struct Station {
    role: Role,
    credentials: Credentials,
    options: Options,
}

/// Time for which one look for a caller waits.
const POLL: Duration = Duration::from_millis(200);
/// What callers are told during a run; they call again.
const BUSY: &str = "busy with another run";
/// Longest silence on a link: between generations the data owner computes.
const IDLE: Duration = Duration::from_secs(120);
/// Longest wait for a message of somebody who gives signs of life: a pass over a large model and many texts takes hours.
const PATIENCE: Duration = Duration::from_secs(30 * 24 * 3600);

impl Station {
    /// With the keys in `keys`.
    pub fn new(role: Role, keys: &std::path::Path, network: Network, wait: Duration) -> Result<Station> {
        let credentials = Credentials::load(keys, &role.identity()).map_err(|e| {
            let name = role.name();
            Error::Input(format!(
                "{e}; give --keys the {name} folder that `veiltune keys --tuning` made"
            ))
        })?;
        Ok(Station {
            role,
            credentials,
            options: Options {
                network,
                idle: IDLE,
                patience: PATIENCE,
                connect: wait,
                ..Options::default()
            },
        })
    }

    /// Accepts calls at `address`.
    pub fn listen(&self, address: &str) -> Result<Listener> {
        let options = Options {
            connect: POLL,
            ..self.options.clone()
        };
        Ok(Listener::bind(address, &self.credentials, &options)?)
    }

    /// Calls a role.
    pub fn call(&self, role: Role, address: &str) -> Result<Arc<dyn Link>> {
        Ok(Arc::new(tcp::connect(
            address,
            &self.credentials,
            &role.identity(),
            &self.options,
        )?))
    }

    /// Waits for one of `roles` to call, at most `wait`, and as long as `go_on` has no objection.
    fn accept(
        &self,
        listener: &Listener,
        roles: &[Role],
        wait: Duration,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<(Role, Arc<dyn Link>)> {
        let names: Vec<_> = roles.iter().map(|r| r.identity()).collect();
        let deadline = std::time::Instant::now() + wait;
        loop {
            match listener.accept(&names) {
                Ok(link) => {
                    let role = roles.iter().find(|r| r.identity() == *link.peer());
                    if let Some(role) = role {
                        return Ok((*role, Arc::new(link)));
                    }
                }
                Err(veiltune_wire::Error::NobodyCame { .. }) => {}
                Err(e) => {
                    tracing::warn!("sent a caller away: {e}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            go_on()?;
            // Callers that are sent away do not make it wait longer.
            if std::time::Instant::now() >= deadline {
                return Err(Error::Wire(veiltune_wire::Error::NobodyCame {
                    expected: roles.iter().map(|r| r.name()).collect::<Vec<_>>().join(" or "),
                    address: listener.address(),
                    waited: wait,
                }));
            }
        }
    }

    /// Waits for a server to call for the run of `owner`, who may give up meanwhile; others are told that it goes on.
    fn accept_server(
        &self,
        listener: &Listener,
        servers: &[Role],
        owner: &dyn Link,
    ) -> Result<(Role, Arc<dyn Link>)> {
        let mut roles = servers.to_vec();
        roles.extend([Role::ModelOwner, Role::DataOwner]);
        loop {
            let (role, link) = self.accept(listener, &roles, self.options.connect, &|| Ok(owner.check()?))?;
            if servers.contains(&role) {
                return Ok((role, link));
            }
            link.abort(BUSY);
        }
    }

    /// Does `work`, and tells meanwhile whoever calls that it goes on.
    fn alone<T>(&self, listener: &Listener, work: impl FnOnce() -> T) -> T {
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    let roles = [Role::ModelOwner, Role::DataOwner];
                    if let Ok((_, link)) = self.accept(listener, &roles, POLL, &|| Ok(())) {
                        link.abort(BUSY);
                    }
                }
            });
            let _done = Done(&done);
            work()
        })
    }

    /// Both sides make sure that they are about to run the same thing.
    fn greet(&self, link: &Arc<dyn Link>, with: Role, run: &Run, program: [u8; 32]) -> Result<()> {
        let model = run.model.get(..16).unwrap_or_default();
        let mine = Hello::new(
            run.number,
            self.role.identity(),
            program,
            format!("tuning of model {model}"),
        );
        Ok(handshake(link, &mine, &with.identity())?)
    }
}

/// Time after which whoever was busy is called again.
const AGAIN: Duration = Duration::from_millis(300);

/// Time after which the user is told: roles take a moment to notice that a run has ended.
const TOLD: Duration = Duration::from_secs(2);

/// Does `what` until nobody is busy with another run.
pub fn patiently<T>(mut what: impl FnMut() -> Result<T>) -> Result<T> {
    let (start, mut told) = (std::time::Instant::now(), false);
    loop {
        match what() {
            Err(Error::Wire(veiltune_wire::Error::PeerAborted { peer, reason })) if reason == BUSY => {
                if start.elapsed() > TOLD && !std::mem::replace(&mut told, true) {
                    tell(&format!(
                        "{peer} is busy with another run; waiting until it is free"
                    ));
                }
                std::thread::sleep(AGAIN);
            }
            other => return other,
        }
    }
}

// ---- sharing a model ----

/// Rows of the word table that are sent at a time.
const TABLE_ROWS: usize = 256;

/// Names and shapes of a model's parameters, in the order in which a program takes them.
pub fn inventory(model: &LanguageConfig) -> Result<Vec<(String, Vec<usize>)>> {
    Ok(LanguageCheckpoint::inventory(model)?)
}

/// The model owner's part: every server gets its shares, once all are free. `table` is the word table `[vocabulary, width]`, a decoder's bias last
/// in each row; `progress` hears which part of all is done.
pub fn share(
    station: &Station,
    public: &PublicModel,
    weights: &Tensors,
    table: &[f32],
    addresses: &[(Role, String)],
    progress: &mut dyn FnMut(f64),
) -> Result<()> {
    patiently(|| {
        let links = addresses
            .iter()
            .map(|(role, address)| Ok((*role, station.call(*role, address)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let mut work = || -> Result<()> {
            for link in links.values() {
                talk::send(link, &Request::Share(Box::new(public.clone())))?;
            }
            let all_say_so = || links.values().try_for_each(|link| link.recv(&mut [0]));
            all_say_so()?;
            let [first, second, assistant] =
                [Role::Server0, Role::Server1, Role::Assistant].map(|role| links.get(&role));
            let (Some(first), Some(second), Some(assistant)) = (first, second, assistant) else {
                return Err(Error::Input("a server's address is missing".into()));
            };
            let random = || Seed::random().map_err(EngineError::from);
            let (seed, masks) = (random()?, [random()?, random()?]);
            first.send(seed.expose().to_vec())?;
            first.send(masks[0].expose().to_vec())?;
            second.send(masks[1].expose().to_vec())?;
            for mask in &masks {
                assistant.send(mask.expose().to_vec())?;
            }
            let inventory = inventory(&public.config)?;
            let all: usize = inventory
                .iter()
                .map(|(_, d)| d.iter().product::<usize>())
                .sum::<usize>()
                + table.len();
            let mut done = 0;
            for (i, (name, dims)) in inventory.iter().enumerate() {
                let array = weights.get(name).filter(|a| a.dims == *dims).ok_or_else(|| {
                    Error::Input(format!("the model has no tensor {name} of shape {dims:?}"))
                })?;
                let words = encode(name, &array.values)?;
                let first = Prg::new(&seed, i as u64, 0).vec(words.len());
                let share: Vec<u64> = words.iter().zip(first).map(|(w, f)| w.wrapping_sub(f)).collect();
                talk::send_words(second, &share)?;
                second.flush()?;
                done += words.len();
                progress(done as f64 / all as f64);
            }
            let width = table_width(&public.config);
            for (i, rows) in table.chunks(width * TABLE_ROWS).enumerate() {
                let mut words = encode("the word table", rows)?;
                let mut mask = vec![0; words.len()];
                let range = TABLE_ROWS * i..TABLE_ROWS * i + words.len() / width;
                for seed in &masks {
                    lookup::mask_rows(seed, range.clone(), width, &mut mask);
                    words
                        .iter_mut()
                        .zip(&mask)
                        .for_each(|(w, m)| *w = w.wrapping_add(*m));
                }
                for link in [first, second] {
                    talk::send_words(link, &words)?;
                    link.flush()?;
                }
                done += words.len();
                progress(done as f64 / all as f64);
            }
            // Nobody offers the model before all have stored their parts.
            all_say_so()?;
            links.values().try_for_each(|link| link.send(vec![1]))?;
            Ok(all_say_so()?)
        };
        work().inspect_err(|e| links.values().for_each(|link| link.abort(&e.for_peer())))?;
        links.values().try_for_each(|link| Ok(link.close()?))
    })
}

fn encode(name: &str, values: &[f32]) -> Result<Vec<u64>> {
    let wide = values.iter().map(|v| f64::from(*v));
    codec::encode(wide, veiltune_engine::gates::SCALE).map_err(|e| Error::Input(format!("{name}: {e}")))
}

/// A server's or the assistant's part of [`share`].
fn take_share(store: &Store, holder: Holder, public: &PublicModel, link: &dyn Link) -> Result<()> {
    public.check()?;
    if store.has(&public.fingerprint) {
        return Err(Error::Refused(
            "a model of that fingerprint is here already".into(),
        ));
    }
    link.send(vec![1])?;
    store.begin(public)?;
    let taken = take_parts(store, holder, public, link).and_then(|()| {
        link.send(vec![1])?;
        link.recv(&mut [0])?;
        store.complete(public)
    });
    taken.inspect_err(|_| store.forget(&public.fingerprint))?;
    link.send(vec![1])?;
    Ok(link.close()?)
}

/// The sealed parts of what is shared.
fn take_parts(store: &Store, holder: Holder, public: &PublicModel, link: &dyn Link) -> Result<()> {
    let id = &public.fingerprint;
    let seed = |count: usize, part: Part| -> Result<()> {
        let mut writer = store.writer(id, part)?;
        for _ in 0..count {
            let mut bytes = Zeroizing::new([0; 16]);
            link.recv(bytes.as_mut())?;
            writer.put(bytes.as_ref())?;
        }
        writer.finish()
    };
    if holder == Holder::First {
        seed(1, Part::Weights)?;
    }
    seed(if holder == Holder::Assistant { 2 } else { 1 }, Part::Masks)?;
    if holder == Holder::Second {
        // One long row of words: shapes follow from the configuration.
        let mut writer = store.writer(id, Part::Weights)?;
        for (_, dims) in inventory(&public.config)? {
            copy_words(link, &mut writer, dims.iter().product())?;
        }
        writer.finish()?;
    }
    if holder != Holder::Assistant {
        let (rows, width) = (table_rows(&public.config), table_width(&public.config));
        let mut writer = store.writer(id, Part::Table)?;
        for start in (0..rows).step_by(TABLE_ROWS) {
            copy_words(link, &mut writer, TABLE_ROWS.min(rows - start) * width)?;
        }
        writer.finish()?;
    }
    Ok(())
}

fn copy_words(link: &dyn Link, writer: &mut Writer, len: usize) -> Result<()> {
    let mut failed = None;
    let put = |piece: &[u64]| {
        if failed.is_none() {
            failed = writer.put_words(piece).err();
        }
    };
    talk::receive_words(link, put, len)?;
    failed.map_or(Ok(()), Err)
}

// ---- a run ----

/// What a server or the assistant is started with.
pub struct Service {
    /// Where it accepts calls.
    pub listen: String,
    /// Address of the assistant; the servers need it.
    pub assistant: Option<String>,
    /// Address of server 0; server 1 needs it.
    pub peer: Option<String>,
    /// Folder of what it keeps, and the file of the key to it.
    pub store: (PathBuf, PathBuf),
    /// Runs after which it ends, those that fail included; None: it goes on.
    pub runs: Option<usize>,
    /// Bytes of memory that a run may need, by its plan.
    pub memory: u64,
    /// Set from outside: it ends after the run that it is in.
    pub stop: Arc<AtomicBool>,
}

impl Service {
    /// Refuses a run that needs more memory than it may.
    fn check(&self, needed: u64) -> Result<()> {
        let gib = |b: u64| b as f64 / 2f64.powi(30);
        match needed <= self.memory {
            true => Ok(()),
            false => Err(Error::Refused(format!(
                "the run needs {:.1} GiB of memory here, {:.1} are given to it; let fewer prompts (--together) or texts (--batch) \
                 share a pass",
                gib(needed),
                gib(self.memory)
            ))),
        }
    }
}

/// Serves model owners and data owners, one after the other. `listening` hears the address.
pub fn serve(station: &Station, service: &Service, listening: &dyn Fn(std::net::SocketAddr)) -> Result<()> {
    let store = Store::open(&service.store.0, &service.store.1)?;
    let listener = station.listen(&service.listen)?;
    listening(listener.address());
    let mut runs = 0;
    while service.runs.is_none_or(|most| runs < most) && !service.stop.load(Relaxed) {
        let (role, link) =
            match station.accept(&listener, &[Role::ModelOwner, Role::DataOwner], POLL, &|| Ok(())) {
                Ok(call) => call,
                Err(Error::Wire(veiltune_wire::Error::NobodyCame { .. })) => continue,
                Err(e) => return Err(e),
            };
        let served = answer(station, service, &store, &listener, role, &link, &mut runs);
        if let Err(e) = served {
            tracing::warn!("serving {} failed: {e}", role.name());
            link.abort(&e.for_peer());
        }
    }
    Ok(())
}

fn answer(
    station: &Station,
    service: &Service,
    store: &Store,
    listener: &Listener,
    caller: Role,
    link: &Arc<dyn Link>,
    runs: &mut usize,
) -> Result<()> {
    let holder = match station.role {
        Role::Server0 => Holder::First,
        Role::Server1 => Holder::Second,
        _ => Holder::Assistant,
    };
    match (caller, talk::receive(link)?) {
        (Role::ModelOwner, Request::Share(public)) => {
            station.alone(listener, || take_share(store, holder, &public, link))
        }
        (Role::DataOwner, Request::Models) => {
            talk::send(link, &store.models()?)?;
            Ok(link.close()?)
        }
        (Role::DataOwner, Request::Model(fingerprint)) => {
            talk::send(link, &store.public(&fingerprint)?)?;
            Ok(link.close()?)
        }
        (Role::DataOwner, Request::Run(run)) => {
            *runs += 1;
            let public = store.public(&run.model)?;
            run.shape.check(&public.config)?;
            match holder {
                Holder::Assistant => assist(station, service, store, listener, &public, &run, link),
                _ => compute(station, service, store, listener, holder, &public, &run, link),
            }
        }
        _ => Err(Error::Refused(format!(
            "that is nothing for a {} to ask",
            caller.name()
        ))),
    }
}

fn seeds(store: &Store, model: &str, part: Part, count: usize) -> Result<Vec<Seed>> {
    let mut reader = store.reader(model, part)?;
    let mut one = |_| {
        let mut bytes = Zeroizing::new([0; 16]);
        reader.take(bytes.as_mut())?;
        Ok(Seed::from_bytes(*bytes))
    };
    (0..count).map(&mut one).collect()
}

/// The assistant's part of a run: its sums of the word lookup, then material.
fn assist(
    station: &Station,
    service: &Service,
    store: &Store,
    listener: &Listener,
    public: &PublicModel,
    run: &Run,
    owner: &Arc<dyn Link>,
) -> Result<()> {
    let model = &public.config;
    let (rows, domain, width) = (run.shape.rows(), table_rows(model), table_width(model));
    let program = run.program(&public.config);
    let plan = program.plan()?;
    service.check(super::plan::memory(&plan.tally.memory, model, &run.shape)[2])?;
    owner.send(vec![1])?;
    let selections = lookup::receive_keys(owner, Holder::Assistant, rows, domain)?;
    let masks = seeds(store, &run.model, Part::Masks, 2)?;
    let mut links = BTreeMap::new();
    let work = (|| -> Result<()> {
        while links.len() < 2 {
            let (role, link) = station.accept_server(listener, &[Role::Server0, Role::Server1], owner)?;
            links.insert(role, link);
        }
        for (role, link) in &links {
            station.greet(link, *role, run, plan.program)?;
        }
        // Fresh, whatever number the data owner gave the run: what hides the sums is never used twice.
        let fresh = Seed::random().map_err(EngineError::from)?;
        for link in links.values() {
            link.send(fresh.expose().to_vec())?;
        }
        // What it adds up of server 0's mask goes to server 1, and the other way round.
        for ((selections, mask), to) in selections.iter().zip(&masks).zip([Role::Server1, Role::Server0]) {
            let mut sums = lookup::mask_sums(mask, domain, width, selections)?;
            lookup::blind(mask, fresh.expose(), &mut sums);
            talk::send_words(&links[&to], &sums)?;
        }
        let both = [Role::Server0, Role::Server1].map(|role| links[&role].clone());
        station.alone(listener, || {
            session::serve_material(&program, PASSES, both, |_| Ok(()))
        })?;
        Ok(())
    })();
    work.inspect_err(|e| links.values().for_each(|link| link.abort(&e.for_peer())))?;
    Ok(owner.close()?)
}

/// A server's part of a run.
#[allow(clippy::too_many_arguments)]
fn compute(
    station: &Station,
    service: &Service,
    store: &Store,
    listener: &Listener,
    holder: Holder,
    public: &PublicModel,
    run: &Run,
    owner: &Arc<dyn Link>,
) -> Result<()> {
    let party = if holder == Holder::First {
        Party::P0
    } else {
        Party::P1
    };
    let model = &public.config;
    let (rows, domain, width) = (run.shape.rows(), table_rows(model), table_width(model));
    let program = run.program(model);
    let plan = program.plan()?;
    service.check(super::plan::memory(&plan.tally.memory, model, &run.shape)[party.index()])?;
    owner.send(vec![1])?;
    // The data owner's inputs: server 0 expands its shares from a seed.
    let inputs = match party {
        Party::P0 => {
            let mut seed = Zeroizing::new([0; 16]);
            owner.recv(seed.as_mut())?;
            Some(Seed::from_bytes(*seed))
        }
        Party::P1 => None,
    };
    let selections = lookup::receive_keys(owner, holder, rows, domain)?;
    let address = |address: &Option<String>, of: &str| {
        address
            .clone()
            .ok_or_else(|| Error::Input(format!("the address of {of} is missing")))
    };
    let assistant = station.call(Role::Assistant, &address(&service.assistant, "the assistant")?)?;
    let mut peer = None;
    let work = (|| -> Result<()> {
        station.greet(&assistant, Role::Assistant, run, plan.program)?;
        let other = Role::server(party.peer());
        let link = match party {
            Party::P0 => station.accept_server(listener, &[other], owner)?.1,
            Party::P1 => station.call(other, &address(&service.peer, "server 0")?)?,
        };
        peer = Some(link.clone());
        station.greet(&link, other, run, plan.program)?;

        let mut fresh = Zeroizing::new([0; 16]);
        assistant.recv(fresh.as_mut())?;
        let masks = seeds(store, &run.model, Part::Masks, 1)?;
        let table = store
            .reader(&run.model, Part::Table)?
            .take_words(domain * width)?;
        let mut own = lookup::mask_sums(&masks[0], domain, width, &selections[1])?;
        lookup::blind(&masks[0], &fresh, &mut own);
        let mut sums = lookup::table_sums(&table, width, &selections[0])?;
        drop(table);
        if party == Party::P1 {
            sums = lookup::negated(sums);
        }
        let received = talk::receive_ring(&assistant, &[rows, width])?;
        let own = Ring::new(vec![rows, width], lookup::negated(own)).map_err(EngineError::from)?;
        let sums = Ring::new(vec![rows, width], sums).map_err(EngineError::from)?;
        // The tables' order: E', R0, R1; this server knows R_party, the assistant has sent of the other one.
        let terms: [Ring; TERMS] = match party {
            Party::P0 => [sums, own, received],
            Party::P1 => [sums, received, own],
        };
        let weights = match party {
            Party::P0 => Weights::Seed(seeds(store, &run.model, Part::Weights, 1)?.remove(0), 0),
            Party::P1 => Weights::File(Box::new(store.reader(&run.model, Part::Weights)?)),
        };
        let outside = Servant {
            owner: owner.clone(),
            weights,
            terms: terms.into(),
            inputs: inputs.clone().map(|seed| (seed, 0)),
        };
        let session = PartySession {
            party,
            peer: link.clone(),
            material: MaterialFrom::Dealer(assistant.clone()),
            ahead: Some(super::plan::AHEAD),
            outside: Box::new(outside),
        };
        station.alone(listener, || session.run(&program, PASSES, |_, _| Ok(())))?;
        Ok(link.close()?)
    })();
    work.inspect_err(|e| {
        let links = [Some(&assistant), peer.as_ref()];
        links.iter().flatten().for_each(|link| link.abort(&e.for_peer()));
    })?;
    Ok(owner.close()?)
}

enum Weights {
    /// Server 0's: parameter number i is stream i of the seed.
    Seed(Seed, u64),
    /// Server 1's.
    File(Box<Reader>),
}

/// What a server has from outside: the model owner's shares from its store, the data owner's over its link.
struct Servant {
    owner: Arc<dyn Link>,
    weights: Weights,
    /// Of the word lookup, which are the first inputs.
    terms: VecDeque<Ring>,
    /// Server 0's seed of the data owner's inputs, and how many there were.
    inputs: Option<(Seed, u64)>,
}

impl Outside for Servant {
    fn parameter(&mut self, dims: &[usize]) -> EngineResult<Ring> {
        match &mut self.weights {
            Weights::Seed(seed, next) => {
                *next += 1;
                Ok(Prg::new(seed, *next - 1, 0).ring(dims))
            }
            Weights::File(reader) => {
                let words = reader
                    .take_words(dims.iter().product())
                    .map_err(|e| EngineError::File(e.to_string()))?;
                Ok(Ring::new(dims.to_vec(), words)?)
            }
        }
    }

    fn input(&mut self, dims: &[usize]) -> EngineResult<Ring> {
        if !self.terms.is_empty() {
            return self.terms.input(dims);
        }
        match &mut self.inputs {
            Some((seed, next)) => {
                *next += 1;
                Ok(Prg::new(seed, *next - 1, 0).ring(dims))
            }
            None => talk::receive_ring(&self.owner, dims),
        }
    }

    fn output(&mut self, share: Ring) -> EngineResult<()> {
        Ok(talk::send_words(&self.owner, share.as_slice())?)
    }

    fn next(&mut self, _: usize) -> EngineResult<Option<u8>> {
        let mut next = [0; 2];
        self.owner.recv(&mut next)?;
        Ok((next[0] != 0).then_some(next[1]))
    }
}
