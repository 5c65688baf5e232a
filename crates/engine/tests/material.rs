//! Material in files: a run from files equals a run from the dealer; a file serves its party and program once.

mod world;

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use veiltune_engine::material::{DealId, FileSink, FileSource, Label, Sink};
use veiltune_engine::session::{self, MaterialFrom, PartySession};
use veiltune_engine::{Activation, Comparison, Error, Owner, Party, Range, Result, Revealed};
use veiltune_ring::Ring;
use veiltune_ring::prg::Seed;
use veiltune_wire::{Identity, Link, Options, memory};
use world::{DIMS, Ends, Job, Roles, Verb, run};

const PARTIES: [Party; 2] = [Party::P0, Party::P1];

fn job() -> Job {
    Job::new(Verb::Activation(Activation::Gelu, Range::Guarded(6.4))).of(Owner::Party(Party::P0))
}

fn values() -> Vec<f32> {
    (0..DIMS[0] * DIMS[1]).map(|i| (i as f32 - 60.0) / 7.0).collect()
}

fn seeds() -> [Seed; 2] {
    [3, 4].map(|b| Seed::from_bytes([b; 16]))
}

fn labels(job: &Job, passes: usize) -> [Label; 2] {
    let program = session::plan(job, passes).expect("a plan").program;
    PARTIES.map(|party| Label { party, program })
}

fn paths(dir: &TempDir) -> [PathBuf; 2] {
    ["p0.material", "p1.material"].map(|name| dir.path().join(name))
}

/// Deals into two files.
fn deal(dir: &TempDir, job: &Job, passes: usize) -> [PathBuf; 2] {
    let (paths, labels, seeds) = (paths(dir), labels(job, passes), seeds());
    let deal_id = DealId::random().expect("a name");
    let sink = |i: usize| {
        Box::new(FileSink::create(&paths[i], &labels[i], deal_id, &seeds[i]).expect("a new file"))
            as Box<dyn Sink>
    };
    session::deal(job, passes, seeds.clone(), [sink(0), sink(1)], |_| Ok(())).expect("dealt");
    paths
}

fn open(paths: &[PathBuf; 2], job: &Job, passes: usize) -> [(FileSource, Seed); 2] {
    let labels = labels(job, passes);
    [0, 1].map(|i| FileSource::open(&paths[i], &labels[i]).expect("good material"))
}

/// Runs both parties with material of their own.
fn consume(job: &Job, sources: [(FileSource, Seed); 2], passes: usize) -> [Result<Vec<Option<Revealed>>>; 2] {
    let names = ["p0", "p1"].map(|name| Identity::new(name).expect("a good name"));
    let (a, b) = memory::pair_with(
        &names[0],
        &names[1],
        &Options {
            patience: Duration::from_secs(20),
            ..Options::default()
        },
    );
    let Roles { parties, shares, .. }: Roles = job.roles(&values());
    let ends: [Arc<dyn Link>; 2] = [Arc::new(a), Arc::new(b)];
    let party = |i: usize, (source, seed): (FileSource, Seed), peer, shares: VecDeque<Ring>| {
        let program = parties[i].clone();
        let material = MaterialFrom::Source(Box::new(source), seed);
        let session = PartySession {
            party: PARTIES[i],
            peer,
            material,
            ahead: None,
            outside: Box::new(shares),
        };
        move || {
            let mut outputs = Vec::new();
            session.run(&program, passes, |_, output| {
                outputs.push(output);
                Ok(())
            })?;
            Ok(outputs)
        }
    };
    let ([first, second], [s0, s1], [e0, e1]) = (sources, shares, ends);
    std::thread::scope(|scope| {
        let first = scope.spawn(party(0, first, e0, s0));
        let second = scope.spawn(party(1, second, e1, s1));
        [first.join().expect("no panic"), second.join().expect("no panic")]
    })
}

/// The message of the refusal.
fn refused(path: &Path, label: &Label) -> String {
    match FileSource::open(path, label) {
        Err(Error::File(message)) => message,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("{} was taken", path.display()),
    }
}

#[test]
fn a_run_from_files_equals_a_run_from_the_dealer() {
    for job in [job(), job().by(Comparison::MaskedBits), Job::new(Verb::Softmax)] {
        let job = Job {
            owner: Owner::Party(Party::P0),
            ..job
        };
        let dir = TempDir::new().expect("a directory");
        let paths = deal(&dir, &job, 3);
        let [first, second] =
            consume(&job, open(&paths, &job, 3), 3).map(|outputs| outputs.expect("a good run"));
        let live = run(
            job.roles(&values()),
            Ends::new(Duration::from_secs(20)),
            3,
            Some(seeds()),
        )
        .unwrap();
        assert_eq!(first, live[0].0);
        assert!(first.iter().all(Option::is_some) && second.iter().all(Option::is_none));
        assert_eq!(
            fs::read_dir(dir.path()).expect("a directory").count(),
            0,
            "consumed files are gone"
        );
    }
}

#[test]
fn material_serves_once() {
    let dir = TempDir::new().expect("a directory");
    let paths = deal(&dir, &job(), 1);
    let label = &labels(&job(), 1)[0];
    drop(FileSource::open(&paths[0], label).expect("good material"));
    let message = refused(&paths[0], label);
    assert!(
        message.contains("exactly once") && message.contains("p0.material"),
        "{message}"
    );
    // Of many who want it at once, one gets it.
    let label = &labels(&job(), 1)[1];
    let got = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| FileSource::open(&paths[1], label).is_ok()))
            .collect();
        tries
            .into_iter()
            .map(|t| t.join().expect("no panic"))
            .filter(|got| *got)
            .count()
    });
    assert_eq!(got, 1);
}

#[test]
fn what_is_refused_is_not_consumed() {
    let dir = TempDir::new().expect("a directory");
    let paths = deal(&dir, &job(), 2);
    let [first, second] = labels(&job(), 2);
    let [other, _] = labels(&Job::new(Verb::Relu), 2);
    let [fewer, _] = labels(&job(), 1);
    let [bits, _] = labels(&job().by(Comparison::MaskedBits), 2);
    for wrong in [&second, &other, &fewer, &bits] {
        let message = refused(&paths[0], wrong);
        assert!(message.contains("another party or another program"), "{message}");
    }
    FileSource::open(&paths[0], &first).expect("still there");
}

#[test]
fn damage_is_found_before_anything_is_used() {
    let dir = TempDir::new().expect("a directory");
    let paths = deal(&dir, &job(), 1);
    let label = &labels(&job(), 1)[1];
    let good = fs::read(&paths[1]).expect("a file");
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let length = good.len();
    let mut bad: Vec<Vec<u8>> = [
        0,
        15,
        16,
        17,
        48,
        49,
        64,
        65,
        length / 2,
        length - 33,
        length - 32,
        length - 1,
    ]
    .map(flipped)
    .into();
    bad.extend([0, 1, 64, 65, 96, 97, length / 2, length - 1].map(|len| good[..len].to_vec()));
    bad.push([&good[..], &[0]].concat());
    for (i, bytes) in bad.iter().enumerate() {
        fs::write(&paths[1], bytes).expect("written");
        let message = refused(&paths[1], label);
        assert!(
            message.contains("not a complete material file"),
            "damage {i}: {message}"
        );
    }
    fs::write(&paths[1], &good).expect("written");
    FileSource::open(&paths[1], label).expect("whole again");
}

#[cfg(unix)]
#[test]
fn only_the_owner_may_read_it() {
    use std::os::unix::fs::PermissionsExt;
    let dir = TempDir::new().expect("a directory");
    for path in deal(&dir, &job(), 1) {
        let mode = fs::metadata(path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[test]
fn a_dealer_that_fails_leaves_nothing_under_the_name() {
    let dir = TempDir::new().expect("a directory");
    let (paths, labels, seeds) = (paths(&dir), labels(&job(), 2), seeds());
    let deal_id = DealId::random().expect("a name");
    let create = |i: usize| FileSink::create(&paths[i], &labels[i], deal_id, &seeds[i]);
    let sinks = [0, 1].map(|i| Box::new(create(i).expect("a new file")) as Box<dyn Sink>);
    let failed = session::deal(&job(), 2, seeds.clone(), sinks, |passes| match passes {
        1 => Err(Error::Stopped("the test")),
        _ => Ok(()),
    });
    assert!(matches!(failed, Err(Error::Stopped("the test"))));
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);

    // Killed: what is left is not taken for material, and says how to go on.
    std::mem::forget(create(0).expect("a new file"));
    assert!(!paths[0].exists());
    assert!(refused(&paths[0], &labels[0]).contains("no such material"));
    let message = create(0).err().expect("in the way").to_string();
    assert!(message.contains("was killed"), "{message}");
}

#[test]
fn material_is_never_overwritten() {
    let dir = TempDir::new().expect("a directory");
    let paths = deal(&dir, &job(), 1);
    let before = fs::read(&paths[0]).expect("a file");
    let [label, _] = labels(&job(), 1);
    let message = FileSink::create(&paths[0], &label, DealId::random().expect("a name"), &seeds()[0])
        .err()
        .expect("in the way")
        .to_string();
    assert!(message.contains("never overwritten"), "{message}");
    assert_eq!(fs::read(&paths[0]).expect("a file"), before);
}

#[test]
fn material_for_fewer_passes_runs_out() {
    let dir = TempDir::new().expect("a directory");
    let paths = deal(&dir, &job(), 2);
    let start = Instant::now();
    // Whoever opens it for two passes, but runs three.
    let ended = consume(&job(), open(&paths, &job(), 2), 3);
    let errors = ended.map(|e| e.expect_err("too little"));
    let used_up = |e: &Error| matches!(e, Error::File(message) if message.contains("used up"));
    let told = |e: &Error| matches!(e, Error::Wire(veiltune_wire::Error::PeerAborted { .. }));
    assert!(
        errors.iter().any(used_up) && errors.iter().all(|e| used_up(e) || told(e)),
        "{errors:?}"
    );
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(paths.iter().all(|p| !p.exists()), "spent all the same");
}

#[test]
fn material_of_two_deals_does_not_mix() {
    let (first, second) = (
        TempDir::new().expect("a directory"),
        TempDir::new().expect("a directory"),
    );
    let mine = open(&deal(&first, &job(), 1), &job(), 1);
    let other = open(&deal(&second, &job(), 1), &job(), 1);
    let ([p0, _], [_, p1]) = (mine, other);
    for result in consume(&job(), [p0, p1], 1) {
        let message = result.expect_err("must be refused").to_string();
        assert!(message.contains("deal"), "{message}");
    }
}
