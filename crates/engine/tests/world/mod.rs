//! One verb as a program, and a session of it in one process over links that a test may wrap.
#![allow(dead_code, reason = "each test uses its part")]

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use veiltune_engine::gates::SCALE;
use veiltune_engine::material::{LinkSink, LinkSource, Sink};
use veiltune_engine::session::{self, MaterialFrom, PartySession, Program, Report};
use veiltune_engine::{
    Activation, Backend, Comparison, NormKind, NormSpec, Owner, Party, Range, Result, Revealed, SoftmaxSpec,
};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_ring::{Ring, codec};
use veiltune_wire::{Identity, Link, Options, memory};

/// Rows and columns of the input.
pub const DIMS: [usize; 2] = [8, 16];

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verb {
    /// x * x.
    Square,
    /// x times x transposed.
    MatMul,
    /// x times a weight `[32, 16]` of the second party.
    Linear,
    /// x^2 * x^2: one factor is truncated first.
    Fourth,
    Relu,
    /// max(x * x, 0): 32 fractional bits.
    ReluOfSquare,
    Argmax,
    Activation(Activation, Range),
    Softmax,
    /// Of scores in a range that is first narrowed.
    WideSoftmax,
    /// In two steps.
    WidestSoftmax,
    /// Softmax of x, times x transposed.
    Attend,
    Normalize(NormKind),
    /// Of x * x: 32 fractional bits, truncated.
    NormalizeOfSquare(NormKind),
    /// max(0.3 x * x, 0): 49 fractional bits, truncated on the comparison's opening.
    ReluOfFineSquare,
    /// A row of 49 fractional bits, truncated, times the weight.
    FineLinear,
    /// 0.3 x * x, of 49 fractional bits, truncated, times its transpose.
    TrimmedMatMul,
    /// Nothing but the reveal.
    Identity,
}

/// A verb on one input, its result revealed to the first party if `reveal`.
#[derive(Clone, Debug)]
pub struct Job {
    pub verb: Verb,
    pub owner: Owner,
    pub dims: Vec<usize>,
    pub comparison: Comparison,
    pub reveal: bool,
    /// Given at the input's owner.
    pub values: Option<Vec<f32>>,
    /// Given at the second party.
    pub weight: Option<Vec<f32>>,
}

impl Job {
    /// On a shared input of the usual shape.
    pub fn new(verb: Verb) -> Job {
        Job {
            verb,
            owner: Owner::Shared,
            dims: DIMS.to_vec(),
            comparison: Comparison::Fss,
            reveal: true,
            values: None,
            weight: None,
        }
    }

    pub fn of(self, owner: Owner) -> Job {
        Job { owner, ..self }
    }

    pub fn by(self, comparison: Comparison) -> Job {
        Job { comparison, ..self }
    }

    pub fn dims(self, dims: &[usize]) -> Job {
        Job {
            dims: dims.to_vec(),
            ..self
        }
    }

    pub fn unrevealed(self) -> Job {
        Job {
            reveal: false,
            ..self
        }
    }

    /// What each role runs when the input is `values`, with a weight of alternating sign. A shared input is split with
    /// a fixed seed.
    pub fn roles(&self, values: &[f32]) -> Roles {
        self.roles_with(values, &Seed::from_bytes([42; 16]))
    }

    /// As [`Job::roles`], splitting with `seed`.
    pub fn roles_with(&self, values: &[f32], seed: &Seed) -> Roles {
        let weight = (0..512).map(|i| if i % 3 == 0 { 0.25 } else { -0.125 }).collect();
        let party = |p: Party| Job {
            values: (self.owner == Owner::Party(p)).then(|| values.to_vec()),
            weight: (p == Party::P1).then(|| Vec::clone(&weight)),
            ..self.clone()
        };
        let mut shares = [VecDeque::new(), VecDeque::new()];
        if self.owner == Owner::Shared {
            let words = codec::encode(values.iter().map(|v| f64::from(*v)), SCALE).expect("small values");
            let first = Prg::new(seed, 0, 0).ring(self.dims.clone());
            let second = Ring::new(self.dims.clone(), words)
                .and_then(|x| x.sub(&first))
                .expect("values of the shape");
            shares
                .iter_mut()
                .zip([first, second])
                .for_each(|(list, part)| list.push_back(part));
        }
        Roles {
            dealer: self.clone(),
            parties: [party(Party::P0), party(Party::P1)],
            shares,
        }
    }
}

fn norm(kind: NormKind) -> NormSpec {
    NormSpec {
        kind,
        eps: 1e-6,
        sigma: (0.25, 4.0),
    }
}

impl Program for Job {
    type Model<B: Backend> = B::Weight;

    fn comparison(&self) -> Comparison {
        self.comparison
    }

    fn load<B: Backend>(&self, b: &B) -> Result<B::Weight> {
        b.weight(Owner::Party(Party::P1), &[32, 16], self.weight.as_deref())
    }

    fn forward<B: Backend>(&self, b: &B, w: &B::Weight, _: usize) -> Result<Option<Revealed>> {
        let x = b.input(self.owner, &self.dims, self.values.as_deref())?;
        let y = match self.verb {
            Verb::Square => b.mul(&x, &x)?,
            Verb::MatMul => {
                b.prepare(&[&x])?;
                b.matmul(&x, &b.transpose(&x, 0, 1)?)?
            }
            Verb::Linear => b.linear(&x, w, None)?,
            Verb::Fourth => b.mul(&b.mul(&x, &x)?, &b.mul(&x, &x)?)?,
            Verb::Relu => b.relu(&x)?,
            Verb::ReluOfSquare => b.relu(&b.mul(&x, &x)?)?,
            Verb::Argmax => b.argmax(&x)?,
            Verb::Activation(f, range) => b.activation(&x, f, range)?,
            Verb::Softmax => b.softmax(&x, &SoftmaxSpec { bound: 15.0 })?,
            Verb::WideSoftmax => b.softmax(&x, &SoftmaxSpec { bound: 90.0 })?,
            Verb::WidestSoftmax => b.softmax(&x, &SoftmaxSpec { bound: 900.0 })?,
            Verb::Attend => b.attend(&x, &b.transpose(&x, 0, 1)?, &SoftmaxSpec { bound: 15.0 })?,
            Verb::Normalize(kind) => b.normalize(&x, &norm(kind))?,
            Verb::NormalizeOfSquare(kind) => b.normalize(&b.mul(&x, &x)?, &norm(kind))?,
            Verb::ReluOfFineSquare => b.relu(&b.mul(&b.scale(&x, 0.3)?, &x)?)?,
            Verb::FineLinear => b.linear(&b.mul(&b.scale(&x, 0.3)?, &x)?, w, None)?,
            Verb::TrimmedMatMul => {
                let y = b.trim(&b.mul(&b.scale(&x, 0.3)?, &x)?)?;
                b.prepare(&[&y])?;
                b.matmul(&y, &b.transpose(&y, 0, 1)?)?
            }
            Verb::Identity => x,
        };
        if self.reveal {
            b.reveal(&y, Party::P0)
        } else {
            Ok(None)
        }
    }
}

/// The three roles' own views of one program.
pub struct Roles<P = Job> {
    pub dealer: P,
    pub parties: [P; 2],
    pub shares: [VecDeque<Ring>; 2],
}

/// The two ends of the three links. The name is that of the role that holds the end.
pub struct Ends {
    /// Each party's end of the link between them.
    pub peers: [Arc<dyn Link>; 2],
    /// The dealer's ends.
    pub dealer: [Arc<dyn Link>; 2],
    /// Each party's end of its link to the dealer.
    pub to_dealer: [Arc<dyn Link>; 2],
}

impl Ends {
    /// In memory; a silent peer is given up after `patience`.
    pub fn new(patience: Duration) -> Ends {
        let options = Options {
            patience,
            ..Options::default()
        };
        let [dealer, p0, p1] = ["dealer", "p0", "p1"].map(|name| Identity::new(name).expect("a good name"));
        let pair = |a: &Identity, b: &Identity| {
            let (a, b) = memory::pair_with(a, b, &options);
            (Arc::new(a) as Arc<dyn Link>, Arc::new(b) as Arc<dyn Link>)
        };
        let ((a, b), (d0, e0), (d1, e1)) = (pair(&p0, &p1), pair(&dealer, &p0), pair(&dealer, &p1));
        Ends {
            peers: [a, b],
            dealer: [d0, d1],
            to_dealer: [e0, e1],
        }
    }
}

/// How each role ended.
pub struct Outcome {
    pub dealer: Result<()>,
    pub parties: [Result<(Vec<Option<Revealed>>, Report)>; 2],
    /// Until the last of them ended.
    pub elapsed: Duration,
}

impl Outcome {
    /// All went well: what each party learnt and measured.
    pub fn unwrap(self) -> [(Vec<Option<Revealed>>, Report); 2] {
        self.dealer.expect("the dealer");
        self.parties.map(|p| p.expect("a party"))
    }
}

/// A panic in any role, or one that has not ended by then, fails the test.
const HANG: Duration = Duration::from_secs(30);

/// Runs the three roles. With `seeds`, the dealer uses these; else it draws them and sends them to the parties.
pub fn run<P: Program + Send + 'static>(
    roles: Roles<P>,
    ends: Ends,
    passes: usize,
    seeds: Option<[Seed; 2]>,
) -> Outcome {
    enum Ended {
        Dealer(Result<()>),
        Party(usize, Result<(Vec<Option<Revealed>>, Report)>),
    }
    let (tx, rx) = mpsc::channel();
    let spawn = |role: Box<dyn FnOnce() -> Ended + Send>| {
        let tx = tx.clone();
        // If nobody listens any more, the test has failed already.
        std::thread::spawn(move || drop(tx.send(catch_unwind(AssertUnwindSafe(role)))));
    };
    let start = Instant::now();
    let Roles {
        dealer,
        parties,
        shares,
    } = roles;
    let Ends {
        peers,
        dealer: dealer_links,
        to_dealer,
    } = ends;
    spawn({
        let seeds = seeds.clone();
        Box::new(move || {
            Ended::Dealer(match seeds {
                None => session::serve_material(&dealer, passes, dealer_links, |_| Ok(())),
                Some(seeds) => {
                    let sinks = dealer_links.map(|l| Box::new(LinkSink::new(l)) as Box<dyn Sink>);
                    session::deal(&dealer, passes, seeds, sinks, |_| Ok(()))
                }
            })
        })
    });
    for ((((index, program), peer), link), shares) in parties
        .into_iter()
        .enumerate()
        .zip(peers)
        .zip(to_dealer)
        .zip(shares)
    {
        let material = match &seeds {
            None => MaterialFrom::Dealer(link),
            Some(seeds) => MaterialFrom::Source(Box::new(LinkSource(link)), seeds[index].clone()),
        };
        let party = [Party::P0, Party::P1][index];
        let session = PartySession {
            party,
            peer,
            material,
            ahead: Some(2),
            outside: Box::new(shares),
        };
        spawn(Box::new(move || {
            let mut outputs = Vec::new();
            let result = session.run(&program, passes, |_, output| {
                outputs.push(output);
                Ok(())
            });
            Ended::Party(index, result.map(|report| (outputs, report)))
        }));
    }
    let (mut dealer, mut ended) = (None, [None, None]);
    for _ in 0..3 {
        match rx.recv_timeout(HANG).expect("a role hangs") {
            Ok(Ended::Dealer(result)) => dealer = Some(result),
            Ok(Ended::Party(index, result)) => ended[index] = Some(result),
            Err(_) => panic!("a role panicked"),
        }
    }
    let elapsed = start.elapsed();
    let parties = ended.map(|p| p.expect("each party ended"));
    Outcome {
        dealer: dealer.expect("the dealer ended"),
        parties,
        elapsed,
    }
}
