//! Who has sent which piece of a masked value: the bookkeeping that every interpreter shares, so that they agree on
//! what travels when.
//!
//! A secret x = x0 + x1 is opened as the pieces x_i + r_i, r_i expanded from the seed that party i shares with the
//! dealer. A party that holds nothing of x (it belongs to the other) has the piece 0 and the mask 0. Each piece
//! travels at most once, and only if the other party needs it.

use crate::gates::Local;
use crate::{Owner, Party};

/// Identity of a mask: the gate number under which it is expanded. Never used twice in a session.
pub(crate) type GateId = u64;

/// Gate numbers of session-long parameters start here, so that they never meet those of a forward pass.
pub(crate) const PARAMETER_GATES: GateId = 1 << 63;

/// The opening of one tensor.
#[derive(Clone, Debug)]
pub(crate) struct Opening {
    /// Set when the first piece is sent.
    pub id: Option<GateId>,
    /// Whether party i's piece is known to the other.
    pub sent: [bool; 2],
}

/// What is left to open of a value that was [truncated](crate::protocols::truncate): the carry, which moves the bits at the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Carry {
    /// How many.
    pub bits: u32,
}

impl Carry {
    /// Bits below the carry: the opening says nothing of them.
    pub fn zeros(self) -> u32 {
        u64::BITS - self.bits
    }

    /// Of what `map` makes of the value, where that is as well known.
    pub fn after(self, map: &Local) -> Option<Carry> {
        match map {
            Local::Relabel(_) | Local::Reshape(_) => Some(self),
            Local::Refine(more) if *more < self.bits => Some(Carry {
                bits: self.bits - more,
            }),
            _ => None,
        }
    }
}

/// Which parties must learn the masked value.
pub(crate) type Learners = [bool; 2];

/// Both parties.
pub(crate) const BOTH: Learners = [true, true];

/// One party.
pub(crate) fn only(party: Party) -> Learners {
    [party == Party::P0, party == Party::P1]
}

/// Whether party `i` holds a non-trivial share (and mask) of a value of `owner`.
pub(crate) fn holds(owner: Owner, i: usize) -> bool {
    match owner {
        Owner::Public => false,
        Owner::Party(p) => p.index() == i,
        Owner::Shared => true,
    }
}

impl Opening {
    /// Nothing sent yet; trivial pieces need no sending.
    pub fn new(owner: Owner) -> Self {
        Opening {
            id: None,
            sent: [0, 1].map(|i| !holds(owner, i)),
        }
    }

    /// Marks what must be sent so that `learners` know the masked value. Returns whether party i sends now, and
    /// whether this is the first opening (the mask must be drawn under a fresh `id`).
    pub fn request(&mut self, learners: Learners, fresh: impl FnOnce() -> GateId) -> ([bool; 2], bool) {
        let mut sends = [false; 2];
        for i in 0..2 {
            if learners[1 - i] && !self.sent[i] {
                sends[i] = true;
                self.sent[i] = true;
            }
        }
        let first = self.id.is_none();
        if first {
            self.id = Some(fresh());
        }
        (sends, first)
    }

    /// Whether both parties know the masked value of a mask that was drawn.
    pub fn is_full(&self) -> bool {
        self.id.is_some() && self.sent == [true, true]
    }
}
