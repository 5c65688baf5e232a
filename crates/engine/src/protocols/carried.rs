//! Truncated values that are open already: sums, elementwise products and sums of squares of them without an opening.
//!
//! A [truncation](super::truncate) of x by f bits on an opening c = x + 2^62 + r gives
//!
//! x' = A - ρ + B m,  A = (c >> f) - 2^(62-f) and B = 2^(64-f) or 0 public,  ρ = r >> f and m = msb(r) dealt.
//!
//! So x' is a masked value whose mask is known to the dealer but for the public B: the *carry*. A difference of two such
//! values (a truncated row and its truncated mean) has the carries of both. Products multiply out, with one more dealt value
//! for each carry; all in Z_{2^64}:
//!
//! - **Product** of x = A - ρ + sum B_i m_i and y = S - q + sum C_j w_j, elementwise, broadcasting; x or y may also be an
//!   opened value, which has no carries: x y = A y + S (x - A) + ρ q - sum B_i (m_i q) - sum C_j (w_j ρ). The terms
//!   B_i C_j m_i w_j vanish modulo 2^64, because the two truncations are by no more than 64 bits together; where they are
//!   by more, the operands are opened as usual. Dealt: ρ q, 64 bits a result; m_i q and w_j ρ modulo 2^f, f bits an element
//!   of their own (broadcast) shape.
//! - **Matrix product** with such an x on the left, by the same formula with y opened: m_i q is then dealt for each
//!   multiplication that the product consists of, f bits each. It is done where that is at most 512 KiB, for a row or two.
//! - **Sum of squares** over the last dimension: sum_k (2 A_k x_k - A_k^2) + R - 2 sum B_i t_i + sum B_i^2 m_i. Dealt:
//!   R = sum ρ_k^2, 64 bits a row; t_i = m_i ρ_k, f bits an element, or m_i sum ρ_k, f bits a row, for the carry of a mean.
//!
//! A product of two truncated values has more fractional bits than its factors were good for. Each party rounds its share of it
//! to a multiple of 2^z, z such that [`SCALE`] fractional bits are left: shares of a value that is off by at most one unit of
//! those, however they wrap, because 2^z divides 2^64 (dropping those bits by a shift would not do). What is made of it is then
//! opened in 64 - z bits ([`Meta::zeros`]). Which way it is rounded depends on the low bits of the first party's share, which is a
//! stream of its seed and what is public; the fixed-point interpreter computes it too.
//!
//! Rounds: none (1 to open an operand that is neither open nor truncated). Exact, but for that rounding. Nothing is opened, so
//! nothing is to be argued: each party computes with shares and public values that it has.

use std::rc::Rc;
use std::sync::Arc;

use veiltune_ring::Ring;

use super::product::take;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Local, Meta, Product, SCALE, floor_to, product_meta};
use crate::offline::{OffTensor, Offline};
use crate::online::{Online, Share};
use crate::opening::{BOTH, Learners};
use crate::{Error, Owner, Result};

/// What the offline walk knows of a carried value.
pub(crate) struct OffCarried {
    /// ρ, at the dealer.
    mask: Option<Ring>,
    carries: Vec<OffCarry>,
    /// Whether all of it was truncated: then a product of two such is rounded.
    traced: bool,
}

#[derive(Clone)]
struct OffCarry {
    bits: u32,
    dims: Vec<usize>,
    /// m, at the dealer.
    carry: Option<Ring>,
}

impl OffCarried {
    /// Of a value truncated by `bits`, from the mask's high part and its top bit.
    pub(crate) fn truncated(
        dims: &[usize],
        bits: u32,
        mask: Option<Ring>,
        carry: Option<Ring>,
    ) -> OffCarried {
        let carry = OffCarry {
            bits,
            dims: dims.to_vec(),
            carry,
        };
        OffCarried {
            mask,
            carries: vec![carry],
            traced: true,
        }
    }

    fn bits(&self) -> Vec<u32> {
        self.carries.iter().map(|c| c.bits).collect()
    }

    /// What a party and the dealer keep of it, of `len` elements: A, B and the shares of m; ρ and m.
    pub(crate) fn bytes(&self, len: usize) -> (u64, u64) {
        let carries: usize = self
            .carries
            .iter()
            .map(|c| c.dims.iter().product::<usize>())
            .sum();
        (8 * (len + 2 * carries) as u64, 8 * (len + carries) as u64)
    }
}

/// What a party knows of a carried value, beside its share.
pub(crate) struct Carried {
    /// A.
    masked: Ring,
    carries: Vec<Carry>,
    /// Whether all of it was truncated: then a product of two such is rounded.
    traced: bool,
}

/// What the fixed-point interpreter knows of a carried value: what the first party does.
pub(crate) struct Traced {
    pub carried: Carried,
    /// The first party's share, if all of it was truncated.
    pub share: Option<Ring>,
}

#[derive(Clone)]
struct Carry {
    bits: u32,
    /// B, public.
    weight: Ring,
    /// This party's share of m modulo 2^bits.
    carry: Ring,
}

impl Carried {
    /// Of a value truncated by `bits` on the opening `c` (the offset included), from the shares of m.
    pub(crate) fn truncated(c: &Ring, offset: u64, bits: u32, carry: Vec<u64>) -> Result<Carried> {
        let weight = c.map(|c| if c >> 63 == 0 { 1 << (64 - bits) } else { 0 });
        let carry = Carry {
            bits,
            weight,
            carry: Ring::new(c.dims().to_vec(), carry)?,
        };
        Ok(Carried {
            masked: c.map(|c| (c >> bits).wrapping_sub(offset >> bits)),
            carries: vec![carry],
            traced: true,
        })
    }

    fn bits(&self) -> Vec<u32> {
        self.carries.iter().map(|c| c.bits).collect()
    }

    fn sum(&self, other: &Carried, subtract: bool) -> Result<Carried> {
        let mut carries = self.carries.clone();
        for carry in &other.carries {
            let mut carry = carry.clone();
            if subtract {
                carry.weight = carry.weight.neg();
            }
            carries.push(carry);
        }
        let (a, b) = (&self.masked, &other.masked);
        Ok(Carried {
            masked: if subtract { a.sub(b)? } else { a.add(b)? },
            carries,
            traced: self.traced && other.traced,
        })
    }
}

/// Zeros that a product is rounded to: it keeps [`SCALE`] fractional bits, if both factors were truncated. Else it stays as it is.
fn zeros_of(kind: Product, meta: &Meta, traced: [bool; 2]) -> u32 {
    match kind {
        Product::Elementwise if traced == [true, true] => meta.scale.saturating_sub(SCALE),
        _ => 0,
    }
}

/// A party's share, rounded to a multiple of 2^zeros: the value moves by at most that much, and not on average.
pub(crate) fn rounded(x: Ring, zeros: u32) -> Ring {
    match zeros {
        0 => x,
        _ => floor_to(x.add_scalar(1 << (zeros - 1)), zeros),
    }
}

/// The value whose shares are rounded, from the first party's share.
pub(crate) fn rounded_sum(value: &Ring, first: Ring, zeros: u32) -> Result<Ring> {
    let second = value.sub(&first)?;
    Ok(rounded(first, zeros).add(&rounded(second, zeros))?)
}

/// Whether no product of two carries, one of each list, is left modulo 2^64.
fn vanish(a: &[u32], b: &[u32]) -> bool {
    a.iter().all(|f| b.iter().all(|g| f + g <= 64))
}

/// Dealt bytes for the carries of a matrix product that are worth a round.
const ROUND: u64 = 1 << 19;

/// Whether a matrix product of a value truncated by `bits` with another is computed here: neither is public, and the dealt
/// values for the carries are few, as they are for a row or two.
pub(crate) fn pays(kind: Product, a: &Meta, b: &Meta, bits: &[u32]) -> bool {
    let Ok(out) = kind.dims(&a.dims, &b.dims) else {
        return false;
    };
    let dealt = kind
        .macs(&a.dims, &out)
        .saturating_mul(bits.iter().map(|b| u64::from(*b)).sum());
    a.owner != Owner::Public && b.owner != Owner::Public && dealt / 8 <= ROUND
}

/// Of which operands the carries are used; None: the product is not computed here.
fn applies(kind: Product, a: &Meta, b: &Meta, carries: [Option<&[u32]>; 2]) -> Option<[bool; 2]> {
    let [x, y] = carries;
    let secret = a.owner != Owner::Public && b.owner != Owner::Public;
    match kind {
        Product::Elementwise => {
            let meet = !vanish(x.unwrap_or(&[]), y.unwrap_or(&[]));
            (secret && !meet && (x.is_some() || y.is_some())).then_some([x.is_some(), y.is_some()])
        }
        _ => pays(kind, a, b, x?).then_some([true, false]),
    }
}

/// Shapes in which m of a left factor's carry and q of the right factor are multiplied without being summed, and the
/// dimension of the sum from the end.
fn crossed(kind: Product, carry: &[usize], other: &[usize]) -> ([Vec<usize>; 2], Option<usize>) {
    let with = |dims: &[usize], from_end: usize| {
        let mut dims = dims.to_vec();
        dims.insert(dims.len() - from_end, 1);
        dims
    };
    match kind {
        Product::Elementwise => ([carry.to_vec(), other.to_vec()], None),
        // [.., m, k, 1] and [.., 1, k, n].
        Product::MatMul => ([with(carry, 0), with(other, 2)], Some(2)),
        // [.., m, 1, k] and [.., 1, n, k].
        Product::MatMulNt => ([with(carry, 1), with(other, 2)], Some(1)),
    }
}

// ---- offline ----

/// How `x` is known up to dealt values: as it was truncated (if `carried`), or as it was opened.
fn offline_known(o: &Offline, x: &OffTensor, carried: bool) -> Result<Option<Rc<OffCarried>>> {
    if carried && let Some(carried) = o.carried(x) {
        return Ok(Some(carried));
    }
    if !o.is_open(x) || o.meta(x).owner == Owner::Public {
        return Ok(None);
    }
    let mask = if o.is_dealer() { Some(o.mask(x)?) } else { None };
    Ok(Some(Rc::new(OffCarried {
        mask,
        carries: Vec::new(),
        traced: false,
    })))
}

pub(crate) fn offline_sum(
    o: &Offline,
    a: &OffTensor,
    b: &OffTensor,
    subtract: bool,
    meta: Meta,
) -> Result<OffTensor> {
    if o.carried(a).is_none() && o.carried(b).is_none() {
        return Ok(o.tensor(meta));
    }
    let (Some(x), Some(y)) = (offline_known(o, a, true)?, offline_known(o, b, true)?) else {
        return Ok(o.tensor(meta));
    };
    let mask = match (&x.mask, &y.mask) {
        (Some(x), Some(y)) => Some(if subtract { x.sub(y)? } else { x.add(y)? }),
        _ => None,
    };
    let carries = [&x.carries[..], &y.carries[..]].concat();
    let traced = x.traced && y.traced;
    Ok(o.carrying(
        meta,
        OffCarried {
            mask,
            carries,
            traced,
        },
    ))
}

/// The product, if it is one to be computed here.
pub(crate) fn offline_product(
    o: &Offline,
    kind: Product,
    a: &OffTensor,
    b: &OffTensor,
) -> Result<Option<OffTensor>> {
    let carries = [a, b].map(|x| o.carried(x).map(|c| c.bits()));
    let carries = carries.each_ref().map(|c| c.as_deref());
    let Some(used) = applies(kind, o.meta(a), o.meta(b), carries) else {
        return Ok(None);
    };
    let meta = product_meta(kind, o.meta(a), o.meta(b))?;
    open_rest(|xs| o.open_for(xs), a, b, used);
    let x = offline_known(o, a, used[0])?.ok_or_else(unknown)?;
    let y = offline_known(o, b, used[1])?.ok_or_else(unknown)?;
    let gate = o.gate("carried product", &[kind as u8]);
    let dealer = |x: &Option<Ring>| x.clone().ok_or_else(unknown);
    o.deal("product", (gate, 0), meta.len(), 64, || {
        Ok(kind.apply(&dealer(&x.mask)?, &dealer(&y.mask)?)?.into_vec())
    })?;
    let (mut slot, mut macs) = (0, 2 * kind.macs(&o.meta(a).dims, &meta.dims));
    for (carries, other, dims) in [
        (&x.carries, &y, &o.meta(b).dims),
        (&y.carries, &x, &o.meta(a).dims),
    ] {
        for carry in carries {
            slot += 1;
            let ([left, right], _) = crossed(kind, &carry.dims, dims);
            let n = Product::Elementwise.dims(&left, &right)?.iter().product();
            o.deal("product", (gate, slot), n, carry.bits, || {
                let (m, q) = (dealer(&carry.carry)?, dealer(&other.mask)?);
                Ok(m.reshape(left)?.mul(&q.reshape(right)?)?.into_vec())
            })?;
            macs += n as u64;
        }
    }
    o.computed("product", [macs; 2]);
    o.end_gate()?;
    Ok(Some(o.tensor(Meta {
        owner: Owner::Shared,
        zeros: zeros_of(kind, &meta, [x.traced, y.traced]),
        ..meta
    })))
}

/// Opens whichever of the operands is not used by its carries.
fn open_rest<'a, T, R>(
    open: impl FnOnce(&[(&'a T, Learners)]) -> R,
    a: &'a T,
    b: &'a T,
    used: [bool; 2],
) -> R {
    let rest = [a, b].into_iter().zip(used).filter(|(_, used)| !used);
    open(&rest.map(|(x, _)| (x, BOTH)).collect::<Vec<_>>())
}

/// What a sum of squares works on: a shared value whose carries do not meet each other, of whole rows or one a row.
struct Rows {
    meta: Meta,
    row: usize,
}

fn rows(x: &Meta) -> Result<Rows> {
    let row = *x
        .dims
        .last()
        .ok_or_else(|| Error::program("square_sum", "a scalar has no rows"))?;
    let mut dims = x.dims.clone();
    dims[x.dims.len() - 1] = 1;
    Ok(Rows {
        meta: Meta {
            dims,
            zeros: 0,
            ..product_meta(Product::Elementwise, x, x)?
        },
        row: row.max(1),
    })
}

/// Whether a sum of squares is a gate of its own; else it is a product and a local sum.
fn squares_alone(x: &Meta, carries: &[u32]) -> bool {
    let pairs = |i: usize| vanish(&carries[..i], &carries[i..=i]);
    x.owner == Owner::Shared && !x.is_empty() && (0..carries.len()).all(pairs)
}

fn square_and_sum<G: Gates>(g: &G, x: &G::T) -> Result<G::T> {
    let square = g.product(Product::Elementwise, x, x)?;
    let last = g.meta(x).dims.len() - 1;
    g.local(&square, &Local::Sum(last))
}

pub(crate) fn offline_square_sum(o: &Offline, x: &OffTensor) -> Result<OffTensor> {
    let Rows { meta, row } = rows(o.meta(x))?;
    let carried = o.carried(x);
    if !squares_alone(o.meta(x), &carried.as_ref().map_or(Vec::new(), |c| c.bits())) {
        return square_and_sum(o, x);
    }
    if carried.is_none() {
        o.open_for(&[(x, BOTH)]);
    }
    let known = offline_known(o, x, true)?.ok_or_else(unknown)?;
    let gate = o.gate("square sum", &[]);
    let mask = || known.mask.clone().ok_or_else(unknown);
    let sums = |values: &Ring| -> Vec<u64> {
        let rows = values.as_slice().chunks(row);
        rows.map(|r| r.iter().fold(0u64, |a, b| a.wrapping_add(*b)))
            .collect()
    };
    o.deal("square sum", (gate, 0), meta.len(), 64, || {
        let mask = mask()?;
        Ok(sums(&mask.mul(&mask)?))
    })?;
    for (slot, carry) in (1..).zip(&known.carries) {
        let n = carry.dims.iter().product();
        o.deal("square sum", (gate, slot), n, carry.bits, || {
            let m = carry.carry.as_ref().ok_or_else(unknown)?;
            if carry.dims == meta.dims {
                return Ok(m.mul(&Ring::new(meta.dims.clone(), sums(&mask()?))?)?.into_vec());
            }
            Ok(m.mul(&mask()?)?.into_vec())
        })?;
    }
    o.computed("square sum", [2 * o.meta(x).len() as u64; 2]);
    o.end_gate()?;
    Ok(o.tensor(meta))
}

// ---- online ----

fn online_known(p: &Online, x: &Share, carried: bool) -> Result<Option<Rc<Carried>>> {
    if carried && let Some(carried) = p.carried(x) {
        return Ok(Some(carried));
    }
    if !p.is_open(x) || p.meta(x).owner == Owner::Public {
        return Ok(None);
    }
    Ok(Some(Rc::new(Carried {
        masked: p.masked(x)?,
        carries: Vec::new(),
        traced: false,
    })))
}

pub(crate) fn online_sum(
    p: &Online,
    a: &Share,
    b: &Share,
    subtract: bool,
    meta: Meta,
    sum: Option<Ring>,
) -> Result<Share> {
    if p.carried(a).is_none() && p.carried(b).is_none() {
        return Ok(p.tensor(meta, sum));
    }
    let (Some(x), Some(y), Some(sum)) = (online_known(p, a, true)?, online_known(p, b, true)?, &sum) else {
        return Ok(p.tensor(meta, sum));
    };
    Ok(p.carrying(meta, sum.clone(), x.sum(&y, subtract)?))
}

/// A party's share of a product, from what it knows of the factors and its shares of them; `dealt` gives the next of the dealt
/// values, so many of so many bits.
fn multiply(
    kind: Product,
    meta: &Meta,
    (x, y): (&Carried, &Carried),
    [a, b]: [Ring; 2],
    first: bool,
    mut dealt: impl FnMut(usize, u32) -> Result<Vec<u64>>,
) -> Result<Ring> {
    let dims = [a.dims().to_vec(), b.dims().to_vec()];
    let mut out = Ring::new(meta.dims.clone(), dealt(meta.len(), 64)?)?;
    // A y + S (x - A), of which the first party's shares hold A.
    out.add_assign(&kind.apply(&x.masked, &b)?)?;
    let rest = if first { a.sub(&x.masked)? } else { a };
    out.add_assign(&kind.apply(&rest, &y.masked)?)?;
    for (carries, dims) in [(&x.carries, &dims[1]), (&y.carries, &dims[0])] {
        for carry in carries {
            let ([left, right], summed) = crossed(kind, carry.weight.dims(), dims);
            let dims = Product::Elementwise.dims(&left, &right)?;
            let (n, rank) = (dims.iter().product(), dims.len());
            let mut term = Ring::new(dims, dealt(n, carry.bits)?)?.mul(&carry.weight.reshape(left)?)?;
            if let Some(from_end) = summed {
                term = term.sum(rank - from_end)?.reshape(meta.dims.clone())?;
            }
            out.sub_assign(&term)?;
        }
    }
    Ok(out)
}

pub(crate) fn online_product(p: &Online, kind: Product, a: &Share, b: &Share) -> Result<Option<Share>> {
    let carries = [a, b].map(|x| p.carried(x).map(|c| c.bits()));
    let carries = carries.each_ref().map(|c| c.as_deref());
    let Some(used) = applies(kind, p.meta(a), p.meta(b), carries) else {
        return Ok(None);
    };
    let meta = product_meta(kind, p.meta(a), p.meta(b))?;
    open_rest(|xs| p.open_for(xs), a, b, used)?;
    let x = online_known(p, a, used[0])?.ok_or_else(unknown)?;
    let y = online_known(p, b, used[1])?.ok_or_else(unknown)?;
    let (_, mut material) = p.gate()?;
    let shares = [a, b].map(|x| p.share_or_zeros(x));
    let out = multiply(kind, &meta, (&x, &y), shares, p.is_first(), |_, _| {
        take(&mut material.words)
    })?;
    let meta = Meta {
        owner: Owner::Shared,
        zeros: zeros_of(kind, &meta, [x.traced, y.traced]),
        ..meta
    };
    let out = rounded(out, meta.zeros);
    Ok(Some(p.tensor(meta, Some(out))))
}

pub(crate) fn online_square_sum(p: &Online, x: &Share) -> Result<Share> {
    let Rows { meta, row } = rows(p.meta(x))?;
    let carried = p.carried(x);
    if !squares_alone(p.meta(x), &carried.as_ref().map_or(Vec::new(), |c| c.bits())) {
        return square_and_sum(p, x);
    }
    if carried.is_none() {
        p.open_for(&[(x, BOTH)])?;
    }
    let known = online_known(p, x, true)?.ok_or_else(unknown)?;
    let (_, mut material) = p.gate()?;
    let mut out = take(&mut material.words)?;
    let first = u64::from(p.is_first());
    let share = p.share_or_zeros(x);
    let rows = known
        .masked
        .as_slice()
        .chunks(row)
        .zip(share.as_slice().chunks(row));
    for (out, (masked, share)) in out.iter_mut().zip(rows) {
        for (a, x) in masked.iter().zip(share) {
            let term = a.wrapping_mul(x.wrapping_mul(2).wrapping_sub(first.wrapping_mul(*a)));
            *out = out.wrapping_add(term);
        }
    }
    for carry in &known.carries {
        let crossed = take(&mut material.words)?;
        // The carry of a mean is that of every element of its row.
        let (span, times) = if carry.weight.dims() == meta.dims {
            (1, row as u64)
        } else {
            (row, 1)
        };
        let elements = carry.weight.as_slice().iter().zip(carry.carry.as_slice());
        for (i, ((b, m), t)) in elements.zip(&crossed).enumerate() {
            let own = b.wrapping_mul(*m).wrapping_mul(times);
            let term = b.wrapping_mul(own.wrapping_sub(t.wrapping_mul(2)));
            out[i / span] = out[i / span].wrapping_add(term);
        }
    }
    Ok(p.tensor(meta.clone(), Some(Ring::new(meta.dims, out)?)))
}

// ---- in the clear ----

fn fixed_known(f: &Fixed, x: &FixedTensor) -> Result<Option<Arc<Traced>>> {
    if let Some(carried) = f.carried(x) {
        return Ok(Some(carried));
    }
    if !f.is_open(x) || f.meta(x).owner == Owner::Public {
        return Ok(None);
    }
    Ok(Some(Arc::new(Traced {
        carried: Carried {
            masked: f.ring(x).add(&f.mask(x)?)?,
            carries: Vec::new(),
            traced: false,
        },
        share: None,
    })))
}

/// What is known of a sum of `a` and `b`, of which one is carried, and the other at least open.
pub(crate) fn fixed_sum(
    f: &Fixed,
    a: &FixedTensor,
    b: &FixedTensor,
    subtract: bool,
) -> Result<Option<Traced>> {
    if f.carried(a).is_none() && f.carried(b).is_none() {
        return Ok(None);
    }
    let (Some(x), Some(y)) = (fixed_known(f, a)?, fixed_known(f, b)?) else {
        return Ok(None);
    };
    let share = match (&x.share, &y.share) {
        (Some(x), Some(y)) => Some(if subtract { x.sub(y)? } else { x.add(y)? }),
        _ => None,
    };
    Ok(Some(Traced {
        carried: x.carried.sum(&y.carried, subtract)?,
        share,
    }))
}

/// The product, if it is one of those computed here; then what it needs is opened.
pub(crate) fn fixed_product(
    f: &Fixed,
    kind: Product,
    a: &FixedTensor,
    b: &FixedTensor,
) -> Result<Option<FixedTensor>> {
    let known = [a, b].map(|x| f.carried(x));
    let bits = known.each_ref().map(|x| x.as_ref().map(|x| x.carried.bits()));
    let Some(used) = applies(kind, f.meta(a), f.meta(b), bits.each_ref().map(|b| b.as_deref())) else {
        return Ok(None);
    };
    let meta = product_meta(kind, f.meta(a), f.meta(b))?;
    open_rest(|xs| f.open_for(xs), a, b, used);
    let gate = f.gate();
    let mut value = kind.apply(f.ring(a), f.ring(b))?;
    super::product::assert_no_wrap(kind, f.ring(a), f.ring(b), &value)?;
    let shares = match &known {
        [Some(x), Some(y)] if used == [true, true] => {
            x.share.as_ref().zip(y.share.as_ref()).map(|s| (x, y, s))
        }
        _ => None,
    };
    let zeros = zeros_of(kind, &meta, [shares.is_some(); 2]);
    if let (Some((x, y, shares)), true) = (shares, zeros > 0) {
        let mut slot = 0;
        let shares = [shares.0.clone(), shares.1.clone()];
        let first = multiply(kind, &meta, (&x.carried, &y.carried), shares, true, |n, bits| {
            let words = f.first_of_dealt((gate, slot), n, bits);
            slot += 1;
            Ok(words)
        })?;
        value = rounded_sum(&value, first, zeros)?;
    }
    Ok(Some(f.tensor(
        Meta {
            owner: Owner::Shared,
            zeros,
            ..meta
        },
        value,
    )))
}

pub(crate) fn fixed_square_sum(f: &Fixed, x: &FixedTensor) -> Result<FixedTensor> {
    let Rows { meta, .. } = rows(f.meta(x))?;
    let carried = f.carried(x);
    if !squares_alone(
        f.meta(x),
        &carried.as_ref().map_or(Vec::new(), |c| c.carried.bits()),
    ) {
        return square_and_sum(f, x);
    }
    if carried.is_none() {
        f.open_for(&[(x, BOTH)]);
    }
    f.gate();
    let square = Product::Elementwise.apply(f.ring(x), f.ring(x))?;
    super::product::assert_no_wrap(Product::Elementwise, f.ring(x), f.ring(x), &square)?;
    Ok(f.tensor(meta, square.sum(f.meta(x).dims.len() - 1)?))
}

fn unknown() -> Error {
    Error::program("carried", "an operand is not known where it should be")
}
