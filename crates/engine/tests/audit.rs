//! What a party sees does not depend on what it must not learn: the transcripts of real runs, audited.
//!
//! Under the same randomness, another input changes no length, no count and nothing that the dealer sends. Under
//! different randomness, whatever a party receives from its peer is uniform, for each input alike, hence independent of
//! it: alone, together with any other message that it receives (a mask that serves twice would show), with what it sent
//! itself (the sum is what is opened), and with its own randomness. All seeds are fixed, so that a verdict never changes by chance; controls show that the same
//! tests find the classic faults.

mod world;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use veiltune_engine::{Activation, Comparison, NormKind, Owner, Party, Range};
use veiltune_ring::pack;
use veiltune_ring::prg::{Prg, Seed};
use veiltune_wire::{Identity, Link, Meter};
use world::{Ends, Job, Verb, run};

const DIMS: [usize; 2] = [32, 32];
const LEN: usize = DIMS[0] * DIMS[1];
/// Sessions a sample.
const SESSIONS: u8 = 4;
/// Standard deviations that count as a deviation. The tests of a run are some 10^5.
const LIMIT: f64 = 6.5;
/// Widths of the values that are opened, or near them.
const WIDTHS: [u32; 7] = [1, 8, 16, 20, 21, 22, 64];

/// The same message of each session.
type Sample = Vec<Vec<u8>>;

type Messages = Arc<Mutex<Vec<Vec<u8>>>>;

/// Keeps a copy of every message received, and of every message sent.
struct Tape(Arc<dyn Link>, [Messages; 2]);

impl Link for Tape {
    fn recv(&self, buf: &mut [u8]) -> veiltune_wire::Result<()> {
        self.0.recv(buf)?;
        self.1[0].lock().expect("no panic").push(buf.to_vec());
        Ok(())
    }
    fn send(&self, bytes: Vec<u8>) -> veiltune_wire::Result<()> {
        self.1[1].lock().expect("no panic").push(bytes.clone());
        self.0.send(bytes)
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

/// What one party received in a session, and what it sent to its peer.
struct View {
    peer: Vec<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    dealer: Vec<Vec<u8>>,
    rounds: u64,
}

impl View {
    fn lengths(&self) -> (Vec<usize>, u64) {
        (
            self.peer.iter().chain(&self.sent).map(Vec::len).collect(),
            self.rounds,
        )
    }
}

fn seeds(session: u8) -> [Seed; 2] {
    [
        Seed::from_bytes([session + 1; 16]),
        Seed::from_bytes([session + 101; 16]),
    ]
}

/// Both parties' views of session number `session`.
fn views(job: &Job, values: &[f32], session: u8) -> [View; 2] {
    let mut ends = Ends::new(Duration::from_secs(60));
    let tape = |link: &mut Arc<dyn Link>| {
        let tape = [Messages::default(), Messages::default()];
        *link = Arc::new(Tape(link.clone(), tape.clone()));
        tape
    };
    let peers = ends.peers.each_mut().map(tape);
    let dealers = ends.to_dealer.each_mut().map(tape);
    let roles = job.roles_with(values, &Seed::from_bytes([session + 201; 16]));
    let reports = run(roles, ends, 1, Some(seeds(session))).unwrap();
    let take = |tape: &Messages| std::mem::take(&mut *tape.lock().expect("no panic"));
    [0, 1].map(|i| View {
        peer: take(&peers[i][0]),
        sent: take(&peers[i][1]),
        dealer: take(&dealers[i][0]),
        rounds: reports[i].1.online_meter.rounds,
    })
}

/// Each kind of message: wide and narrow openings, bits, asymmetric products, the coarse maximum, reveals.
fn jobs() -> Vec<Job> {
    let verbs = [
        Verb::Square,
        Verb::Fourth,
        Verb::MatMul,
        Verb::Relu,
        Verb::Argmax,
        Verb::Activation(Activation::Gelu, Range::Within(6.4)),
        Verb::Activation(Activation::Tanh, Range::Guarded(6.0)),
        Verb::Softmax,
        Verb::WideSoftmax,
        Verb::WidestSoftmax,
        Verb::Attend,
        Verb::Normalize(NormKind::Layer),
        Verb::NormalizeOfSquare(NormKind::Layer),
        Verb::ReluOfFineSquare,
        Verb::TrimmedMatMul,
        Verb::Identity,
    ];
    let shared = verbs.into_iter().map(|verb| Job::new(verb).dims(&DIMS));
    let bits = [Verb::Relu, Verb::ReluOfSquare, Verb::Argmax];
    let bits = bits
        .into_iter()
        .map(|verb| Job::new(verb).dims(&DIMS).by(Comparison::MaskedBits));
    let owned = [Party::P0, Party::P1].into_iter().flat_map(|p| {
        let linear = Job::new(Verb::Linear).dims(&[64, 16]);
        let fine = Job::new(Verb::FineLinear).dims(&[64, 16]);
        let gelu = Job::new(Verb::Activation(Activation::Gelu, Range::Within(6.4))).dims(&DIMS);
        [
            linear.of(Owner::Party(p)),
            gelu.of(Owner::Party(p)),
            fine.of(Owner::Party(p)),
        ]
    });
    shared.chain(bits).chain(owned).collect()
}

/// All equal, the extremes, and a wave; within the range of every job.
fn inputs() -> [Vec<f32>; 3] {
    let wave = (0..LEN).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
    [
        vec![1.0; LEN],
        (0..LEN).map(|i| if i % 2 == 0 { -3.9 } else { 3.9 }).collect(),
        wave,
    ]
}

#[test]
fn with_the_same_randomness_no_shape_depends_on_the_input() {
    for job in jobs() {
        let runs = inputs().map(|values| views(&job, &values, 0));
        for run in &runs[1..] {
            for (party, view) in run.iter().enumerate() {
                assert_eq!(view.lengths(), runs[0][party].lengths(), "{job:?}, party {party}");
                assert!(
                    view.dealer == runs[0][party].dealer,
                    "{job:?}, party {party}: what the dealer sends"
                );
            }
        }
        // The transcript is what the input is hidden in: it does depend on it.
        let public = job.owner == Owner::Party(Party::P1) && job.verb == Verb::Linear;
        let differs = (0..2).any(|party| runs[1][party].peer != runs[0][party].peer);
        assert!(differs || public, "{job:?}: the run ignores its input");
    }
}

#[test]
fn with_different_randomness_what_a_peer_sends_is_uniform() {
    for job in jobs() {
        for (index, values) in inputs().iter().enumerate() {
            let sessions: Vec<[View; 2]> = (0..SESSIONS).map(|s| views(&job, values, s)).collect();
            for party in 0..2 {
                let context = format!(
                    "{:?} {:?} {:?}, input {index}, party {party}",
                    job.verb, job.owner, job.comparison
                );
                let views: Vec<&View> = sessions.iter().map(|s| &s[party]).collect();
                audit(&context, &views, party);
            }
        }
    }
}

fn audit(context: &str, views: &[&View], party: usize) {
    // Message i of every session.
    let of = |part: fn(&View) -> &Vec<Vec<u8>>| -> Vec<Sample> {
        (0..part(views[0]).len())
            .map(|i| views.iter().map(|v| part(v)[i].clone()).collect())
            .collect()
    };
    // Both tell each other which deal the online phase starts with; it has no name where a dealer streams.
    let starts = |m: &Sample| m.iter().all(|m| *m == [0; 16]);
    let (mut peer, mut sent, dealer) = (of(|v| &v.peer), of(|v| &v.sent), of(|v| &v.dealer));
    let before = peer.len();
    peer.retain(|m| !starts(m));
    sent.retain(|m| !starts(m));
    assert_eq!(before, peer.len() + 1, "{context}");

    let verdict = |z: f64, what: String| assert!(z < LIMIT, "{context}: {what} ({z:.1})");
    for (i, message) in peer.iter().enumerate() {
        verdict(deviation(message), format!("message {i} is not uniform"));
        for (j, other) in peer[..i].iter().chain(&dealer).enumerate() {
            verdict(
                joint_deviation(message, other),
                format!("message {i} tells something together with message {j}"),
            );
        }
        for gate in 0..24 {
            let own: Sample = (0..SESSIONS)
                .zip(message)
                .map(|(s, m)| own_mask(&seeds(s)[party], gate, m.len()))
                .collect();
            verdict(
                joint_deviation(message, &own),
                format!("message {i} tells something with the party's own mask {gate}"),
            );
        }
    }

    // What was opened: the sums of messages that crossed, in whatever group; and any two of them.
    let mut openings: Vec<(Sample, Sample)> = Vec::new();
    for message in peer {
        let crossed = sent
            .iter()
            .position(|m| m.iter().zip(&message).all(|(a, b)| a.len() == b.len()));
        if let Some(crossed) = crossed {
            openings.push((message, sent.remove(crossed)));
        }
    }
    for (i, (a, b)) in openings.iter().enumerate() {
        verdict(
            WIDTHS
                .map(|w| deviation(&sum(a, b, w)))
                .into_iter()
                .fold(0.0, f64::max),
            format!("opening {i} shows something"),
        );
        for (j, (c, d)) in openings[..i].iter().enumerate() {
            for width in [1, 64] {
                let z = joint_deviation(&sum(a, b, width), &sum(c, d, width));
                verdict(z, format!("openings {i} and {j} show something together"));
            }
            verdict(
                correlation((a, b), (c, d)),
                format!("elements of openings {i} and {j} depend on each other"),
            );
        }
    }
}

fn own_mask(seed: &Seed, gate: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Prg::new(seed, gate, 0).fill_bytes(&mut bytes);
    bytes
}

/// The worst of several tests of uniformity, in standard deviations: those of [`words`], and each bit's position in words
/// of the widths that narrow openings have.
fn deviation(sample: &Sample) -> f64 {
    let narrow = [20, 21, 22].map(|width| {
        let (mut ones, mut all) = (vec![0u32; width], vec![0u32; width]);
        for message in sample {
            for (bit, position) in (0..8 * message.len()).zip((0..width).cycle()) {
                ones[position] += u32::from(message[bit / 8] >> (bit % 8) & 1);
                all[position] += 1;
            }
        }
        ones.into_iter()
            .zip(all)
            .map(|(ones, all)| balance(ones, all))
            .fold(0.0, f64::max)
    });
    narrow.into_iter().fold(words(sample), f64::max)
}

/// Tests of bytes (halves of them where there are few), of all bits together, and of each bit's position in a byte and in
/// a word of 64 bits.
fn words(sample: &Sample) -> f64 {
    let mut counts = vec![[0u32; 256]; 8];
    for message in sample {
        for (byte, place) in message.iter().zip((0..8).cycle()) {
            counts[place][*byte as usize] += 1;
        }
    }
    let bytes: Vec<u32> = (0..256)
        .map(|value| counts.iter().map(|c| c[value]).sum())
        .collect();
    let total: u32 = bytes.iter().sum();
    let mut worst = 0f64;
    if total >= 5 * 256 {
        worst = chi_square(&bytes);
    } else if total >= 5 * 8 {
        let half = |v: usize| (0..16).map(|o| bytes[16 * v + o] + bytes[16 * o + v]).sum();
        worst = chi_square(&(0..16).map(half).collect::<Vec<u32>>());
    }
    let ones = |counts: &[u32], bit: usize| {
        (0..256)
            .filter(|v| v >> bit & 1 == 1)
            .map(|v| counts[v])
            .sum::<u32>()
    };
    for bit in 0..8 {
        worst = worst.max(balance(ones(&bytes, bit), total));
        for counts in &counts {
            worst = worst.max(balance(ones(counts, bit), counts.iter().sum()));
        }
    }
    worst.max(balance((0..8).map(|bit| ones(&bytes, bit)).sum(), 8 * total))
}

/// How far `ones` of `all` bits are from half, in standard deviations; few bits say nothing.
fn balance(ones: u32, all: u32) -> f64 {
    if all < 64 {
        return 0.0;
    }
    let (ones, all) = (f64::from(ones), f64::from(all));
    (ones - all / 2.0).abs() / (all / 4.0).sqrt()
}

/// As [`words`], of the differences and the exclusive or, as words of 64 bits, as far as both messages reach.
fn joint_deviation(a: &Sample, b: &Sample) -> f64 {
    let combine = |word: fn(u64, u64) -> u64| {
        let split = |bytes: &[u8]| -> Vec<u64> {
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|w| u64::from_le_bytes(*w))
                .collect()
        };
        let pair = |(a, b): (&Vec<u8>, &Vec<u8>)| {
            split(a)
                .into_iter()
                .zip(split(b))
                .flat_map(|(a, b)| word(a, b).to_le_bytes())
                .collect()
        };
        words(&a.iter().zip(b).map(pair).collect())
    };
    combine(|a, b| a ^ b).max(combine(u64::wrapping_sub))
}

/// The sums modulo 2^`width` of packed values; a rest that is no whole value is left out.
fn sum(a: &Sample, b: &Sample, width: u32) -> Sample {
    let add = |(a, b): (&Vec<u8>, &Vec<u8>)| {
        let words = unpacked(a, width)
            .into_iter()
            .zip(unpacked(b, width))
            .map(|(a, b)| a.wrapping_add(b));
        let mut bytes = pack::pack(&words.collect::<Vec<u64>>(), width);
        bytes.truncate(8 * a.len() / width as usize * width as usize / 8);
        bytes
    };
    a.iter().zip(b).map(add).collect()
}

fn unpacked(bytes: &[u8], width: u32) -> Vec<u64> {
    let len = 8 * bytes.len() / width as usize;
    let mut words = vec![0; len];
    pack::unpack(&bytes[..pack::packed_len(len, width)], width, &mut words);
    words
}

/// The strongest correlation of a bit of a narrow opening with a bit of another one of as many elements, element by
/// element. (The bit that a comparison opens against the masked value would be one.)
fn correlation(a: (&Sample, &Sample), b: (&Sample, &Sample)) -> f64 {
    let width = |s: &Sample| {
        (8 * s[0].len())
            .is_multiple_of(LEN)
            .then_some((8 * s[0].len() / LEN) as u32)
            .filter(|w| (1..=64).contains(w))
    };
    let (Some(wa), Some(wb)) = (width(a.0), width(b.0)) else {
        return 0.0;
    };
    if wa.min(wb) > 2 {
        return 0.0;
    }
    let values = |(x, y): (&Sample, &Sample), w: u32| -> Vec<u64> {
        sum(x, y, w).iter().flat_map(|m| unpacked(m, w)).collect()
    };
    let (x, y) = (values(a, wa), values(b, wb));
    let mut worst = 0f64;
    for i in 0..wa {
        for j in 0..wb {
            let odd = x.iter().zip(&y).map(|(x, y)| (x >> i ^ y >> j) as u32 & 1).sum();
            worst = worst.max(balance(odd, x.len() as u32));
        }
    }
    worst
}

/// Chi-square of equal counts, as standard deviations (Wilson and Hilferty).
fn chi_square(counts: &[u32]) -> f64 {
    let expected = f64::from(counts.iter().sum::<u32>()) / counts.len() as f64;
    let chi: f64 = counts
        .iter()
        .map(|c| (f64::from(*c) - expected).powi(2) / expected)
        .sum();
    let (freedom, third) = (counts.len() as f64 - 1.0, 1.0 / 3.0);
    let spread = 2.0 / (9.0 * freedom);
    ((chi / freedom).powf(third) - (1.0 - spread)) / spread.sqrt()
}

// ---- controls: faults that the tests above would find ----

/// Masked values of a sample: `mask(session, element)` added to each element of the input.
fn opened(values: &[f32], bits: u32, mask: impl Fn(u8, usize) -> u64) -> Sample {
    let open = |s| {
        let words: Vec<u64> = values
            .iter()
            .enumerate()
            .map(|(i, v)| ((f64::from(*v) * 65536.0).round() as i64 as u64).wrapping_add(mask(s, i)))
            .collect();
        pack::pack(&words, bits)
    };
    (0..SESSIONS).map(open).collect()
}

fn uniform_masks(slot: u16, bits: u32) -> Vec<Vec<u64>> {
    (0..SESSIONS)
        .map(|s| Prg::new(&seeds(s)[0], 77, slot).bits(LEN, bits))
        .collect()
}

#[test]
fn a_good_mask_passes_the_controls() {
    for bits in [20, 64] {
        let masks = uniform_masks(0, bits);
        for values in inputs() {
            let sample = opened(&values, bits, |s, i| masks[s as usize][i]);
            assert!(deviation(&sample) < LIMIT);
        }
    }
}

#[test]
fn a_mask_shorter_than_its_modulus_is_found() {
    // One period of 2^20, opened in the full ring, as published code does; and only one bit too short.
    for modulus in [64, 21] {
        let masks = uniform_masks(0, 20);
        for values in inputs() {
            let sample = opened(&values, modulus, |s, i| masks[s as usize][i]);
            assert!(deviation(&sample) > 2.0 * LIMIT, "modulus of {modulus} bits");
        }
    }
}

#[test]
fn a_slightly_biased_mask_is_found() {
    // Every eighth element has its lowest mask bit clear.
    let masks = uniform_masks(0, 64);
    let sample = opened(&inputs()[0], 64, |s, i| {
        masks[s as usize][i] & if i % 8 == 0 { !1 } else { !0 }
    });
    assert!(deviation(&sample) > LIMIT);
}

#[test]
fn a_mask_that_serves_twice_is_found() {
    let [first, second] = [0, 1].map(|slot| uniform_masks(slot, 64));
    let inputs = inputs();
    let open = |values: &[f32], masks: &[Vec<u64>]| opened(values, 64, |s, i| masks[s as usize][i]);
    let (a, b, c) = (
        open(&inputs[1], &first),
        open(&inputs[2], &first),
        open(&inputs[2], &second),
    );
    assert!(deviation(&b) < LIMIT, "alone it looks well");
    assert!(joint_deviation(&a, &b) > 2.0 * LIMIT);
    assert!(joint_deviation(&a, &c) < LIMIT);
}

#[test]
fn an_opening_without_a_mask_is_found() {
    // Shares are uniform, and so is each message; their sum is the value.
    let sent = uniform_masks(0, 64);
    let sample = opened(&inputs()[2], 64, |s, i| sent[s as usize][i].wrapping_neg());
    let sent: Sample = sent.iter().map(|words| pack::pack(words, 64)).collect();
    assert!(deviation(&sample) < LIMIT, "alone it looks well");
    assert!(deviation(&sum(&sample, &sent, 64)) > 2.0 * LIMIT);
}

#[test]
fn a_bit_that_depends_on_another_opening_is_found() {
    // A comparison that blinds its bit by a bit of the mask alone: each opening looks well, but small values hardly change
    // that bit, and the masked value is open.
    let masks = uniform_masks(0, 64);
    let wide = opened(&inputs()[0], 64, |s, i| masks[s as usize][i]);
    let narrow: Sample = masks
        .iter()
        .map(|m| pack::pack(&m.iter().map(|r| r >> 28).collect::<Vec<u64>>(), 1))
        .collect();
    assert!(
        deviation(&wide).max(deviation(&narrow)) < LIMIT,
        "alone they look well"
    );
    let zeros = |s: &Sample| -> Sample { s.iter().map(|m| vec![0; m.len()]).collect() };
    let correlation = |narrow: &Sample| correlation((narrow, &zeros(narrow)), (&wide, &zeros(&wide)));
    assert!(correlation(&narrow) > 2.0 * LIMIT);
    let blind: Sample = (0..SESSIONS)
        .map(|s| Prg::new(&seeds(s)[0], 77, 5).bits(LEN, 1))
        .map(|b| pack::pack(&b, 1))
        .collect();
    assert!(correlation(&sum(&narrow, &blind, 1)) < LIMIT);
}

#[test]
fn a_value_masked_with_what_the_receiver_knows_is_found() {
    let own: Vec<Vec<u8>> = (0..SESSIONS)
        .map(|s| own_mask(&seeds(s)[1], 5, 8 * LEN))
        .collect();
    let sample = opened(&inputs()[2], 64, |s, i| Prg::new(&seeds(s)[1], 5, 0).vec(LEN)[i]);
    assert!(deviation(&sample) < LIMIT, "alone it looks well");
    assert!(joint_deviation(&sample, &own) > 2.0 * LIMIT);
}
