//! Links between two threads of one process.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use crate::{
    Error, Identity, Link, Meter, Options, Result,
    emulate::DelayLine,
    error::{CLOSED, sanitise},
    inbox::Inbox,
    link::{Counters, check_message, deliver},
};

/// One end of an in-memory link. Its queues are not bounded: whoever fills them pays with memory of this
/// process.
pub struct MemoryLink {
    me: Identity,
    peer: Identity,
    options: Options,
    incoming: Arc<Inbox>,
    outgoing: Arc<Inbox>,
    line: Mutex<DelayLine>,
    counters: Counters,
}

/// Two ends of a link without emulation, named `left` and `right`: the first one's peer is `right`.
pub fn pair() -> (MemoryLink, MemoryLink) {
    let [left, right] = ["left", "right"].map(|name| Identity::new(name).expect("a plain name is valid"));
    pair_with(&left, &right, &Options::default())
}

/// Two ends of a link between `left` and `right`, with the same options at both. Of the options, the network
/// and the patience matter here.
pub fn pair_with(left: &Identity, right: &Identity, options: &Options) -> (MemoryLink, MemoryLink) {
    let to_left = Arc::new(Inbox::new(right.clone()));
    let to_right = Arc::new(Inbox::new(left.clone()));
    let end = |me: &Identity, peer: &Identity, incoming: &Arc<Inbox>, outgoing: &Arc<Inbox>| MemoryLink {
        me: me.clone(),
        peer: peer.clone(),
        options: options.clone(),
        incoming: incoming.clone(),
        outgoing: outgoing.clone(),
        line: Mutex::new(DelayLine::new(options.network)),
        counters: Counters::default(),
    };
    (
        end(left, right, &to_left, &to_right),
        end(right, left, &to_right, &to_left),
    )
}

impl fmt::Debug for MemoryLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryLink {{ peer: {} }}", self.peer)
    }
}

impl Link for MemoryLink {
    fn send(&self, bytes: Vec<u8>) -> Result<()> {
        let length = check_message(&bytes)?;
        if let Some(error) = self.incoming.ended() {
            return Err(error);
        }
        // The lock covers the push, so that messages of several threads arrive in the order they enter the
        // line.
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let due = line.enter(length).map(|passage| passage.last);
        self.outgoing.push(bytes, due);
        self.counters.count_sent(length);
        Ok(())
    }

    fn recv(&self, buf: &mut [u8]) -> Result<()> {
        deliver(
            self.incoming.pop(&self.options, false)?,
            buf,
            &self.peer,
            &self.counters,
        )
    }

    fn flush(&self) -> Result<()> {
        self.check()
    }

    fn check(&self) -> Result<()> {
        self.incoming.ended().map_or(Ok(()), Err)
    }

    fn abort(&self, reason: &str) {
        let reason = sanitise(reason.as_bytes());
        if !matches!(self.incoming.ended(), Some(Error::Closed { .. })) {
            self.outgoing.end(
                Error::PeerAborted {
                    peer: self.me.clone(),
                    reason: reason.clone(),
                },
                true,
            );
            self.incoming.end(Error::Aborted { reason }, true);
        }
    }

    fn close(&self) -> Result<()> {
        match self.incoming.ended() {
            None | Some(Error::PeerGone { .. } | Error::Closed { .. }) => {
                self.outgoing.end(
                    Error::PeerGone {
                        peer: self.me.clone(),
                        how: CLOSED.into(),
                    },
                    false,
                );
                self.incoming.end(
                    Error::Closed {
                        peer: self.peer.clone(),
                    },
                    true,
                );
                Ok(())
            }
            Some(error) => Err(error),
        }
    }

    fn meter(&self) -> Meter {
        self.counters.meter()
    }

    fn round(&self) {
        self.counters.count_round();
    }

    fn peer(&self) -> &Identity {
        &self.peer
    }
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        if thread::panicking() {
            self.abort("it panicked");
        } else {
            let _ = self.close();
        }
    }
}
