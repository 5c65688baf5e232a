//! An outside owner: it shares a parameter and inputs, takes outputs, and says when it is done.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use veiltune_engine::session::{self, MaterialFrom, PartySession, Program, Report};
use veiltune_engine::{Activation, Backend, Error, Outside, Owner, Party, Plain, Range, Result, Revealed};
use veiltune_ring::{Ring, codec};
use veiltune_wire::{Link, memory};

/// y = gelu(x W^T), W and x from outside, y to the outside.
#[derive(Clone, Default)]
struct Job {
    weight: Option<Vec<f32>>,
    inputs: Vec<Vec<f32>>,
}

const WEIGHT: [usize; 2] = [5, 8];
const INPUT: [usize; 2] = [3, 8];

impl Program for Job {
    type Model<B: Backend> = B::Weight;

    fn load<B: Backend>(&self, b: &B) -> Result<B::Weight> {
        b.weight(Owner::Shared, &WEIGHT, self.weight.as_deref())
    }

    fn paced(&self) -> bool {
        true
    }

    fn forward<B: Backend>(&self, b: &B, w: &B::Weight, index: usize) -> Result<Option<Revealed>> {
        let x = b.input(Owner::Shared, &INPUT, self.inputs.get(index).map(Vec::as_slice))?;
        let y = b.linear(&x, w, None)?;
        b.deliver(&b.activation(&y, Activation::Gelu, Range::Within(8.0))?)
    }
}

/// One party's end of the outside owner, in memory.
struct Owned {
    parameters: VecDeque<Ring>,
    inputs: VecDeque<Ring>,
    outputs: Arc<Mutex<Vec<Ring>>>,
}

impl Outside for Owned {
    fn parameter(&mut self, dims: &[usize]) -> Result<Ring> {
        self.parameters.input(dims)
    }

    fn input(&mut self, dims: &[usize]) -> Result<Ring> {
        self.inputs.input(dims)
    }

    fn output(&mut self, share: Ring) -> Result<()> {
        self.outputs.lock().unwrap().push(share);
        Ok(())
    }

    fn next(&mut self, done: usize) -> Result<Option<u8>> {
        // Pass 2 comes twice, if there is one.
        let pass = if done == 3 { 2 } else { done as u8 };
        Ok((!self.inputs.is_empty()).then_some(pass))
    }
}

fn values(seed: usize, n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 31 + seed * 17) % 23) as f32 / 11.5 - 1.0)
        .collect()
}

/// Runs `given` of at most `most` passes; the outputs' shares by party, the parties' reports, and how the dealer ended.
fn run(job: &Job, most: usize) -> ([Vec<Ring>; 2], [Report; 2], Result<()>) {
    let weight = session::share(&WEIGHT, job.weight.as_deref().unwrap()).unwrap();
    let inputs = job.inputs.iter().map(|v| session::share(&INPUT, v).unwrap());
    let (mut lists, outputs) = (
        [VecDeque::new(), VecDeque::new()],
        [Arc::default(), Arc::default()],
    );
    for shares in inputs {
        lists.iter_mut().zip(shares).for_each(|(l, s)| l.push_back(s));
    }
    let (a, b) = memory::pair();
    let (d0, p0) = memory::pair();
    let (d1, p1) = memory::pair();
    let ends = [(Party::P0, a, p0), (Party::P1, b, p1)];
    let (reports, dealt) = std::thread::scope(|scope| {
        let dealer = scope.spawn(|| {
            session::serve_material(&Job::default(), most, [Arc::new(d0), Arc::new(d1)], |_| Ok(()))
        });
        let mut parties = Vec::new();
        for (((party, peer, dealer), (weight, inputs)), outputs) in ends
            .into_iter()
            .zip(weight.into_iter().zip(lists))
            .zip(outputs.clone())
        {
            parties.push(scope.spawn(move || {
                let peer: Arc<dyn Link> = Arc::new(peer);
                let session = PartySession {
                    party,
                    peer,
                    material: MaterialFrom::Dealer(Arc::new(dealer)),
                    ahead: Some(4),
                    outside: Box::new(Owned {
                        parameters: [weight].into(),
                        inputs,
                        outputs,
                    }),
                };
                session.run(&Job::default(), most, |_, revealed| {
                    assert!(revealed.is_none(), "a party learnt an output");
                    Ok(())
                })
            }));
        }
        let reports: Vec<Report> = parties.into_iter().map(|p| p.join().unwrap().unwrap()).collect();
        (reports, dealer.join().unwrap())
    });
    let outputs = outputs.map(|o: Arc<Mutex<Vec<Ring>>>| o.lock().unwrap().clone());
    (outputs, [reports[0], reports[1]], dealt)
}

fn job(passes: usize) -> Job {
    Job {
        weight: Some(values(1, 40)),
        inputs: (0..passes).map(|i| values(2 + i, 24)).collect(),
    }
}

#[test]
fn outputs_are_the_owners_alone_and_it_may_stop_early() {
    let job = job(2);
    let ([first, second], reports, dealt) = run(&job, 5);
    dealt.expect("the dealer ends well");
    assert_eq!(first.len(), 2);
    let b = Plain::new();
    let w = job.load(&b).unwrap();
    for (i, (x, y)) in first.iter().zip(&second).enumerate() {
        let expected = job.forward(&b, &w, i).unwrap().unwrap().values;
        let sum = codec::decode(x.add(y).unwrap().as_slice(), 16);
        for (a, b) in sum.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-3, "{a} for {b}");
        }
        // Neither share alone is small: it says nothing.
        for share in [x, y] {
            let large = share
                .as_slice()
                .iter()
                .filter(|&&v| (v as i64).unsigned_abs() > 1 << 40);
            assert!(large.count() > 10);
        }
    }
    // What was predicted for the passes that ran is what was counted.
    let plan = session::plan(&Job::default(), 2).unwrap().tally;
    let total = plan.total();
    for (i, report) in reports.iter().enumerate() {
        assert_eq!(report.online_meter.rounds, total.rounds);
        assert_eq!(report.online_meter.sent, total.online_bytes[i]);
        assert_eq!(report.setup_meter.sent, plan.setup_bytes[i]);
        assert_eq!(report.dealer_bytes, total.dealer_bytes[i]);
    }
    assert_eq!(plan.outside.parameters, 8 * 40);
    assert_eq!(plan.outside.inputs, 2 * 8 * 24);
    assert_eq!(plan.outside.outputs, 2 * 8 * 15);
}

#[test]
fn all_passes_may_run() {
    let ([first, _], reports, dealt) = run(&job(4), 4);
    dealt.expect("the dealer ends well");
    assert_eq!(first.len(), 4);
    let total = session::plan(&Job::default(), 4).unwrap().tally.total();
    assert_eq!(reports[0].online_meter.rounds, total.rounds);
}

#[test]
fn a_share_of_another_shape_is_refused() {
    let mut shares = VecDeque::from([Ring::zeros([2, 2])]);
    assert!(matches!(
        Outside::input(&mut shares, &[4]),
        Err(Error::Program { .. })
    ));
}
