//! The link trait, and what every link has: a named peer, meters, options.

use std::{
    fmt,
    ops::Sub,
    str::FromStr,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{Error, Network, Result};

/// Longest message, in bytes. Longer tensors travel as several messages, so that sending, receiving and
/// computing overlap.
pub const MAX_MESSAGE: usize = 1 << 20;

/// A reliable, ordered, authenticated channel of messages to one peer. One message is one `send` and one
/// `recv`.
///
/// All methods take `&self`: one thread may send while another receives. Once a link has ended, every later
/// call returns how. A link that is dropped without `close` is closed; one that is dropped in a panic is
/// aborted.
pub trait Link: Send + Sync {
    /// Queues a message of at most [`MAX_MESSAGE`] bytes (an empty one is allowed) for sending and returns at
    /// once. The queue is bounded by the caller's own data only, so that two sides which both send before
    /// they receive cannot block each other.
    ///
    /// # Errors
    /// [`Error::TooLong`], or how the link failed before.
    fn send(&self, bytes: Vec<u8>) -> Result<()>;

    /// Waits for the next message and copies it into `buf`.
    ///
    /// # Errors
    /// [`Error::WrongLength`] if the message has not exactly `buf.len()` bytes (the message is consumed),
    /// [`Error::Silent`] if nothing comes within the time of the link's [`Options`], or how the link failed.
    fn recv(&self, buf: &mut [u8]) -> Result<()>;

    /// Waits until everything queued has been handed to the transport, which takes what the peer's link has
    /// room for ([`Options::incoming`]). Two sides that flush more than that before they receive wait for
    /// each other in vain.
    ///
    /// # Errors
    /// How the link failed.
    fn flush(&self) -> Result<()>;

    /// Gives up: drops what is still queued, tells the peer `reason` (256 printable ASCII bytes of it), and
    /// closes. The peer's pending or next `recv` returns [`Error::PeerAborted`]. Never give a secret as a
    /// reason.
    fn abort(&self, reason: &str);

    /// Orderly end: waits until the peer's end has taken everything that was sent. The peer's `recv` returns
    /// [`Error::PeerGone`] (`closed`) after the last message.
    ///
    /// # Errors
    /// How the link failed, if it did before everything was delivered.
    fn close(&self) -> Result<()>;

    /// Whether the link has ended, as far as this side has noticed; without waiting. Links that cannot tell have not.
    ///
    /// # Errors
    /// How it ended.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// What has passed so far.
    fn meter(&self) -> Meter;

    /// Counts one more communication round on this link; called by the protocol engine, which alone knows.
    fn round(&self);

    /// Who is at the other end.
    fn peer(&self) -> &Identity;
}

/// Forwards every method to the link inside, for `Box`, `Arc` and `&`.
macro_rules! forward_link {
    ($($pointer:ty),*) => {$(
        impl<L: Link + ?Sized> Link for $pointer {
            fn send(&self, bytes: Vec<u8>) -> Result<()> { (**self).send(bytes) }
            fn recv(&self, buf: &mut [u8]) -> Result<()> { (**self).recv(buf) }
            fn flush(&self) -> Result<()> { (**self).flush() }
            fn abort(&self, reason: &str) { (**self).abort(reason) }
            fn close(&self) -> Result<()> { (**self).close() }
            fn check(&self) -> Result<()> { (**self).check() }
            fn meter(&self) -> Meter { (**self).meter() }
            fn round(&self) { (**self).round() }
            fn peer(&self) -> &Identity { (**self).peer() }
        }
    )*};
}
forward_link!(Box<L>, Arc<L>, &L);

/// What passed over a link, in payload bytes.
///
/// Framing and TLS are left out: they add 5 bytes a message and 22 bytes a record of up to 16 KiB (so 0.14 %
/// to long messages), TCP and IP another 40 to 52 bytes a packet, and a link that has nothing to send 27
/// bytes every few seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meter {
    /// Payload bytes given to `send`.
    pub sent: u64,
    /// Payload bytes taken by `recv`.
    pub received: u64,
    /// Messages given to `send`.
    pub messages_sent: u64,
    /// Messages taken by `recv`.
    pub messages_received: u64,
    /// Communication rounds, as counted by the protocol engine.
    pub rounds: u64,
}

impl Sub for Meter {
    type Output = Meter;

    /// What passed since `earlier` was read from the same link.
    fn sub(self, earlier: Meter) -> Meter {
        Meter {
            sent: self.sent - earlier.sent,
            received: self.received - earlier.received,
            messages_sent: self.messages_sent - earlier.messages_sent,
            messages_received: self.messages_received - earlier.messages_received,
            rounds: self.rounds - earlier.rounds,
        }
    }
}

/// The counters behind a [`Meter`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    messages_sent: AtomicU64,
    messages_received: AtomicU64,
    rounds: AtomicU64,
}

impl Counters {
    pub(crate) fn count_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Relaxed);
        self.messages_sent.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Relaxed);
        self.messages_received.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_round(&self) {
        self.rounds.fetch_add(1, Relaxed);
    }

    pub(crate) fn meter(&self) -> Meter {
        Meter {
            sent: self.sent.load(Relaxed),
            received: self.received.load(Relaxed),
            messages_sent: self.messages_sent.load(Relaxed),
            messages_received: self.messages_received.load(Relaxed),
            rounds: self.rounds.load(Relaxed),
        }
    }
}

/// Length of a message that is about to be sent.
pub(crate) fn check_message(message: &[u8]) -> Result<usize> {
    match message.len() {
        got if got > MAX_MESSAGE => Err(Error::TooLong {
            got,
            max: MAX_MESSAGE,
        }),
        got => Ok(got),
    }
}

/// Hands a received message to the caller of `recv`.
pub(crate) fn deliver(message: Vec<u8>, buf: &mut [u8], peer: &Identity, counters: &Counters) -> Result<()> {
    let (expected, got) = (buf.len(), message.len());
    if expected != got {
        return Err(Error::WrongLength {
            peer: peer.clone(),
            expected,
            got,
        });
    }
    buf.copy_from_slice(&message);
    counters.count_received(got);
    Ok(())
}

/// The name of a party, as its certificate states it: 1 to 63 of a-z, 0-9 and '-', not at the ends. Cheap to
/// clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity(Arc<str>);

impl Identity {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// [`Error::BadName`].
    pub fn new(name: &str) -> Result<Identity> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let ends_well = |end: Option<&u8>| end.is_some_and(|&b| inner(b));
        let bytes = name.as_bytes();
        if bytes.len() <= 63
            && ends_well(bytes.first())
            && ends_well(bytes.last())
            && bytes.iter().all(|&b| inner(b) || b == b'-')
        {
            Ok(Identity(name.into()))
        } else {
            Err(Error::BadName(crate::error::sanitise(name.as_bytes())))
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name for errors where nobody has identified themselves yet.
    pub(crate) fn unknown() -> Identity {
        Identity("the caller".into())
    }
}

impl FromStr for Identity {
    type Err = Error;

    fn from_str(name: &str) -> Result<Identity> {
        Identity::new(name)
    }
}

impl TryFrom<String> for Identity {
    type Error = Error;

    fn try_from(name: String) -> Result<Identity> {
        Identity::new(&name)
    }
}

impl From<Identity> for String {
    fn from(identity: Identity) -> String {
        identity.0.as_ref().into()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// A time limit's end; limits beyond a year, which clocks need not be able to hold, are a year.
pub(crate) fn later(start: Instant, limit: Duration) -> Instant {
    start + limit.min(Duration::from_secs(365 * 24 * 3600))
}

/// How a link behaves. Each side chooses its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Network to emulate for what this side sends; give both sides the same for a symmetric network.
    pub network: Network,
    /// Longest time without any sign of life from the peer. A peer that computes is not silent: its link
    /// sends a sign of life six times in this period (so both sides should agree on it roughly).
    /// In-memory links share a process and need none.
    pub idle: Duration,
    /// Longest time that one `recv` waits for a peer that is alive but sends no message.
    pub patience: Duration,
    /// Longest time to establish a connection: for the caller to reach the peer and be accepted, for the
    /// listener to wait for a call.
    pub connect: Duration,
    /// Longest time that a listener gives a caller for the TLS handshake.
    pub handshake: Duration,
    /// Bytes received but not yet taken by `recv`, beyond which the link stops reading from the network.
    /// At least one message is always taken. In-memory links do not bound their queues.
    pub incoming: usize,
}

impl Default for Options {
    /// No emulation; 60 s for a sign of life, 10 minutes for a message, 30 s to connect, 10 s for a caller's
    /// handshake, 32 MiB of incoming data.
    fn default() -> Options {
        Options {
            network: Network::NONE,
            idle: Duration::from_secs(60),
            patience: Duration::from_secs(600),
            connect: Duration::from_secs(30),
            handshake: Duration::from_secs(10),
            incoming: 32 << 20,
        }
    }
}

impl Options {
    /// The defaults over an emulated network.
    pub fn over(network: Network) -> Options {
        Options {
            network,
            ..Options::default()
        }
    }
}
