//! Bilinear products of masked values: elementwise, batched matrix product, linear layer.
//!
//! Computes z = x * y for any bilinear `*`, in Z_{2^64}: exact, scales add up.
//!
//! With X = x + r and Y = y + q open, x*y = X*Y - X*q - r*Y + r*q, of which each party computes the part with its own
//! shares of r and q; the dealer deals r*q. (Beaver triples in the masked-value form of ABY2.0 and TurboSpeedz.)
//!
//! | operands | opened (once a tensor) | dealer | online products, first / second party |
//! |---|---|---|---|
//! | public, or both of one party | nothing | nothing | 1 at those who know both |
//! | x shared or of party 1-p, y of party p | x to p, y to 1-p | 8 bytes a result | owner p: 1; 1-p: 1, or 0 when y is a session parameter (prepared offline) |
//! | both shared | both, to both | 8 bytes a result | 2 each, or 1 when y is a session parameter |
//!
//! At most one round, none if both are open; 8 bytes an element opened, in each direction that is needed. Zeros of an
//! operand ([`Meta::zeros`]) are not sent, nor are they of the dealt r*q, which has those of both; of an operand that was
//! [truncated](super::truncate) the carry is. Dealer bytes go to the second party. A session parameter was opened at set-up.
//!
//! Asymmetric sharing: when party p owns the weight y, it multiplies in the clear, (x_p + X_{1-p}) * y, where
//! X_{1-p} = x_{1-p} + r_{1-p} is the other's piece; the other's result, -(r_{1-p} * Y) + c, is known before the
//! input is.

use veiltune_ring::Ring;

use super::carried;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Meta, Product, product_meta};
use crate::offline::{OffTensor, Offline};
use crate::online::{Online, Share};
use crate::opening::{BOTH, only};
use crate::{Error, Owner, Party, Result};

/// How the operands' owners decide the protocol: the same at every role.
enum Case {
    /// Who knows both operands computes.
    Local,
    /// The operand of `owner` is the right one if `right`, else the left one.
    Owned { owner: Party, right: bool },
    /// Neither party knows either operand.
    Shared,
}

impl Case {
    fn of(a: &Meta, b: &Meta) -> Case {
        match (a.owner, b.owner) {
            (Owner::Public, _) | (_, Owner::Public) => Case::Local,
            (Owner::Party(p), Owner::Party(q)) if p == q => Case::Local,
            (_, Owner::Party(owner)) => Case::Owned { owner, right: true },
            (Owner::Party(owner), _) => Case::Owned { owner, right: false },
            (Owner::Shared, Owner::Shared) => Case::Shared,
        }
    }
}

/// `kind` with the owned operand `w` on its side.
fn oriented(kind: Product, x: &Ring, w: &Ring, right: bool) -> Result<Ring> {
    if right { kind.apply(x, w) } else { kind.apply(w, x) }
}

pub(crate) fn offline(o: &Offline, kind: Product, a: &OffTensor, b: &OffTensor) -> Result<OffTensor> {
    if let Some(z) = carried::offline_product(o, kind, a, b)? {
        return Ok(z);
    }
    let meta = product_meta(kind, o.meta(a), o.meta(b))?;
    let macs = kind.macs(&o.meta(a).dims, &meta.dims);
    let detail = [kind as u8];
    match Case::of(o.meta(a), o.meta(b)) {
        Case::Local => {
            let knows = [Party::P0, Party::P1].map(|p| meta.owner != Owner::Party(p.peer()));
            o.computed("product", knows.map(|k| if k { macs } else { 0 }));
        }
        Case::Owned { owner, right } => {
            let (x, w) = if right { (a, b) } else { (b, a) };
            let other = owner.peer();
            o.open_for(&[(x, only(owner)), (w, only(other))]);
            let gate = o.gate("product", &detail);
            let mask = |t: &OffTensor, p: Party| o.mask_of(t, p.index());
            let cross = o.correlate_as("product", (gate, 0), &meta, || {
                match (mask(x, other), mask(w, owner)) {
                    (Some(r), Some(q)) => Ok(oriented(kind, &r, &q, right)?.into_vec()),
                    _ => Err(Error::program("product", "a mask is missing at the dealer")),
                }
            })?;
            let prepared = o.is_parameter(w);
            let mut online = [0; 2];
            online[owner.index()] = macs;
            online[other.index()] = if prepared { 0 } else { macs };
            o.computed("product", online);
            if let Some(c) = cross {
                let c = if prepared && o.party_role() == Some(other) {
                    let masked = o.masked_parameter(w).ok_or_else(unopened)?;
                    let r = mask(x, other).ok_or_else(unopened)?;
                    Ring::new(meta.dims.clone(), c)?
                        .sub(&oriented(kind, &r, &masked, right)?)?
                        .into_vec()
                } else {
                    c
                };
                o.put(c);
            }
            o.end_gate()?;
        }
        Case::Shared => {
            o.open_for(&[(a, BOTH), (b, BOTH)]);
            let gate = o.gate("product", &detail);
            let cross = o.correlate_as("product", (gate, 0), &meta, || {
                Ok(kind.apply(&o.mask(a)?, &o.mask(b)?)?.into_vec())
            })?;
            let prepared = o.is_parameter(b);
            o.computed("product", [if prepared { macs } else { 2 * macs }; 2]);
            if let Some(c) = cross {
                let c = match (prepared, o.party_role()) {
                    (true, Some(p)) => {
                        let masked = o.masked_parameter(b).ok_or_else(unopened)?;
                        let r = o.mask_of(a, p.index()).ok_or_else(unopened)?;
                        Ring::new(meta.dims.clone(), c)?
                            .sub(&kind.apply(&r, &masked)?)?
                            .into_vec()
                    }
                    _ => c,
                };
                o.put(c);
            }
            o.end_gate()?;
        }
    }
    Ok(o.tensor(meta))
}

pub(crate) fn online(p: &Online, kind: Product, a: &Share, b: &Share) -> Result<Share> {
    if let Some(z) = carried::online_product(p, kind, a, b)? {
        return Ok(z);
    }
    let meta = product_meta(kind, p.meta(a), p.meta(b))?;
    match Case::of(p.meta(a), p.meta(b)) {
        Case::Local => {
            // A public operand multiplies the other's share; two operands of one party multiply where they are.
            let (x, y) = match (p.meta(a).owner, p.meta(b).owner) {
                (Owner::Public, Owner::Public) => (p.known(a), p.known(b)),
                (Owner::Public, _) => (p.known(a), p.share(b)),
                (_, Owner::Public) => (p.share(a), p.known(b)),
                _ => (p.known(a), p.known(b)),
            };
            let share = match (x, y) {
                (Some(x), Some(y)) => Some(kind.apply(&x, &y)?),
                _ => None,
            };
            Ok(p.tensor(meta, share))
        }
        Case::Owned { owner, right } => {
            let (x, w) = if right { (a, b) } else { (b, a) };
            let other = owner.peer();
            p.open_for(&[(x, only(owner)), (w, only(other))])?;
            let (_, mut material) = p.gate()?;
            let mut share = Ring::new(meta.dims.clone(), take(&mut material.words)?)?;
            if p.party() == owner {
                let piece = p.peer_piece(x).ok_or_else(unopened)?;
                let sum = match p.share(x) {
                    Some(own) => piece.add(&own)?,
                    None => piece,
                };
                let w = p.known(w).ok_or_else(unopened)?;
                share.add_assign(&oriented(kind, &sum, &w, right)?)?;
            } else if !p.is_parameter(w) {
                let masked = p.peer_piece(w).ok_or_else(unopened)?;
                let r = p.mask(x).ok_or_else(unopened)?;
                share.sub_assign(&oriented(kind, &r, &masked, right)?)?;
            }
            Ok(p.tensor(meta, Some(share)))
        }
        Case::Shared => {
            p.open_for(&[(a, BOTH), (b, BOTH)])?;
            let (_, mut material) = p.gate()?;
            let mut share = Ring::new(meta.dims.clone(), take(&mut material.words)?)?;
            let (x, y) = (p.masked(a)?, p.masked(b)?);
            let (r, mut q) = (p.mask(a).ok_or_else(unopened)?, p.mask(b).ok_or_else(unopened)?);
            if p.is_first() {
                q.sub_assign(&y)?;
            }
            share.sub_assign(&kind.apply(&x, &q)?)?;
            if !p.is_parameter(b) {
                share.sub_assign(&kind.apply(&r, &y)?)?;
            }
            Ok(p.tensor(meta, Some(share)))
        }
    }
}

pub(crate) fn fixed(f: &Fixed, kind: Product, a: &FixedTensor, b: &FixedTensor) -> Result<FixedTensor> {
    if let Some(z) = carried::fixed_product(f, kind, a, b)? {
        return Ok(z);
    }
    let meta = product_meta(kind, f.meta(a), f.meta(b))?;
    match Case::of(f.meta(a), f.meta(b)) {
        Case::Local => {}
        Case::Owned { owner, right } => {
            let (x, w) = if right { (a, b) } else { (b, a) };
            f.open_for(&[(x, only(owner)), (w, only(owner.peer()))]);
            f.gate();
        }
        Case::Shared => {
            f.open_for(&[(a, BOTH), (b, BOTH)]);
            f.gate();
        }
    }
    let value = kind.apply(f.ring(a), f.ring(b))?;
    assert_no_wrap(kind, f.ring(a), f.ring(b), &value)?;
    Ok(f.tensor(meta, value))
}

/// The product must fit the signed range: a cheap bound first, a float shadow of the whole product if it is not
/// enough.
pub(super) fn assert_no_wrap(kind: Product, a: &Ring, b: &Ring, value: &Ring) -> Result<()> {
    let norm = |x: &Ring| {
        x.as_slice()
            .iter()
            .map(|v| (*v as i64 as f64).abs())
            .fold(0.0, f64::max)
    };
    let inner = match kind {
        Product::Elementwise => 1,
        _ => a.dims().last().copied().unwrap_or(1),
    };
    let limit = 2f64.powi(63);
    if norm(a) * norm(b) * (inner as f64) < limit {
        return Ok(());
    }
    let shadow = shadow(kind, a, b)?;
    // The shadow is exact to a relative 2^-40 or so; a wrapped value is off by 2^64.
    let wrapped = shadow
        .iter()
        .zip(value.as_slice())
        .any(|(s, v)| s.abs() >= limit || (s - *v as i64 as f64).abs() > limit / 2.0);
    if wrapped {
        return Err(Error::Range {
            op: "product",
            detail: format!(
                "a product of {:?} and {:?} leaves the 64-bit range; scale the weights or inputs down",
                a.dims(),
                b.dims()
            ),
        });
    }
    Ok(())
}

fn shadow(kind: Product, a: &Ring, b: &Ring) -> Result<Vec<f64>> {
    use candle_core::{Device, Tensor};
    let float = |x: &Ring| {
        let values: Vec<f64> = x.as_slice().iter().map(|v| *v as i64 as f64).collect();
        Tensor::from_vec(values, x.dims().to_vec(), &Device::Cpu)
    };
    let (a, b) = (float(a)?, float(b)?);
    let product = match kind {
        Product::Elementwise => a.broadcast_mul(&b)?,
        Product::MatMul => a.broadcast_matmul(&b)?,
        Product::MatMulNt => a.broadcast_matmul(&b.t()?)?,
    };
    Ok(product.flatten_all()?.to_vec1()?)
}

/// The next words of a gate's material.
pub(crate) fn take<T>(queue: &mut std::collections::VecDeque<T>) -> Result<T> {
    queue
        .pop_front()
        .ok_or_else(|| Error::program("gate", "material is missing"))
}

fn unopened() -> Error {
    Error::program("product", "an operand is not open where it should be")
}
