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
use crate::session::{Request, SessionId, Station};
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

/// What is done for a caller that has asked for something.
pub type Play<'a> = &'a (dyn Fn(Arc<dyn Link>, SessionId, Request) -> Result<()> + Sync);

/// Most callers that have yet to ask for anything.
const ASKING: usize = 64;

/// Accepts calls, and plays each client's session on a thread of its own, at most `limits.parallel` at a time. A provider that
/// calls is handed to `join`, if that is given. A session that fails is told of, and ends alone; a caller that hangs up before
/// it asks for anything has looked whether anybody is here.
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
    let (asking, active) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let sessions = Mutex::new(Sessions::default());
    let sessions = || sessions.lock().unwrap_or_else(PoisonError::into_inner);
    let more = || limits.sessions.is_none_or(|n| sessions().begun < n.get());
    let only = limits.sessions == Some(NonZeroUsize::MIN);

    let answer = |link: Arc<dyn Link>, asks: Place| {
        let from = link.peer().clone();
        let asked = Request::receive(&link).and_then(|(id, request)| {
            limits.check(&request)?;
            Ok((id, request))
        });
        drop(asks);
        if let Err(Error::Wire(e)) = &asked
            && e.is_orderly_end()
        {
            return tracing::debug!("{from} has looked whether anybody is here");
        }
        let asked = asked.inspect_err(|e| link.abort(&e.for_peer()));
        if let Some(join) = join.filter(|_| from == Role::Provider.identity()) {
            if let Err(e) = asked.and_then(|(id, request)| join(link, id, request)) {
                tracing::warn!("sent {from} away: {e}");
            }
            return;
        }
        let Some(_place) = Place::take(&active, limits.parallel.get()) else {
            return send_away(&link, &busy(limits.parallel.get()));
        };
        if !sessions().begin(limits) {
            return send_away(&link, NO_MORE);
        }
        if let Err(e) = asked.and_then(|(id, request)| play(link, id, request)) {
            if !only {
                tracing::warn!("a session with {from} failed: {e}");
            }
            sessions().fail(e);
        }
    };
    thread::scope(|scope| {
        while more() || active.load(SeqCst) > 0 {
            let mut roles = Vec::new();
            roles.extend(more().then_some(Role::Client));
            roles.extend(join.map(|_| Role::Provider));
            let Some(link) = station.accept(listener, &roles) else {
                continue;
            };
            match Place::take(&asking, ASKING) {
                Some(asks) => drop(scope.spawn(|| answer(link, asks))),
                None => send_away(&link, &busy(ASKING)),
            }
        }
        // Only they are left who have not asked for anything yet.
        station.end(NO_MORE);
    });
    let Sessions { begun, failed, last } = std::mem::take(&mut *sessions());
    match last {
        None => Ok(()),
        Some(e) if only => Err(e),
        Some(_) => Err(Error::Sessions { failed, of: begun }),
    }
}

/// What callers are told after the last session.
const NO_MORE: &str = "no more sessions are served here";

fn busy(others: usize) -> String {
    format!("busy with {others} others; try again later")
}

fn send_away(link: &Arc<dyn Link>, why: &str) {
    tracing::warn!("sent {} away: {why}", link.peer());
    link.abort(why);
}

/// The sessions of a service, which may run for long.
#[derive(Default)]
struct Sessions {
    begun: usize,
    failed: usize,
    /// How the last of these did.
    last: Option<Error>,
}

impl Sessions {
    /// Counts one that begins, if there may be another.
    fn begin(&mut self, limits: &Limits) -> bool {
        let more = limits.sessions.is_none_or(|n| self.begun < n.get());
        self.begun += usize::from(more);
        more
    }

    fn fail(&mut self, e: Error) {
        self.failed += 1;
        self.last = Some(e);
    }
}

/// One of a limited number; free again once it is dropped.
struct Place<'a>(&'a AtomicUsize);

impl Place<'_> {
    fn take(taken: &AtomicUsize, limit: usize) -> Option<Place<'_>> {
        let one_more = |n| (n < limit).then_some(n + 1);
        taken.fetch_update(SeqCst, SeqCst, one_more).ok()?;
        Some(Place(taken))
    }
}

impl Drop for Place<'_> {
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
