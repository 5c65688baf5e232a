//! Framing of the byte stream inside TLS: kind (1 byte), length (4 bytes, little-endian), body.

use crate::{Error, Identity, MAX_MESSAGE, Result, error::MAX_TEXT};

/// Bytes before a frame's body.
pub(crate) const HEADER: usize = 5;

/// What the listening side says first, once it knows the caller, and what the caller answers.
pub(crate) const GREETING: &[u8] = b"veiltune";

/// What a frame means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A message.
    Data = 1,
    /// The sender gives up; the body says why.
    Abort = 2,
    /// The sender sends nothing more.
    Close = 3,
    /// [`GREETING`], in both directions before anything else.
    Hello = 4,
    /// The sender has taken everything up to the other side's `Close`.
    Closed = 5,
    /// The sender is alive, with nothing to say.
    Alive = 6,
}

impl Kind {
    fn new(byte: u8) -> Option<Kind> {
        [
            Kind::Data,
            Kind::Abort,
            Kind::Close,
            Kind::Hello,
            Kind::Closed,
            Kind::Alive,
        ]
        .into_iter()
        .find(|&kind| kind as u8 == byte)
    }

    fn max_len(self) -> usize {
        match self {
            Kind::Data => MAX_MESSAGE,
            Kind::Abort => MAX_TEXT,
            Kind::Hello => GREETING.len(),
            Kind::Close | Kind::Closed | Kind::Alive => 0,
        }
    }
}

/// Header of a frame.
pub(crate) fn header(kind: Kind, len: usize) -> [u8; HEADER] {
    let [a, b, c, d] = (len as u32).to_le_bytes();
    [kind as u8, a, b, c, d]
}

/// Kind and body length, if the frame is one that may be sent.
pub(crate) fn parse_header(header: [u8; HEADER], peer: &Identity) -> Result<(Kind, usize)> {
    let [kind, len @ ..] = header;
    let kind = Kind::new(kind).ok_or_else(|| Error::BadFrame {
        peer: peer.clone(),
        kind,
    })?;
    let (got, max) = (u32::from_le_bytes(len) as usize, kind.max_len());
    if got > max {
        return Err(Error::OverLong {
            peer: peer.clone(),
            got,
            max,
        });
    }
    Ok((kind, got))
}

/// Puts frames together from a byte stream that comes in arbitrary pieces.
pub(crate) struct Assembler {
    peer: Identity,
    header: [u8; HEADER],
    filled: usize,
    /// Kind and length of the frame whose header is complete.
    frame: Option<(Kind, usize)>,
    body: Vec<u8>,
}

impl Assembler {
    pub(crate) fn new(peer: Identity) -> Assembler {
        Assembler {
            peer,
            header: [0; HEADER],
            filled: 0,
            frame: None,
            body: Vec::new(),
        }
    }

    /// Takes `bytes`, and appends the frames that they complete to `frames`.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], frames: &mut Vec<(Kind, Vec<u8>)>) -> Result<()> {
        loop {
            let (kind, len) = match self.frame {
                Some(frame) => frame,
                None => {
                    let take = bytes.len().min(HEADER - self.filled);
                    self.header[self.filled..][..take].copy_from_slice(&bytes[..take]);
                    self.filled += take;
                    bytes = &bytes[take..];
                    if self.filled < HEADER {
                        return Ok(());
                    }
                    let (kind, len) = parse_header(self.header, &self.peer)?;
                    // At most MAX_MESSAGE, which parse_header has made sure of.
                    self.body.reserve_exact(len);
                    *self.frame.insert((kind, len))
                }
            };
            let take = bytes.len().min(len - self.body.len());
            self.body.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.body.len() < len {
                return Ok(());
            }
            frames.push((kind, std::mem::take(&mut self.body)));
            self.frame = None;
            self.filled = 0;
        }
    }

    /// Where in a frame the stream stands; `None` between frames.
    pub(crate) fn inside(&self) -> Option<String> {
        match self.frame {
            Some((_, len)) => Some(format!("{} bytes into a message of {len}", self.body.len())),
            None if self.filled > 0 => Some("inside the header of a message".into()),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_survive_any_division(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            cuts in prop::collection::vec(1usize..30, 1..20),
        ) {
            let mut stream: Vec<u8> =
                bodies.iter().flat_map(|body| [&header(Kind::Data, body.len()), &body[..]].concat()).collect();
            let mut assembler = Assembler::new(Identity::unknown());
            let mut frames = Vec::new();
            for cut in cuts.into_iter().cycle() {
                let rest = stream.split_off(cut.min(stream.len()));
                assembler.feed(&stream, &mut frames).unwrap();
                stream = rest;
                if stream.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(assembler.inside(), None);
            let expected: Vec<_> = bodies.into_iter().map(|body| (Kind::Data, body)).collect();
            prop_assert_eq!(frames, expected);
        }

        #[test]
        fn garbage_never_panics_nor_allocates_much(garbage in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut assembler = Assembler::new(Identity::unknown());
            let _ = assembler.feed(&garbage, &mut Vec::new());
            prop_assert!(assembler.body.capacity() <= MAX_MESSAGE);
        }
    }

    #[test]
    fn wrong_headers_are_refused_before_any_allocation() {
        let feed = |bytes: &[u8]| {
            let mut assembler = Assembler::new(Identity::unknown());
            let result = assembler.feed(bytes, &mut Vec::new());
            assert_eq!(assembler.body.capacity(), 0);
            result.unwrap_err()
        };
        assert!(matches!(
            feed(&header(Kind::Data, MAX_MESSAGE + 1)),
            Error::OverLong { got: 1_048_577, .. }
        ));
        assert!(matches!(
            feed(&header(Kind::Abort, 257)),
            Error::OverLong { max: 256, .. }
        ));
        assert!(matches!(
            feed(&header(Kind::Alive, 1)),
            Error::OverLong { max: 0, .. }
        ));
        assert!(matches!(feed(&[0, 0, 0, 0, 0]), Error::BadFrame { kind: 0, .. }));
        assert!(matches!(feed(&[7, 0, 0, 0, 0]), Error::BadFrame { kind: 7, .. }));
    }
}
