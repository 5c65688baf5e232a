//! The trigonometric gate: any smooth function on a bounded range as a short trigonometric series.
//!
//! For a period 2^p both parties reduce their shares of x modulo 2^n, n = scale + p (it divides 2^64, so this is
//! exact) and open d = x + t mod 2^n, t **uniform over that same modulus**: d says nothing about x. The dealer deals
//! shares of cos(k theta_t), sin(k theta_t) for each harmonic k, theta_t = 2 pi t / 2^n; then
//! cos(k theta_x) = cos(k theta_d) cos(k theta_t) + sin(k theta_d) sin(k theta_t), and likewise the sine, are public
//! combinations of shares, and so is any series ([`Series`]). (Zheng et al. 2023 for one sine; the modulus matters: a
//! mask shorter than the ring it is opened in reveals x to within a period.)
//!
//! Several series of one period and as many harmonics share opening and dealt values: sine and cosine of whole turns cost 16
//! bytes an element together.
//!
//! An angle of more than 53 bits is opened whole and used by its first 53.
//!
//! One round; n bits each way an element (packed; none if x is open). Dealer to the second party: 16 bytes an element
//! and harmonic. Error: that of the fit ([`Series::fit_error`], 3e-5 for the activations), plus fixed-point rounding of
//! coefficients and harmonics: below 4e-4 for activations, 1e-5 for exp before softmax.

use std::sync::Arc;

use veiltune_ring::Ring;

use super::product::take;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Meta};
use crate::offline::{OffTensor, Offline, low_bits};
use crate::online::{Online, Share};
use crate::series::Series;
use crate::{Owner, Result};

fn output(x: &Meta, series: &Series) -> Meta {
    Meta {
        dims: x.dims.clone(),
        scale: series.scale(x.scale),
        owner: Owner::Shared,
    }
}

/// linear * x + constant at the scale of the result, on this share of x.
fn affine_part(series: &Series, x: Option<&Ring>, scale: u32, with_constant: bool, out: &mut [u64]) {
    let shift = series.scale(scale) as i32 - scale as i32;
    let linear = (series.linear * 2f64.powi(shift)).round() as i64 as u64;
    if let (Some(x), true) = (x, linear != 0) {
        out.iter_mut()
            .zip(x.as_slice())
            .for_each(|(o, x)| *o = o.wrapping_add(linear.wrapping_mul(*x)));
    }
    if with_constant {
        let constant = (series.constant * 2f64.powi(series.scale(scale) as i32)).round() as i64 as u64;
        out.iter_mut().for_each(|o| *o = o.wrapping_add(constant));
    }
}

/// `all` have one period, and one number of harmonics and scale of dealt values.
pub(crate) fn offline(o: &Offline, x: &OffTensor, all: &[Arc<Series>]) -> Result<Vec<OffTensor>> {
    let series = &all[0];
    let (n, bits) = (o.meta(x).len(), series.modulus_bits(o.meta(x).scale)?);
    let fingerprints: Vec<u8> = all.iter().flat_map(|s| s.fingerprint()).collect();
    let gate = o.gate("trigonometric", &fingerprints);
    let mask = if o.is_open(x) {
        if o.is_dealer() {
            Some(o.mask(x)?.map(|r| r & low_bits(bits)).into_vec())
        } else {
            None
        }
    } else {
        let each = veiltune_wire::pack::packed_len(n, bits) as u64;
        o.exchanged("trigonometric", [each; 2]);
        o.small_mask(gate, 0, n, bits)
    };
    o.deal("trigonometric", (gate, 1), series.dealt_len(n), 64, || {
        Ok(series.deal(&mask.unwrap_or_default(), bits))
    })?;
    o.end_gate()?;
    Ok(all.iter().map(|s| o.tensor(output(o.meta(x), s))).collect())
}

pub(crate) fn online(p: &Online, x: &Share, all: &[Arc<Series>]) -> Result<Vec<Share>> {
    let scale = p.meta(x).scale;
    let (n, bits) = (p.meta(x).len(), all[0].modulus_bits(scale)?);
    let (gate, mut material) = p.gate()?;
    let share = p.share(x);
    let d = if p.is_open(x) {
        p.masked(x)?.map(|d| d & low_bits(bits)).into_vec()
    } else {
        let mut mine = p.small_mask(gate, 0, n, bits);
        if let Some(share) = &share {
            mine.iter_mut()
                .zip(share.as_slice())
                .for_each(|(m, x)| *m = m.wrapping_add(*x) & low_bits(bits));
        }
        p.open_words(mine, bits)?
    };
    let dealt = take(&mut material.words)?;
    let one = |series: &Arc<Series>| {
        let mut out = series.accumulate(&d, bits, scale, &dealt);
        affine_part(series, share.as_ref(), scale, p.is_first(), &mut out);
        let meta = output(p.meta(x), series);
        Ok(p.tensor(meta.clone(), Some(Ring::new(meta.dims, out)?)))
    };
    all.iter().map(one).collect()
}

pub(crate) fn fixed(f: &Fixed, x: &FixedTensor, all: &[Arc<Series>]) -> Result<Vec<FixedTensor>> {
    let (series, scale) = (&all[0], f.meta(x).scale);
    let (n, bits) = (f.meta(x).len(), series.modulus_bits(scale)?);
    let gate = f.gate();
    let t = if f.is_open(x) {
        f.mask(x).map(|r| r & low_bits(bits)).into_vec()
    } else {
        f.small_mask(gate, 0, n, bits)
    };
    let d: Vec<u64> = t
        .iter()
        .zip(f.ring(x).as_slice())
        .map(|(t, x)| t.wrapping_add(*x) & low_bits(bits))
        .collect();
    let dealt = series.deal(&t, bits);
    let one = |series: &Arc<Series>| {
        let mut out = series.accumulate(&d, bits, scale, &dealt);
        affine_part(series, Some(f.ring(x)), scale, true, &mut out);
        let meta = output(f.meta(x), series);
        Ok(f.tensor(meta.clone(), Ring::new(meta.dims, out)?))
    };
    all.iter().map(one).collect()
}
