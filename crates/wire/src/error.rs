//! What can go wrong on a link, by whose fault it is.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use crate::Identity;

/// Result of anything that a link does.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong on a link. Cloneable, because a link that failed once answers every later call with the
/// same failure. Whatever text a peer sent is reduced to 256 printable ASCII bytes before it gets in here.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // The peer sent something wrong.
    /// A message had another length than the protocol asks for at this point.
    #[error(
        "{peer} sent a message of {got} bytes where {expected} were due: both sides must run the same program"
    )]
    WrongLength {
        /// Who sent it.
        peer: Identity,
        /// Bytes that the protocol asks for.
        expected: usize,
        /// Bytes that came.
        got: usize,
    },
    /// A frame announced more bytes than any message may have; nothing was allocated for it.
    #[error(
        "{peer} announced a message of {got} bytes, but at most {max} are allowed: it does not speak this protocol"
    )]
    OverLong {
        /// Who announced it.
        peer: Identity,
        /// Bytes announced.
        got: usize,
        /// [`MAX_MESSAGE`](crate::MAX_MESSAGE), or the limit of the frame's kind.
        max: usize,
    },
    /// A frame was of no known kind, or of a kind that has no place here.
    #[error("{peer} sent a frame of unexpected kind {kind}: it does not speak this protocol")]
    BadFrame {
        /// Who sent it.
        peer: Identity,
        /// The frame's first byte.
        kind: u8,
    },
    /// The peer's greeting is not one of this program.
    #[error("{peer} does not greet as veiltune does: another program answers there, check the address")]
    BadGreeting {
        /// Who was expected.
        peer: Identity,
    },
    /// The two sides run different versions of the protocol.
    #[error("{peer} speaks protocol version {theirs}, this side {ours}: install the same release on both")]
    VersionMismatch {
        /// The peer.
        peer: Identity,
        /// This side's version.
        ours: u32,
        /// The peer's version.
        theirs: u32,
    },
    /// The two sides are in different sessions.
    #[error("{peer} is in session {theirs}, this side in {ours}: start both sides of the same session")]
    SessionMismatch {
        /// The peer.
        peer: Identity,
        /// This side's session, hexadecimal.
        ours: String,
        /// The peer's session, hexadecimal.
        theirs: String,
    },
    /// The peer plays another role than the one expected on this link.
    #[error(
        "{peer} plays the role '{theirs}' where '{expected}' is needed: check which address belongs to which role"
    )]
    RoleMismatch {
        /// The peer.
        peer: Identity,
        /// Role that this side needs there.
        expected: String,
        /// Role that the peer says it plays.
        theirs: String,
    },
    /// The two sides would run different programs.
    #[error("{peer} runs program {theirs}, this side {ours}: both must use the same model and the same job")]
    ProgramMismatch {
        /// The peer.
        peer: Identity,
        /// Hash of this side's program, hexadecimal.
        ours: String,
        /// Hash of the peer's program, hexadecimal.
        theirs: String,
    },
    /// The two sides are configured differently.
    #[error("{peer} is configured as '{theirs}', this side as '{ours}': use the same configuration on both")]
    ConfigurationMismatch {
        /// The peer.
        peer: Identity,
        /// This side's configuration.
        ours: String,
        /// The peer's configuration.
        theirs: String,
    },

    // The peer is gone, silent, or gave up.
    /// The peer closed the link, or its end vanished.
    #[error("{peer} is gone: {how}")]
    PeerGone {
        /// Who is gone.
        peer: Identity,
        /// `closed` after an orderly end, else what was seen.
        how: String,
    },
    /// The connection ended inside a message or without the end that TLS prescribes: somebody may have cut
    /// it.
    #[error("the connection to {peer} was cut {at}: the peer crashed, or something between the two cut it")]
    Truncated {
        /// The peer.
        peer: Identity,
        /// Where in the stream it was cut.
        at: String,
    },
    /// Nothing came for too long.
    #[error("{peer} is silent: nothing came for {:.1} s; is it running, and is the network up?", waited.as_secs_f64())]
    Silent {
        /// Who is silent.
        peer: Identity,
        /// How long this side waited.
        waited: Duration,
    },
    /// The peer gave up and said why.
    #[error("{peer} aborted the run: {reason}")]
    PeerAborted {
        /// Who gave up.
        peer: Identity,
        /// The peer's words, sanitised.
        reason: String,
    },

    // TLS and identity.
    /// The other end does not speak TLS.
    #[error("{peer} does not speak TLS ({detail}): check the address and the port")]
    NotTls {
        /// Who was expected.
        peer: Identity,
        /// What the TLS layer made of it.
        detail: String,
    },
    /// The peer's certificate is missing, expired, or not signed by the run's authority.
    #[error(
        "the certificate of {peer} is not trusted ({detail}): use certificates that one authority issued for this run"
    )]
    Untrusted {
        /// Who was expected.
        peer: Identity,
        /// What is wrong with it.
        detail: String,
    },
    /// The peer's certificate is good, but names somebody else.
    #[error(
        "expected {expected}, but the certificate there belongs to {presented}: check which address belongs to whom"
    )]
    WrongIdentity {
        /// Who was expected; several names where several may call.
        expected: String,
        /// Names in the certificate.
        presented: String,
    },
    /// The peer did not accept this side's certificate.
    #[error(
        "{peer} rejected this side's certificate ({detail}): use certificates that one authority issued for this run"
    )]
    Rejected {
        /// Who rejected it.
        peer: Identity,
        /// The TLS alert.
        detail: String,
    },
    /// Any other failure of TLS: a record that was tampered with, no common algorithm.
    #[error("TLS with {peer} failed: {detail}; if it happens again, something alters the connection")]
    Tls {
        /// The peer.
        peer: Identity,
        /// What the TLS layer says.
        detail: String,
    },

    // This side's surroundings.
    /// Nobody answered at the address.
    #[error("cannot reach {peer} at {address} within {:.1} s ({source}): is it running there?", waited.as_secs_f64())]
    Unreachable {
        /// Who was to be reached.
        peer: Identity,
        /// Where.
        address: String,
        /// For how long it was tried.
        waited: Duration,
        /// The last attempt's failure.
        source: Arc<io::Error>,
    },
    /// Nobody called in time.
    #[error("none of {expected} connected to {address} within {:.1} s: start it, or raise the limit", waited.as_secs_f64())]
    NobodyCame {
        /// Who was expected.
        expected: String,
        /// Where this side listened.
        address: SocketAddr,
        /// For how long.
        waited: Duration,
    },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: Arc<io::Error>,
    },
    /// A certificate or key file does not hold what it should.
    #[error("{path}: {detail}; issue the certificates again")]
    BadFile {
        /// The file.
        path: String,
        /// What is wrong with it.
        detail: String,
    },

    // Misuse by this side.
    /// A message is longer than [`MAX_MESSAGE`](crate::MAX_MESSAGE).
    #[error("a message of {got} bytes is longer than {max}: send it in chunks")]
    TooLong {
        /// Bytes given.
        got: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The link was used after this side had closed it.
    #[error("the link to {peer} was used after this side closed it")]
    Closed {
        /// The peer.
        peer: Identity,
    },
    /// The link was used after this side had aborted it.
    #[error("this side aborted the run: {reason}")]
    Aborted {
        /// Why.
        reason: String,
    },
    /// A name that cannot be one of a party.
    #[error("'{0}' is no name for a party: use 1 to 63 of a-z, 0-9 and '-', not at the ends")]
    BadName(String),
    /// A network description that cannot be read.
    #[error(
        "'{0}' is no network: use none, lan, wan, secp-lan, secp-wan-a, secp-wan-b or RATE_MBIT:DELAY_US"
    )]
    BadNetwork(String),
    /// A field of the handshake is longer than its place.
    #[error("the {what} of the handshake has {got} bytes, at most {max} fit")]
    BadHello {
        /// Which field.
        what: &'static str,
        /// Bytes given.
        got: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// Making or using keys or certificates failed.
    #[error("cannot make or use a certificate: {0}")]
    Certificate(String),
}

impl Error {
    /// Whether the peer has closed the link in good order.
    pub fn is_orderly_end(&self) -> bool {
        matches!(self, Error::PeerGone { how, .. } if how == CLOSED)
    }

    /// What the peers are told of it: nothing of this machine's files and addresses, which only this side's own message names.
    pub fn for_peer(&self) -> String {
        match self {
            Error::Unreachable { peer, .. } => format!("it cannot reach {peer}"),
            Error::NobodyCame { expected, .. } => format!("{expected} did not call it"),
            Error::Io { .. } => "its system failed it".into(),
            Error::BadFile { .. } | Error::Certificate(_) => "its certificates cannot be used".into(),
            other => other.to_string(),
        }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            what: what.into(),
            source: Arc::new(source),
        }
    }
}

/// How a peer is gone that closed in good order.
pub(crate) const CLOSED: &str = "closed";

/// Longest text taken from a peer, in bytes.
pub(crate) const MAX_TEXT: usize = 256;

/// A peer's text, fit for a terminal or a log: printable ASCII, at most [`MAX_TEXT`] bytes.
pub(crate) fn sanitise(text: &[u8]) -> String {
    let printable = |&b: &u8| {
        if b == b' ' || b.is_ascii_graphic() {
            b as char
        } else {
            '?'
        }
    };
    text.iter().take(MAX_TEXT).map(printable).collect()
}
