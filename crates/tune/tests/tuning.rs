//! A whole tuning against a forward pass that is a quadratic landscape.

use std::sync::atomic::{AtomicBool, Ordering};

use veiltune_tune::{
    Cause, Ended, Error, Evaluate, Labels, Loss, Metric, Outcome, Progress, Projection, Prompt, Record,
    Settings, Split, Tuner,
};

const TOKENS: usize = 2;
const HIDDEN: usize = 8;
const DIMENSION: usize = 6;
const TRAIN: [usize; 4] = [0, 1, 0, 1];
const VALIDATION: [usize; 4] = [0, 0, 1, 1];

/// Each example's right logit is the higher the nearer the prompt is to a goal; each example demands a margin of its own.
struct Landscape {
    goal: Vec<f32>,
    /// Calls after which it fails.
    fails_after: usize,
    calls: Vec<(Split, usize)>,
}

impl Landscape {
    fn new() -> Self {
        // Within reach of the projection.
        let goal = projection()
            .prompts(&[vec![2.0, -1.0, 0.5, 1.5, -2.0, 1.0]])
            .remove(0)
            .0;
        Landscape {
            goal,
            fails_after: usize::MAX,
            calls: Vec::new(),
        }
    }
}

impl Evaluate for Landscape {
    fn logits(&mut self, split: Split, prompts: &[Prompt]) -> Result<Vec<f32>, Cause> {
        if self.calls.len() == self.fails_after {
            return Err("the server is gone".into());
        }
        self.calls.push((split, prompts.len()));
        let labels = match split {
            Split::Train => TRAIN,
            Split::Validation => VALIDATION,
            Split::Test => unreachable!("tuning does not look at test examples"),
        };
        let mut logits = Vec::new();
        for prompt in prompts {
            let gaps = prompt.0.iter().zip(&self.goal).map(|(p, g)| (p - g).powi(2));
            let distance: f32 = gaps.sum::<f32>().sqrt();
            for (i, &label) in labels.iter().enumerate() {
                let right = (1.0 + i as f32) - 2.0 * distance;
                logits.extend(if label == 0 { [right, 0.0] } else { [0.0, right] });
            }
        }
        Ok(logits)
    }
}

fn projection() -> Projection {
    Projection::new(TOKENS, HIDDEN, DIMENSION, 1.0, 3).unwrap()
}

fn settings() -> Settings {
    Settings {
        population: 8,
        budget: 320,
        validate_every: 20,
        seed: 11,
        ..Settings::default()
    }
}

fn labels() -> Labels {
    Labels {
        classes: 2,
        train: TRAIN.to_vec(),
        validation: VALIDATION.to_vec(),
    }
}

fn run(tuner: &mut Tuner, landscape: &mut Landscape) -> Result<Outcome, Error> {
    tuner.run(landscape, &AtomicBool::new(false), &mut |_| {})
}

/// Evaluations, scores of training and validation, and step size: the same bits whatever the interruptions.
type Course = Vec<(usize, Option<[u64; 2]>, Option<[u64; 2]>, u64)>;

fn course(history: &[Record]) -> Course {
    let bits = |s: veiltune_tune::Score| [s.loss.to_bits(), s.metric.to_bits()];
    let point = |r: &Record| {
        (
            r.evaluations,
            r.train.map(bits),
            r.validation.map(bits),
            r.sigma.to_bits(),
        )
    };
    history.iter().map(point).collect()
}

#[test]
fn tuning_finds_the_goal_and_says_how() {
    let mut tuner = Tuner::new(settings(), projection(), labels()).unwrap();
    let mut landscape = Landscape::new();
    let mut seen = Vec::new();
    let mut hear = |p: &Progress| {
        assert_eq!((p.budget, p.left.is_some()), (320, p.record.evaluations > 0));
        seen.push(p.record.evaluations);
    };
    let outcome = tuner
        .run(&mut landscape, &AtomicBool::new(false), &mut hear)
        .unwrap();
    assert_eq!(outcome.ended, Ended::Budget);
    assert_eq!(seen, (0..=40).map(|g| 8 * g).collect::<Vec<_>>());
    assert!(
        outcome.initial.metric < 0.6 && outcome.best.score.metric == 1.0,
        "it learns"
    );
    assert!(outcome.best.score.loss < 0.3 * outcome.initial.loss);
    let gaps = outcome
        .prompt
        .0
        .iter()
        .zip(&landscape.goal)
        .map(|(p, g)| (p - g).powi(2));
    assert!(gaps.sum::<f32>().sqrt() < 0.2);

    // A generation is one batch, and validation comes when another 20 evaluations are full, and at the end.
    let of = |split| {
        landscape
            .calls
            .iter()
            .filter(move |(s, _)| *s == split)
            .map(|(_, count)| *count)
    };
    assert!(of(Split::Train).count() == 40 && of(Split::Train).all(|count| count == 8));
    assert!(of(Split::Validation).eq(std::iter::once(1).chain(std::iter::repeat_n(2, 16))));
    let history = serde_json::to_string(tuner.history()).unwrap();
    let back: Vec<Record> = serde_json::from_str(&history).unwrap();
    assert_eq!(course(&back), course(tuner.history()));
    assert!(
        veiltune_tune::plot::svg(&back, "accuracy")
            .unwrap()
            .contains("validation")
    );
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let mut whole = Tuner::new(settings(), projection(), labels()).unwrap();
    let want = run(&mut whole, &mut Landscape::new()).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/checkpoint.json");
    // Died within the first validation, the first generation, later ones, and later validations.
    for fails_after in [0, 1, 7, 5, 3] {
        let mut tuner = Tuner::open(settings(), projection(), labels(), "model", &path).unwrap();
        let mut landscape = Landscape::new();
        landscape.fails_after = fails_after;
        let error = run(&mut tuner, &mut landscape).unwrap_err().to_string();
        assert!(
            error.contains("the server is gone") && error.contains("goes on"),
            "{error}"
        );
    }
    let mut tuner = Tuner::open(settings(), projection(), labels(), "model", &path).unwrap();
    assert!((8..320).contains(&tuner.evaluations()), "{}", tuner.evaluations());
    let found = run(&mut tuner, &mut Landscape::new()).unwrap();
    assert_eq!(course(tuner.history()), course(whole.history()));
    assert_eq!((&found.prompt, &found.best), (&want.prompt, &want.best));

    // A finished run has nothing left to do; a larger budget goes on.
    let mut again = Tuner::open(settings(), projection(), labels(), "model", &path).unwrap();
    let mut idle = Landscape::new();
    assert_eq!(run(&mut again, &mut idle).unwrap().prompt, want.prompt);
    assert!(idle.calls.is_empty());
    let more = Settings {
        budget: 400,
        ..settings()
    };
    let mut longer = Tuner::open(more, projection(), labels(), "model", &path).unwrap();
    run(&mut longer, &mut Landscape::new()).unwrap();
    assert_eq!(longer.evaluations(), 400);
}

#[test]
fn an_interruption_loses_nothing_that_was_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint.json");
    let stop = AtomicBool::new(false);
    let mut tuner = Tuner::open(settings(), projection(), labels(), "model", &path).unwrap();
    let mut interrupt = |p: &Progress| stop.store(p.record.evaluations == 80, Ordering::Relaxed);
    let outcome = tuner.run(&mut Landscape::new(), &stop, &mut interrupt).unwrap();
    assert_eq!((outcome.ended, tuner.evaluations()), (Ended::Interrupted, 80));
    let tuner = Tuner::open(settings(), projection(), labels(), "model", &path).unwrap();
    assert_eq!((tuner.evaluations(), tuner.history().len()), (80, 11));

    // Before the first validation there is no prompt to hand out.
    let mut tuner = Tuner::new(settings(), projection(), labels()).unwrap();
    let mut landscape = Landscape::new();
    let early = tuner.run(&mut landscape, &AtomicBool::new(true), &mut |_| {});
    assert!(matches!(early, Err(Error::Interrupted)) && landscape.calls.is_empty());
}

#[test]
fn a_run_is_what_was_planned() {
    for (population, budget, validate_every) in [
        (8, 320, 20),
        (8, 30, 100),
        (6, 18, 6),
        (6, 24, 5),
        (7, 3, 3),
        (4, 16, 8),
    ] {
        let settings = Settings {
            population,
            budget,
            validate_every,
            ..settings()
        };
        let planned = settings.planned();
        let mut landscape = Landscape::new();
        run(
            &mut Tuner::new(settings, projection(), labels()).unwrap(),
            &mut landscape,
        )
        .unwrap();
        let of = |split| landscape.calls.iter().filter(move |(s, _)| *s == split);
        assert_eq!(of(Split::Train).count() as u64, planned.generations);
        assert_eq!(of(Split::Validation).count() as u64, planned.validations);
        assert_eq!(
            of(Split::Validation).map(|(_, n)| *n as u64).sum::<u64>(),
            planned.validated
        );
    }
}

#[test]
fn patience_ends_a_run_that_does_not_get_better() {
    /// Whatever the prompt, the same.
    struct Flat;
    impl Evaluate for Flat {
        fn logits(&mut self, _: Split, prompts: &[Prompt]) -> Result<Vec<f32>, Cause> {
            Ok(vec![0.5; prompts.len() * 8])
        }
    }
    let settings = Settings {
        patience: Some(3),
        ..settings()
    };
    let mut tuner = Tuner::new(settings, projection(), labels()).unwrap();
    let outcome = tuner
        .run(&mut Flat, &AtomicBool::new(false), &mut |_| {})
        .unwrap();
    assert_eq!((outcome.ended, tuner.evaluations()), (Ended::Patience, 64));
    assert_eq!(outcome.best.evaluations, 0, "the initial prompt is as good");
    assert!(outcome.prompt.0.iter().all(|p| *p == 0.0));
}

#[test]
fn another_runs_checkpoint_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint.json");
    let short = Settings {
        budget: 8,
        ..settings()
    };
    let mut tuner = Tuner::open(short, projection(), labels(), "model", &path).unwrap();
    run(&mut tuner, &mut Landscape::new()).unwrap();
    let open = |settings, identity| match Tuner::open(settings, projection(), labels(), identity, &path) {
        Ok(_) => panic!("taken"),
        Err(e) => e.to_string(),
    };
    assert!(open(settings(), "other").contains("checkpoint.json: the checkpoint is of another model"));
    let hinge = Settings {
        loss: Loss::Hinge { margin: 2.0 },
        ..settings()
    };
    assert!(open(hinge, "model").contains("other settings"));

    let text = std::fs::read_to_string(&path).unwrap();
    let damaged = [
        (
            text.replacen("\"version\":1", "\"version\":9", 1),
            "another version",
        ),
        (text[..text.len() / 2].to_owned(), "start in another folder"),
        (
            text.replacen("\"history\":[{", "\"history\":[],\"was\":[{", 1),
            "do not fit together",
        ),
        (
            text.replacen("\"population\":8,\"seed\"", "\"population\":9,\"seed\"", 1),
            "do not fit together",
        ),
    ];
    for (content, part) in damaged {
        assert_ne!(content, text);
        std::fs::write(&path, content).unwrap();
        let error = open(settings(), "model");
        assert!(
            error.contains("checkpoint.json") && error.contains(part),
            "{error}"
        );
    }
}

#[test]
fn a_forward_pass_that_breaks_its_word_is_an_error_and_leaves_no_trace() {
    struct Wrong(Vec<f32>);
    impl Evaluate for Wrong {
        fn logits(&mut self, split: Split, prompts: &[Prompt]) -> Result<Vec<f32>, Cause> {
            let train = split == Split::Train;
            Ok(if train {
                self.0.clone()
            } else {
                vec![0.0; 8 * prompts.len()]
            })
        }
    }
    let error = |logits| {
        let mut tuner = Tuner::new(settings(), projection(), labels()).unwrap();
        let outcome = tuner.run(&mut Wrong(logits), &AtomicBool::new(false), &mut |_| {});
        assert_eq!((tuner.evaluations(), tuner.history().len()), (0, 1));
        outcome.unwrap_err().to_string()
    };
    assert!(error(vec![0.0; 63]).contains("63 logits, not 64"));
    assert!(error(vec![f32::NAN; 64]).contains("none of the generation's losses"));
}

#[test]
fn settings_and_labels_that_make_no_sense_are_refused() {
    let refused = |settings: Settings, labels: Labels| match Tuner::new(settings, projection(), labels) {
        Ok(_) => panic!("taken"),
        Err(e) => e.to_string(),
    };
    let with = |change: &dyn Fn(&mut Settings)| {
        let mut settings = settings();
        change(&mut settings);
        refused(settings, labels())
    };
    assert!(with(&|s| s.validate_every = 0).contains("every 0"));
    assert!(with(&|s| s.patience = Some(0)).contains("patience"));
    assert!(with(&|s| s.population = 1).contains("population of 1"));
    assert!(with(&|s| s.budget = 0).contains("budget of 0"));
    assert!(with(&|s| s.sigma = -1.0).contains("step size"));
    assert!(with(&|s| s.loss = Loss::Hinge { margin: f64::NAN }).contains("margin"));
    assert!(with(&|s| s.metric = Metric::F1 { positive: 2 }).contains("label 2 of 2"));
    let none = Labels {
        train: vec![],
        ..labels()
    };
    assert!(refused(settings(), none).contains("one training example"));
    assert_eq!(format!("{:?}", labels()), "Labels[4 + 4 of 2]");
}
