//! What has arrived on a link and waits for `recv`.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{Error, Identity, Options, Result, emulate, link::later};

/// Memory that a message takes beside its bytes. Counted, so that empty messages cannot fill the memory.
const OVERHEAD: usize = 64;

/// Queue of received messages, with the end of the stream behind them.
pub(crate) struct Inbox {
    peer: Identity,
    state: Mutex<State>,
    arrived: Condvar,
    taken: Condvar,
}

struct State {
    queue: VecDeque<Arrival>,
    bytes: usize,
    /// Last sign of life from the peer.
    heard: Instant,
    /// Nobody will take anything any more.
    discard: bool,
    /// The link waits for room, and does not listen to the peer.
    deaf: bool,
    /// How the stream ended, and whether that overtakes the messages before it.
    end: Option<(Error, bool)>,
}

struct Arrival {
    message: Vec<u8>,
    /// When it may be seen, if that is not at once.
    due: Option<Instant>,
}

impl Inbox {
    pub(crate) fn new(peer: Identity) -> Inbox {
        let state = State {
            queue: VecDeque::new(),
            bytes: 0,
            heard: Instant::now(),
            discard: false,
            deaf: false,
            end: None,
        };
        Inbox {
            peer,
            state: Mutex::new(state),
            arrived: Condvar::new(),
            taken: Condvar::new(),
        }
    }

    /// Adds a message, visible from `due` on.
    pub(crate) fn push(&self, message: Vec<u8>, due: Option<Instant>) {
        let mut state = self.lock();
        if state.end.is_none() && !state.discard {
            state.bytes += message.len() + OVERHEAD;
            state.queue.push_back(Arrival { message, due });
            self.arrived.notify_all();
        }
    }

    /// Waits until the queue is shorter than `limit` bytes or nobody will take from it any more.
    pub(crate) fn wait_for_room(&self, limit: usize) {
        let mut state = self.lock();
        state.deaf = true;
        let full = |state: &mut State| state.end.is_none() && !state.queue.is_empty() && state.bytes >= limit;
        self.taken
            .wait_while(state, full)
            .unwrap_or_else(PoisonError::into_inner)
            .deaf = false;
    }

    /// Drops all messages, those that come later too.
    pub(crate) fn discard(&self) {
        let mut state = self.lock();
        state.discard = true;
        state.queue.clear();
        state.bytes = 0;
        self.taken.notify_all();
    }

    /// Notes a sign of life.
    pub(crate) fn hear(&self) {
        self.lock().heard = Instant::now();
    }

    /// Ends the stream: behind the messages already here, or before them if `now`. The first end stays,
    /// except that one which overtakes replaces one which does not.
    pub(crate) fn end(&self, error: Error, now: bool) {
        let mut state = self.lock();
        if !matches!(state.end, Some((_, already)) if already || !now) {
            state.end = Some((error, now));
            if now {
                state.queue.clear();
                state.bytes = 0;
            }
            self.arrived.notify_all();
            self.taken.notify_all();
        }
    }

    /// How the stream ended, if it did.
    pub(crate) fn ended(&self) -> Option<Error> {
        self.lock().end.as_ref().map(|(error, _)| error.clone())
    }

    /// Waits for the stream to end, but not longer than `limit`.
    pub(crate) fn wait_for_end(&self, limit: Duration) {
        let open = |state: &mut State| state.end.is_none();
        drop(self.arrived.wait_timeout_while(self.lock(), limit, open));
    }

    /// Error for a peer that gives no sign of life, or has not taken what was sent `since` for too long.
    pub(crate) fn check_alive(&self, since: Instant, options: &Options) -> Result<()> {
        let state = self.lock();
        let quiet = since.max(state.heard).elapsed();
        if since.elapsed() >= options.patience || !state.deaf && quiet >= options.idle {
            return Err(Error::Silent {
                peer: self.peer.clone(),
                waited: since.elapsed(),
            });
        }
        Ok(())
    }

    /// Takes the next message. `heartbeat` says whether the peer gives signs of life while it computes.
    pub(crate) fn pop(&self, options: &Options, heartbeat: bool) -> Result<Vec<u8>> {
        let start = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some((error, true)) = &state.end {
                return Err(error.clone());
            }
            let now = Instant::now();
            let wake = match (state.queue.front(), &state.end) {
                (Some(Arrival { due: Some(due), .. }), _) if *due > now + emulate::SPIN => {
                    *due - emulate::SPIN
                }
                (Some(_), _) => break,
                (None, Some((error, _))) => return Err(error.clone()),
                (None, None) => {
                    let patience = later(start, options.patience);
                    // A peer is judged by what it does while this side listens, not by what was left unread
                    // before.
                    let alive = later(state.heard.max(start), options.idle);
                    let limit = if heartbeat { patience.min(alive) } else { patience };
                    if now >= limit {
                        return Err(Error::Silent {
                            peer: self.peer.clone(),
                            waited: now - start,
                        });
                    }
                    limit
                }
            };
            state = self
                .arrived
                .wait_timeout(state, wake - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let Some(Arrival { message, due }) = state.queue.pop_front() else {
            unreachable!("the loop ends with a message in front")
        };
        state.bytes -= message.len() + OVERHEAD;
        self.taken.notify_all();
        drop(state);
        if let Some(due) = due {
            emulate::spin_until(due);
        }
        Ok(message)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and the state is consistent between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
