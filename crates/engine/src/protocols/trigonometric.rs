//! The trigonometric gate: any smooth function on a bounded range as a short trigonometric series.
//!
//! For a period 2^p / m, m a small odd factor, both parties reduce their shares of m x modulo 2^n, n = scale + p (it divides 2^64, so this
//! is exact) and open d = m x + t mod 2^n, t **uniform over that same modulus**: d says nothing about x. The dealer deals
//! shares of cos(k theta_t), sin(k theta_t) for each harmonic k, theta_t = 2 pi t / 2^n; then
//! cos(k theta_x) = cos(k theta_d) cos(k theta_t) + sin(k theta_d) sin(k theta_t), and likewise the sine, are public
//! combinations of shares, and so is any series ([`Series`]). (Zheng et al. 2023 for one sine; the modulus matters: a
//! mask shorter than the ring it is opened in reveals x to within a period.)
//!
//! Several series of one period and as many harmonics share opening and dealt values: sine and cosine of whole turns cost 16
//! bytes an element together.
//!
//! An angle of more than 53 bits is opened whole and used by its first 53. Zeros of x ([`Meta::zeros`]) are zeros of t, and are not
//! sent. The result comes in one of four forms:
//!
//! - [`Form::Whole`]: modulo 2^64, at the scale of the series.
//! - [`Form::Rounded`]: the same, each party's share rounded to a multiple of 2^z as by [`carried`](super::carried): later openings
//!   take z bits less.
//! - [`Form::Raised`]: a bounded function needs no more of the ring than its own range. Sines and cosines are dealt modulo 2^(64-z),
//!   and what is made of them is multiplied by 2^z, z such that the result fills the 62 bits that a truncation takes. That truncation
//!   has to follow, and brings it into the whole ring again. Any linear term is a shift of x, without rounding.
//!
//! One round; n bits each way an element (packed; none if x is open). Dealer to the second party: 16 bytes an element
//! and harmonic, raised 16 (64 - z) / 64, about 10. Error: that of the fit ([`Series::fit_error`], 3e-5 for the activations), plus fixed-point rounding of
//! coefficients and harmonics: below 4e-4 for activations, 1e-5 for exp before softmax.

use std::sync::Arc;

use veiltune_ring::{Ring, harmonics};

use super::carried::{rounded, rounded_sum};
use super::product::take;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, LIMIT_BITS, Meta};
use crate::offline::{OffTensor, Offline, low_bits};
use crate::online::{Online, Share};
use crate::series::Series;
use crate::{Error, Owner, Result};

/// Masks whose sines and cosines are dealt at a time: whole tiles, which stay in the cache.
const BATCH: usize = 4 * harmonics::TILE;

/// What the result is to look like; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As it comes.
    Whole,
    /// Rounded to so many fractional bits; without a linear term.
    Rounded(u32),
    /// As large as a truncation takes it, for |f| < 2^b; a linear coefficient is a power of two.
    Raised(u32),
    /// As `Raised(size)`, rounded to `bits` fractional bits; without a linear term.
    RaisedRounded {
        /// |f| < 2^size.
        size: u32,
        /// Fractional bits.
        bits: u32,
    },
}

/// How a series is evaluated on an input.
struct Layout {
    meta: Meta,
    /// Bits of the dealt values.
    dealt: u32,
    /// Shift of the trigonometric part and the constant, and fractional bits of its coefficients.
    lift: u32,
    coefficients: u32,
    /// Zeros to which the shares are rounded.
    rounded: u32,
}

impl Layout {
    fn new(x: &Meta, series: &Series, form: Form) -> Result<Layout> {
        let impossible = || Error::program("series", format!("{form:?} of {} fractional bits", x.scale));
        let whole = series.scale(x.scale);
        let meta = |scale, zeros| Meta {
            dims: x.dims.clone(),
            scale,
            owner: Owner::Shared,
            zeros,
        };
        let coefficients = whole - series.dealt_scale;
        let to_round = matches!(form, Form::Rounded(_) | Form::RaisedRounded { .. });
        if to_round && series.linear != 0.0 {
            return Err(impossible());
        }
        Ok(match form {
            Form::Whole => Layout {
                meta: meta(whole, 0),
                dealt: 64,
                lift: 0,
                coefficients,
                rounded: 0,
            },
            Form::Rounded(bits) => {
                let zeros = whole.saturating_sub(bits);
                Layout {
                    meta: meta(whole, zeros),
                    dealt: 64,
                    lift: 0,
                    coefficients,
                    rounded: zeros,
                }
            }
            Form::Raised(bits) => {
                let coefficients = series.coefficient_scale;
                let scale = LIMIT_BITS.checked_sub(bits).ok_or_else(impossible)?;
                let lift = scale
                    .checked_sub(coefficients + series.dealt_scale)
                    .ok_or_else(impossible)?;
                let mut layout = Layout {
                    meta: meta(scale, lift),
                    dealt: 64 - lift,
                    lift,
                    coefficients,
                    rounded: 0,
                };
                if series.linear != 0.0 {
                    let shift = layout.linear_shift(x, series).ok_or_else(impossible)?;
                    layout.meta.zeros = lift.min(x.zeros + shift);
                }
                layout
            }
            Form::RaisedRounded { size, bits } => {
                let mut layout = Layout::new(x, series, Form::Raised(size))?;
                layout.rounded = layout.meta.scale.saturating_sub(bits);
                layout.meta.zeros = layout.meta.zeros.max(layout.rounded);
                layout
            }
        })
    }

    /// The shift that multiplies x by the linear coefficient and brings it to the scale of the result.
    fn linear_shift(&self, x: &Meta, series: &Series) -> Option<u32> {
        let exponent = series.linear.log2();
        let shift = i64::from(self.meta.scale) - i64::from(x.scale) + exponent as i64;
        (exponent.fract() == 0.0).then_some(u32::try_from(shift).ok()?)
    }

    /// A party's share: from the opened angles, its share of x and of the dealt values.
    fn share(
        &self,
        x: &Meta,
        series: &Series,
        (d, bits): (&[u64], u32),
        share: Option<&Ring>,
        dealt: impl Fn(usize, &mut [u64]) + Sync,
        first: bool,
    ) -> Result<Ring> {
        let mut out = series.accumulate(d, bits, self.coefficients, dealt);
        let lift = self.lift;
        let scale = self.coefficients + series.dealt_scale;
        let constant = (series.constant * 2f64.powi(scale as i32)).round() as i64 as u64;
        let constant = if first { constant } else { 0 };
        for o in &mut out {
            *o = o.wrapping_add(constant) << lift;
        }
        if let (Some(share), true) = (share, series.linear != 0.0) {
            let factor = match lift {
                0 => (series.linear * 2f64.powi(scale as i32 - x.scale as i32)).round() as i64 as u64,
                _ => 1 << self.linear_shift(x, series).unwrap_or(0),
            };
            for (o, x) in out.iter_mut().zip(share.as_slice()) {
                *o = o.wrapping_add(factor.wrapping_mul(*x));
            }
        }
        Ok(Ring::new(self.meta.dims.clone(), out)?)
    }
}

/// Bits of the modulus, and those of them that are not always zero.
fn modulus(x: &Meta, series: &Series) -> Result<(u32, u32)> {
    let bits = series.modulus_bits(x.scale)?;
    match bits.checked_sub(x.zeros) {
        None | Some(0) => Err(Error::program(
            "activation",
            format!("an input of {} zeros has no bits below a period", x.zeros),
        )),
        Some(sent) => Ok((bits, sent)),
    }
}

/// `all` have one period, and one number of harmonics and scale of dealt values.
pub(crate) fn offline(o: &Offline, x: &OffTensor, all: &[Arc<Series>], form: Form) -> Result<Vec<OffTensor>> {
    let (series, meta) = (&all[0], o.meta(x));
    let (n, (bits, sent)) = (meta.len(), modulus(meta, series)?);
    let mut detail: Vec<u8> = all.iter().flat_map(|s| s.fingerprint()).collect();
    detail.extend(format!("{form:?}").into_bytes());
    let gate = o.gate("trigonometric", &detail);
    let mask = if o.is_open(x) {
        if o.is_dealer() {
            Some(
                o.mask(x)?
                    .map(|r| r.wrapping_mul(series.factor) & low_bits(bits))
                    .into_vec(),
            )
        } else {
            None
        }
    } else {
        o.exchanged(
            "trigonometric",
            [veiltune_ring::pack::packed_len(n, sent) as u64; 2],
        );
        let mask = o.small_mask(gate, 0, n, sent);
        mask.map(|t| t.into_iter().map(|t| t << meta.zeros).collect())
    };
    let layouts = all
        .iter()
        .map(|s| Layout::new(meta, s, form))
        .collect::<Result<Vec<_>>>()?;
    let dealt = layouts[0].dealt;
    let (mask, each) = (mask.unwrap_or_default(), 2 * series.harmonics());
    o.deal_many("trigonometric", (gate, 1), (n, each, BATCH), dealt, |range| {
        series.deal(&mask[range], bits)
    })?;
    o.end_gate()?;
    Ok(layouts.into_iter().map(|l| o.tensor(l.meta)).collect())
}

pub(crate) fn online(p: &Online, x: &Share, all: &[Arc<Series>], form: Form) -> Result<Vec<Share>> {
    let meta = p.meta(x);
    let (n, (bits, sent), factor) = (meta.len(), modulus(meta, &all[0])?, all[0].factor);
    let (gate, mut material) = p.gate()?;
    let share = p.share(x);
    let d = if p.is_open(x) {
        p.masked(x)?
            .map(|d| d.wrapping_mul(factor) & low_bits(bits))
            .into_vec()
    } else {
        let mut mine = p.small_mask(gate, 0, n, sent);
        if let Some(share) = &share {
            mine.iter_mut().zip(share.as_slice()).for_each(|(m, x)| {
                *m = m.wrapping_add(factor.wrapping_mul(*x >> meta.zeros)) & low_bits(sent)
            });
        }
        let mut d = p.open_words(mine, sent)?;
        d.iter_mut().for_each(|d| *d <<= meta.zeros);
        d
    };
    let dealt = take(&mut material.dealt)?;
    let one = |series: &Arc<Series>| {
        let layout = Layout::new(meta, series, form)?;
        let read = |first: usize, out: &mut [u64]| dealt.read(first, out);
        let out = layout.share(meta, series, (&d, bits), share.as_ref(), read, p.is_first())?;
        let out = rounded(out, layout.rounded);
        Ok(p.tensor(layout.meta, Some(out)))
    };
    all.iter().map(one).collect()
}

pub(crate) fn fixed(f: &Fixed, x: &FixedTensor, all: &[Arc<Series>], form: Form) -> Result<Vec<FixedTensor>> {
    let (series, meta) = (&all[0], f.meta(x));
    let (n, (bits, sent)) = (meta.len(), modulus(meta, series)?);
    let gate = f.gate();
    let t = if f.is_open(x) {
        f.mask(x)?
            .map(|r| r.wrapping_mul(series.factor) & low_bits(bits))
            .into_vec()
    } else {
        let mut t = f.small_mask(gate, 0, n, sent);
        t.iter_mut().for_each(|t| *t <<= meta.zeros);
        t
    };
    let d: Vec<u64> = t
        .iter()
        .zip(f.ring(x).as_slice())
        .map(|(t, x)| t.wrapping_add(x.wrapping_mul(series.factor)) & low_bits(bits))
        .collect();
    let one = |series: &Arc<Series>| {
        let layout = Layout::new(meta, series, form)?;
        let dealing = series.dealing(&t, bits);
        let mut out = layout.share(meta, series, (&d, bits), Some(f.ring(x)), dealing, true)?;
        if layout.rounded > 0 {
            let first = f.first_dealt((gate, 1), layout.dealt);
            let read = |from: usize, out: &mut [u64]| first.read(from, out);
            let first = layout.share(meta, series, (&d, bits), None, read, true)?;
            out = rounded_sum(&out, first, layout.rounded)?;
        }
        Ok(f.tensor(layout.meta, out))
    };
    all.iter().map(one).collect()
}
