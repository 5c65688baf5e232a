//! A session: the same program walked by the dealer, by two parties (preparing and online), and by the cost model.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use veiltune_ring::Ring;
use veiltune_ring::prg::{Prg, Seed};
use veiltune_wire::{Link, Meter, Network};

use crate::cost::Tally;
use crate::gates::encode;
use crate::material::{DealId, LinkSink, LinkSource, ParameterStore, Queue, Sink, Source};
use crate::offline::Offline;
use crate::online::Online;
use crate::protocols::compare::Comparison;
use crate::{Backend, Cost, Error, Outside, Party, Result, Revealed};

/// What is run: parameters once, then any number of forward passes.
///
/// Each role has its own value of the implementing type: the client's holds the inputs, the provider's the weights,
/// the dealer's neither. Shapes and public configuration are the same everywhere (their hash is compared).
pub trait Program: Sync {
    /// The parameters on a backend.
    type Model<B: Backend>;

    /// Brings the parameters in.
    fn load<B: Backend>(&self, backend: &B) -> Result<Self::Model<B>>;

    /// How the program compares: the same at every role.
    fn comparison(&self) -> Comparison {
        Comparison::Fss
    }

    /// Whether the outside owner says before each pass which one is next, if any: `index` is then what it says, and may be the
    /// same again. A dealer on a link hears of it from the parties; where there is no link, and in predictions, the passes come
    /// in order. The same at every role.
    fn paced(&self) -> bool {
        false
    }

    /// Pass number `index`; the revealed output where this role learns it.
    fn forward<B: Backend>(
        &self,
        backend: &B,
        model: &Self::Model<B>,
        index: usize,
    ) -> Result<Option<Revealed>>;
}

/// What a program costs, before it runs.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Everything counted: the set-up apart, then all passes together.
    pub tally: Tally,
    /// Hash of every gate, shape and public constant: equal at roles that will agree on what comes next.
    pub program: [u8; 32],
}

/// Walks `program` for `passes` forward passes with shapes alone.
pub fn plan<P: Program>(program: &P, passes: usize) -> Result<Plan> {
    plan_with(program, passes, program.comparison())
}

fn plan_with<P: Program>(program: &P, passes: usize, comparison: Comparison) -> Result<Plan> {
    let walk = Offline::count(comparison);
    walk_all(program, &walk, passes, |done| Ok(Some(done)), |_| Ok(()))?;
    let mut tally = walk.tally().clone();
    tally.memory = walk.memory();
    Ok(Plan {
        tally,
        program: walk.program_hash(),
    })
}

/// The way to compare that takes `passes` passes of `program` through the network sooner, by [`sooner`].
pub fn cheapest_comparison<P: Program>(program: &P, passes: usize, network: &Network) -> Result<Comparison> {
    let cost = |comparison| -> Result<Cost> { Ok(plan_with(program, passes, comparison)?.tally.total()) };
    Ok(sooner(
        &cost(Comparison::Fss)?,
        &cost(Comparison::MaskedBits)?,
        network,
    ))
}

/// The way to compare that is through the network sooner, of what a program costs with either: a latency for each round, and
/// at the network's rate the busier direction's online bytes, then the busier party's bytes from the dealer (each party
/// has one line for both). Computation is not counted; at equal seconds, as on a network without limits, the fewer bytes from
/// the dealer win, because they are also the less work.
pub fn sooner(fss: &Cost, masked_bits: &Cost, network: &Network) -> Comparison {
    let [fss, masked_bits] = [fss, masked_bits].map(|cost| {
        let dealt = cost.dealer_bytes[0].max(cost.dealer_bytes[1]);
        let seconds = network.transmission(usize::try_from(dealt).unwrap_or(usize::MAX));
        (cost.network_seconds(network) + seconds.as_secs_f64(), dealt)
    });
    match masked_bits < fss {
        true => Comparison::MaskedBits,
        false => Comparison::Fss,
    }
}

/// Deals the material of `passes` forward passes into the two sinks. `progress` is called after each pass.
pub fn deal<P: Program>(
    program: &P,
    passes: usize,
    seeds: [Seed; 2],
    sinks: [Box<dyn Sink>; 2],
    progress: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let walk = Offline::dealer(program.comparison(), seeds, sinks);
    let wanted = |done| match program.paced() {
        true => Ok(walk.wanted(done)?.map(usize::from)),
        false => Ok(Some(done)),
    };
    walk_all(program, &walk, passes, wanted, progress)?;
    walk.finish()
}

fn walk_all<P: Program>(
    program: &P,
    walk: &Offline,
    passes: usize,
    mut next: impl FnMut(usize) -> Result<Option<usize>>,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let model = program.load(walk)?;
    for done in 0..passes {
        let Some(index) = next(done)? else {
            break;
        };
        program.forward(walk, &model, index)?;
        progress(done + 1)?;
    }
    Ok(())
}

/// The dealer of an interactive session: a fresh seed to each party over its link, then the material.
pub fn serve_material<P: Program>(
    program: &P,
    passes: usize,
    links: [Arc<dyn Link>; 2],
    progress: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let run = || {
        let seeds = [Seed::random()?, Seed::random()?];
        for (link, seed) in links.iter().zip(&seeds) {
            link.send(seed.expose().to_vec())?;
        }
        let sinks = links.clone().map(|l| Box::new(LinkSink::new(l)) as Box<dyn Sink>);
        deal(program, passes, seeds, sinks, progress)
    };
    run().inspect_err(|e| links.iter().for_each(|l| l.abort(&e.for_peer())))
}

/// A compute party's end of a session.
pub struct PartySession {
    /// Which party.
    pub party: Party,
    /// The link to the other party.
    pub peer: Arc<dyn Link>,
    /// Where material comes from.
    pub material: MaterialFrom,
    /// How many gates the preparation may run ahead of the online phase, which bounds memory; None: the whole offline
    /// phase comes first.
    pub ahead: Option<usize>,
    /// Where inputs and parameters of [`Owner::Shared`](crate::Owner::Shared) come from, and delivered outputs go.
    pub outside: Box<dyn Outside>,
}

/// Splits values into additive shares, as an outside owner does before it hands one to each party. [`SCALE`](crate::gates::SCALE)
/// fractional bits.
pub fn share(dims: &[usize], values: &[f32]) -> Result<[Ring; 2]> {
    let first = Prg::new(&Seed::random()?, 0, 0).ring(dims);
    let second = encode("share", dims, values)?.sub(&first)?;
    Ok([first, second])
}

/// Where a party's material comes from.
pub enum MaterialFrom {
    /// A dealer on the other end of this link, which also sends the seed.
    Dealer(Arc<dyn Link>),
    /// A source and the seed that belongs to it.
    Source(Box<dyn Source>, Seed),
}

impl MaterialFrom {
    /// The link to the dealer, if it is one, the seed, and what material is taken from.
    #[allow(clippy::type_complexity)]
    fn open(self, peer: &Arc<dyn Link>) -> Result<(Option<Arc<dyn Link>>, Seed, Box<dyn Source>)> {
        match self {
            MaterialFrom::Source(source, seed) => Ok((None, seed, source)),
            MaterialFrom::Dealer(link) => {
                let mut seed = [0; 16];
                link.recv(&mut seed)
                    .inspect_err(|e| [peer, &link].iter().for_each(|l| l.abort(&e.for_peer())))?;
                Ok((
                    Some(link.clone()),
                    Seed::from_bytes(seed),
                    Box::new(LinkSource(link)),
                ))
            }
        }
    }
}

/// Both parties start the online phase together, with material of the same deal.
fn begin_online(peer: &dyn Link, deal: DealId) -> Result<()> {
    peer.send(deal.0.to_vec())?;
    let mut other = DealId::default();
    peer.recv(&mut other.0)?;
    match other == deal {
        true => Ok(()),
        false => Err(Error::File(
            "the other party's material is of another deal: use the two files that were made together".into(),
        )),
    }
}

/// What a party measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Opening the parameters.
    pub setup: Duration,
    /// Bytes and messages of the set-up on the peer link.
    pub setup_meter: Meter,
    /// Receiving and preparing material, the time after the set-up that it took alone.
    pub offline: Duration,
    /// The online phase.
    pub online: Duration,
    /// Bytes, messages and rounds of the online phase on the peer link.
    pub online_meter: Meter,
    /// Bytes of material received.
    pub dealer_bytes: u64,
}

impl PartySession {
    /// Runs `passes` forward passes; `output` gets each pass's number and what was revealed to this party.
    pub fn run<P: Program>(
        self,
        program: &P,
        passes: usize,
        mut output: impl FnMut(usize, Option<Revealed>) -> Result<()>,
    ) -> Result<Report> {
        let PartySession {
            party,
            peer,
            material,
            ahead,
            outside,
        } = self;
        let (dealer, seed, source) = material.open(&peer)?;
        let deal_id = source.deal();
        let dealt = || dealer.as_ref().map_or(0, |d| d.meter().received);
        let dealt_before = dealt();

        let (queue, receiver) = Queue::new(ahead);
        let parameters = Arc::new(ParameterStore::default());
        let (done_tx, done_rx) = mpsc::channel();
        let (pace_tx, pace_rx) = mpsc::channel();
        let failure = Failure {
            first: Mutex::new(None),
            links: [Some(peer.clone()), dealer.clone()],
        };
        let mut report = Report::default();

        std::thread::scope(|scope| {
            let (seed_offline, store) = (seed.clone(), parameters.clone());
            let failure = &failure;
            scope.spawn(move || {
                let walk = Offline::party(program.comparison(), party, seed_offline, source, queue, store);
                let next = |done| {
                    if !program.paced() {
                        return Ok(Some(done));
                    }
                    let next: Option<u8> = pace_rx.recv().map_err(|_| Error::Stopped("the online phase"))?;
                    walk.want(next)?;
                    Ok(next.map(usize::from))
                };
                match walk_all(program, &walk, passes, next, |_| Ok(())) {
                    Ok(()) => _ = done_tx.send(()),
                    Err(e) => failure.record(e),
                }
            });
            let online = Online::new(
                program.comparison(),
                party,
                seed,
                peer.clone(),
                receiver,
                parameters.clone(),
                outside,
            );
            // Gone with this scope's work, also if that fails: the preparation then waits for no further pass.
            let pace = pace_tx;
            let mut run = || -> Result<()> {
                let (start, before) = (Instant::now(), peer.meter());
                let model = program.load(&online)?;
                report.setup = start.elapsed();
                report.setup_meter = peer.meter() - before;

                let start = Instant::now();
                if ahead.is_none() && !program.paced() {
                    done_rx.recv().map_err(|_| Error::Stopped("the offline phase"))?;
                }
                begin_online(&*peer, deal_id)?;
                report.offline = start.elapsed();

                let (start, before) = (Instant::now(), peer.meter());
                for done in 0..passes {
                    let index = if program.paced() {
                        let next = online.next(done)?;
                        // If the preparation has failed, it says so itself.
                        let _ = pace.send(next);
                        match next {
                            Some(index) => index.into(),
                            None => break,
                        }
                    } else {
                        done
                    };
                    output(done, program.forward(&online, &model, index)?)?;
                }
                report.online = start.elapsed();
                report.online_meter = peer.meter() - before;
                Ok(())
            };
            if let Err(e) = run() {
                failure.record(e);
            }
            parameters.close();
            drop((online, pace));
        });
        if let Some(e) = failure.first.into_inner().unwrap_or_else(|e| e.into_inner()) {
            return Err(e);
        }
        report.dealer_bytes = dealt() - dealt_before;
        Ok(report)
    }
}

/// The first failure of a role's threads; it ends the links, so that every thread and the other roles hear of it.
struct Failure {
    first: Mutex<Option<Error>>,
    links: [Option<Arc<dyn Link>>; 2],
}

impl Failure {
    fn record(&self, e: Error) {
        let mut first = self.first.lock().unwrap_or_else(|e| e.into_inner());
        if first.as_ref().is_none_or(|f| matches!(f, Error::Stopped(_))) {
            if !matches!(e, Error::Stopped(_)) {
                self.links.iter().flatten().for_each(|l| l.abort(&e.for_peer()));
            }
            *first = Some(e);
        }
    }
}

/// A whole session in one process over in-memory links, for tests, calibration and benchmarks.
pub struct Local {
    /// What each party got from each pass.
    pub outputs: [Vec<Option<Revealed>>; 2],
    /// What each party measured.
    pub reports: [Report; 2],
    /// What was predicted.
    pub plan: Plan,
}

/// Runs dealer and both parties in this process with the given seeds; `programs` and `shares` are the parties' own.
pub fn run_local<P: Program + Send>(
    programs: [&P; 2],
    passes: usize,
    seeds: [Seed; 2],
    shares: [VecDeque<Ring>; 2],
) -> Result<Local> {
    let plan = plan(programs[0], passes)?;
    let (a, b) = veiltune_wire::memory::pair();
    let (d0, p0) = veiltune_wire::memory::pair();
    let (d1, p1) = veiltune_wire::memory::pair();
    let dealer_links = [Arc::new(d0) as Arc<dyn Link>, Arc::new(d1)];
    std::thread::scope(|scope| {
        let dealer = scope.spawn({
            let (links, seeds) = (dealer_links.clone(), seeds.clone());
            move || {
                let sinks = links.map(|l| Box::new(LinkSink::new(l)) as Box<dyn Sink>);
                deal(programs[0], passes, seeds, sinks, |_| Ok(()))
            }
        });
        let ends: [(Arc<dyn Link>, Arc<dyn Link>); 2] =
            [(Arc::new(a), Arc::new(p0)), (Arc::new(b), Arc::new(p1))];
        let mut parties = Vec::new();
        for ((((party, (peer, dealer)), seed), program), outside) in [Party::P0, Party::P1]
            .into_iter()
            .zip(ends)
            .zip(seeds)
            .zip(programs)
            .zip(shares)
        {
            parties.push(scope.spawn(move || {
                let source = Box::new(LinkSource(dealer.clone()));
                let material = MaterialFrom::Source(source, seed);
                let session = PartySession {
                    party,
                    peer: peer.clone(),
                    material,
                    ahead: None,
                    outside: Box::new(outside),
                };
                let mut outputs = Vec::new();
                let mut report = session.run(program, passes, |_, o| {
                    outputs.push(o);
                    Ok(())
                })?;
                report.dealer_bytes = dealer.meter().received;
                Ok::<_, Error>((outputs, report))
            }));
        }
        let joined: Vec<_> = parties
            .into_iter()
            .map(|p| p.join().unwrap_or(Err(Error::Stopped("a thread"))))
            .collect();
        dealer.join().unwrap_or(Err(Error::Stopped("a thread")))?;
        let mut joined = joined.into_iter().collect::<Result<Vec<_>>>()?.into_iter();
        let mut next = || joined.next().ok_or(Error::Stopped("a thread"));
        let ((o0, r0), (o1, r1)) = (next()?, next()?);
        Ok(Local {
            outputs: [o0, o1],
            reports: [r0, r1],
            plan,
        })
    })
}
