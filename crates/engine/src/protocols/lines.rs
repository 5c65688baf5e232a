//! Piecewise linear functions of a non-negative value, with public thresholds, constants and slopes, in one round.
//!
//! y = k_i + a_i u on the interval T_i <= u < T_{i+1}, u = x / 2^t, for x in 0..2^n. With X = x + r open, u is
//! C - ρ modulo 2^(n-t), where C = (X mod 2^n) >> t is public and ρ = (r mod 2^n) >> t the dealer's: rounded down or up, as
//! by a one-round truncation. Intervals are told apart by u' = u / 2^s, rounded likewise, of which thresholds T are whole: lines
//! that meet at a threshold differ little next to it, and each bit less is a level less of every key. So let C' = C >> s and
//! ρ' = ρ >> s. One key of a distributed comparison function of n - t - s bits gives f(v) = [v < ρ'] at any public
//! v, and with a second payload ρ f(v). Then u = C - ρ + 2^(n-t) f(C'), and [u' >= T] is
//! g = [C' >= T] - f(C' - T mod 2^(n-t-s)) + f(C'), so that one key serves every threshold (the interval-containment gate of
//! Boyle et al. 2021, with outputs in Z_{2^64}). Their product needs no multiplication of shares: g ρ is the same sum of the
//! second payload, and g f(C') is g if C' < T, else f(C'), because f falls. Hence
//! y = k_0 + a_0 u + sum_j ((k_j - k_{j-1}) g_j + (a_j - a_{j-1}) g_j u) is local. (C' = ρ' with C < ρ would be u less a turn: it
//! happens where x is within 2^(t+s) of 2^n, and nowhere else.)
//!
//! No round beyond opening x (1, or 0 if open); 8 bytes each way an element if not open. Dealer: one key of a pair of n - t - s
//! bits an element (about 32 bytes a bit) to both, 8 bytes to the second party. Nothing but u and u' is rounded. Costs a key
//! evaluation an element and interval: for values that are few, such as one a row.

use std::sync::Arc;

use veiltune_fss::dcf;
use veiltune_ring::Ring;

use super::product::take;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Meta};
use crate::offline::{OffTensor, Offline, low_bits};
use crate::online::{Online, Share};
use crate::opening::BOTH;
use crate::{Error, Owner, Result};

/// Public thresholds and lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lines {
    /// The input satisfies 0 <= x < 2^bits in the ring.
    pub bits: u32,
    /// The lines are evaluated at u = x / 2^shift.
    pub shift: u32,
    /// Which of them, u' = u / 2^cut says.
    pub cut: u32,
    /// Of u'. Strictly increasing, in 1..2^(bits - shift - cut).
    pub thresholds: Vec<u64>,
    /// Of the line on each interval (one more than there are thresholds), in the ring.
    pub constants: Vec<u64>,
    /// As `constants`.
    pub slopes: Vec<u64>,
    /// Fractional bits of the result.
    pub scale: u32,
}

impl Lines {
    fn check(&self) -> Result<()> {
        let lines = self.thresholds.len() + 1;
        let good = self.bits < 64
            && self.shift + self.cut < self.bits
            && self.thresholds.windows(2).all(|w| w[0] < w[1])
            && self
                .thresholds
                .iter()
                .all(|t| *t > 0 && *t <= low_bits(self.key_bits()))
            && self.constants.len() == lines
            && self.slopes.len() == lines;
        if good {
            return Ok(());
        }
        Err(Error::program(
            "lines",
            "thresholds must increase within their range, with one line more than there are of them",
        ))
    }

    fn fingerprint(&self) -> Vec<u8> {
        format!("{self:?}").into_bytes()
    }

    fn output(&self, x: &Meta) -> Meta {
        Meta {
            dims: x.dims.clone(),
            scale: self.scale,
            owner: Owner::Shared,
            zeros: 0,
        }
    }

    /// Bits of u', which are those of a key.
    fn key_bits(&self) -> u32 {
        self.bits - self.shift - self.cut
    }

    /// What u gains where x + r passes 2^bits.
    fn turn(&self) -> u64 {
        1 << (self.bits - self.shift)
    }

    /// C of an opened value, ρ of a mask.
    fn coarse(&self, x: u64) -> u64 {
        (x & low_bits(self.bits)) >> self.shift
    }
}

pub(crate) fn offline(o: &Offline, x: &OffTensor, spec: &Arc<Lines>) -> Result<OffTensor> {
    spec.check()?;
    o.open_for(&[(x, BOTH)]);
    let n = o.meta(x).len();
    let gate = o.gate("lines", &spec.fingerprint());
    let rho = if o.is_dealer() {
        o.mask(x)?.map(|r| spec.coarse(r))
    } else {
        Ring::zeros([0])
    };
    let rho = rho.as_slice();
    o.keys(
        "lines",
        (gate, 0),
        n,
        dcf::pair_key_bytes(spec.key_bits()),
        |range, roots, keys| {
            let rho = &rho[range];
            let alphas: Vec<u64> = rho.iter().map(|r| r >> spec.cut).collect();
            let betas: Vec<[u64; 2]> = rho.iter().map(|r| [1, *r]).collect();
            Ok(dcf::generate_pairs_into(
                spec.key_bits(),
                &alphas,
                &betas,
                roots,
                keys,
            )?)
        },
    )?;
    o.deal("lines", (gate, 1), n, 64, || Ok(rho.to_vec()))?;
    o.end_gate()?;
    Ok(o.tensor(spec.output(o.meta(x))))
}

pub(crate) fn online(p: &Online, x: &Share, spec: &Arc<Lines>) -> Result<Share> {
    spec.check()?;
    p.open_for(&[(x, BOTH)])?;
    let (_, mut material) = p.gate()?;
    let (roots, keys) = take(&mut material.keys)?;
    let mut out = take(&mut material.words)?; // shares of ρ, overwritten by the result
    let (bits, low) = (spec.key_bits(), low_bits(spec.key_bits()));
    let c = p.masked(x)?.map(|c| spec.coarse(c)).into_vec();
    let points = spec.thresholds.len() + 1;
    let mut xs = Vec::with_capacity(c.len() * points);
    for c in &c {
        let c = c >> spec.cut;
        xs.push(c);
        xs.extend(spec.thresholds.iter().map(|t| c.wrapping_sub(*t) & low));
    }
    let f = dcf::evaluate_pairs(p.party().index(), bits, &roots, &keys, points, &xs)?;
    let one = u64::from(p.is_first());
    for ((y, &c), f) in out.iter_mut().zip(&c).zip(f.chunks_exact(points)) {
        let rho = *y;
        let ([f_c, rho_f_c], f) = (f[0], &f[1..]);
        let at = |g: u64, g_rho: u64, g_f: u64| {
            c.wrapping_mul(g)
                .wrapping_sub(g_rho)
                .wrapping_add(spec.turn().wrapping_mul(g_f))
        };
        *y = one
            .wrapping_mul(spec.constants[0])
            .wrapping_add(spec.slopes[0].wrapping_mul(at(one, rho, f_c)));
        for (j, (t, [below, rho_below])) in spec.thresholds.iter().zip(f).enumerate() {
            let below_t = c >> spec.cut < *t;
            let (public, public_rho) = if below_t { (0, 0) } else { (one, rho) };
            let g = public.wrapping_sub(*below).wrapping_add(f_c);
            let g_rho = public_rho.wrapping_sub(*rho_below).wrapping_add(rho_f_c);
            let g_f = if below_t { g } else { f_c };
            let step = |values: &[u64]| values[j + 1].wrapping_sub(values[j]);
            *y = y
                .wrapping_add(step(&spec.constants).wrapping_mul(g))
                .wrapping_add(step(&spec.slopes).wrapping_mul(at(g, g_rho, g_f)));
        }
    }
    let meta = spec.output(p.meta(x));
    Ok(p.tensor(meta.clone(), Some(Ring::new(meta.dims, out)?)))
}

pub(crate) fn fixed(f: &Fixed, x: &FixedTensor, spec: &Arc<Lines>) -> Result<FixedTensor> {
    spec.check()?;
    if f.ring(x).as_slice().iter().any(|x| *x > low_bits(spec.bits)) {
        let detail = format!(
            "a value is negative or reaches 2^{}; calibrate a wider range",
            spec.bits
        );
        return Err(f.out_of_range("activation", detail));
    }
    f.open_for(&[(x, BOTH)]);
    f.gate();
    let mask = f.mask(x)?;
    let mut value = f.ring(x).clone();
    for (x, r) in value.make_mut().iter_mut().zip(mask.as_slice()) {
        let (c, rho) = (spec.coarse(x.wrapping_add(*r)), spec.coarse(*r));
        let (coarse_c, coarse_rho) = (c >> spec.cut, rho >> spec.cut);
        let turned = if coarse_c < coarse_rho { spec.turn() } else { 0 };
        let u = c.wrapping_sub(rho).wrapping_add(turned);
        let coarse = coarse_c.wrapping_sub(coarse_rho) & low_bits(spec.key_bits());
        let i = spec.thresholds.partition_point(|t| *t <= coarse);
        *x = spec.constants[i].wrapping_add(spec.slopes[i].wrapping_mul(u));
    }
    Ok(f.tensor(spec.output(f.meta(x)), value))
}
