//! What each protocol costs, in numbers written out: a change of cost must be meant.
//!
//! The conformance suite checks that these predictions equal the meters of real runs.

mod world;

use veiltune_engine::session::{self, Plan};
use veiltune_engine::{Activation, Comparison, NormKind, Owner, Party, Range};
use veiltune_wire::Network;
use world::{Job, Verb};

/// Elements and rows of the input `[8, 16]`.
const N: u64 = 128;
const ROWS: u64 = 8;
/// Words of 64 elements that hold one bit of each.
const BIT: u64 = N / 8;

fn plan(job: &Job) -> Plan {
    session::plan(job, 1).expect("a plan")
}

/// Rounds, bytes sent by each party, bytes dealt to each party; without the reveal.
#[track_caller]
fn costs(job: Job, rounds: u64, online: [u64; 2], dealer: [u64; 2]) {
    let total = plan(&job.clone().unrevealed()).tally.total();
    assert_eq!(
        (total.rounds, total.online_bytes, total.dealer_bytes),
        (rounds, online, dealer),
        "{job:?}"
    );
}

#[test]
fn products() {
    let [p0, p1] = [Party::P0, Party::P1].map(Owner::Party);
    // Each opened element 8 bytes, each result 8 from the dealer.
    costs(Job::new(Verb::Square), 1, [8 * N, 8 * N], [0, 8 * N]);
    costs(Job::new(Verb::Square).of(p1), 0, [0, 0], [0, 0]);
    costs(Job::new(Verb::Square).of(Owner::Public), 0, [0, 0], [0, 0]);
    costs(Job::new(Verb::MatMul), 1, [8 * N, 8 * N], [0, 8 * 64]);
    // The owner of the weight, opened at set-up, learns the masked input; it multiplies alone.
    costs(Job::new(Verb::Linear), 1, [8 * N, 0], [0, 8 * 256]);
    costs(Job::new(Verb::Linear).of(p0), 1, [8 * N, 0], [0, 8 * 256]);
    costs(Job::new(Verb::Linear).of(p1), 0, [0, 0], [0, 0]);
    let tally = plan(&Job::new(Verb::Linear).unrevealed()).tally;
    assert_eq!(tally.setup_bytes, [0, 8 * 512]);
    assert_eq!(tally.total().macs, [0, 256 * 16]);
}

#[test]
fn truncations_and_reveal() {
    // x, x^2 for the truncation, then both factors; three products, and 8 bytes and 16 bits for the truncation.
    costs(Job::new(Verb::Fourth), 3, [32 * N, 32 * N], [0, 24 * N + 10 * N]);
    // Faithful: the opening, 10 bytes, and a key of 16 bits to both. The other party's share is the reveal.
    let [with, without] =
        [Job::new(Verb::Square), Job::new(Verb::Square).unrevealed()].map(|job| plan(&job).tally.total());
    assert_eq!(with.rounds - without.rounds, 2);
    let online = [0, 1].map(|i| with.online_bytes[i] - without.online_bytes[i]);
    assert_eq!(online, [8 * N, 8 * N + 8 * N]);
    let dealer = [0, 1].map(|i| with.dealer_bytes[i] - without.dealer_bytes[i]);
    assert_eq!(dealer, [368 * N, (368 + 10) * N]);
}

#[test]
fn comparisons() {
    let (fss, bits) = (Comparison::Fss, Comparison::MaskedBits);
    // 28 bits: a key of 352 bytes; 7 one-hot vectors of 15 bits, levels of 7, 4 and 2 nodes.
    costs(
        Job::new(Verb::Relu).by(fss),
        2,
        [8 * N + BIT; 2],
        [352 * N, (352 + 16) * N],
    );
    costs(
        Job::new(Verb::Relu).by(bits),
        5,
        [8 * N + (9 + 5 + 2) * BIT + BIT; 2],
        [0, 7 * 15 * BIT + (6 + 3 + 1) * BIT + 16 * N],
    );
    // 44 bits, after a product: a key of 608 bytes; 11 vectors, levels of 11, 6, 3 and 2 nodes.
    costs(
        Job::new(Verb::ReluOfSquare).by(fss),
        3,
        [16 * N + BIT; 2],
        [608 * N, 8 * N + (608 + 16) * N],
    );
    costs(
        Job::new(Verb::ReluOfSquare).by(bits),
        7,
        [16 * N + (15 + 8 + 3 + 2) * BIT + BIT; 2],
        [0, 8 * N + 11 * 15 * BIT + (10 + 5 + 2 + 1) * BIT + 16 * N],
    );
    // Levels of 64, 32, 16 and 8 pairs: 120 comparisons without selection, as many products, and 112 to select with. One
    // bit each of 120, and with masked bits one word a plane, whatever it holds.
    let (pairs, selected) = (120, 112);
    let open = 8 * (2 * pairs + selected);
    let products = 8 * (pairs + selected);
    costs(
        Job::new(Verb::Argmax).by(fss),
        15,
        [open + pairs / 8; 2],
        [352 * pairs, (352 + 8) * pairs + products],
    );
    costs(
        Job::new(Verb::Argmax).by(bits),
        15 + 4 * 3,
        [open + pairs / 8 + 4 * 8 * (9 + 5 + 2); 2],
        [0, 4 * 8 * (7 * 15 + 6 + 3 + 1) + 8 * pairs + products],
    );
}

#[test]
fn activations() {
    let within = |f, bound| Job::new(Verb::Activation(f, Range::Within(bound)));
    // scale + p bits; 16 bytes for each harmonic.
    costs(
        within(Activation::Gelu, 6.4),
        1,
        [20 * N / 8; 2],
        [0, 12 * 16 * N],
    );
    costs(
        within(Activation::Silu, 12.0),
        1,
        [21 * N / 8; 2],
        [0, 18 * 16 * N],
    );
    costs(
        within(Activation::Tanh, 6.0),
        1,
        [20 * N / 8; 2],
        [0, 16 * 16 * N],
    );
    costs(
        within(Activation::Sigmoid, 12.0),
        1,
        [21 * N / 8; 2],
        [0, 16 * 16 * N],
    );
    // Two comparisons with selection for each element before it.
    let guarded = Job::new(Verb::Activation(Activation::Gelu, Range::Guarded(6.4)));
    let dealt = 2 * 352 * N;
    costs(
        guarded.clone(),
        3,
        [16 * N + 2 * BIT + 20 * N / 8; 2],
        [dealt, dealt + 2 * 16 * N + 12 * 16 * N],
    );
    costs(
        guarded.by(Comparison::MaskedBits),
        6,
        [16 * N + 2 * (9 + 5 + 2 + 1) * BIT + 20 * N / 8; 2],
        [0, 2 * (115 * BIT + 16 * N) + 12 * 16 * N],
    );
}

#[test]
fn normalisations() {
    // Centring: a row's sum opened and truncated by 20 bits. Then the inverse root and the product.
    let inverse = |value_bits: u64, cuts: [u64; 2]| {
        let key = 24 * (value_bits - 2) + 32;
        // Opens v, its coarse copy, the slope, the result; two truncations and a product.
        (
            8 * 4 * ROWS,
            key * ROWS,
            (8 + 8 + 8) * ROWS + cuts.map(|bits| (bits * ROWS).div_ceil(8)).iter().sum::<u64>(),
        )
    };
    let (online, both, second) = inverse(42, [17, 24]);
    costs(
        Job::new(Verb::Normalize(NormKind::Rms)),
        5,
        [8 * N + online + 8 * ROWS; 2],
        [both, both + 2 * 8 * N + second],
    );
    costs(
        Job::new(Verb::Normalize(NormKind::Layer)),
        6,
        [8 * N + 8 * ROWS + online + 8 * ROWS; 2],
        [both, both + 2 * 8 * N + second + 8 * ROWS + 20 * ROWS / 8],
    );
    // Buckets of 21 bits opened and 32 one-byte counters dealt, 31 suffixes a row opened and given a key of 128 bytes; the
    // exponential of 22 bits with 16 harmonics; the inverse; the product.
    let (online, both, second) = inverse(48, [21, 24]);
    costs(
        Job::new(Verb::Softmax),
        7,
        [21 * N / 8 + 31 * ROWS + 22 * N / 8 + 8 * N + online + 8 * ROWS; 2],
        [
            31 * 128 * ROWS + both,
            32 * N + 31 * 128 * ROWS + 16 * 16 * N + both + second + 8 * N,
        ],
    );
}

#[test]
fn the_comparison_is_part_of_the_program() {
    let hash = |job: Job| plan(&job).program;
    let job = Job::new(Verb::Relu);
    assert_ne!(hash(job.clone()), hash(job.clone().by(Comparison::MaskedBits)));
    let other = Job::new(Verb::Square);
    assert_eq!(hash(other.clone()), hash(other.by(Comparison::MaskedBits)));
}

#[test]
fn the_network_decides_how_to_compare() {
    let choose =
        |job: &Job, network: &Network| session::cheapest_comparison(job, 1, network).expect("a choice");
    let (small, large) = (Job::new(Verb::Relu), Job::new(Verb::Relu).dims(&[1 << 20]));
    // Three latencies against 47 KB or 369 MB from the dealer.
    assert_eq!(choose(&small, &Network::WAN), Comparison::Fss);
    assert_eq!(choose(&large, &Network::WAN), Comparison::MaskedBits);
    assert_eq!(choose(&large, &Network::LAN), Comparison::MaskedBits);
    // No limits: the fewer bytes from the dealer; and without a comparison there is nothing to choose.
    assert_eq!(choose(&large, &Network::NONE), Comparison::MaskedBits);
    assert_eq!(choose(&Job::new(Verb::Square), &Network::WAN), Comparison::Fss);
    // What the program asks for does not matter.
    assert_eq!(
        choose(&small.by(Comparison::MaskedBits), &Network::WAN),
        Comparison::Fss
    );
}
