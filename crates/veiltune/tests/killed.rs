//! Whatever is killed, nothing stays: no process, no file, no doubt about why.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{LIMIT, Running, start, veiltune, wait_for};

/// More than a run needs to notice, explain and clean up.
const PROMPTLY: Duration = Duration::from_secs(20);

/// A demo that takes a minute, with its temporary files in `dir`.
fn slow_demo(dir: &Path) -> Running {
    start(
        veiltune()
            .args(["demo", "--json", "--batch", "1", "--network", "100:40000"])
            .env("TMPDIR", dir),
    )
}

/// The processes that `parent` has started and not yet collected: which role, and its number.
fn roles(parent: &Running) -> Vec<(String, u32)> {
    let pids = fs::read_to_string(format!("/proc/{0}/task/{0}/children", parent.child.id())).unwrap();
    let name = |pid: &str| {
        Some(
            fs::read_to_string(format!("/proc/{pid}/cmdline"))
                .ok()?
                .split('\0')
                .nth(2)?
                .to_owned(),
        )
    };
    pids.split_whitespace()
        .filter_map(|pid| Some((name(pid)?, pid.parse().unwrap())))
        .collect()
}

/// All of them, once `role` is among them.
fn roles_with(parent: &Running, role: &str) -> Vec<(String, u32)> {
    wait_for(role, LIMIT, || {
        Some(roles(parent)).filter(|all| all.iter().any(|(name, _)| name == role))
    })
}

fn kill(signal: &str, pid: u32) {
    assert!(
        Command::new("kill")
            .args([signal, &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
}

fn is_gone(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie has no resources, but somebody must still collect it.
    status.is_empty() || status.contains(") Z ")
}

fn nothing_in(dir: &Path) {
    let left: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn when_a_role_is_killed_the_others_end_and_the_cause_is_told() {
    // At once, and in the middle of the private computation.
    let computing = Some(Duration::from_secs(2));
    let moments = [
        ("dealer", None),
        ("provider", None),
        ("client", None),
        ("provider", computing),
        ("client", computing),
    ];
    for (victim, moment) in moments {
        let dir = tempfile::tempdir().unwrap();
        let demo = slow_demo(dir.path());
        if let Some(moment) = moment {
            roles_with(&demo, "client");
            std::thread::sleep(moment);
        }
        let all = roles_with(&demo, victim);
        kill("-KILL", all.iter().find(|(name, _)| name == victim).unwrap().1);
        let out = demo.end(PROMPTLY);
        out.explains(1, &[&format!("{victim}: it was killed"), "signal: 9"]);
        assert!(all.into_iter().all(|(_, pid)| is_gone(pid)));
        nothing_in(dir.path());
    }
}

#[test]
fn an_interruption_ends_everything() {
    for signal in ["-INT", "-TERM"] {
        let dir = tempfile::tempdir().unwrap();
        let demo = slow_demo(dir.path());
        let all = roles_with(&demo, "client");
        kill(signal, demo.child.id());
        demo.end(PROMPTLY).explains(130, &["interrupted"]);
        assert!(all.into_iter().all(|(_, pid)| is_gone(pid)));
        nothing_in(dir.path());
    }
}

#[test]
fn roles_end_with_the_process_that_started_them() {
    let dir = tempfile::tempdir().unwrap();
    let demo = slow_demo(dir.path());
    let all = roles_with(&demo, "client");
    kill("-KILL", demo.child.id());
    assert!(!demo.end(PROMPTLY).status.success());
    for (_, pid) in all {
        wait_for("end of a role", PROMPTLY, || is_gone(pid).then_some(()));
    }
}

#[test]
fn an_interrupted_dealer_leaves_no_partial_material() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("material");
    let deal = start(
        veiltune()
            .args(["deal", "--images", "3000", "--batch", "1", "--out"])
            .arg(&out),
    );
    wait_for("material", LIMIT, || {
        out.join("client.partial").exists().then_some(())
    });
    kill("-INT", deal.child.id());
    deal.end(PROMPTLY).explains(130, &["interrupted"]);
    nothing_in(&out);
}

#[test]
fn a_dealer_whose_errors_nobody_reads_ends_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    let made = veiltune().arg("keys").arg("--out").arg(&keys).output().unwrap();
    assert!(made.status.success());
    for signal in ["-INT", "-TERM"] {
        let mut child = veiltune()
            .args(["dealer", "--listen", "127.0.0.1:0", "--keys"])
            .arg(keys.join("dealer"))
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.starts_with("listening"), "{line}");
        drop(child.stderr.take());
        kill(signal, child.id());
        let status = wait_for("the dealer's end", PROMPTLY, || child.try_wait().unwrap());
        assert_eq!(status.code(), Some(130), "{signal}");
    }
}
