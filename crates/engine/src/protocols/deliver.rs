//! Deliver: an output for the outside owner alone, who adds up what the two parties hand over.
//!
//! Each party's share plus its share of a dealt zero, so that what the owner gets from one party alone, and the pair of
//! shares beyond its sum, is uniformly random. No round between the parties; 8 bytes an element from each party to the
//! owner; dealer 8 bytes an element to the second party. Callers reduce the value to its declared precision first, as for
//! [`reveal`](super::reveal).

use veiltune_ring::Ring;

use super::product::take;
use crate::Result;
use crate::gates::Gates;
use crate::offline::{OffTensor, Offline};
use crate::online::{Online, Share};

pub(crate) fn offline(o: &Offline, x: &OffTensor) -> Result<()> {
    let n = o.meta(x).len();
    let gate = o.gate("deliver", &[]);
    o.delivered(8 * n as u64);
    o.deal("deliver", (gate, 0), n, 64, || Ok(vec![0; n]))?;
    o.end_gate()
}

pub(crate) fn online(p: &Online, x: &Share) -> Result<()> {
    let (_, mut material) = p.gate()?;
    let mut share = Ring::new(p.meta(x).dims.clone(), take(&mut material.words)?)?;
    share.add_assign(&p.share_or_zeros(x))?;
    p.hand_out(share)
}
