//! The predicted memory of a session against what the operating system counts. One test, so that nothing else is counted
//! in this process.
#![cfg(target_os = "linux")]

mod world;

use std::time::Duration;

use veiltune_engine::{NormKind, Party, session};
use world::{Ends, Job, Verb, run};

/// Bytes of the process at its peak.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a process has a status");
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).expect("a peak");
    let kilobytes: u64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("a number");
    kilobytes << 10
}

#[test]
fn memory_is_as_predicted() {
    let job = Job::new(Verb::NormalizeOfSquare(NormKind::Layer)).dims(&[1024, 1024]);
    let memory = session::plan(&job, 1).expect("a plan").tally.memory;
    // As many gates ahead as the session below allows.
    let predicted = memory.dealer()
        + [Party::P0, Party::P1]
            .map(|p| memory.party(p, Some(2)))
            .iter()
            .sum::<u64>();
    let values: Vec<f32> = (0..1 << 20).map(|i| (i as f32 * 0.7).sin() * 2.0).collect();
    let roles = job.roles(&values);
    let before = peak();
    run(roles, Ends::new(Duration::from_secs(60)), 1, None).unwrap();
    let used = peak() - before;
    eprintln!("{predicted} predicted, {used} used: {memory:?}");
    // Within a factor of two, beside what links have under way.
    assert!(
        used < 2 * predicted && predicted < 2 * used,
        "{predicted} predicted, {used} used"
    );
}
