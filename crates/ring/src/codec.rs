//! Fixed point: the real `x` at scale `s` is the integer nearest to `x * 2^s`, in two's complement.

use crate::Error;
use crate::simd::vectorised;

/// Most fraction bits a value may have; one sign bit remains.
pub const MAX_SCALE: u32 = 63;

/// A real number that can be encoded: `f64`, `f32`, or a reference to one.
pub trait Real {
    /// The same number in double precision (exact).
    fn to_f64(&self) -> f64;
}

impl Real for f64 {
    fn to_f64(&self) -> f64 {
        *self
    }
}

impl Real for f32 {
    fn to_f64(&self) -> f64 {
        f64::from(*self)
    }
}

impl<T: Real> Real for &T {
    fn to_f64(&self) -> f64 {
        T::to_f64(self)
    }
}

/// Encodes `values` with `scale` fraction bits, rounding to the nearest integer and halves to even, so that the
/// rounding error has no bias. The result lies within 2^-(scale + 1) of the input wherever `x * 2^scale` is below
/// 2^52 in magnitude, and is exact from there on.
///
/// # Errors
/// [`Error::Encode`] names the first value that is NaN, infinite, or not in `[-2^(63-scale), 2^(63-scale))`;
/// [`Error::Scale`] if `scale` exceeds [`MAX_SCALE`].
///
/// ```
/// use veiltune_ring::codec;
/// assert_eq!(codec::encode([1.5f32, -0.25], 4)?, [24, 4u64.wrapping_neg()]);
/// assert_eq!(codec::decode(&[24], 4), [1.5]);
/// # Ok::<(), veiltune_ring::Error>(())
/// ```
pub fn encode(values: impl IntoIterator<Item = impl Real>, scale: u32) -> Result<Vec<u64>, Error> {
    if scale > MAX_SCALE {
        return Err(Error::Scale(scale));
    }
    encode_all(values.into_iter().map(|value| value.to_f64()), scale)
}

vectorised! {
    fn encode_all[I: Iterator<Item = f64>](values: I, scale: u32) -> Result<Vec<u64>, Error> {
        let (unit, limit) = (f64::from(scale).exp2(), f64::from(63).exp2());
        // Judged afterwards, because a loop that may end early is not vectorised.
        let mut bad = usize::MAX;
        let one = |(index, value): (usize, f64)| {
            let x = (value * unit).round_ties_even();
            // Written so that NaN fails it.
            let fits = x >= -limit && x < limit;
            bad = bad.min(if fits { usize::MAX } else { index });
            x as i64 as u64
        };
        let words = values.enumerate().map(one).collect();
        if bad == usize::MAX { Ok(words) } else { Err(Error::Encode { index: bad, scale }) }
    }
}

/// Decodes words with `scale` fraction bits; integers above 2^53 in magnitude round to the nearest double.
pub fn decode(words: &[u64], scale: u32) -> Vec<f64> {
    let unit = (-f64::from(scale)).exp2();
    words.iter().map(|&w| w as i64 as f64 * unit).collect()
}
