//! What each protocol costs, in numbers written out: a change of cost must be meant.
//!
//! The conformance suite checks that these predictions equal the meters of real runs.

mod world;

use veiltune_engine::session::{self, Plan, Program};
use veiltune_engine::{
    Activation, Backend, Comparison, Fixed, NormKind, NormSpec, Owner, Party, Plain, Range, Result, Revealed,
};
use veiltune_ring::prg::{Prg, Seed};
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
    // x, then x^2 for the truncation and the other factor; three products, 8 bytes and 16 bits for the truncation, 16 bits for
    // its carry in the last product.
    costs(Job::new(Verb::Fourth), 2, [24 * N, 24 * N], [0, 24 * N + 12 * N]);
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
fn what_was_truncated_is_opened_for_its_carry() {
    // Two factors and their product opened, one of the factors and the product less a zero; 33 bits of carry dealt, and opened again;
    // then the matrix product.
    let [opened, again] = [(64 + 63 + 63) * N / 8, 33 * N / 8];
    costs(
        Job::new(Verb::TrimmedMatMul),
        3,
        [opened + again; 2],
        [0, 63 * N / 8 + 8 * N + 33 * N / 8 + 8 * 64],
    );
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
    // 61 bits, of a product of 49 fractional bits: truncated by 33 on the same opening. One of the factors was multiplied by
    // an even number: it and the product have a zero, which neither is opened nor dealt.
    costs(
        Job::new(Verb::ReluOfFineSquare).by(fss),
        3,
        [(64 + 63 + 63) * N / 8 + BIT; 2],
        [880 * N, 63 * N / 8 + (880 + 24) * N + 2 * 33 * N / 8],
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
        [0, 11 * 16 * N],
    );
    costs(
        within(Activation::Silu, 12.0),
        1,
        [21 * N / 8; 2],
        [0, 17 * 16 * N],
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
        [0, 15 * 16 * N],
    );
    // Two comparisons with selection for each element before it.
    let guarded = Job::new(Verb::Activation(Activation::Gelu, Range::Guarded(6.4)));
    let dealt = 2 * 352 * N;
    costs(
        guarded.clone(),
        3,
        [16 * N + 2 * BIT + 20 * N / 8; 2],
        [dealt, dealt + 2 * 16 * N + 11 * 16 * N],
    );
    costs(
        guarded.by(Comparison::MaskedBits),
        6,
        [16 * N + 2 * (9 + 5 + 2 + 1) * BIT + 20 * N / 8; 2],
        [0, 2 * (115 * BIT + 16 * N) + 11 * 16 * N],
    );
}

#[test]
fn normalisations() {
    // The inverse of a value whose intervals so many bits tell apart, truncated by `cut` bits, and the product with it: opens v and the
    // line's result; deals a key of a pair, the low mask, the truncation, and for each element a product and its carry.
    let inverse_for = |products: u64, key_bits: u64, cut: u64| {
        let key = 32 * (key_bits - 2) + 64;
        let second = (8 + 8) * ROWS + cut * ROWS / 8 + 8 * products + cut * products / 8;
        (16 * ROWS, key * ROWS, second)
    };
    let inverse = |key_bits, cut| inverse_for(N, key_bits, cut);
    let (online, both, second) = inverse(25 - 6, 24);
    // The row itself, and the sum of its squares.
    let (online, second) = (8 * N + online, second + 8 * ROWS);
    costs(
        Job::new(Verb::Normalize(NormKind::Rms)),
        3,
        [online; 2],
        [both, both + second],
    );
    // The mean, truncated by 20 bits; its carry in the sum of squares and in the product.
    let mean = |cut: u64| 8 * ROWS + 3 * cut * ROWS / 8;
    costs(
        Job::new(Verb::Normalize(NormKind::Layer)),
        3,
        [online; 2],
        [both, both + second + mean(20)],
    );
    // After a product (of 8 bytes an element opened and dealt), the row is truncated by 16 bits; its carry is in the squares
    // and in the product too.
    let (product, row) = (8 * N, 8 * N + 3 * 16 * N / 8);
    costs(
        Job::new(Verb::NormalizeOfSquare(NormKind::Layer)),
        4,
        [8 * N + online; 2],
        [both, both + product + row + second + mean(36)],
    );
    // Buckets of 21 bits opened and 32 counters of 5 bits dealt, 31 suffixes a row opened and given a key of 80 bytes; the
    // exponential of 22 bits with 16 harmonics, opened with 24 of its 40 fractional bits, as is the sum; the inverse and the
    // product.
    let (online, both, second) = inverse(25 - 6, 22);
    let (exp, online) = (6 * N, online - 2 * ROWS);
    costs(
        Job::new(Verb::Softmax),
        5,
        [21 * N / 8 + 31 * 5 * ROWS / 8 + 22 * N / 8 + exp + online; 2],
        [
            31 * 80 * ROWS + both,
            20 * N + 31 * 80 * ROWS + 16 * 16 * N + both + second,
        ],
    );
    // The product with values before the division: the values are opened; 60 fractional bits of the exponentials, rounded to 24 of them,
    // from sines of 44 bits; truncated, and what is left of them opened, with their sum, of 24 fractional bits. Of the product, opened whole
    // and truncated by 24 bits, the carry is in its product with the inverse.
    let products = ROWS * ROWS;
    let (divided, both, second) = inverse_for(products, 25 - 6, 24);
    let second = second + 3 * products;
    costs(
        Job::new(Verb::Attend),
        6,
        [21 * N / 8 + 31 * 5 * ROWS / 8 + 22 * N / 8 + (28 + 36) * N / 8 + 8 * N + 8 * products + divided; 2],
        [
            31 * 80 * ROWS + both,
            20 * N
                + 31 * 80 * ROWS
                + 16 * 2 * 44 * N / 8
                + 8 * N
                + 36 * N / 8
                + (8 + 8 + 3) * products
                + both
                + second,
        ],
    );
    // Wide scores: before that a maximum in buckets of 8 (24 bits) and a ReLU of either kind; then scores up to 16 in buckets of 2
    // (22 bits), with 19 harmonics.
    let (online, both, second) = inverse(27 - 5, 26);
    let online = online - 2 * ROWS;
    let maximum = |bits: u64| bits * N / 8 + 31 * 5 * ROWS / 8;
    for (comparison, rounds, relu, dealt) in [
        (Comparison::Fss, 2, 8 * N + BIT, [352 * N, (352 + 16) * N]),
        (
            Comparison::MaskedBits,
            5,
            8 * N + (9 + 5 + 2) * BIT + BIT,
            [0, 7 * 15 * BIT + (6 + 3 + 1) * BIT + 16 * N],
        ),
    ] {
        // Or two of both, the first maximum in buckets of 64.
        for (verb, steps, first) in [
            (Verb::WideSoftmax, 1, 0),
            (Verb::WidestSoftmax, 2, maximum(27) + relu),
        ] {
            let narrowed = first + maximum(24) + relu;
            costs(
                Job::new(verb).by(comparison),
                steps * (2 + rounds) + 5,
                [narrowed + maximum(22) + 22 * N / 8 + exp + online; 2],
                [
                    (steps + 1) * 31 * 80 * ROWS + steps * dealt[0] + both,
                    (steps + 1) * (20 * N + 31 * 80 * ROWS) + steps * dealt[1] + 19 * 16 * N + both + second,
                ],
            );
        }
    }
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

/// The adapter of a vision transformer for its class token alone: the client's hidden states, the provider's weights.
struct Adapter {
    tokens: usize,
    width: usize,
    rank: usize,
    classes: usize,
    kind: NormKind,
    /// The first party's hidden states; the second party's weights. Both in the clear.
    known: [bool; 2],
}

impl Adapter {
    /// At the shapes of ViT-B.
    fn base(rank: usize, kind: NormKind) -> Adapter {
        Adapter {
            tokens: 197,
            width: 768,
            rank,
            classes: 100,
            kind,
            known: [false; 2],
        }
    }

    fn small(known: [bool; 2]) -> Adapter {
        Adapter {
            tokens: 9,
            width: 24,
            rank: 16,
            classes: 5,
            kind: NormKind::Layer,
            known,
        }
    }

    /// Uniform values of variance `variance`.
    fn values(&self, party: usize, slot: u16, dims: &[usize], variance: f64) -> Option<Vec<f32>> {
        let words = Prg::new(&Seed::from_bytes([11; 16]), party as u64, slot).vec(dims.iter().product());
        let size = (3.0 * variance).sqrt() / 2f64.powi(63);
        self.known[party].then(|| {
            words
                .into_iter()
                .map(|w| (w as i64 as f64 * size) as f32)
                .collect()
        })
    }
}

impl Program for Adapter {
    type Model<B: Backend> = Vec<B::Weight>;

    fn load<B: Backend>(&self, b: &B) -> Result<Vec<B::Weight>> {
        let (n, d, r) = (self.tokens, self.width, self.rank);
        let dims = [
            [r, d],
            [r + 1, r],
            [n, n],
            [r, r + 1],
            [r, r],
            [r, r],
            [d, r],
            [self.classes, d],
        ];
        let weight = |(i, dims): (usize, &[usize; 2])| {
            // Scores are not normalised: small queries keep what they mix in range.
            let size = if i == 1 { 0.02 } else { 1.0 };
            let values = self.values(1, i as u16, dims, size / dims[1] as f64);
            b.weight(Owner::Party(Party::P1), dims, values.as_deref())
        };
        dims.iter().enumerate().map(weight).collect()
    }

    fn forward<B: Backend>(&self, b: &B, w: &Vec<B::Weight>, _: usize) -> Result<Option<Revealed>> {
        let norm = NormSpec {
            kind: self.kind,
            eps: 1e-6,
            sigma: (0.5, 4.0),
        };
        b.layer("down");
        let dims = [1, self.tokens, self.width];
        let u = b.input(
            Owner::Party(Party::P0),
            &dims,
            self.values(0, 0, &dims, 2.0).as_deref(),
        )?;
        let x = b.linear(&u, &w[0], None)?;
        b.layer("norm1");
        let normal = b.normalize(&x, &norm)?;
        b.layer("attention");
        b.prepare(&[&normal])?;
        let query = b.linear(&b.narrow(&normal, 1, 0, 1)?, &w[1], None)?;
        let scores = b.matmul(&b.narrow(&query, 2, 0, self.rank)?, &b.transpose(&normal, 1, 2)?)?;
        let scores = b.add(&scores, &b.narrow(&query, 2, self.rank, 1)?)?;
        let shares = b.linear(&scores, &w[2], None)?;
        let rows = b.cat(&[&b.matmul(&shares, &normal)?, &b.sum(&shares, 2)?], 2)?;
        let x = b.add(&b.narrow(&x, 1, 0, 1)?, &b.linear(&rows, &w[3], None)?)?;
        b.layer("norm2");
        let normal = b.normalize(&x, &norm)?;
        b.layer("mlp");
        let hidden = b.relu(&b.linear(&normal, &w[4], None)?)?;
        let x = b.add(&x, &b.linear(&hidden, &w[5], None)?)?;
        b.layer("up");
        let u = b.add(&b.narrow(&u, 1, 0, 1)?, &b.linear(&x, &w[6], None)?)?;
        b.layer("norm");
        let normal = b.normalize(&u, &norm)?;
        b.layer("head");
        b.reveal(&b.linear(&normal, &w[7], None)?, Party::P0)
    }
}

#[test]
fn layers_of_an_adapter() {
    let rounds = |kind| {
        let tally = session::plan(&Adapter::base(240, kind), 1).expect("a plan").tally;
        tally
            .layers()
            .map(|(name, c)| (name.to_owned(), c.rounds))
            .collect::<Vec<_>>()
    };
    let expected = |last| {
        let names = ["down", "norm1", "attention", "norm2", "mlp", "up", "norm", "head"];
        let rounds = [1, 3, 5, 3, 4, 1, last, 3];
        names
            .map(str::to_owned)
            .into_iter()
            .zip(rounds)
            .collect::<Vec<_>>()
    };
    assert_eq!(rounds(NormKind::Rms), expected(3));
    assert_eq!(rounds(NormKind::Layer), expected(4));

    let tally = session::plan(&Adapter::base(300, NormKind::Rms), 3)
        .expect("a plan")
        .tally;
    let total = tally.total();
    assert_eq!(total.rounds, 3 * 23);
    let sum = |f: fn(&veiltune_engine::Cost) -> u64| tally.layers().map(|(_, c)| f(c)).sum::<u64>();
    assert_eq!(sum(|c| c.rounds), total.rounds);
    for (parts, whole) in [
        (
            [sum(|c| c.online_bytes[0]), sum(|c| c.online_bytes[1])],
            total.online_bytes,
        ),
        (
            [sum(|c| c.dealer_bytes[0]), sum(|c| c.dealer_bytes[1])],
            total.dealer_bytes,
        ),
        ([sum(|c| c.macs[0]), sum(|c| c.macs[1])], total.macs),
    ] {
        assert_eq!(parts, whole);
    }
    // What is opened, both ways, once a pass.
    let online = total.online_bytes.iter().sum::<u64>();
    assert!(online <= 3 * 3_200_000, "{online}");
}

#[test]
fn an_adapter_runs_as_counted() {
    let seeds = [1, 2].map(|b| Seed::from_bytes([b; 16]));
    let programs = [[true, false], [false, true]].map(Adapter::small);
    let run = session::run_local(programs.each_ref(), 1, seeds.clone(), Default::default()).expect("a run");
    let total = run.plan.tally.total();
    for (i, report) in run.reports.iter().enumerate() {
        assert_eq!(
            (report.online_meter.rounds, report.online_meter.sent),
            (24, total.online_bytes[i])
        );
        assert_eq!(report.dealer_bytes, total.dealer_bytes[i]);
    }
    let all = Adapter::small([true; 2]);
    let fixed = Fixed::with_seeds(seeds);
    let expected = all
        .forward(&fixed, &all.load(&fixed).expect("weights"), 0)
        .expect("in range");
    assert_eq!(run.outputs, [vec![expected.clone()], vec![None]]);
    let plain = all
        .forward(&Plain::new(), &all.load(&Plain::new()).expect("weights"), 0)
        .expect("plain");
    let logits = plain
        .into_iter()
        .chain(expected)
        .map(|r| r.values)
        .collect::<Vec<_>>();
    for (a, b) in logits[0].iter().zip(&logits[1]) {
        assert!((a - b).abs() < 5e-3, "{logits:?}");
    }
}
