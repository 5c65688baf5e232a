//! Session after session: what provider and dealer have in common as services.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};
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
            Err(Error::Input(format!(
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

/// How many images each client may still have classified.
#[derive(Default)]
pub struct Budget {
    /// Of each client, over the life of the service.
    pub each: Option<NonZeroUsize>,
    spent: Mutex<BTreeMap<String, usize>>,
}

impl Budget {
    /// `each` images for every client; None: any number.
    pub fn new(each: Option<NonZeroUsize>) -> Budget {
        Budget {
            each,
            spent: Mutex::default(),
        }
    }

    /// Takes from what `client` has. It is spent once the session begins, for a client that vanishes may have learned logits.
    pub fn spend(&self, client: &str, images: usize) -> Result<()> {
        let Some(each) = self.each else {
            return Ok(());
        };
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let spent = spent.entry(client.into()).or_default();
        match each.get().checked_sub(*spent) {
            Some(left) if images <= left => {
                *spent += images;
                Ok(())
            }
            left => Err(Error::Input(format!(
                "{client} may have {} more images classified here, {images} are asked for",
                left.unwrap_or(0)
            ))),
        }
    }
}

/// What is done with a link that was accepted.
pub type Play<'a> = &'a (dyn Fn(Arc<dyn Link>) -> Result<()> + Sync);

/// Accepts calls, and plays each client's session on a thread of its own. A provider that calls is handed to `join`, if that
/// is given. A session that fails is told of, and ends alone.
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
    let active = AtomicUsize::new(0);
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
            match join {
                Some(join) if from == Role::Provider.identity() => {
                    scope.spawn(move || {
                        if let Err(e) = join(link) {
                            tracing::warn!("sent {from} away: {e}");
                        }
                    });
                }
                _ if active.load(SeqCst) >= limits.parallel.get() => {
                    let busy = format!("busy with {} other sessions; try again later", limits.parallel);
                    tracing::warn!("sent {from} away: {busy}");
                    link.abort(&busy);
                }
                _ => {
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

/// Counts a session out, however it ended.
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
    fn a_budget_is_of_each_client_and_is_never_exceeded() {
        let budget = Budget::new(NonZeroUsize::new(5));
        budget.spend("one", 3).unwrap();
        let e = budget.spend("one", 3).unwrap_err().to_string();
        assert!(e.contains("2 more images"), "{e}");
        budget.spend("other", 5).unwrap();
        budget.spend("one", 2).unwrap();
        assert!(budget.spend("one", 1).is_err() && budget.spend("other", usize::MAX).is_err());
        Budget::new(None).spend("one", usize::MAX).unwrap();
    }
}
