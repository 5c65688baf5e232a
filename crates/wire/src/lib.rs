//! Links between the parties of a private computation.
//!
//! A [`Link`] carries messages to one peer. [`tcp`] links run over mutual TLS and check who the peer is;
//! [`memory`] links join two threads; either can emulate a [`Network`]. [`pki`] makes the certificates of a
//! run, [`handshake`] makes sure that both sides are about to run the same thing, and [`fault`] damages messages in
//! tests.
//!
//! Everything is synchronous: `send` queues, `recv` waits, and threads inside the link move the bytes, so
//! that sending, receiving and computing overlap. Nothing is allocated by a peer's word beyond
//! [`MAX_MESSAGE`].
//!
//! ```
//! use veiltune_wire::{Link, memory};
//!
//! # fn main() -> veiltune_wire::Result<()> {
//! let (left, right) = memory::pair();
//! left.send(vec![1, 2, 3])?;
//! let mut message = [0; 3];
//! right.recv(&mut message)?;
//! assert_eq!(message, [1, 2, 3]);
//! assert_eq!(left.meter().sent, 3);
//! # Ok(())
//! # }
//! ```

mod duplex;
mod error;
mod frame;
mod inbox;
mod link;
mod tls;

pub mod emulate;
pub mod fault;
pub mod handshake;
pub mod memory;
pub mod pki;
pub mod tcp;

pub use emulate::Network;
pub use error::{Error, Result};
pub use link::{Identity, Link, MAX_MESSAGE, Meter, Options};
