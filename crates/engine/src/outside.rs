//! The outside owner of a session's shared values: neither compute party, it hands each of them a share of what it puts in
//! and gets from each a share of what it takes out.

use std::collections::VecDeque;

use veiltune_ring::Ring;

use crate::{Error, Result};

/// What one party has from outside owners: shares of parameters and of inputs, in program order, and where its shares of
/// outputs go.
pub trait Outside: Send {
    /// This party's share of the next parameter.
    fn parameter(&mut self, dims: &[usize]) -> Result<Ring>;

    /// This party's share of the next input.
    fn input(&mut self, dims: &[usize]) -> Result<Ring>;

    /// This party's share of a delivered output; see [`Backend::deliver`](crate::Backend::deliver).
    fn output(&mut self, share: Ring) -> Result<()>;

    /// Which pass comes next, None: the session ends. Asked before each pass of a [paced](crate::session::Program::paced)
    /// program, `done` of which have run; the same at both parties.
    fn next(&mut self, done: usize) -> Result<Option<u8>> {
        Ok(u8::try_from(done).ok())
    }
}

/// Shares at hand, for one session; nothing can be delivered.
impl Outside for VecDeque<Ring> {
    fn parameter(&mut self, dims: &[usize]) -> Result<Ring> {
        self.input(dims)
    }

    fn input(&mut self, dims: &[usize]) -> Result<Ring> {
        let share = self
            .pop_front()
            .ok_or_else(|| Error::program("input", "no share was given for a shared input"))?;
        match share.dims() == dims {
            true => Ok(share),
            false => Err(Error::program(
                "input",
                format!("a share of {:?} for shape {dims:?}", share.dims()),
            )),
        }
    }

    fn output(&mut self, _: Ring) -> Result<()> {
        Err(Error::program(
            "deliver",
            "this session has no outside owner to deliver to",
        ))
    }
}
