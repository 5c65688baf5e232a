//! Session after session: what provider and dealer have in common as services.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};
use veiltune_hub::files;
use veiltune_wire::Link;
use veiltune_wire::tcp::Listener;

use crate::roles::Role;
use crate::session::{Request, Station};
use crate::{Error, Result};

/// What a service does for whom.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Sessions after which it ends, those that fail included; None: it goes on.
    pub sessions: Option<NonZeroUsize>,
    /// Sessions at the same time.
    pub parallel: NonZeroUsize,
    /// Images a session.
    pub images: NonZeroUsize,
    /// Images a pass, which memory grows with.
    pub batch: NonZeroUsize,
}

impl Limits {
    /// Of the roles of a run that is set up for one session.
    pub const ONE: Limits = Limits {
        sessions: Some(NonZeroUsize::MIN),
        parallel: NonZeroUsize::MIN,
        images: NonZeroUsize::MAX,
        batch: NonZeroUsize::MAX,
    };

    /// Refuses what is too much.
    pub fn check(&self, request: &Request) -> Result<()> {
        let asked = request.batches;
        let refuse = |limit: NonZeroUsize, what: &str, asked: usize| {
            Err(Error::Refused(format!(
                "at most {limit} images a {what} are served here, {asked} are asked for"
            )))
        };
        match () {
            () if asked.images > self.images.get() => refuse(self.images, "session", asked.images),
            () if asked.batch > self.batch => refuse(self.batch, "pass", asked.batch.get()),
            () => Ok(()),
        }
    }
}

/// How many images clients may still have classified. All clients have certificates of one name, so there is one count.
pub struct Budget {
    limit: Option<NonZeroUsize>,
    spent: Mutex<usize>,
    /// Where the count is kept, so that it outlives the service.
    file: Option<PathBuf>,
}

/// The content of a budget's file.
#[derive(Serialize, Deserialize)]
struct Spent {
    images: usize,
}

impl Budget {
    /// `limit` images in all; None: any number. What `file` says is already spent; one that is not there yet says nothing is.
    pub fn open(limit: Option<NonZeroUsize>, file: Option<PathBuf>) -> Result<Budget> {
        let spent = match &file {
            Some(path) if path.exists() => {
                files::read_json::<Spent>(path)
                    .map_err(|e| {
                        Error::Input(format!(
                            "{e}; give a file that an earlier `serve` wrote to --budget-file"
                        ))
                    })?
                    .images
            }
            _ => 0,
        };
        if let Some(limit) = limit {
            if let Some(path) = &file {
                // Before any client is told that it is served.
                let spent = Spent { images: spent };
                files::write_json(path, &spent).map_err(|e| {
                    Error::Input(format!("{e}; give a file that can be written to --budget-file"))
                })?;
            }
            if spent >= limit.get() {
                tracing::warn!(
                    "0 of {limit} images of the budget are left, so every client is refused: give a larger --budget, or another \
                     --budget-file"
                );
            }
        }
        Ok(Budget {
            limit,
            spent: Mutex::new(spent),
            file,
        })
    }

    /// Takes from what is left. It is spent once the session begins, for a client that vanishes may have learned logits.
    pub fn spend(&self, images: usize) -> Result<()> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let left = limit.get().saturating_sub(*spent);
        if images > left {
            return Err(Error::Refused(format!(
                "{left} more images may be classified here, {images} are asked for"
            )));
        }
        if let Some(path) = &self.file {
            // Before anything is answered; what cannot be counted is not served.
            let images = *spent + images;
            files::write_json(path, &Spent { images }).map_err(|e| Error::Input(e.to_string()))?;
        }
        *spent += images;
        Ok(())
    }
}

/// What is done with a link that was accepted.
pub type Play<'a> = &'a (dyn Fn(Arc<dyn Link>) -> Result<()> + Sync);

/// Accepts calls, and plays each client's session on a thread of its own. A provider that calls is handed to `join`, if that
/// is given. Of either there are at most `limits.parallel` at a time. A session that fails is told of, and ends alone.
///
/// # Errors
/// How the session failed, if there was to be only one; that some have, if there were to be more.
pub fn serve(
    station: &Station,
    listener: &Listener,
    limits: &Limits,
    play: Play,
    join: Option<Play>,
) -> Result<()> {
    let (active, joining) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // How many sessions failed, and how the last did: a service may run for long.
    let failures = Mutex::new((0, None));
    let only = limits.sessions == Some(NonZeroUsize::MIN);
    let mut begun = 0;
    thread::scope(|scope| {
        loop {
            let more = limits.sessions.is_none_or(|n| begun < n.get());
            if !more && active.load(SeqCst) == 0 {
                break;
            }
            let mut roles = Vec::new();
            roles.extend(more.then_some(Role::Client));
            roles.extend(join.map(|_| Role::Provider));
            let Some(link) = station.accept(listener, &roles) else {
                continue;
            };
            let from = link.peer().clone();
            let limit = limits.parallel.get();
            // There are never more sessions that wait for their providers.
            let join = join.filter(|_| from == Role::Provider.identity());
            let others = if join.is_some() { &joining } else { &active };
            match join {
                _ if others.load(SeqCst) >= limit => {
                    let busy = format!("busy with {limit} other sessions; try again later");
                    tracing::warn!("sent {from} away: {busy}");
                    link.abort(&busy);
                }
                Some(join) => {
                    joining.fetch_add(1, SeqCst);
                    let joining = Ended(&joining);
                    scope.spawn(move || {
                        let _joining = joining;
                        if let Err(e) = join(link) {
                            tracing::warn!("sent {from} away: {e}");
                        }
                    });
                }
                None => {
                    begun += 1;
                    active.fetch_add(1, SeqCst);
                    let (active, failures) = (Ended(&active), &failures);
                    scope.spawn(move || {
                        let _active = active;
                        if let Err(e) = play(link) {
                            if !only {
                                tracing::warn!("a session with {from} failed: {e}");
                            }
                            let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
                            *failures = (failures.0 + 1, Some(e));
                        }
                    });
                }
            }
        }
    });
    match failures.into_inner().unwrap_or_else(PoisonError::into_inner) {
        (_, None) => Ok(()),
        (_, Some(e)) if only => Err(e),
        (failed, Some(_)) => Err(Error::Sessions { failed, of: begun }),
    }
}

/// Counts a session or a caller out, however it ended.
struct Ended<'a>(&'a AtomicUsize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_never_exceeded_and_outlives_the_service() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("spent.json");
        let open = |file: Option<&PathBuf>| Budget::open(NonZeroUsize::new(5), file.cloned());
        let budget = open(Some(&file)).unwrap();
        budget.spend(3).unwrap();
        let e = budget.spend(3).unwrap_err();
        assert!(
            e.to_string().contains("2 more images") && e.for_peer() == e.to_string(),
            "{e}"
        );

        let budget = open(Some(&file)).unwrap();
        assert!(budget.spend(3).is_err() && budget.spend(usize::MAX).is_err());
        budget.spend(2).unwrap();
        assert!(budget.spend(1).is_err() && open(Some(&file)).unwrap().spend(1).is_err());

        std::fs::write(&file, "[]").unwrap();
        let e = open(Some(&file)).err().unwrap().to_string();
        assert!(e.contains("spent.json") && e.contains("--budget-file"), "{e}");
        // What cannot be counted is not served.
        let nowhere = file.join("spent.json");
        let e = open(Some(&nowhere)).err().unwrap().to_string();
        assert!(e.contains("--budget-file"), "{e}");
        Budget::open(None, None).unwrap().spend(usize::MAX).unwrap();
    }
}
