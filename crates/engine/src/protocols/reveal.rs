//! Reveal: the only way from a share to a plain value.
//!
//! The other party sends its share; 1 round, 8 bytes an element towards the receiver, nothing from the dealer.
//! Callers reduce the value to its declared precision by a faithful truncation first, so that the low bits of an
//! intermediate product, or a rounding bit that depends on a mask, are not revealed with it.

use veiltune_ring::{Ring, codec};

use crate::fixed::{Fixed, FixedTensor};
use crate::gates::Gates;
use crate::offline::{OffTensor, Offline};
use crate::online::{Online, Share};
use crate::{Owner, Party, Result, Revealed};

/// Whether the receiver knows it already.
fn is_known(owner: Owner, to: Party) -> bool {
    owner == Owner::Public || owner == Owner::Party(to)
}

pub(crate) fn offline(o: &Offline, x: &OffTensor, to: Party) -> Result<Option<Revealed>> {
    let meta = o.meta(x);
    if !is_known(meta.owner, to) {
        o.gate("reveal", &[to.index() as u8]);
        let mut bytes = [0; 2];
        bytes[to.peer().index()] = 8 * meta.len() as u64;
        o.exchanged("reveal", bytes);
        o.end_gate()?;
    }
    Ok(None)
}

pub(crate) fn online(p: &Online, x: &Share, to: Party) -> Result<Option<Revealed>> {
    let meta = p.meta(x);
    let mut value = p.share(x).or_else(|| p.known(x));
    if !is_known(meta.owner, to) {
        p.gate()?;
        if let Some(words) = p.send_one_way(to.peer(), value.as_ref(), meta.len())? {
            let other = Ring::new(meta.dims.clone(), words)?;
            value = Some(match value {
                Some(own) => own.add(&other)?,
                None => other,
            });
        }
    }
    if p.party() != to {
        return Ok(None);
    }
    let value = value.unwrap_or_else(|| Ring::zeros(meta.dims.clone()));
    Ok(Some(Revealed {
        dims: meta.dims.clone(),
        values: codec::decode(value.as_slice(), meta.scale),
    }))
}

pub(crate) fn fixed(f: &Fixed, x: &FixedTensor, to: Party) -> Result<Option<Revealed>> {
    if !is_known(f.meta(x).owner, to) {
        f.gate();
    }
    Ok(Some(Revealed {
        dims: f.meta(x).dims.clone(),
        values: f.values(x),
    }))
}
