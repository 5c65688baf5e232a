//! Sines and cosines of the multiples of a fixed-point angle: the kernels of the trigonometric gate.
//!
//! An angle is an integer d modulo 2^bits and stands for theta = 2 pi d / 2^bits. Everything here uses IEEE additions and
//! multiplications in a fixed order, no library function and no fused multiply-add, so that two machines get the same
//! bits: what one party computes from an opened angle multiplies a share, and must be what the other computes.

use std::f64::consts::TAU;
use std::sync::LazyLock;

use crate::simd::{fill_rows, vectorised};

/// Angles a tile; see [`dealt`] for the layout.
pub const TILE: usize = 256;

/// cos(k theta) and sin(k theta) for k = 1 ..= `harmonics`, rounded to `scale` fractional bits, of every angle.
///
/// Layout: tiles of [`TILE`] angles (the last one shorter); within a tile, all cos(theta), all sin(theta), all
/// cos(2 theta), ...: 2 `harmonics` values an angle.
pub fn dealt(angles: &[u64], bits: u32, harmonics: usize, scale: u32) -> Vec<u64> {
    let width = 2 * harmonics;
    let mut out = vec![0; width * angles.len()];
    // Whole tiles, so that threads cut between them.
    let whole = angles.len() / TILE * TILE;
    let (tiles, rest) = out.split_at_mut(whole * width);
    fill_rows(tiles, TILE * width, |first, rows| {
        dealt_tiles(angles, bits, harmonics, scale, first * TILE * width, rows);
    });
    dealt_tiles(angles, bits, harmonics, scale, whole * width, rest);
    out
}

/// What [`dealt`] gives from `first` on, the beginning of a tile, as much as fits into `out`: whole tiles, or all that are left.
pub fn dealt_tiles(angles: &[u64], bits: u32, harmonics: usize, scale: u32, first: usize, out: &mut [u64]) {
    let width = 2 * harmonics;
    let angles = angles[first / width..].chunks(TILE);
    for (out, angles) in out.chunks_mut(TILE * width).zip(angles) {
        deal_tile(angles, bits, scale, out);
    }
}

/// For every angle, the sum over k of `(cos_k cos(k theta) + sin_k sin(k theta)) C_k + (cos_k sin(k theta) - sin_k
/// cos(k theta)) S_k`, the brackets rounded to `scale` fractional bits and C, S what [`dealt`] gives, in its layout. Linear in these:
/// on shares it gives shares. `read` writes some of them, from the given one on, a tile of angles at a time, so that they need not
/// lie anywhere as they are used here.
///
/// # Panics
/// If `cos` and `sin` differ in length.
pub fn combine(
    angles: &[u64],
    bits: u32,
    (cos, sin): (&[f64], &[f64]),
    scale: u32,
    read: impl Fn(usize, &mut [u64]) + Sync,
) -> Vec<u64> {
    let width = 2 * cos.len();
    assert!(cos.len() == sin.len(), "lengths must agree");
    let mut out = vec![0; angles.len()];
    let piece = |start: usize, out: &mut [u64], dealt: &mut [u64]| {
        let dealt = &mut dealt[..out.len() * width];
        read(start * width, dealt);
        let angles = &angles[start..start + out.len()];
        combine_tile(angles, bits, cos, sin, scale, dealt, out);
    };
    // Whole tiles, so that threads cut between them.
    let whole = angles.len() / TILE * TILE;
    let (tiles, rest) = out.split_at_mut(whole);
    fill_rows(tiles, TILE, |first, rows| {
        let mut dealt = vec![0; TILE * width];
        for (i, out) in rows.chunks_exact_mut(TILE).enumerate() {
            piece((first + i) * TILE, out, &mut dealt);
        }
    });
    if !rest.is_empty() {
        piece(whole, rest, &mut vec![0; TILE * width]);
    }
    out
}

vectorised! {
    fn deal_tile(angles: &[u64], bits: u32, scale: u32, out: &mut [u64]) {
        let n = angles.len();
        if n == 0 {
            return;
        }
        let unit = (1u64 << scale) as f64;
        // All at once: lines of the cache are written one after the other.
        let mut rotor = Rotor::<TILE>::new(angles, bits);
        for pair in out.chunks_exact_mut(2 * n) {
            let (c, s) = pair.split_at_mut(n);
            for ((c, s), (x, y)) in c.iter_mut().zip(s).zip(rotor.cos.iter().zip(&rotor.sin)) {
                *c = round(x * unit);
                *s = round(y * unit);
            }
            rotor.advance();
        }
    }
}

vectorised! {
    fn combine_tile(angles: &[u64], bits: u32, cos: &[f64], sin: &[f64], scale: u32, dealt: &[u64], out: &mut [u64]) {
        let n = angles.len();
        let unit = (1u64 << scale) as f64;
        for first in (0..n).step_by(LANES) {
            let lanes = LANES.min(n - first);
            let mut rotor = Rotor::<LANES>::new(&angles[first..first + lanes], bits);
            let mut sum = [0u64; LANES];
            for (pair, (a, b)) in dealt.chunks_exact(2 * n).zip(cos.iter().zip(sin)) {
                let (a, b) = (a * unit, b * unit);
                let (c, s) = (lanes_of(&pair[first..n]), lanes_of(&pair[n + first..]));
                for j in 0..LANES {
                    let (x, y) = (rotor.cos[j], rotor.sin[j]);
                    let on_cos = round(a * x + b * y);
                    let on_sin = round(a * y - b * x);
                    sum[j] = sum[j].wrapping_add(on_cos.wrapping_mul(c[j])).wrapping_add(on_sin.wrapping_mul(s[j]));
                }
                rotor.advance();
            }
            out[first..first + lanes].copy_from_slice(&sum[..lanes]);
        }
    }
}

/// The first values, and zeros if there are fewer.
#[inline(always)]
fn lanes_of(values: &[u64]) -> [u64; LANES] {
    match values.first_chunk() {
        Some(lanes) => *lanes,
        None => std::array::from_fn(|j| values.get(j).copied().unwrap_or(0)),
    }
}

/// Angles that [`combine`] takes through all harmonics at a time: few enough for their [`Rotor`] to stay in registers.
const LANES: usize = 16;

/// cos(k theta) and sin(k theta) of up to `N` angles, for k = 1 and on.
struct Rotor<const N: usize> {
    twice: [f64; N],
    cos: [f64; N],
    sin: [f64; N],
    cos_before: [f64; N],
    sin_before: [f64; N],
}

impl<const N: usize> Rotor<N> {
    #[inline(always)]
    fn new(angles: &[u64], bits: u32) -> Self {
        let (mut cos, mut sin, mut twice) = ([0.0; N], [0.0; N], [0.0; N]);
        for (((c, s), t), d) in cos.iter_mut().zip(&mut sin).zip(&mut twice).zip(angles) {
            (*c, *s) = unit_circle(*d, bits);
            *t = 2.0 * *c;
        }
        Rotor {
            twice,
            cos,
            sin,
            cos_before: [1.0; N],
            sin_before: [0.0; N],
        }
    }

    /// To the next k: cos((k+1)a) = 2 cos(a) cos(ka) - cos((k-1)a), and the same for the sine.
    #[inline(always)]
    fn advance(&mut self) {
        for j in 0..N {
            let c = self.twice[j] * self.cos[j] - self.cos_before[j];
            let s = self.twice[j] * self.sin[j] - self.sin_before[j];
            (self.cos_before[j], self.sin_before[j]) = (self.cos[j], self.sin[j]);
            (self.cos[j], self.sin[j]) = (c, s);
        }
    }
}

/// Nearest integer (ties to even) of |x| < 2^51, modulo 2^64, without a conversion instruction that only some vector
/// units have.
#[inline(always)]
fn round(x: f64) -> u64 {
    const MAGIC: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    (x + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits())
}

const FINE: u32 = 10;

/// cos and sin of 2 pi i / 2^10, and of 2 pi i / 2^20, i < 2^10.
static CIRCLE: LazyLock<[Vec<(f64, f64)>; 2]> = LazyLock::new(|| {
    [FINE, 2 * FINE].map(|b| {
        (0..1u64 << FINE)
            .map(|i| cos_sin(i as f64 / (1u64 << b) as f64))
            .collect()
    })
});

/// (cos, sin) of 2 pi d / 2^bits, error below 4e-15.
#[inline(always)]
fn unit_circle(d: u64, bits: u32) -> (f64, f64) {
    let mask = (1u64 << FINE) - 1;
    // Left-aligned to 60 bits: ten coarse, ten fine, forty for the first terms of the series at zero.
    let d = if bits <= 60 {
        d << (60 - bits)
    } else {
        d >> (bits - 60)
    };
    let (ch, sh) = CIRCLE[0][((d >> 50) & mask) as usize];
    let (cm, sm) = CIRCLE[1][((d >> 40) & mask) as usize];
    let (c, s) = (ch * cm - sh * sm, sh * cm + ch * sm);
    let rest = (d & ((1 << 40) - 1)) as f64 * (TAU / (1u64 << 60) as f64);
    let half = 1.0 - 0.5 * (rest * rest);
    (c * half - s * rest, s * half + c * rest)
}

/// (cos, sin) of 2 pi `turn`, 0 <= turn < 1, by Taylor series after reduction to an eighth of a turn.
fn cos_sin(turn: f64) -> (f64, f64) {
    let quarter = (turn * 4.0 + 0.5).floor();
    let a = (turn - quarter * 0.25) * TAU;
    let (mut c, mut s, mut term) = (1.0, 0.0, 1.0);
    for n in 1..24u32 {
        term = term * a / f64::from(n);
        match n % 4 {
            0 => c += term,
            1 => s += term,
            2 => c -= term,
            _ => s -= term,
        }
    }
    match quarter as u32 % 4 {
        0 => (c, s),
        1 => (-s, c),
        2 => (-c, -s),
        _ => (s, -c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn angles(n: usize, bits: u32) -> Vec<u64> {
        (0..n as u64)
            .map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - bits))
            .collect()
    }

    #[test]
    fn the_circle_is_accurate() {
        for bits in [8, 20, 21, 36, 53, 60, 63] {
            for d in angles(1000, bits) {
                let (c, s) = unit_circle(d, bits);
                let a = d as f64 / (1u64 << bits) as f64 * TAU;
                assert!(
                    (c - a.cos()).abs() < 4e-15 && (s - a.sin()).abs() < 4e-15,
                    "{bits} {d}"
                );
            }
        }
    }

    #[test]
    fn harmonics_of_a_sum_of_angles() {
        // cos(k(d - t)) from the harmonics of t and the opened d: coefficients pick one cosine and one sine.
        let (bits, scale) = (20, 24);
        for n in [0, 1, TILE, 3 * TILE + 7] {
            let t = angles(n, bits);
            let x: Vec<u64> = (0..n as u64).map(|i| i * 977 % (1 << bits)).collect();
            let d: Vec<u64> = x.iter().zip(&t).map(|(x, t)| (x + t) % (1 << bits)).collect();
            let (cos, sin) = ([0.0, 0.0, 1.0], [0.0, 0.5, 0.0]);
            let all = dealt(&t, bits, 3, scale);
            let read = |first: usize, out: &mut [u64]| out.copy_from_slice(&all[first..first + out.len()]);
            let sum = combine(&d, bits, (&cos, &sin), scale, read);
            // The same of values that are dealt as they are read.
            let read = |first: usize, out: &mut [u64]| dealt_tiles(&t, bits, 3, scale, first, out);
            assert_eq!(sum, combine(&d, bits, (&cos, &sin), scale, read));
            for (x, y) in x.iter().zip(sum) {
                let a = *x as f64 / (1u64 << bits) as f64 * TAU;
                let y = y as i64 as f64 / (1u64 << (2 * scale)) as f64;
                assert!((y - (3.0 * a).cos() - 0.5 * (2.0 * a).sin()).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_integer() {
        for x in [0.0, 0.5, 1.5, -0.5, -1.49, 1e9 + 0.4, -1e14 - 0.6] {
            assert_eq!(round(x) as i64 as f64, x.round_ties_even());
        }
    }
}
