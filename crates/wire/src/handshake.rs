//! Before anything else, two sides make sure that they are about to run the same thing.
//!
//! Each side sends one message of fixed length that states its protocol version, session, role, program and
//! configuration, and compares what it gets with its own. Both see every difference themselves, so both name
//! it.

use crate::{
    Error, Identity, Link, Result,
    error::{MAX_TEXT, sanitise},
};

/// Version of everything that parties say to each other. Sides of different versions do not talk.
pub const PROTOCOL_VERSION: u32 = 3;

/// What one side says about itself. Nothing in it is secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u32,
    /// The session, the same on all its links.
    pub session: [u8; 16],
    /// Role that the sender plays in it, such as `client`.
    pub role: Identity,
    /// Hash of the program: everything that decides which messages are exchanged.
    pub program: [u8; 32],
    /// Configuration, as short text of at most 256 printable bytes, or its hash; shown to the user where it
    /// differs.
    pub configuration: String,
}

/// The message: magic 8, version 4, session 16, program 32, role 1 + 63, configuration 2 + 256 bytes.
const MAGIC: &[u8; 8] = b"veiltune";
const VERSION: usize = 8;
const SESSION: usize = VERSION + 4;
const PROGRAM: usize = SESSION + 16;
const ROLE: usize = PROGRAM + 32;
const CONFIGURATION: usize = ROLE + 64;

/// Bytes that [`handshake`] sends and receives, once each way; they count in the link's meter.
pub const HELLO_LEN: usize = CONFIGURATION + 2 + MAX_TEXT;

impl Hello {
    /// What a side of this version says.
    pub fn new(
        session: [u8; 16],
        role: Identity,
        program: [u8; 32],
        configuration: impl Into<String>,
    ) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            session,
            role,
            program,
            configuration: configuration.into(),
        }
    }

    fn encode(&self) -> Result<Vec<u8>> {
        let (role, configuration) = (self.role.as_str().as_bytes(), self.configuration.as_bytes());
        if configuration.len() > MAX_TEXT {
            let got = configuration.len();
            return Err(Error::BadHello {
                what: "configuration",
                got,
                max: MAX_TEXT,
            });
        }
        let mut bytes = vec![0; HELLO_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..][..field.len()].copy_from_slice(field);
        put(0, MAGIC);
        put(VERSION, &self.version.to_le_bytes());
        put(SESSION, &self.session);
        put(PROGRAM, &self.program);
        put(ROLE, &[role.len() as u8]);
        put(ROLE + 1, role);
        put(CONFIGURATION, &(configuration.len() as u16).to_le_bytes());
        put(CONFIGURATION + 2, configuration);
        Ok(bytes)
    }
}

/// Exchanges greetings over `link` and checks that the peer plays `peer_role` in the same session, program
/// and configuration. One round. After a mismatch the link is closed; both sides get the error.
///
/// # Errors
/// [`Error::BadGreeting`], [`Error::VersionMismatch`], [`Error::SessionMismatch`], [`Error::RoleMismatch`],
/// [`Error::ProgramMismatch`], [`Error::ConfigurationMismatch`], each naming both values (the first that differs,
/// in this order); [`Error::BadHello`] if this side's configuration is too long; or how the link failed.
pub fn handshake(link: &(impl Link + ?Sized), mine: &Hello, peer_role: &Identity) -> Result<()> {
    link.send(mine.encode()?)?;
    let mut theirs = [0; HELLO_LEN];
    link.recv(&mut theirs)?;
    compare(link.peer(), mine, &theirs, peer_role).inspect_err(|_| {
        // Closing, unlike aborting, lets the peer read our greeting and see the mismatch for itself.
        let _ = link.close();
    })
}

fn compare(peer: &Identity, mine: &Hello, theirs: &[u8; HELLO_LEN], peer_role: &Identity) -> Result<()> {
    let peer = peer.clone();
    if &theirs[..VERSION] != MAGIC {
        return Err(Error::BadGreeting { peer });
    }
    let version = u32::from_le_bytes(theirs[VERSION..][..4].try_into().expect("four bytes"));
    if version != mine.version {
        return Err(Error::VersionMismatch {
            peer,
            ours: mine.version,
            theirs: version,
        });
    }
    let session = &theirs[SESSION..][..16];
    if session != mine.session {
        return Err(Error::SessionMismatch {
            peer,
            ours: hex(&mine.session),
            theirs: hex(session),
        });
    }
    let role = text(&theirs[ROLE + 1..CONFIGURATION], theirs[ROLE].into());
    if role != peer_role.as_str().as_bytes() {
        return Err(Error::RoleMismatch {
            peer,
            expected: peer_role.to_string(),
            theirs: sanitise(role),
        });
    }
    let program = &theirs[PROGRAM..][..32];
    if program != mine.program {
        return Err(Error::ProgramMismatch {
            peer,
            ours: hex(&mine.program),
            theirs: hex(program),
        });
    }
    let length = u16::from_le_bytes([theirs[CONFIGURATION], theirs[CONFIGURATION + 1]]);
    let configuration = text(&theirs[CONFIGURATION + 2..], length.into());
    if configuration != mine.configuration.as_bytes() {
        let (ours, theirs) = (sanitise(mine.configuration.as_bytes()), sanitise(configuration));
        return Err(Error::ConfigurationMismatch { peer, ours, theirs });
    }
    Ok(())
}

/// The first `length` bytes of `field`; all of it if the peer claims more.
fn text(field: &[u8], length: usize) -> &[u8] {
    field.get(..length).unwrap_or(field)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
