//! Material in files: a run from files equals a run from the dealer; a file serves its party and program once.

mod world;

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use veiltune_engine::material::{DealId, FileSink, FileSource, Label, Sink, Source};
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

/// Bytes before and after the body of a material file, beside four for each 64 KiB of it.
const AROUND: [usize; 2] = [85, 12];

/// A file of so many bytes of body, put in pieces of 1, 2, 4, ... bytes; and the body.
fn file_of(dir: &TempDir, body: usize) -> (PathBuf, Label, Vec<u8>) {
    let (path, [label, _], [seed, _]) = (dir.path().join("body.material"), labels(&job(), 1), seeds());
    let bytes: Vec<u8> = (0..body).map(|i| (i * i / 7 + i / 65_536) as u8).collect();
    let deal = DealId::random().expect("a name");
    let mut sink = FileSink::create(&path, &label, deal, &seed).expect("a new file");
    let (mut rest, mut size) = (&bytes[..], 1);
    while !rest.is_empty() {
        let (piece, later) = rest.split_at(size.min(rest.len()));
        sink.put(piece).expect("put");
        (rest, size) = (later, 2 * size);
    }
    sink.finish().expect("finished");
    (path, label, bytes)
}

#[test]
fn what_is_put_is_taken_in_pieces_of_any_size() {
    let dir = TempDir::new().expect("a directory");
    for body in [0, 1, 65_535, 65_536, 65_537, 131_072, 400_000] {
        for size in [1, 1000, 65_536, 70_000, 200_000] {
            let (path, label, bytes) = file_of(&dir, body);
            let length = fs::metadata(&path).expect("a file").len() as usize;
            assert_eq!(length, AROUND[0] + body + 4 * body.div_ceil(65_536) + AROUND[1]);
            let (mut source, _) = FileSource::open(&path, &label).expect("good material");
            let mut taken = vec![0; body];
            for piece in taken.chunks_mut(size) {
                source.take(piece).expect("enough");
            }
            assert!(taken == bytes, "{body} bytes in pieces of {size}");
            let message = source.take(&mut [0]).expect_err("nothing left").to_string();
            assert!(message.contains("used up"), "{message}");
        }
    }
}

#[test]
fn a_file_that_is_not_whole_is_refused() {
    let dir = TempDir::new().expect("a directory");
    let (path, label, bytes) = file_of(&dir, 400_000);
    let good = fs::read(&path).expect("a file");
    let (start, length) = (AROUND[0], good.len());
    let end = start + bytes.len();
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let mut bad: Vec<Vec<u8>> = (0..start).chain(end..length).map(flipped).collect();
    bad.extend([0, 1, start, 96, 97, length / 2, length - 1].map(|len| good[..len].to_vec()));
    bad.push([&good[..], &[0]].concat());
    bad.push([&good[..end - 1], &good[end..]].concat());
    for (i, bytes) in bad.iter().enumerate() {
        fs::write(&path, bytes).expect("written");
        let message = refused(&path, &label);
        assert!(
            message.contains("not a complete material file"),
            "damage {i}: {message}"
        );
    }
    fs::write(&path, &good).expect("written");
    FileSource::open(&path, &label).expect("whole again");
}

#[test]
fn damage_is_found_before_anything_of_it_is_used() {
    let dir = TempDir::new().expect("a directory");
    let body = 400_000;
    for at in [0, 1, 65_535, 65_536, 200_000, body - 1] {
        for size in [1, 1000, 65_536, 70_000, body] {
            let (path, label, bytes) = file_of(&dir, body);
            let mut file = fs::read(&path).expect("a file");
            file[AROUND[0] + at] ^= 1;
            fs::write(&path, file).expect("written");
            let (mut source, _) = FileSource::open(&path, &label).expect("all there");
            let mut good = 0;
            let message = loop {
                let mut piece = vec![0; size.min(body - good)];
                if let Err(e) = source.take(&mut piece) {
                    break e.to_string();
                }
                assert!(piece == bytes[good..good + piece.len()], "good so far");
                good += piece.len();
                assert!(good <= at, "byte {at} in pieces of {size} was handed out");
            };
            assert!(message.contains("damaged since it was made"), "{message}");
            fs::remove_file(&path).expect_err("opening removed it");
        }
    }
}

#[test]
fn a_run_on_damaged_material_ends_on_both_sides() {
    let dir = TempDir::new().expect("a directory");
    let paths = deal(&dir, &job(), 1);
    let mut file = fs::read(&paths[1]).expect("a file");
    let at = file.len() / 2;
    file[at] ^= 1;
    fs::write(&paths[1], file).expect("written");
    let ended = consume(&job(), open(&paths, &job(), 1), 1);
    let errors = ended.map(|e| e.expect_err("damaged").to_string());
    assert!(errors[1].contains("damaged since it was made"), "{errors:?}");
    // The other one is told who has to act, and no name of a file.
    assert!(
        errors[0].contains("a file of its own cannot be used"),
        "{errors:?}"
    );
    assert!(!errors[0].contains(&*dir.path().to_string_lossy()), "{errors:?}");
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
    let errors = consume(&job(), [p0, p1], 1).map(|r| r.expect_err("must be refused"));
    let noticed = |e: &Error| matches!(e, Error::File(message) if message.contains("deal"));
    let told = |e: &Error| matches!(e, Error::Wire(veiltune_wire::Error::PeerAborted { .. }));
    assert!(
        errors.iter().any(noticed) && errors.iter().all(|e| noticed(e) || told(e)),
        "{errors:?}"
    );
}
