//! What the benchmarks share: two parties on so many threads each, over TLS on loopback with an emulated network, with their
//! material ready before the clock starts.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::Serialize;
use veiltune_engine::material::{DealId, FileSink, FileSource, Label, Sink, Source};
use veiltune_engine::session::{self, MaterialFrom, PartySession, Program};
use veiltune_engine::{Error, Outside, Party, Result, Revealed, Tally};
use veiltune_ring::prg::Seed;
use veiltune_wire::pki::Authority;
use veiltune_wire::{Identity, Link, Network, Options, tcp};

/// Smallest, median and largest of several runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

impl Spread {
    fn of(mut seconds: Vec<f64>) -> Spread {
        seconds.sort_by(f64::total_cmp);
        Spread {
            min: seconds[0],
            median: seconds[seconds.len() / 2],
            max: seconds[seconds.len() - 1],
        }
    }
}

/// What was measured, per pass.
pub struct Timing {
    /// The online phase of the counted passes.
    pub seconds: Spread,
    /// Computing the material at the dealer, without sending it.
    pub dealer: f64,
    /// Preparing the material at the busier party.
    pub offline: f64,
    /// Opening the parameters, once a session.
    pub setup: f64,
    /// What was revealed to each party in the last pass.
    pub revealed: [Option<Revealed>; 2],
    /// Gates that the preparation ran ahead; None: it came first.
    pub ahead: Option<usize>,
}

/// Material in memory: dealt first, then read by a party.
#[derive(Clone, Default)]
struct Shelf(Arc<Mutex<VecDeque<Vec<u8>>>>);

impl Sink for Shelf {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.0
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .push_back(bytes.to_vec());
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Source for Shelf {
    fn take(&mut self, buf: &mut [u8]) -> Result<()> {
        // Gates read exactly what the dealer put, piece by piece.
        let piece = self.0.lock().unwrap_or_else(|e| e.into_inner()).pop_front();
        match piece {
            Some(piece) if piece.len() == buf.len() => {
                buf.copy_from_slice(&piece);
                Ok(())
            }
            _ => Err(Error::program("bench", "the material does not match the program")),
        }
    }
}

/// Material of more bytes than this goes through files: memory for it twice costs more time than reading it.
const IN_MEMORY: u64 = 7 << 29;
/// Gates that the preparation of such material then runs ahead, in the time of the online phase.
const AHEAD: usize = 8;

/// Where material waits: in memory, or in files of a folder that goes with this value.
enum Store {
    Memory([Shelf; 2]),
    Files(tempfile::TempDir, [Label; 2]),
}

impl Store {
    fn new(bytes: u64, program: [u8; 32]) -> Result<Store> {
        if bytes <= IN_MEMORY {
            return Ok(Store::Memory(Default::default()));
        }
        let dir = tempfile::tempdir().map_err(|e| Error::File(format!("a folder for material: {e}")))?;
        Ok(Store::Files(
            dir,
            [Party::P0, Party::P1].map(|party| Label { party, program }),
        ))
    }

    fn sinks(&self, seeds: &[Seed; 2]) -> Result<[Box<dyn Sink>; 2]> {
        match self {
            Store::Memory(shelves) => Ok(shelves.clone().map(|s| Box::new(s) as Box<dyn Sink>)),
            Store::Files(dir, labels) => {
                let deal = DealId::random()?;
                let sink = |i: usize| {
                    FileSink::create(&path(dir, i), &labels[i], deal, &seeds[i])
                        .map(|s| Box::new(s) as Box<dyn Sink>)
                };
                Ok([sink(0)?, sink(1)?])
            }
        }
    }

    fn sources(&self) -> Result<[Box<dyn Source>; 2]> {
        match self {
            Store::Memory(shelves) => Ok(shelves.clone().map(|s| Box::new(s) as Box<dyn Source>)),
            Store::Files(dir, labels) => {
                let source = |i: usize| {
                    FileSource::open(&path(dir, i), &labels[i]).map(|(s, _)| Box::new(s) as Box<dyn Source>)
                };
                Ok([source(0)?, source(1)?])
            }
        }
    }

    fn ahead(&self) -> Option<usize> {
        matches!(self, Store::Files(..)).then_some(AHEAD)
    }
}

fn path(dir: &tempfile::TempDir, party: usize) -> std::path::PathBuf {
    dir.path().join(format!("{party}.material"))
}

/// A sink that counts what passes.
struct Counting(Box<dyn Sink>, Arc<AtomicU64>);

impl Sink for Counting {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.1.fetch_add(bytes.len() as u64, Relaxed);
        self.0.put(bytes)
    }

    fn finish(&mut self) -> Result<()> {
        self.0.finish()
    }
}

/// Runs one pass to warm up and `runs` counted ones, or a single one that counts if `runs` is zero. `programs` are those of the two parties and of the dealer; every pass
/// costs the same, and what the links counted must be what `cost`, the prediction for one pass, says. Each role has `threads`.
pub fn time<P: Program + Sync>(
    programs: [&P; 3],
    cost: &Tally,
    runs: usize,
    network: Network,
    outside: [Box<dyn Outside>; 2],
    threads: NonZeroUsize,
) -> Result<Timing> {
    let passes = runs + 1;
    let seeds = [Seed::random()?, Seed::random()?];
    let plan = session::plan(programs[2], passes)?;
    let bytes = plan.tally.total().dealer_bytes.into_iter().max().unwrap_or(0);
    let store = Store::new(bytes, plan.program)?;
    let counters: [Arc<AtomicU64>; 2] = Default::default();
    let [first, second] = store.sinks(&seeds)?;
    let sinks: [Box<dyn Sink>; 2] = [
        Box::new(Counting(first, counters[0].clone())),
        Box::new(Counting(second, counters[1].clone())),
    ];
    let start = Instant::now();
    pool(threads)?.install(|| session::deal(programs[2], passes, seeds.clone(), sinks, |_| Ok(())))?;
    let dealer = start.elapsed().as_secs_f64();
    let dealt = counters.each_ref().map(|c| c.load(Relaxed));
    let (sources, ahead) = (store.sources()?, store.ahead());

    let links = links(network)?;
    let mut results = Vec::new();
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        let parties = [Party::P0, Party::P1]
            .into_iter()
            .zip(links)
            .zip(sources)
            .zip(seeds)
            .zip(outside)
            .zip(programs);
        for (((((party, peer), source), seed), outside), program) in parties {
            running.push(scope.spawn(move || -> Result<_> {
                let material = MaterialFrom::Source(source, seed);
                let session = PartySession {
                    party,
                    peer,
                    material,
                    ahead,
                    outside,
                };
                let (mut marks, mut last) = (Vec::with_capacity(passes), None);
                let report = pool(threads)?.install(|| {
                    session.run(program, passes, |_, revealed| {
                        marks.push(Instant::now());
                        last = revealed;
                        Ok(())
                    })
                })?;
                Ok((marks, report, last))
            }));
        }
        results = running
            .into_iter()
            .map(|t| t.join().unwrap_or(Err(Error::Stopped("a thread"))))
            .collect();
    });
    let results = results.into_iter().collect::<Result<Vec<_>>>()?;
    let total = cost.total();
    for (i, (_, report, _)) in results.iter().enumerate() {
        let counted = [report.online_meter.rounds, report.online_meter.sent, dealt[i]];
        let predicted =
            [total.rounds, total.online_bytes[i], total.dealer_bytes[i]].map(|v| v * passes as u64);
        if counted != predicted {
            let detail = format!("rounds, bytes and dealer bytes were {counted:?}, predicted {predicted:?}");
            return Err(Error::program("bench", detail));
        }
    }
    // A pass ends when the later party ends it; the first has no mark before it and is not counted.
    let ends: Vec<Instant> = (0..passes)
        .map(|i| results[0].0[i].max(results[1].0[i]))
        .collect();
    let longest = |f: &dyn Fn(&session::Report) -> f64| results.iter().map(|r| f(&r.1)).fold(0.0, f64::max);
    let mut seconds: Vec<f64> = ends.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
    if seconds.is_empty() {
        seconds.push(longest(&|r| r.online.as_secs_f64()));
    }
    Ok(Timing {
        seconds: Spread::of(seconds),
        dealer: dealer / passes as f64,
        offline: longest(&|r| r.offline.as_secs_f64()) / passes as f64,
        setup: longest(&|r| r.setup.as_secs_f64()),
        revealed: [results[0].2.clone(), results[1].2.clone()],
        ahead,
    })
}

/// A role's own: the roles share a machine here, and would else share one pool.
fn pool(threads: NonZeroUsize) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.get())
        .build()
        .map_err(|e| Error::File(e.to_string()))
}

fn links(network: Network) -> Result<[Arc<dyn Link>; 2]> {
    let names = [Identity::new("first")?, Identity::new("second")?];
    let authority = Authority::new()?;
    let credentials = [authority.issue(&names[0])?, authority.issue(&names[1])?];
    let options = Options::over(network);
    let listener = tcp::Listener::bind("127.0.0.1:0", &credentials[0], &options)?;
    let address = listener.address().to_string();
    let (accepted, connected) = std::thread::scope(|scope| {
        let call = scope.spawn(|| tcp::connect(&address, &credentials[1], &names[0], &options));
        let accepted = listener.accept(&names[1..]);
        (accepted, call.join().map_err(|_| Error::Stopped("a thread")))
    });
    Ok([Arc::new(accepted?), Arc::new(connected??)])
}

/// What was measured of one pass during which the dealer was dealing.
pub struct Streamed {
    /// From the first byte of material to the result.
    pub seconds: f64,
    /// Opening the parameters before.
    pub setup: f64,
    /// What was revealed to each party.
    pub revealed: [Option<Revealed>; 2],
}

/// Gates that the preparation of streamed material runs ahead.
pub const STREAM_AHEAD: usize = 4;

/// Runs one pass with all three roles at work, the dealer streaming to both parties: material never has to fit anywhere. As
/// [`time`] otherwise. The clock also counts the dealer's work.
pub fn stream<P: Program + Sync>(
    programs: [&P; 3],
    cost: &Tally,
    network: Network,
    outside: [Box<dyn Outside>; 2],
    threads: NonZeroUsize,
) -> Result<Streamed> {
    let peers = links(network)?;
    let dealers = [links(network)?, links(network)?].map(|[a, b]| (a, b));
    let ends = dealers.each_ref().map(|(dealer, _)| dealer.clone());
    let mut results = Vec::new();
    let mut dealt = Ok(());
    std::thread::scope(|scope| {
        let dealer = scope
            .spawn(|| pool(threads)?.install(|| session::serve_material(programs[2], 1, ends, |_| Ok(()))));
        let parties = [Party::P0, Party::P1]
            .into_iter()
            .zip(peers)
            .zip(dealers.iter().map(|(_, party)| party.clone()))
            .zip(outside)
            .zip(programs);
        let running: Vec<_> = parties
            .map(|((((party, peer), dealer), outside), program)| {
                scope.spawn(move || -> Result<_> {
                    let session = PartySession {
                        party,
                        peer,
                        material: MaterialFrom::Dealer(dealer),
                        ahead: Some(STREAM_AHEAD),
                        outside,
                    };
                    let mut last = None;
                    let report = pool(threads)?.install(|| {
                        session.run(program, 1, |_, revealed| {
                            last = revealed;
                            Ok(())
                        })
                    })?;
                    Ok((report, last))
                })
            })
            .collect();
        results = running
            .into_iter()
            .map(|t| t.join().unwrap_or(Err(Error::Stopped("a thread"))))
            .collect();
        dealt = dealer.join().unwrap_or(Err(Error::Stopped("a thread")));
    });
    let results = results.into_iter().collect::<Result<Vec<_>>>()?;
    dealt?;
    let total = cost.total();
    for (i, (report, _)) in results.iter().enumerate() {
        let counted = [
            report.online_meter.rounds,
            report.online_meter.sent,
            report.dealer_bytes,
        ];
        let predicted = [total.rounds, total.online_bytes[i], total.dealer_bytes[i]];
        if counted != predicted {
            let detail = format!("rounds, bytes and dealer bytes were {counted:?}, predicted {predicted:?}");
            return Err(Error::program("bench", detail));
        }
    }
    let longest = |f: &dyn Fn(&session::Report) -> f64| results.iter().map(|r| f(&r.0)).fold(0.0, f64::max);
    Ok(Streamed {
        seconds: longest(&|r| r.online.as_secs_f64()),
        setup: longest(&|r| r.setup.as_secs_f64()),
        revealed: [results[0].1.clone(), results[1].1.clone()],
    })
}
