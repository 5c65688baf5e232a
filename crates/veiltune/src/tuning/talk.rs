//! What the roles of a tuning run say to each other besides the protocols' own messages.

use serde::Serialize;
use serde::de::DeserializeOwned;
use veiltune_ring::Ring;
use veiltune_wire::Link;

use crate::{Error, Result};

/// Longest structured message, in bytes: a tokenizer is a few megabytes.
pub const MOST: usize = 64 << 20;
/// Words of a piece of a long message.
const PIECE: usize = 1 << 15;

/// Sends bytes whose length the other side does not know.
pub fn send_bytes(link: &dyn Link, bytes: &[u8]) -> Result<()> {
    link.send((bytes.len() as u64).to_le_bytes().to_vec())?;
    for piece in bytes.chunks(8 * PIECE) {
        link.send(piece.to_vec())?;
    }
    Ok(())
}

/// Receives what [`send_bytes`] sent.
pub fn receive_bytes(link: &dyn Link) -> Result<Vec<u8>> {
    let mut length = [0; 8];
    link.recv(&mut length)?;
    let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MOST {
        return Err(Error::Refused(format!(
            "{} announces a message of {length} bytes; at most {MOST} are taken",
            link.peer()
        )));
    }
    let mut bytes = Vec::new();
    while bytes.len() < length {
        let start = bytes.len();
        // Memory is taken only as bytes arrive.
        bytes.resize(start + (length - start).min(8 * PIECE), 0);
        link.recv(&mut bytes[start..])?;
    }
    Ok(bytes)
}

/// Sends a structured message.
pub fn send<T: Serialize>(link: &dyn Link, message: &T) -> Result<()> {
    let bytes = serde_json::to_vec(message).map_err(|e| Error::Input(e.to_string()))?;
    send_bytes(link, &bytes)
}

/// Receives what [`send`] sent.
pub fn receive<T: DeserializeOwned>(link: &dyn Link) -> Result<T> {
    serde_json::from_slice(&receive_bytes(link)?).map_err(|e| {
        Error::Refused(format!(
            "{} says something that is not understood here ({e}): install the same release everywhere",
            link.peer()
        ))
    })
}

/// Sends ring elements whose number the other side knows.
pub fn send_words(link: &dyn Link, words: &[u64]) -> veiltune_wire::Result<()> {
    for piece in words.chunks(PIECE) {
        link.send(piece.iter().flat_map(|w| w.to_le_bytes()).collect())?;
    }
    Ok(())
}

/// Receives what [`send_words`] sent.
pub fn receive_words(link: &dyn Link, mut take: impl FnMut(&[u64]), len: usize) -> veiltune_wire::Result<()> {
    let mut bytes = vec![0; 8 * PIECE.min(len)];
    for start in (0..len).step_by(PIECE) {
        let piece = &mut bytes[..8 * PIECE.min(len - start)];
        link.recv(piece)?;
        let words: Vec<u64> = piece
            .chunks_exact(8)
            .map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")))
            .collect();
        take(&words);
    }
    Ok(())
}

/// Receives a tensor.
pub fn receive_ring(link: &dyn Link, dims: &[usize]) -> veiltune_engine::Result<Ring> {
    let len = dims.iter().product();
    let mut words = Vec::with_capacity(len);
    receive_words(link, |piece| words.extend_from_slice(piece), len)?;
    Ok(Ring::new(dims.to_vec(), words)?)
}
