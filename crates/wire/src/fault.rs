//! Fault injection: a link that damages one message it sends. For tests of whoever receives it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{Identity, Link, Meter, Result};

/// What happens to the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The lowest bit of its middle byte is flipped.
    Corrupt,
    /// Its last byte is missing.
    Truncate,
    /// One byte too many is sent.
    Extend,
    /// It is not sent at all.
    Drop,
    /// It is sent twice.
    Duplicate,
    /// The link is aborted instead.
    Abort,
    /// The link is closed instead.
    Close,
}

/// A link that does one [`Fault`] to the message of the given index, counted from 0, and else behaves as the
/// one inside.
pub struct Faulty<L> {
    link: L,
    fault: Fault,
    index: u64,
    sent: AtomicU64,
}

impl<L: Link> Faulty<L> {
    /// Damages message `index` of those sent from now on.
    pub fn new(link: L, fault: Fault, index: u64) -> Faulty<L> {
        Faulty {
            link,
            fault,
            index,
            sent: AtomicU64::new(0),
        }
    }
}

impl<L: Link> Link for Faulty<L> {
    fn send(&self, mut bytes: Vec<u8>) -> Result<()> {
        if self.sent.fetch_add(1, Relaxed) != self.index {
            return self.link.send(bytes);
        }
        match self.fault {
            Fault::Corrupt => {
                let middle = bytes.len() / 2;
                if let Some(byte) = bytes.get_mut(middle) {
                    *byte ^= 1;
                }
            }
            Fault::Truncate => drop(bytes.pop()),
            Fault::Extend => bytes.push(0),
            Fault::Drop => return Ok(()),
            Fault::Duplicate => self.link.send(bytes.clone())?,
            Fault::Abort => {
                self.link.abort("injected fault");
                return Ok(());
            }
            Fault::Close => return self.link.close(),
        }
        self.link.send(bytes)
    }

    fn recv(&self, buf: &mut [u8]) -> Result<()> {
        self.link.recv(buf)
    }

    fn flush(&self) -> Result<()> {
        self.link.flush()
    }

    fn abort(&self, reason: &str) {
        self.link.abort(reason);
    }

    fn close(&self) -> Result<()> {
        self.link.close()
    }

    fn check(&self) -> Result<()> {
        self.link.check()
    }

    fn meter(&self) -> Meter {
        self.link.meter()
    }

    fn round(&self) {
        self.link.round();
    }

    fn peer(&self) -> &Identity {
        self.link.peer()
    }
}
