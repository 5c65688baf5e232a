//! Running the built binary, with a limit to how long it may take.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod artefact;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Nothing takes longer, however busy the machine is.
pub const LIMIT: Duration = Duration::from_secs(120);

/// The embedded model and pictures, as files.
pub fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo")
}

/// Some of the embedded pictures.
pub fn pictures(names: &[&str]) -> Vec<PathBuf> {
    names
        .iter()
        .map(|name| assets().join("images").join(name))
        .collect()
}

pub fn veiltune() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_veiltune"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_remove("RUST_LOG");
    command
}

pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn json(&self) -> serde_json::Value {
        assert!(self.status.success(), "{}", self.stderr);
        assert_eq!(
            self.stdout.lines().count(),
            1,
            "one object alone: {}",
            self.stdout
        );
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// The message of a command that failed with `code`: one line that holds each of `parts`.
    pub fn explains(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.status.code(), Some(code), "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "", "a failure prints no result");
        let last = self.stderr.lines().last().unwrap_or("");
        assert!(last.starts_with("veiltune: "), "{}", self.stderr);
        for part in parts {
            assert!(last.contains(part), "{part:?} is not in {last:?}");
        }
    }
}

/// A process that is running.
pub struct Running {
    pub child: Child,
    readers: [thread::JoinHandle<String>; 2],
}

pub fn start(command: &mut Command) -> Running {
    let mut child = command.spawn().unwrap();
    fn reader(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
    }
    let readers = [
        reader(child.stdout.take().unwrap()),
        reader(child.stderr.take().unwrap()),
    ];
    Running { child, readers }
}

impl Running {
    /// Waits for the end; a process that is still there at the limit hangs, and fails the test.
    pub fn end(mut self, limit: Duration) -> Output {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > limit => {
                    self.child.kill().unwrap();
                    let [_, stderr] = self.readers.map(|r| r.join().unwrap());
                    panic!("still running after {limit:?}: {stderr}");
                }
                None => thread::sleep(Duration::from_millis(10)),
            }
        };
        let [stdout, stderr] = self.readers.map(|r| r.join().unwrap());
        Output {
            status,
            stdout,
            stderr,
        }
    }
}

pub fn run(command: &mut Command) -> Output {
    start(command).end(LIMIT)
}

/// Waits until `condition` gives something.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < limit, "no {what} within {limit:?}");
        thread::sleep(Duration::from_millis(5));
    }
}
