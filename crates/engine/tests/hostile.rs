//! Peers and dealers that misbehave: whoever sees it says what, the others end promptly, nobody panics or hangs.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use veiltune_engine::session::Program;
use veiltune_engine::{Activation, Backend, Comparison, Error, Owner, Party, Range, Result, Revealed};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_wire::fault::{Fault, Faulty};
use veiltune_wire::{Error as Wire, Identity, Link, Meter};
use world::{Ends, Job, Outcome, Roles, Verb, run};

/// How long a silent peer is waited for where silence is tested, and elsewhere.
const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(25);
/// How soon all must have ended, on a machine under load.
const PROMPT: Duration = Duration::from_secs(8);

/// Faults after which the receiver cannot go on.
const FATAL: [Fault; 5] = [
    Fault::Truncate,
    Fault::Extend,
    Fault::Drop,
    Fault::Abort,
    Fault::Close,
];

/// A program with every kind of message and material: openings, narrow openings, bits, keys, corrections.
fn jobs() -> Vec<Job> {
    vec![
        Job::new(Verb::Linear).of(Owner::Party(Party::P0)),
        Job::new(Verb::Argmax).by(Comparison::MaskedBits),
        Job::new(Verb::Activation(Activation::Gelu, Range::Guarded(6.4))),
        Job::new(Verb::Softmax),
        Job::new(Verb::Attend),
    ]
}

fn roles(job: &Job) -> Roles {
    job.roles(
        &(0..128)
            .map(|i| (i as f32 * 0.37).sin() * 3.0)
            .collect::<Vec<_>>(),
    )
}

/// The one end that misbehaves.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    Peer(usize),
    Dealer(usize),
}

impl Who {
    fn end(self, ends: &mut Ends) -> &mut Arc<dyn Link> {
        match self {
            Who::Peer(i) => &mut ends.peers[i],
            Who::Dealer(i) => &mut ends.dealer[i],
        }
    }

    /// The party that receives what it sends.
    fn victim(self) -> usize {
        match self {
            Who::Peer(i) => 1 - i,
            Who::Dealer(i) => i,
        }
    }
}

const ALL: [Who; 4] = [Who::Peer(0), Who::Peer(1), Who::Dealer(0), Who::Dealer(1)];

/// Runs with one end wrapped.
fn wrapped(
    job: &Job,
    who: Who,
    patience: Duration,
    wrap: impl FnOnce(Arc<dyn Link>) -> Arc<dyn Link>,
) -> Outcome {
    let mut ends = Ends::new(patience);
    let end = who.end(&mut ends);
    *end = wrap(end.clone());
    // Whoever runs a session may hold its links beyond it; nobody must rely on their being dropped.
    let _held = (ends.peers.clone(), ends.dealer.clone(), ends.to_dealer.clone());
    run(roles(job), ends, 1, None)
}

/// Passes everything on, and counts the messages sent.
struct Counting(Arc<dyn Link>, Arc<AtomicU64>);

/// Sends noise of the right length from message `from` on.
struct Garbage(Arc<dyn Link>, u64, AtomicU64);

macro_rules! pass_on {
    ($kind:ty, $send:expr) => {
        impl Link for $kind {
            fn send(&self, bytes: Vec<u8>) -> veiltune_wire::Result<()> {
                $send(self, bytes)
            }
            fn recv(&self, buf: &mut [u8]) -> veiltune_wire::Result<()> {
                self.0.recv(buf)
            }
            fn flush(&self) -> veiltune_wire::Result<()> {
                self.0.flush()
            }
            fn abort(&self, reason: &str) {
                self.0.abort(reason);
            }
            fn close(&self) -> veiltune_wire::Result<()> {
                self.0.close()
            }
            fn meter(&self) -> Meter {
                self.0.meter()
            }
            fn round(&self) {
                self.0.round();
            }
            fn peer(&self) -> &Identity {
                self.0.peer()
            }
        }
    };
}

pass_on!(Counting, |link: &Counting, bytes| {
    link.1.fetch_add(1, Relaxed);
    link.0.send(bytes)
});

pass_on!(Garbage, |link: &Garbage, mut bytes: Vec<u8>| {
    let index = link.2.fetch_add(1, Relaxed);
    if index >= link.1 {
        Prg::new(&Seed::from_bytes([9; 16]), index, 0).fill_bytes(&mut bytes);
    }
    link.0.send(bytes)
});

/// Messages that an end sends in a good run.
fn messages(job: &Job, who: Who) -> u64 {
    let count = Arc::new(AtomicU64::new(0));
    wrapped(job, who, LONG, |link| Arc::new(Counting(link, count.clone()))).unwrap();
    count.load(Relaxed)
}

/// The victim's error is the right one, everybody ends, nobody late.
fn check(outcome: &Outcome, who: Who, fault: Fault, context: &str) {
    let victim = &outcome.parties[who.victim()];
    let error = match victim {
        Err(e) => e,
        Ok(_) => panic!("{context}: the victim noticed nothing"),
    };
    let right = match (fault, error) {
        (Fault::Truncate | Fault::Extend, Error::Wire(Wire::WrongLength { expected, got, .. })) => {
            expected != got
        }
        // The next message, of another length, or the end of the link may come before patience ends.
        (Fault::Drop, Error::Wire(Wire::Silent { .. } | Wire::WrongLength { .. })) => true,
        // The news may come by way of another role, too.
        (
            Fault::Drop | Fault::Abort | Fault::Close,
            Error::Wire(Wire::PeerAborted { .. } | Wire::PeerGone { .. }),
        ) => true,
        _ => false,
    };
    assert!(right, "{context}: {error:?}");
    // Who did not see the fault hears of it, unless it had ended well before.
    for other in [
        outcome.parties[1 - who.victim()].as_ref().err(),
        outcome.dealer.as_ref().err(),
    ]
    .into_iter()
    .flatten()
    {
        let told = matches!(
            other,
            Error::Wire(
                Wire::PeerAborted { .. }
                    | Wire::PeerGone { .. }
                    | Wire::Silent { .. }
                    | Wire::Aborted { .. }
                    | Wire::Closed { .. }
            )
        );
        assert!(told, "{context}: {other:?}");
    }
    assert!(
        outcome.elapsed < PROMPT,
        "{context}: ended after {:?}",
        outcome.elapsed
    );
}

fn injected(job: &Job, who: Who, fault: Fault, index: u64) -> Outcome {
    let patience = if fault == Fault::Drop { SHORT } else { LONG };
    wrapped(job, who, patience, |link| {
        Arc::new(Faulty::new(link, fault, index))
    })
}

#[test]
fn any_message_of_anybody_may_go_wrong() {
    for job in jobs() {
        for who in ALL {
            let messages = messages(&job, who);
            for index in 0..messages {
                // A silence takes its time: the first, one in the middle, the last.
                let silence = [0, messages / 2, messages - 1].contains(&index);
                for fault in FATAL.into_iter().filter(|f| *f != Fault::Drop || silence) {
                    let outcome = injected(&job, who, fault, index);
                    let context = format!(
                        "{:?}: {who:?} {fault:?} at message {index} of {messages}",
                        job.verb
                    );
                    check(&outcome, who, fault, &context);
                }
            }
        }
    }
}

#[test]
fn garbage_of_the_right_length_gives_a_wrong_result_at_worst() {
    for job in jobs() {
        for who in ALL {
            // The dealer's first message is the seed: noise is as good there as any.
            for start in [0, 1, 2, 5, 9] {
                let noise = |link| Arc::new(Garbage(link, start, AtomicU64::new(0))) as Arc<dyn Link>;
                let outcome = wrapped(&job, who, LONG, noise);
                // The name of the deal is the one message whose content is compared.
                let refused = |e: &Error| e.to_string().contains("another deal");
                if !outcome.parties.iter().any(|p| p.as_ref().is_err_and(refused)) {
                    outcome.unwrap();
                }
            }
            for fault in [Fault::Corrupt, Fault::Duplicate] {
                for index in 0..messages(&job, who) {
                    // A message too many is either of the wrong length, or as good as garbage.
                    let outcome = injected(&job, who, fault, index);
                    assert!(
                        outcome.elapsed < PROMPT,
                        "{:?}: {who:?} {fault:?} at message {index}",
                        job.verb
                    );
                }
            }
        }
    }
}

#[test]
fn a_role_that_runs_another_program_is_found_out() {
    let job = Job::new(Verb::Relu);
    for (index, other) in [
        job.clone().dims(&[8, 15]),
        Job::new(Verb::Softmax),
        Job::new(Verb::Attend),
        job.clone().by(Comparison::MaskedBits),
    ]
    .into_iter()
    .enumerate()
    {
        for who in 0..3 {
            let (mut mixed, alien) = (roles(&job), other.roles(&vec![0.5; other.dims.iter().product()]));
            let Roles {
                dealer,
                parties: [p0, p1],
                shares: [s0, s1],
            } = alien;
            match who {
                0 => mixed.dealer = dealer,
                1 => (mixed.parties[0], mixed.shares[0]) = (p0, s0),
                _ => (mixed.parties[1], mixed.shares[1]) = (p1, s1),
            }
            let outcome = run(mixed, Ends::new(LONG), 1, None);
            // Messages of other lengths, or a dealer that is done where more is due; who hears of it second is told.
            let errors = outcome
                .parties
                .each_ref()
                .map(|p| p.as_ref().expect_err("both parties fail"));
            let found =
                |e: &&Error| matches!(e, Error::Wire(Wire::WrongLength { .. } | Wire::PeerGone { .. }));
            assert!(errors.iter().any(found), "program {index} at {who}: {errors:?}");
            assert!(outcome.elapsed < PROMPT);
        }
    }
}

#[test]
fn a_dealer_that_makes_less_than_is_run_is_gone() {
    struct Fewer(Job, usize);
    impl Program for Fewer {
        type Model<B: Backend> = B::Weight;
        fn load<B: Backend>(&self, b: &B) -> Result<B::Weight> {
            self.0.load(b)
        }
        fn forward<B: Backend>(&self, b: &B, w: &B::Weight, index: usize) -> Result<Option<Revealed>> {
            if index >= self.1 {
                Ok(None)
            } else {
                self.0.forward(b, w, index)
            }
        }
    }
    let job = Job::new(Verb::Relu);
    let input = |who| roles(&job.clone().of(Owner::Party(who)));
    let Roles {
        dealer,
        parties: [p0, p1],
        shares,
    } = input(Party::P0);
    let mixed = Roles {
        dealer: Fewer(dealer, 2),
        parties: [Fewer(p0, 3), Fewer(p1, 3)],
        shares,
    };
    let outcome = run(mixed, Ends::new(LONG), 3, None);
    for party in &outcome.parties {
        let told = matches!(
            party,
            Err(Error::Wire(Wire::PeerGone { .. } | Wire::PeerAborted { .. }))
        );
        assert!(told, "{:?}", party.as_ref().err());
    }
    assert!(outcome.elapsed < PROMPT);
}

#[test]
fn material_for_another_gate_is_refused() {
    /// Against the rule, its two walks at a party differ: the second takes another way.
    struct Fickle(Job, AtomicUsize);
    impl Program for Fickle {
        type Model<B: Backend> = B::Weight;
        fn load<B: Backend>(&self, b: &B) -> Result<B::Weight> {
            self.0.load(b)
        }
        fn forward<B: Backend>(&self, b: &B, w: &B::Weight, index: usize) -> Result<Option<Revealed>> {
            let way = self.1.fetch_add(1, Relaxed) % 2;
            let x = b.input(self.0.owner, &self.0.dims, self.0.values.as_deref())?;
            if way == 1 {
                // One more opening, so that gates are numbered otherwise.
                b.prepare(&[&x])?;
            }
            self.0.forward(b, w, index)
        }
    }
    let Roles {
        dealer,
        parties: [p0, p1],
        shares,
    } = roles(&Job::new(Verb::Square).of(Owner::Party(Party::P0)));
    let fickle = |job| Fickle(job, AtomicUsize::new(0));
    let mixed = Roles {
        dealer: fickle(dealer),
        parties: [fickle(p0), fickle(p1)],
        shares,
    };
    let outcome = run(mixed, Ends::new(LONG), 1, None);
    let errors: Vec<String> = outcome
        .parties
        .iter()
        .filter_map(|p| p.as_ref().err())
        .map(ToString::to_string)
        .collect();
    assert!(
        errors.iter().any(|e| e.contains("material of gate")),
        "{errors:?}"
    );
    assert!(outcome.elapsed < PROMPT);
}
