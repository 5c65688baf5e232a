use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const EPOCHS: usize = 20;
const SEEDS: u64 = 24;

/// Made-up accuracies: saturating in rank and scope, shifted by heads and norm, growing with the epochs, with noise.
#[derive(Clone)]
struct Landscape {
    /// Accuracy that rank and scope add, and how fast they saturate.
    rank: (f64, f64),
    scope: (f64, f64),
    /// Rank beyond which more is worse (too few pictures).
    overfit: f64,
    /// The best number of heads, and how much it matters.
    heads: (f64, f64),
    /// What BatchNorm costs.
    batch: f64,
    /// What training adds, and how much more slowly large adapters learn.
    learning: (f64, f64),
    /// Standard deviation of a measured accuracy.
    noise: f64,
    seed: u64,
    /// Everything asked of it.
    trained: Vec<(Candidate, usize)>,
    /// Trainings that succeed.
    patience: usize,
}

impl Landscape {
    fn new(kind: usize, noise: f64, seed: u64) -> Self {
        let (rank, scope, overfit, heads, batch, learning) = [
            // Grows slowly in both directions.
            (
                (0.040, 120.0),
                (0.030, 1.5),
                1e9,
                (4.0, 0.002),
                0.003,
                (0.06, 0.0),
            ),
            // Saturates early; heads matter, norms do not.
            ((0.020, 50.0), (0.010, 0.7), 1e9, (12.0, 0.006), 0.0, (0.03, 0.0)),
            // Wide adapters overfit; short trainings say little, and least of large adapters.
            (
                (0.050, 60.0),
                (0.020, 1.0),
                180.0,
                (2.0, 0.003),
                0.006,
                (0.2, 0.05),
            ),
        ][kind];
        Landscape {
            rank,
            scope,
            overfit,
            heads,
            batch,
            learning,
            noise,
            seed,
            trained: Vec::new(),
            patience: usize::MAX,
        }
    }

    /// Without noise.
    fn truth(&self, c: &Candidate, epochs: usize) -> f64 {
        let (r, s, h) = (c.rank as f64, c.scope as f64, c.heads as f64);
        let size =
            self.rank.0 * (1.0 - (-r / self.rank.1).exp()) + self.scope.0 * (1.0 - (-s / self.scope.1).exp());
        let worse = 1e-4 * (r - self.overfit).max(0.0)
            + self.heads.1 * (h / self.heads.0).ln().powi(2)
            + if c.norm == NormChoice::Batch {
                self.batch
            } else {
                0.0
            };
        let rate = 4.0 / (1.0 + self.learning.1 * s * r / 300.0);
        let unlearned = (-rate * epochs as f64 / EPOCHS as f64).exp() - (-4f64).exp();
        0.8 + size - worse - self.learning.0 * unlearned
    }

    fn seconds(c: &Candidate) -> f64 {
        let (r, s, h) = (c.rank as f64, c.scope as f64, c.heads as f64);
        let norm = if c.norm == NormChoice::Batch { 0.8 } else { 1.0 };
        norm * (0.03 + s * (0.02 + 1e-4 * r + 1e-3 * h))
    }

    /// The best candidate in truth.
    fn right(&self, goal: &Goal) -> Candidate {
        let trials: Vec<Trial> = Space::default()
            .candidates()
            .unwrap()
            .iter()
            .map(|c| trial(c, EPOCHS, self.truth(c, EPOCHS)))
            .collect();
        run::best(&trials, goal).unwrap().candidate
    }
}

impl Evaluate for Landscape {
    fn latency(&mut self, c: &Candidate) -> Result<f64> {
        Ok(Self::seconds(c))
    }

    fn train(&mut self, c: &Candidate, epochs: usize) -> Result<f64> {
        if self.trained.len() == self.patience {
            return Err(Error::Settings("no more".into()));
        }
        self.trained.push((*c, epochs));
        let mut uniforms = (0..12u8).map(|i| {
            let mut hasher = DefaultHasher::new();
            (self.seed, c, epochs, i).hash(&mut hasher);
            hasher.finish() as f64 / u64::MAX as f64
        });
        let normal = uniforms.by_ref().sum::<f64>() - 6.0;
        Ok((self.truth(c, epochs) + self.noise * normal).clamp(0.0, 1.0))
    }

    fn training_cost(&self, c: &Candidate) -> f64 {
        (c.rank * c.scope) as f64 / 60.0
    }
}

fn trial(c: &Candidate, epochs: usize, accuracy: f64) -> Trial {
    Trial {
        candidate: *c,
        epochs,
        accuracy,
        latency: Landscape::seconds(c),
        seconds: 1.0,
        cost: epochs as f64,
    }
}

fn settings(method: Method, goal: Goal, seed: u64) -> Settings {
    Settings {
        method,
        space: Space::default(),
        goal,
        epochs: EPOCHS,
        seed,
        fingerprint: "made up".into(),
        budget: None,
    }
}

fn run(settings: Settings, landscape: &mut Landscape) -> Outcome {
    let mut search = Search::new(settings).unwrap();
    search
        .run(landscape, &AtomicBool::new(false), &mut |_, _| {})
        .unwrap()
}

const GOALS: [[Goal; 2]; 3] = [
    [
        Goal::Efficiency { accuracy: 0.850 },
        Goal::Utility { seconds: 0.2 },
    ],
    [
        Goal::Efficiency { accuracy: 0.824 },
        Goal::Utility { seconds: 0.1 },
    ],
    [
        Goal::Efficiency { accuracy: 0.858 },
        Goal::Utility { seconds: 0.3 },
    ],
];

/// What one method took and found, on average over the seeds.
#[derive(Default)]
struct Average {
    /// Searches that reached their goal.
    reached: u64,
    /// Full trainings: altogether, and until the level that both methods reached.
    trainings: f64,
    until: f64,
    /// True accuracy and latency beside those of the right candidate.
    regret: f64,
    slower: f64,
}

/// Over 24 seeds: the controller, then halving.
fn averages(kind: usize, goal: &Goal, noise: f64) -> [Average; 2] {
    let mut sums = [Average::default(), Average::default()];
    let right = Landscape::new(kind, 0.0, 0).right(goal);
    for seed in 0..SEEDS {
        let outcomes = [Method::Reinforce, Method::Halving].map(|method| {
            let mut landscape = Landscape::new(kind, noise, seed);
            run(settings(method, *goal, seed), &mut landscape)
        });
        let compared = compare(goal, EPOCHS, &outcomes[0].trials, &outcomes[1].trials).unwrap();
        for ((sum, outcome), until) in sums.iter_mut().zip(&outcomes).zip(compared.until) {
            let best = outcome.best.unwrap();
            let landscape = Landscape::new(kind, noise, seed);
            sum.reached += u64::from(outcome.reached);
            sum.trainings += outcome.spent.trainings / SEEDS as f64;
            sum.until += until.trainings / SEEDS as f64;
            sum.regret += (landscape.truth(&right, EPOCHS) - landscape.truth(&best, EPOCHS)) / SEEDS as f64;
            sum.slower += Landscape::seconds(&best) / Landscape::seconds(&right) / SEEDS as f64;
        }
    }
    sums
}

#[test]
fn halving_finds_the_right_candidate_with_fewer_trainings() {
    for noise in [0.0, 0.002, 0.005] {
        let mut until = [0.0; 2];
        for (kind, goals) in GOALS.iter().enumerate() {
            for goal in goals {
                let [reinforce, halving] = averages(kind, goal, noise);
                for (name, a) in [("reinforce", &reinforce), ("halving", &halving)] {
                    println!(
                        "noise {noise}, landscape {kind}, {goal}: {name} reached {} times, regret {:+.4}, latency x{:.3}, \
                         trainings {:.2}, until level {:.2}",
                        a.reached, a.regret, a.slower, a.trainings, a.until
                    );
                    assert_eq!(a.reached, SEEDS);
                }
                until[0] += reinforce.until;
                until[1] += halving.until;
                // The noise of a measurement may hide the right one among its neighbours.
                assert!(halving.regret < 1.5e-3 + noise, "{goal}: {}", halving.regret);
                match goal {
                    Goal::Efficiency { .. } => {
                        assert!(halving.slower < 1.05 && halving.slower < reinforce.slower);
                        assert!(halving.trainings < 15.0);
                    }
                    Goal::Utility { .. } => {
                        assert!(reinforce.regret < 0.01);
                        assert!(1.5 * halving.trainings < reinforce.trainings);
                    }
                }
            }
        }
        println!("noise {noise}: trainings until the same level, all problems: {until:.1?}");
        assert!(1.5 * until[1] < until[0], "{until:?}");
    }
}

#[test]
fn what_is_rejected_is_never_trained() {
    let smallest = |c: &Candidate| Candidate {
        heads: 1,
        rank: 60,
        scope: c.scope + 4,
        ..*c
    };
    for seed in 0..20 {
        for (method, goal) in [
            (Method::Reinforce, Goal::Utility { seconds: 0.1 }),
            (Method::Reinforce, Goal::Efficiency { accuracy: 0.99 }),
            (Method::Halving, Goal::Utility { seconds: 0.1 }),
        ] {
            let mut landscape = Landscape::new(0, 0.002, seed);
            run(settings(method, goal, seed), &mut landscape);
            assert!(!landscape.trained.is_empty());
            for (c, _) in &landscape.trained {
                let seconds = Landscape::seconds(c);
                assert!(!matches!(goal, Goal::Utility { seconds: most } if seconds > most));
                if method == Method::Reinforce {
                    assert!(seconds <= Landscape::seconds(&smallest(c)) + 1e-12, "{c}");
                }
            }
        }
    }
}

#[test]
fn without_epochs_starts_are_compared_each_once_and_a_good_one_is_found() {
    for (method, goal) in problems() {
        let mut landscape = Landscape::new(1, 0.0, 5);
        // An accuracy that starts reach too: so much is unlearned.
        let goal = match goal {
            Goal::Efficiency { accuracy } => Goal::Efficiency {
                accuracy: accuracy - landscape.learning.0 * (1.0 - (-4f64).exp()),
            },
            utility => utility,
        };
        let all = Space::default().candidates().unwrap();
        let starts: Vec<Trial> = all.iter().map(|c| trial(c, 0, landscape.truth(c, 0))).collect();
        let right = run::best(&starts, &goal).unwrap();
        let budget = Some(30.0);
        let without = Settings {
            epochs: 0,
            budget,
            ..settings(method, goal, 5)
        };
        let outcome = run(without, &mut landscape);
        let seen: BTreeSet<_> = landscape.trained.iter().map(|(c, _)| c).collect();
        assert!(landscape.trained.iter().all(|(_, epochs)| *epochs == 0));
        assert_eq!(seen.len(), landscape.trained.len());
        assert_eq!(outcome.spent.trainings, seen.len() as f64);
        assert!(outcome.spent.trainings <= 30.0);
        if method == Method::Halving {
            assert!(outcome.reached && goal.value(right).0);
            let found = outcome.trials.iter().find(|t| Some(t.candidate) == outcome.best);
            let found = found.unwrap();
            let near = match goal {
                Goal::Efficiency { .. } => found.latency < 1.1 * right.latency,
                Goal::Utility { .. } => found.accuracy > right.accuracy - 0.002,
            };
            assert!(near, "{found:?}, not {right:?}");
        }
    }
}

#[test]
fn nothing_is_trained_twice_and_trainings_only_get_longer() {
    for (method, goal) in problems() {
        let mut landscape = Landscape::new(1, 0.002, 5);
        let outcome = run(settings(method, goal, 5), &mut landscape);
        let mut longest = BTreeMap::new();
        for (c, epochs) in &landscape.trained {
            let before = longest.insert(*c, *epochs).unwrap_or(0);
            assert!(before < *epochs && *epochs <= EPOCHS);
        }
        assert_eq!(outcome.spent.candidates, longest.len());
        let full: usize = longest.values().sum();
        assert_eq!(outcome.spent.trainings, full as f64 / EPOCHS as f64);
        let cost: f64 = longest
            .iter()
            .map(|(c, &e)| e as f64 * landscape.training_cost(c))
            .sum();
        assert!((outcome.spent.cost - cost).abs() < 1e-6);
        if goal == (Goal::Efficiency { accuracy: 0.824 }) {
            assert_eq!(
                longest[&outcome.best.unwrap()],
                EPOCHS,
                "the best is trained in full"
            );
        }
    }
}

fn problems() -> [(Method, Goal); 4] {
    let goals = GOALS[1];
    [
        (Method::Reinforce, goals[0]),
        (Method::Reinforce, goals[1]),
        (Method::Halving, goals[0]),
        (Method::Halving, goals[1]),
    ]
}

#[test]
fn a_resumed_search_ends_like_one_that_never_stopped() {
    let folder = tempfile::tempdir().unwrap();
    for (n, (method, goal)) in problems().into_iter().enumerate() {
        let mut landscape = Landscape::new(1, 0.002, 3);
        let whole = run(settings(method, goal, 3), &mut landscape);
        for patience in 0..landscape.trained.len() {
            let path = folder.path().join(format!("{n}-{patience}"));
            let mut trained = Vec::new();
            let mut outcome = None;
            // Breaks off every `patience + 1` trainings.
            while outcome.is_none() {
                let mut search = Search::open(settings(method, goal, 3), &path).unwrap();
                let mut part = Landscape::new(1, 0.002, 3);
                part.patience = patience + 1;
                let mut replayed = 0;
                let mut count = |_: &Trial, s: &Status| replayed += usize::from(s.replayed);
                outcome = search.run(&mut part, &AtomicBool::new(false), &mut count).ok();
                assert_eq!(replayed, trained.len());
                trained.extend(part.trained);
            }
            let outcome = outcome.unwrap();
            assert_eq!(trained, landscape.trained);
            assert_eq!(timeless(&outcome.trials), timeless(&whole.trials));
            assert_eq!(outcome.best, whole.best);
            assert_eq!(outcome.summary, whole.summary);
        }
    }
}

fn timeless(trials: &[Trial]) -> Vec<Trial> {
    let still = |t: &Trial| Trial {
        seconds: 0.0,
        ..t.clone()
    };
    trials.iter().map(still).collect()
}

fn halving() -> Settings {
    settings(Method::Halving, Goal::Utility { seconds: 0.1 }, 3)
}

/// A finished search's journal.
fn finished(path: &Path) -> Outcome {
    let mut search = Search::open(halving(), path).unwrap();
    search
        .run(
            &mut Landscape::new(1, 0.002, 3),
            &AtomicBool::new(false),
            &mut |_, _| {},
        )
        .unwrap()
}

fn refusal(settings: Settings, path: &Path) -> String {
    match Search::open(settings, path) {
        Ok(_) => panic!("the journal was accepted"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_torn_journal_loses_its_last_line_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let whole = finished(&path);
    let bytes = fs::read(&path).unwrap();
    let header = bytes.iter().position(|&b| b == b'\n').unwrap() + 1;
    let last = bytes[..bytes.len() - 1]
        .iter()
        .rposition(|&b| b == b'\n')
        .unwrap()
        + 1;
    let garbled = [&bytes[..last], b"\0\0\0\0\n"].concat();
    let mut torn: Vec<(Vec<u8>, usize)> = (last..bytes.len()).map(|n| (bytes[..n].to_vec(), 1)).collect();
    torn.push((garbled, 1));
    torn.extend(
        (0..=header)
            .step_by(7)
            .map(|n| (bytes[..n].to_vec(), whole.trials.len())),
    );
    for (bytes, lost) in torn {
        fs::write(&path, &bytes).unwrap();
        let mut landscape = Landscape::new(1, 0.002, 3);
        let mut search = Search::open(halving(), &path).unwrap();
        let outcome = search
            .run(&mut landscape, &AtomicBool::new(false), &mut |_, _| {})
            .unwrap();
        assert_eq!(landscape.trained.len(), lost);
        assert_eq!(timeless(&outcome.trials), timeless(&whole.trials));
        drop(search);
        assert_eq!(
            fs::read(&path).unwrap().iter().filter(|&&b| b == b'\n').count(),
            1 + whole.trials.len()
        );
    }
}

#[test]
fn another_searches_journal_is_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    finished(&path);
    let bytes = fs::read(&path).unwrap();
    let small = Space {
        heads: vec![1],
        ..Space::default()
    };
    let others: [(&str, Settings); 6] = [
        (
            "method",
            Settings {
                method: Method::Reinforce,
                ..halving()
            },
        ),
        (
            "space",
            Settings {
                space: small,
                ..halving()
            },
        ),
        (
            "goal",
            Settings {
                goal: Goal::Utility { seconds: 0.11 },
                ..halving()
            },
        ),
        (
            "number of epochs",
            Settings {
                epochs: 10,
                ..halving()
            },
        ),
        ("seed", Settings { seed: 4, ..halving() }),
        (
            "data",
            Settings {
                fingerprint: "other pictures".into(),
                ..halving()
            },
        ),
    ];
    for (word, other) in others {
        let refused = refusal(other, &path);
        assert!(
            refused.contains("another search") && refused.contains(word),
            "{refused}"
        );
    }
    assert_eq!(fs::read(&path).unwrap(), bytes);

    let open = Search::open(halving(), &path).unwrap();
    assert!(refusal(halving(), &path).contains("another search is writing"));
    drop(open);

    // A budget may change from one run to the next.
    Search::open(
        Settings {
            budget: Some(9.0),
            ..halving()
        },
        &path,
    )
    .unwrap();

    for foreign in ["precious notes", "precious notes\n", "{}\n"] {
        fs::write(&path, foreign).unwrap();
        assert!(refusal(halving(), &path).contains("not a search journal"));
        assert_eq!(fs::read_to_string(&path).unwrap(), foreign);
    }
    assert!(matches!(
        Search::open(halving(), folder.path()),
        Err(Error::File(_))
    ));
}

#[test]
fn a_journal_that_was_tampered_with_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    finished(&path);
    let text = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    let write = |lines: &[&str]| fs::write(&path, lines.join("\n") + "\n").unwrap();
    let run = |seconds: f64| {
        struct Slower(Landscape, f64);
        impl Evaluate for Slower {
            fn latency(&mut self, c: &Candidate) -> Result<f64> {
                Ok(self.1 * self.0.latency(c)?)
            }
            fn train(&mut self, c: &Candidate, epochs: usize) -> Result<f64> {
                self.0.train(c, epochs)
            }
            fn training_cost(&self, c: &Candidate) -> f64 {
                self.0.training_cost(c)
            }
        }
        let mut evaluate = Slower(Landscape::new(1, 0.002, 3), seconds);
        let mut search = Search::open(halving(), &path).unwrap();
        search
            .run(&mut evaluate, &AtomicBool::new(false), &mut |_, _| {})
            .err()
            .map(|e| e.to_string())
    };
    assert_eq!(run(1.0), None);
    assert!(run(1.01).unwrap().contains("cost model or network"));

    let kept = lines[2];
    lines[2] = "{";
    write(&lines);
    assert!(refusal(halving(), &path).contains("trial 2"));
    lines[2] = lines[1];
    write(&lines);
    assert!(run(1.0).unwrap().contains("the search wants"));
    lines[2] = kept;
    let more = lines[lines.len() - 1];
    lines.push(more);
    write(&lines);
    assert!(run(1.0).unwrap().contains("1 trials more"));
}

#[test]
fn an_interruption_ends_the_search_between_trainings() {
    struct Interrupted<'a>(Landscape, &'a AtomicBool);
    impl Evaluate for Interrupted<'_> {
        fn latency(&mut self, c: &Candidate) -> Result<f64> {
            self.0.latency(c)
        }
        fn train(&mut self, c: &Candidate, epochs: usize) -> Result<f64> {
            if self.0.trained.len() == 5 {
                self.1.store(true, Ordering::Relaxed);
                return Err(Error::Settings("stopped within a training".into()));
            }
            self.0.train(c, epochs)
        }
        fn training_cost(&self, c: &Candidate) -> f64 {
            self.0.training_cost(c)
        }
    }
    for (method, goal) in problems().into_iter().skip(1) {
        let whole = run(settings(method, goal, 3), &mut Landscape::new(1, 0.002, 3));
        let mut search = Search::new(settings(method, goal, 3)).unwrap();
        let stop = AtomicBool::new(true);
        let mut landscape = Landscape::new(1, 0.002, 3);
        let outcome = search.run(&mut landscape, &stop, &mut |_, _| {}).unwrap();
        assert_eq!(
            (outcome.ended, outcome.best, outcome.reached),
            (Ended::Interrupted, None, false)
        );
        assert!(landscape.trained.is_empty());

        stop.store(false, Ordering::Relaxed);
        let outcome = search
            .run(&mut landscape, &stop, &mut |_, s| {
                assert!(s.left >= 0.0 && s.left.is_finite());
                stop.store(s.spent.candidates == 3, Ordering::Relaxed);
            })
            .unwrap();
        assert_eq!((outcome.ended, outcome.spent.candidates), (Ended::Interrupted, 3));
        assert!(outcome.summary.contains("interrupted"));

        stop.store(false, Ordering::Relaxed);
        let mut interrupted = Interrupted(landscape, &stop);
        let outcome = search.run(&mut interrupted, &stop, &mut |_, _| {}).unwrap();
        assert_eq!((outcome.ended, outcome.trials.len()), (Ended::Interrupted, 5));

        stop.store(false, Ordering::Relaxed);
        let outcome = search
            .run(&mut Landscape::new(1, 0.002, 3), &stop, &mut |_, _| {})
            .unwrap();
        assert_eq!(outcome.ended, Ended::Complete);
        assert_eq!(timeless(&outcome.trials), timeless(&whole.trials));
    }
}

#[test]
fn a_goal_out_of_reach_is_said_so() {
    for method in [Method::Reinforce, Method::Halving] {
        let mut landscape = Landscape::new(0, 0.002, 1);
        let outcome = run(
            settings(method, Goal::Efficiency { accuracy: 0.95 }, 1),
            &mut landscape,
        );
        assert_eq!((outcome.reached, outcome.ended), (false, Ended::Complete));
        let most = outcome.front.last().unwrap();
        assert_eq!(outcome.best, Some(most.candidate));
        assert!(outcome.summary.starts_with("not reached"), "{}", outcome.summary);
        assert!(outcome.summary.contains(&most.candidate.to_string()));
        println!(
            "{method:?} gives up after {:.2} trainings",
            outcome.spent.trainings
        );

        let mut landscape = Landscape::new(0, 0.002, 1);
        let outcome = run(
            settings(method, Goal::Utility { seconds: 0.001 }, 1),
            &mut landscape,
        );
        assert_eq!(
            (outcome.reached, outcome.best, landscape.trained.len()),
            (false, None, 0)
        );
        assert!(
            outcome
                .summary
                .contains("even the fastest candidate, (1, 60, 1, batch)")
        );
    }
}

#[test]
fn a_budget_is_kept() {
    for method in [Method::Reinforce, Method::Halving] {
        let limited = Settings {
            budget: Some(3.0),
            ..settings(method, Goal::Utility { seconds: 0.2 }, 2)
        };
        let outcome = run(limited, &mut Landscape::new(0, 0.002, 2));
        assert_eq!(outcome.ended, Ended::Budget);
        assert!(outcome.spent.trainings > 2.0 && outcome.spent.trainings <= 3.0);
        assert!(outcome.reached && outcome.summary.contains("budget"));
    }
}

#[test]
fn small_spaces_and_short_trainings_are_searched_too() {
    for epochs in 1..6 {
        for scopes in 1..4 {
            for (method, goal) in problems() {
                let tiny = Settings {
                    space: Space {
                        heads: vec![2],
                        ranks: vec![60],
                        scopes: (1..=scopes).collect(),
                        norms: vec![NormChoice::Layer],
                    },
                    epochs,
                    ..settings(method, goal, 1)
                };
                let outcome = run(tiny, &mut Landscape::new(1, 0.002, 1));
                assert!(outcome.best.is_some() && outcome.ended == Ended::Complete);
            }
        }
    }
}

#[test]
fn failures_of_the_evaluation_are_told_apart() {
    struct Fails(fn() -> Result<f64>, f64);
    impl Evaluate for Fails {
        fn latency(&mut self, _: &Candidate) -> Result<f64> {
            Ok(self.1)
        }
        fn train(&mut self, _: &Candidate, _: usize) -> Result<f64> {
            self.0()
        }
    }
    let run = |train, latency| {
        let mut search = Search::new(halving()).unwrap();
        search.run(
            &mut Fails(train, latency),
            &AtomicBool::new(false),
            &mut |_, _| {},
        )
    };
    let diverged = run(|| Err(Error::Diverged(f32::NAN)), 0.01).unwrap();
    assert!(diverged.trials.iter().all(|t| t.accuracy == 0.0) && !diverged.trials.is_empty());
    assert!(run(|| Ok(f64::NAN), 0.01).is_err());
    assert!(run(|| Ok(1.5), 0.01).is_err());
    assert!(run(|| Ok(0.5), f64::NAN).is_err());
    assert!(run(|| Ok(0.5), 0.0).is_err());
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let empty = Space {
        norms: vec![],
        ..Space::default()
    };
    let indivisible = Space {
        heads: vec![7],
        ..Space::default()
    };
    let zero = Space {
        scopes: vec![0, 1],
        ..Space::default()
    };
    let huge = Space {
        scopes: (1..10_000).collect(),
        ..Space::default()
    };
    for space in [empty, indivisible, zero, huge] {
        assert!(Search::new(Settings { space, ..halving() }).is_err());
    }
    for goal in [
        Goal::Efficiency { accuracy: 1.1 },
        Goal::Efficiency { accuracy: f64::NAN },
        Goal::Utility { seconds: 0.0 },
        Goal::Utility {
            seconds: f64::INFINITY,
        },
    ] {
        assert!(Search::new(Settings { goal, ..halving() }).is_err());
    }
    assert!(
        Search::new(Settings {
            budget: Some(f64::NAN),
            ..halving()
        })
        .is_err()
    );
}

#[test]
fn the_space_is_the_papers() {
    let space = Space::default();
    let all = space.candidates().unwrap();
    assert_eq!(all.len(), 6 * 5 * 6 * 2);
    assert!(all.is_sorted() && all.iter().all(|c| space.contains(c)));
    let odd = Candidate { rank: 61, ..all[0] };
    assert!(!space.contains(&odd));
    assert_eq!(all[0].to_string(), "(1, 60, 1, layer)");
    let small = Space::default().within(3, 192).candidates().unwrap();
    assert_eq!(small.len(), 6 * 3 * 3 * 2);
    let uneven = Space {
        heads: vec![7, 4, 4],
        ranks: vec![28, 20],
        scopes: vec![1],
        norms: vec![NormChoice::Layer],
    };
    assert_eq!(
        uneven.candidates().unwrap().len(),
        3,
        "heads divide the rank, doubles count once"
    );
}

fn candidate(rank: usize) -> Candidate {
    Candidate {
        heads: 2,
        rank,
        scope: 1,
        norm: NormChoice::Layer,
    }
}

#[test]
fn the_front_keeps_what_nothing_surpasses() {
    let at = |rank, accuracy| trial(&candidate(rank), 20, accuracy);
    // 120 was better when trained for less; only its last training counts.
    let trials = [
        at(120, 0.9),
        at(60, 0.7),
        at(180, 0.8),
        at(120, 0.75),
        at(240, 0.79),
        at(300, 0.8),
    ];
    let ranks: Vec<usize> = front(&trials).iter().map(|t| t.candidate.rank).collect();
    assert_eq!(ranks, [60, 120, 180]);
    assert!(front(&[]).is_empty());
}

#[test]
fn comparisons_count_until_the_common_level() {
    let at = |rank, epochs, accuracy| trial(&candidate(rank), epochs, accuracy);
    let first = [at(60, 20, 0.7), at(120, 20, 0.8), at(180, 20, 0.79)];
    let second = [
        at(60, 5, 0.6),
        at(240, 5, 0.75),
        at(240, 10, 0.81),
        at(240, 20, 0.85),
    ];
    let compared = compare(&Goal::Utility { seconds: 1.0 }, 20, &first, &second).unwrap();
    assert_eq!(compared.accuracy, 0.8);
    assert_eq!(compared.until.map(|s| s.trainings), [2.0, 0.75]);
    assert_eq!(compared.until.map(|s| s.candidates), [2, 2]);
    assert_eq!(compared.until.map(|s| s.seconds), [2.0, 3.0]);
    assert_eq!(compared.total.map(|s| s.trainings), [3.0, 1.25]);
    // At 0.8 the first has the faster candidate, so the second's latency is the level.
    let compared = compare(&Goal::Efficiency { accuracy: 0.8 }, 20, &first, &second).unwrap();
    assert_eq!(compared.latency, Landscape::seconds(&candidate(240)));
    assert_eq!(compared.until.map(|s| s.trainings), [2.0, 0.75]);
    assert_eq!(compare(&Goal::Utility { seconds: 1.0 }, 20, &first, &[]), None);
}

#[test]
fn the_front_is_shown_for_every_network() {
    let trials: Vec<Trial> = [(60, 0.7), (120, 0.75), (180, 0.8)]
        .map(|(r, a)| trial(&candidate(r), 20, a))
        .into();
    let of = |factor: f64| -> BTreeMap<Candidate, f64> {
        trials.iter().map(|t| (t.candidate, factor * t.latency)).collect()
    };
    let mut latencies = Latencies::from([("LAN".into(), of(1.0)), ("<WAN | \"far\">".into(), of(3.0))]);
    latencies.get_mut("LAN").unwrap().remove(&candidate(180));

    let table = markdown(&trials, &latencies);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 5);
    assert_eq!(
        lines[0],
        "| heads | rank | scope | norm | accuracy | epochs | <WAN \\| \"far\">, s | LAN, s |"
    );
    assert_eq!(
        lines[2],
        "| 2 | 60 | 1 | layer | 70.00 % | 20 | 0.1740 | 0.0580 |"
    );
    assert!(lines[4].ends_with("| |"));

    let values = csv(&trials, &latencies);
    let lines: Vec<&str> = values.split("\r\n").collect();
    assert_eq!(
        lines[0],
        "heads,rank,scope,norm,accuracy,epochs,\"<WAN | \"\"far\"\"> (s)\",\"LAN (s)\""
    );
    assert!(lines[3].starts_with("2,180,1,layer,0.8,20,0.21") && lines[3].ends_with(','));

    let picture = svg("CIFAR-10", &trials, &trials, &latencies).unwrap();
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    assert!(picture.contains("CIFAR-10") && picture.contains("&lt;WAN") && !picture.contains("<WAN"));
    let lines = picture
        .split("<polyline")
        .filter(|p| p.contains("stroke-width=\"2\" points"));
    assert_eq!(lines.count(), 2, "a line for each network");
    assert!(svg("none", &[], &[], &latencies).is_err());
    assert!(svg("none", &trials, &[], &Latencies::new()).is_err());
    // A single point, and one that is no number.
    let single = Latencies::from([("LAN".into(), BTreeMap::from([(candidate(60), 0.1)]))]);
    assert!(svg("one", &trials, &trials, &single).is_ok());
    let bad = Latencies::from([("LAN".into(), BTreeMap::from([(candidate(60), f64::NAN)]))]);
    assert!(svg("bad", &trials, &trials, &bad).is_err());
}
