//! The processes of a run: started, listened to, and ended whatever happens.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::events::{Event, Rank};
use crate::progress::Progress;
use crate::roles::Role;
use crate::{Error, Result};

/// After the first failure the other roles have this long to say what they saw of it.
const GRACE: Duration = Duration::from_secs(3);

/// The processes of one run. Dropping it ends all of them.
pub struct Crew {
    members: Vec<Member>,
    sender: Sender<Message>,
    inbox: Receiver<Message>,
    failures: Vec<(Rank, Error)>,
}

struct Member {
    role: Role,
    child: Child,
    /// How it ended, once it has.
    ended: Option<ExitStatus>,
    /// It has told its failure itself.
    explained: bool,
}

enum Message {
    Event(Role, Event),
    /// A line for the log.
    Log(Role, String),
    /// The role's standard output has ended, and so has the role.
    Ended(Role),
    Interrupted,
}

impl Crew {
    /// Nobody yet. From now on an interruption ends the run in good order.
    pub fn new() -> Result<Crew> {
        let (sender, inbox) = mpsc::channel();
        let interrupt = sender.clone();
        ctrlc::set_handler(move || _ = interrupt.send(Message::Interrupted)).map_err(|e| Error::Io {
            what: "catching interruptions".into(),
            source: std::io::Error::other(e),
        })?;
        Ok(Crew {
            members: Vec::new(),
            sender,
            inbox,
            failures: Vec::new(),
        })
    }

    /// Starts `role` as its configuration file says.
    pub fn start(&mut self, role: Role, config: &Path) -> Result<()> {
        let failed = || Error::io(format!("starting the {}", role.name()));
        let mut command = Command::new(std::env::current_exe().map_err(failed())?);
        command.args(["role", role.name(), "--config"]).arg(config);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if std::env::var_os(THREADS).is_none() {
            // Both parties compute at the same time on this one machine.
            let cores = thread::available_parallelism().map_or(1, usize::from);
            command.env(THREADS, (cores / 2).max(1).to_string());
        }
        // Ctrl-C reaches this process alone, which then ends the others.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().map_err(failed())?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        self.members.push(Member {
            role,
            child,
            ended: None,
            explained: false,
        });
        let (events, log) = (self.sender.clone(), self.sender.clone());
        let logger = thread::spawn(move || {
            stderr
                .into_iter()
                .flat_map(lines)
                .for_each(|line| _ = log.send(Message::Log(role, line)));
        });
        thread::spawn(move || {
            for line in stdout.into_iter().flat_map(lines) {
                let message = match serde_json::from_str(&line) {
                    Ok(event) => Message::Event(role, event),
                    Err(_) => Message::Log(role, line),
                };
                let _ = events.send(message);
            }
            // Its last words come before its end.
            let _ = logger.join();
            let _ = events.send(Message::Ended(role));
        });
        Ok(())
    }

    /// Waits until `role` tells where it can be called.
    pub fn address(&mut self, role: Role, progress: &Progress) -> Result<SocketAddr> {
        let mut found = None;
        self.listen(progress, |from, event| {
            if let (true, Event::Listening { address }) = (from == role, event) {
                found = Some(address);
            }
            found.is_some()
        })?;
        found.ok_or_else(|| role_error(role, "it ended before it listened".into(), 1))
    }

    /// Hands `take` every event until it has enough, or until all roles have ended.
    ///
    /// # Errors
    /// The first cause, if a role fails; by then all of them have ended.
    pub fn listen(&mut self, progress: &Progress, mut take: impl FnMut(Role, Event) -> bool) -> Result<()> {
        let mut deadline: Option<Instant> = None;
        while self.members.iter().any(|m| m.ended.is_none()) {
            if !self.failures.is_empty() {
                deadline.get_or_insert_with(|| Instant::now() + GRACE);
            }
            let message = match deadline {
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => self
                    .inbox
                    .recv_timeout(deadline.saturating_duration_since(Instant::now())),
            };
            match message {
                Ok(Message::Event(role, Event::Failed { message, code, rank })) => {
                    self.member(role).explained = true;
                    self.failures.push((rank, role_error(role, message, code)));
                }
                Ok(Message::Event(Role::Client | Role::Dealer, Event::Progress { stage, done, total })) => {
                    progress.at(stage, done, total);
                }
                Ok(Message::Event(role, event)) => {
                    if take(role, event) {
                        return Ok(());
                    }
                }
                Ok(Message::Log(role, line)) => progress.log(&format!("{}: {line}", role.name())),
                Ok(Message::Ended(role)) => self.bury(role)?,
                Ok(Message::Interrupted) => {
                    self.end();
                    return Err(Error::Interrupted);
                }
                Err(_) => break,
            }
        }
        // Of equally likely ones the first that was heard of.
        self.failures.sort_by_key(|(rank, _)| *rank);
        if self.failures.is_empty() {
            return Ok(());
        }
        self.end();
        Err(self.failures.remove(0).1)
    }

    /// Whether the user wants to stop.
    pub fn check(&self) -> Result<()> {
        match self
            .inbox
            .try_iter()
            .any(|message| matches!(message, Message::Interrupted))
        {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    fn bury(&mut self, role: Role) -> Result<()> {
        let member = self.member(role);
        let status = member
            .child
            .wait()
            .map_err(Error::io(format!("waiting for the {}", role.name())))?;
        member.ended = Some(status);
        if !status.success() && !member.explained {
            let how =
                format!("it was killed or crashed ({status}); run again with RUST_LOG=info to see more");
            self.failures.push((Rank::Cause, role_error(role, how, 1)));
        }
        Ok(())
    }

    fn member(&mut self, role: Role) -> &mut Member {
        self.members
            .iter_mut()
            .find(|m| m.role == role)
            .expect("messages come from members")
    }

    /// Ends whoever still runs.
    fn end(&mut self) {
        for member in self.members.iter_mut().filter(|m| m.ended.is_none()) {
            let _ = member.child.kill();
            member.ended = member.child.wait().ok();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.end();
    }
}

/// Number of threads that a process computes with.
const THREADS: &str = "RAYON_NUM_THREADS";

fn role_error(role: Role, message: String, code: u8) -> Error {
    Error::Role {
        role: role.name(),
        message,
        code,
    }
}

fn lines(stream: impl std::io::Read) -> impl Iterator<Item = String> {
    BufReader::new(stream)
        .split(b'\n')
        .map_while(|line| line.ok())
        .map(|l| String::from_utf8_lossy(&l).into_owned())
}
