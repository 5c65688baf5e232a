//! Elementwise and row-wise kernels of the float interpreter, and the operations made of them.
//!
//! Everything runs on the caller's rayon pool, in pieces that stay in a core's cache, compiled for the widest vectors that
//! the processor may have. Candle's own elementwise operations hand each call to threads that spin at a barrier: on a
//! machine with anything else to do they are slower than one thread.

use std::f64::consts::TAU;
use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::series::Series;
use crate::{Activation, NormKind, NormSpec};

/// Numbers that a piece of work should have: 16 KiB, half a first-level cache.
const PIECE: usize = 1 << 12;
/// From how many numbers on other threads take part.
const PARALLEL: usize = 1 << 16;

/// Defines a function whose body is compiled several times over, for the widest vectors that the processor may have,
/// and chosen from at run time. Type parameters stand in brackets.
macro_rules! vectorised {
    ($(#[$meta:meta])* fn $name:ident $([$($type:ident: $bound:path),*])? ($($arg:ident: $ty:ty),* $(,)?)
    $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        pub(crate) fn $name $(<$($type: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($type: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx512bw,avx2")]
                fn avx512 $(<$($type: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }

                #[target_feature(enable = "avx2")]
                fn avx2 $(<$($type: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }

                let avx2_too = is_x86_feature_detected!("avx2");
                if avx2_too
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                {
                    // SAFETY: the features that it is compiled for were just detected.
                    return unsafe { avx512($($arg),*) };
                }
                if avx2_too {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

/// `len` numbers made in pieces of whole rows of `row`: `f` is given where a piece begins and a buffer to fill.
pub(crate) fn build(len: usize, row: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let piece = PIECE.div_ceil(row) * row;
    // The detour by a small buffer costs less than to clear memory that is written anyway.
    let one = |buffer: &mut Vec<f32>, start: usize, out: &mut [MaybeUninit<f32>]| {
        buffer.resize(out.len(), 0.0);
        f(start, buffer);
        out.write_copy_of_slice(buffer);
    };
    let mut out = Vec::with_capacity(len);
    let pieces = &mut out.spare_capacity_mut()[..len];
    if len < PARALLEL || rayon::current_num_threads() == 1 {
        let mut buffer = Vec::new();
        for (i, out) in pieces.chunks_mut(piece).enumerate() {
            one(&mut buffer, i * piece, out);
        }
    } else {
        pieces
            .par_chunks_mut(piece)
            .enumerate()
            .for_each_init(Vec::new, |buffer, (i, out)| one(buffer, i * piece, out));
    }
    // SAFETY: the capacity is at least `len`, and every piece of the first `len` was copied to.
    unsafe { out.set_len(len) };
    out
}

/// f of every number.
pub(crate) fn map(x: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    build(x.len(), 1, |start, out| {
        each(&x[start..start + out.len()], out, &f)
    })
}

/// f of every pair.
pub(crate) fn map2(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    assert_eq!(x.len(), y.len(), "operands of one shape");
    build(x.len(), 1, |start, out| {
        let end = start + out.len();
        each2(&x[start..end], &y[start..end], out, &f)
    })
}

vectorised! {
    fn each[F: Fn(f32) -> f32](x: &[f32], out: &mut [f32], f: &F) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = f(*x);
        }
    }
}

vectorised! {
    fn each2[F: Fn(f32, f32) -> f32](x: &[f32], y: &[f32], out: &mut [f32], f: &F) {
        for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
            *out = f(*x, *y);
        }
    }
}

/// Sum of f(a, b) over two rows, in lanes, so that it vectorises.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let (ca, cb) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = ca
        .remainder()
        .iter()
        .zip(cb.remainder())
        .map(|(&a, &b)| f(a, b))
        .sum();
    for (a, b) in ca.zip(cb) {
        for i in 0..16 {
            lanes[i] += f(a[i], b[i]);
        }
    }
    rest + lanes.iter().sum::<f32>()
}

/// Mean and sqrt(variance + eps) of a row; the mean is zero for RMS.
#[inline(always)]
pub(crate) fn moments(row: &[f32], spec: &NormSpec) -> (f32, f32) {
    let n = row.len().max(1) as f32;
    let mean = match spec.kind {
        NormKind::Layer => dot(row, row, |v, _| v) / n,
        NormKind::Rms => 0.0,
    };
    let variance = dot(row, row, |v, _| (v - mean) * (v - mean)) / n;
    (mean, (variance + spec.eps as f32).sqrt())
}

/// The transpose of a matrix of rows of `cols`, in squares that stay in the cache.
pub(crate) fn transpose(x: &[f32], cols: usize) -> Vec<f32> {
    const SIDE: usize = 32;
    if x.is_empty() {
        return Vec::new();
    }
    let rows = x.len() / cols;
    build(x.len(), rows, |start, out| {
        for (c, out) in out.chunks_mut(rows * SIDE).enumerate() {
            let first = start / rows + c * SIDE;
            for block in (0..rows).step_by(SIDE) {
                for (j, out) in out.chunks_exact_mut(rows).enumerate() {
                    for (r, out) in out[block..].iter_mut().take(SIDE).enumerate() {
                        *out = x[(block + r) * cols + first + j];
                    }
                }
            }
        }
    })
}

/// The elements of a contiguous operand.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("operand is not contiguous"),
    }
}

pub(crate) fn width(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1).max(1)
}

/// e^x to 2 ulp; zero where it is below 2e-38, infinite where f32 ends, NaN of NaN. Reduction to |r| <= ln(2) / 2 in two
/// parts (Cody and Waite), then the Taylor series.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves an integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_4; // 355 / 512: its product with the integer is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let tail =
        r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0)))));
    let p = 1.0 + (r + r * r * (0.5 + tail));
    // Half the power of two, so that its exponent never overflows where the result does not.
    let half = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(126) << 23);
    let y = p * 2.0 * half;
    let y = if x < -86.9 { 0.0 } else { y };
    if x > 88.722_84 { f32::INFINITY } else { y }
}

/// 1 / (1 + e^-x)
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// P(X <= x) and the density of a standard normal X, both to 2e-7. Abramowitz and Stegun, Handbook of Mathematical
/// Functions, 7.1.26, for the tail.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const FIT: [f32; 5] = [0.254_829_6, -0.284_496_74, 1.421_413_7, -1.453_152, 1.061_405_4];
    let e = exp(-0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let poly = t * (FIT[0] + t * (FIT[1] + t * (FIT[2] + t * (FIT[3] + t * FIT[4]))));
    let tail = 0.5 * poly * e;
    let below = if x > 0.0 { 1.0 - tail } else { tail };
    (below, 0.398_942_3 * e)
}

/// The functions themselves, of a contiguous tensor.
pub(crate) fn activation(x: &Tensor, f: Activation) -> Result<Tensor> {
    let smooth = match f {
        Activation::Gelu => Smooth::Gelu,
        Activation::Silu => Smooth::Silu,
        Activation::Sigmoid => Smooth::Sigmoid,
        Activation::Exp => Smooth::Exp,
        Activation::Tanh => return x.tanh(),
        Activation::Sin => return x.sin(),
        Activation::Cos => return x.cos(),
    };
    x.apply_op1(smooth)
}

/// Those with kernels here.
#[derive(Clone, Copy)]
enum Smooth {
    Gelu,
    Silu,
    Sigmoid,
    Exp,
}

impl CustomOp1 for Smooth {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, l)?;
        let y = match self {
            Smooth::Gelu => map(x, |x| x * normal(x).0),
            Smooth::Silu => map(x, |x| x * sigmoid(x)),
            Smooth::Sigmoid => map(x, sigmoid),
            Smooth::Exp => map(x, exp),
        };
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(
            x.apply_op2_no_bwd(&g.contiguous()?, &SmoothGradient(*self))?,
        ))
    }
}

/// g f'(x), from x and g.
struct SmoothGradient(Smooth);

impl CustomOp2 for SmoothGradient {
    fn name(&self) -> &'static str {
        "activation-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, g) = (slice(x, lx)?, slice(g, lg)?);
        let dx = match self.0 {
            Smooth::Gelu => map2(x, g, |x, g| {
                let (below, density) = normal(x);
                g * (below + x * density)
            }),
            Smooth::Silu => map2(x, g, |x, g| {
                let s = sigmoid(x);
                g * s * (1.0 + x * (1.0 - s))
            }),
            Smooth::Sigmoid => map2(x, g, |x, g| {
                let s = sigmoid(x);
                g * s * (1.0 - s)
            }),
            Smooth::Exp => map2(x, g, |x, g| g * exp(x)),
        };
        Ok((CpuStorage::F32(dx), lx.shape().clone()))
    }
}

/// An activation as private interpreters compute it: its series, beyond the range too.
#[derive(Clone)]
pub(crate) struct Fourier {
    period: f64,
    guard: Option<Guard>,
    value: Waves,
    slope: Waves,
}

/// linear x + constant + sum_k cos[k] cos(k t) + sin[k] sin(k t), for k = 1, 2, ...; without coefficients where all are zero.
#[derive(Clone)]
struct Waves {
    linear: f64,
    constant: f64,
    cos: Vec<f64>,
    sin: Vec<f64>,
}

/// Beyond the bound the function stays what it is there, or goes on as max(x, 0) does.
#[derive(Clone, Copy)]
pub(crate) struct Guard {
    pub bound: f64,
    pub grows: bool,
}

impl Fourier {
    pub fn new(s: &Series, guard: Option<Guard>) -> Self {
        Fourier::of(s.period, guard, (s.linear, s.constant), (&s.cos, &s.sin))
    }

    /// sin(2 pi x) and cos(2 pi x).
    pub fn turns() -> [Fourier; 2] {
        [(&[0.0], &[1.0]), (&[1.0], &[0.0])].map(|(cos, sin)| Fourier::of(1.0, None, (0.0, 0.0), (cos, sin)))
    }

    fn of(
        period: f64,
        guard: Option<Guard>,
        (linear, constant): (f64, f64),
        (cos, sin): (&[f64], &[f64]),
    ) -> Self {
        let unless_zero = |c: Vec<f64>| match c.iter().any(|c| *c != 0.0) {
            true => c,
            false => Vec::new(),
        };
        let sloped = |c: &[f64], sign: f64| {
            let factors = (1..).map(|k| sign * f64::from(k) * TAU / period);
            unless_zero(c.iter().zip(factors).map(|(c, factor)| factor * c).collect())
        };
        Fourier {
            period,
            guard,
            value: Waves {
                linear,
                constant,
                cos: unless_zero(cos.to_vec()),
                sin: unless_zero(sin.to_vec()),
            },
            slope: Waves {
                linear: 0.0,
                constant: linear,
                cos: sloped(sin, 1.0),
                sin: sloped(cos, -1.0),
            },
        }
    }
}

impl CustomOp1 for Fourier {
    fn name(&self) -> &'static str {
        "fourier"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, l)?;
        let y = build(x.len(), 1, |start, out| {
            fourier(&x[start..start + out.len()], None, out, self);
        });
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let gradient = FourierGradient(self.clone());
        Ok(Some(x.apply_op2_no_bwd(&g.contiguous()?, &gradient)?))
    }
}

/// g f'(x), from x and g.
struct FourierGradient(Fourier);

impl CustomOp2 for FourierGradient {
    fn name(&self) -> &'static str {
        "fourier-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, g) = (slice(x, lx)?, slice(g, lg)?);
        let dx = build(x.len(), 1, |start, out| {
            let end = start + out.len();
            fourier(&x[start..end], Some(&g[start..end]), out, &self.0);
        });
        Ok((CpuStorage::F32(dx), lx.shape().clone()))
    }
}

/// Numbers whose harmonics are added up side by side.
const LANES: usize = 32;

vectorised! {
    /// f(x), or, given g, g f'(x).
    fn fourier(x: &[f32], g: Option<&[f32]>, out: &mut [f32], f: &Fourier) {
        let (bound, grows) = f.guard.map_or((f64::INFINITY, false), |g| (g.bound, g.grows));
        let waves = if g.is_none() { &f.value } else { &f.slope };
        for (at, (x, out)) in x.chunks(LANES).zip(out.chunks_mut(LANES)).enumerate() {
            let mut inside = [0f64; LANES];
            for (inside, x) in inside.iter_mut().zip(x) {
                let x = f64::from(*x);
                let x = if x > bound { bound } else { x };
                *inside = if x < -bound { -bound } else { x };
            }
            let mut turns = inside;
            for turns in &mut turns {
                *turns /= f.period;
            }
            let (sin, cos) = sin_cos_turns(&turns);
            let mut y = [0f64; LANES];
            let (u1, u2) = clenshaw(&waves.cos, &cos);
            for i in 0..LANES {
                y[i] = waves.linear * inside[i] + waves.constant + u1[i] * cos[i] - u2[i];
            }
            let (u1, _) = clenshaw(&waves.sin, &cos);
            for i in 0..LANES {
                y[i] += u1[i] * sin[i];
            }
            for (i, (x, out)) in x.iter().zip(out.iter_mut()).enumerate() {
                let beyond = f64::from(*x) - inside[i];
                let above = grows && beyond > 0.0;
                *out = match g {
                    None => (if above { y[i] + beyond } else { y[i] }) as f32,
                    Some(g) => {
                        let slope = match beyond == 0.0 {
                            true => y[i],
                            false => f64::from(u8::from(above)),
                        };
                        g[at * LANES + i] * slope as f32
                    }
                };
            }
        }
    }
}

/// The last two terms U1 and U2 of Clenshaw's recurrence: sum_k c[k] cos(k t) is U1 cos(t) - U2, sum_k c[k] sin(k t) is U1 sin(t).
#[inline(always)]
fn clenshaw(c: &[f64], cos: &[f64; LANES]) -> ([f64; LANES], [f64; LANES]) {
    let (mut u1, mut u2) = ([0f64; LANES], [0f64; LANES]);
    for c in c.iter().rev() {
        for i in 0..LANES {
            (u1[i], u2[i]) = (c + 2.0 * cos[i] * u1[i] - u2[i], u1[i]);
        }
    }
    (u1, u2)
}

/// Sine and cosine of so many turns, to 1e-11: Taylor series around the nearest whole turn.
#[inline(always)]
fn sin_cos_turns(turns: &[f64; LANES]) -> ([f64; LANES], [f64; LANES]) {
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52: adding it leaves no fraction
    const TERMS: [f64; 13] = [
        26.0, 24.0, 22.0, 20.0, 18.0, 16.0, 14.0, 12.0, 10.0, 8.0, 6.0, 4.0, 2.0,
    ];
    let (mut angle, mut square) = ([0f64; LANES], [0f64; LANES]);
    for i in 0..LANES {
        angle[i] = (turns[i] - ((turns[i] + ROUND) - ROUND)) * TAU;
        square[i] = -angle[i] * angle[i];
    }
    let (mut sin, mut cos) = ([0f64; LANES], [0f64; LANES]);
    // 1 - x^2 / (2 * 3) (1 - x^2 / (4 * 5) (...)), and with one less in each factor for the cosine.
    for k in TERMS {
        let (odd, even) = (1.0 / (k * (k + 1.0)), 1.0 / (k * (k - 1.0)));
        for i in 0..LANES {
            sin[i] = (1.0 + sin[i]) * (square[i] * odd);
            cos[i] = (1.0 + cos[i]) * (square[i] * even);
        }
    }
    for i in 0..LANES {
        sin[i] = angle[i] * (1.0 + sin[i]);
        cos[i] += 1.0;
    }
    (sin, cos)
}

/// Softmax over the last dimension.
pub(crate) struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, n) = (slice(x, l)?, width(l));
        let y = build(x.len(), n, |start, out| {
            softmax(&x[start..start + out.len()], out, n)
        });
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(y.apply_op2_no_bwd(&g.contiguous()?, &SoftmaxGradient)?))
    }
}

vectorised! {
    fn softmax(x: &[f32], out: &mut [f32], n: usize) {
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            let mut lanes = [f32::NEG_INFINITY; 16];
            let chunks = x.chunks_exact(16);
            let rest = chunks.remainder();
            for x in chunks {
                for i in 0..16 {
                    lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
                }
            }
            let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
            for (out, x) in out.iter_mut().zip(x) {
                *out = exp(*x - max);
            }
            let inverse = 1.0 / dot(out, out, |v, _| v);
            for out in out {
                *out *= inverse;
            }
        }
    }
}

/// dx = y (g - sum(g y)), from y and g.
struct SoftmaxGradient;

impl CustomOp2 for SoftmaxGradient {
    fn name(&self) -> &'static str {
        "softmax-gradient"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        ly: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, g, n) = (slice(y, ly)?, slice(g, lg)?, width(ly));
        let dx = build(y.len(), n, |start, out| {
            let end = start + out.len();
            softmax_gradient(&y[start..end], &g[start..end], out, n);
        });
        Ok((CpuStorage::F32(dx), ly.shape().clone()))
    }
}

vectorised! {
    fn softmax_gradient(y: &[f32], g: &[f32], out: &mut [f32], n: usize) {
        for ((y, g), out) in y.chunks_exact(n).zip(g.chunks_exact(n)).zip(out.chunks_exact_mut(n)) {
            let inner = dot(y, g, |y, g| y * g);
            for ((out, y), g) in out.iter_mut().zip(y).zip(g) {
                *out = y * (g - inner);
            }
        }
    }
}

/// x + y of one shape.
pub(crate) struct Sum;

impl CustomOp2 for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        y: &CpuStorage,
        ly: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sum = map2(slice(x, lx)?, slice(y, ly)?, |x, y| x + y);
        Ok((CpuStorage::F32(sum), lx.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(g.clone()), Some(g.clone())))
    }
}

/// c x.
pub(crate) struct Scale(pub f32);

impl CustomOp1 for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let c = self.0;
        Ok((CpuStorage::F32(map(slice(x, l)?, |x| c * x)), l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(g.contiguous()?.apply_op1_no_bwd(self)?))
    }
}

vectorised! {
    /// The sum of each column of rows as long as `sum`, in blocks, so that round-off grows slowly.
    fn columns(x: &[f32], sum: &mut [f32]) {
        for block in x.chunks(sum.len() * 64) {
            let mut part = vec![0f32; sum.len()];
            for row in block.chunks_exact(sum.len()) {
                for (part, x) in part.iter_mut().zip(row) {
                    *part += x;
                }
            }
            for (sum, part) in sum.iter_mut().zip(part) {
                *sum += part;
            }
        }
    }
}

/// f of every number of every row and the number of `w` in its place.
pub(crate) fn rows(x: &[f32], w: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    build(x.len(), w.len(), |start, out| {
        let x = x[start..start + out.len()].chunks_exact(w.len());
        for (x, out) in x.zip(out.chunks_exact_mut(w.len())) {
            each2(x, w, out, &f);
        }
    })
}

vectorised! {
    /// (x - mean) / sigma of every row of n.
    fn normalize(x: &[f32], out: &mut [f32], n: usize, spec: &NormSpec) {
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            let (mean, sigma) = moments(x, spec);
            let inverse = 1.0 / sigma;
            for (out, x) in out.iter_mut().zip(x) {
                *out = (x - mean) * inverse;
            }
        }
    }
}

vectorised! {
    /// (g - mean(g) - y mean(g y)) / sigma of every row of n, without mean(g) for RMS.
    fn normalize_gradient(x: &[f32], y: &[f32], g: &[f32], out: &mut [f32], n: usize, spec: &NormSpec) {
        let rows = x.chunks_exact(n).zip(y.chunks_exact(n)).zip(g.chunks_exact(n));
        for (((x, y), g), out) in rows.zip(out.chunks_exact_mut(n)) {
            let inverse = 1.0 / moments(x, spec).1;
            let mean = match spec.kind {
                NormKind::Layer => dot(g, g, |g, _| g) / n as f32,
                NormKind::Rms => 0.0,
            };
            let inner = dot(y, g, |y, g| y * g) / n as f32;
            for ((out, y), g) in out.iter_mut().zip(y).zip(g) {
                *out = inverse * (g - mean - y * inner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn near(got: f32, want: f64, bound: f64) -> bool {
        (f64::from(got) - want).abs() <= bound
    }

    /// The complementary error function by its continued fraction, or its series near zero.
    fn erfc(x: f64) -> f64 {
        if x < 0.0 {
            return 2.0 - erfc(-x);
        }
        let scale = (-x * x).exp() / std::f64::consts::PI.sqrt();
        if x > 2.5 {
            return scale / (1..100).rev().fold(x, |below, k| x + f64::from(k) / 2.0 / below);
        }
        let (mut term, mut sum) = (x, x);
        for k in 1..100 {
            term *= 2.0 * x * x / f64::from(2 * k + 1);
            sum += term;
        }
        1.0 - 2.0 * scale * sum
    }

    #[test]
    fn a_series_and_its_slope_are_their_sums() {
        let x: Vec<f32> = (-300..=300).map(|i| i as f32 / 10.0 + 0.01).collect();
        for (f, bound, guarded) in [
            (Activation::Gelu, 8.0, true),
            (Activation::Silu, 12.0, false),
            (Activation::Tanh, 4.0, true),
        ] {
            let s = Series::for_activation(f, bound).unwrap();
            let grows = f != Activation::Tanh;
            let fourier = Fourier::new(&s, guarded.then_some(Guard { bound, grows }));
            let sums = |x: f64| {
                let (mut value, mut slope) = (s.linear * x + s.constant, s.linear);
                for (k, (a, b)) in s.cos.iter().zip(&s.sin).enumerate() {
                    let step = (k + 1) as f64 * TAU / s.period;
                    let (sin, cos) = (step * x).sin_cos();
                    value += a * cos + b * sin;
                    slope += step * (b * cos - a * sin);
                }
                (value, slope)
            };
            let (mut values, mut slopes) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            super::fourier(&x, None, &mut values, &fourier);
            super::fourier(&x, Some(&vec![2.0; x.len()]), &mut slopes, &fourier);
            for ((x, value), slope) in x.iter().map(|x| f64::from(*x)).zip(values).zip(slopes) {
                let (mut wanted, mut rise) = sums(if guarded { x.clamp(-bound, bound) } else { x });
                if guarded && x.abs() > bound {
                    let above = grows && x > 0.0;
                    wanted += if above { x - bound } else { 0.0 };
                    rise = if above { 1.0 } else { 0.0 };
                }
                assert!(near(value, wanted, 4e-6), "{f:?} of {x}: {value} for {wanted}");
                assert!(near(slope, 2.0 * rise, 4e-6), "{f:?}' of {x}: {slope} for {rise}");
            }
        }
        let [sin, cos] = Fourier::turns();
        let (mut s, mut c) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        super::fourier(&x, None, &mut s, &sin);
        super::fourier(&x, None, &mut c, &cos);
        for ((x, s), c) in x.iter().zip(s).zip(c) {
            let (sin, cos) = (f64::from(*x) * TAU).sin_cos();
            assert!(near(s, sin, 1e-7) && near(c, cos, 1e-7), "{x} turns");
        }
    }

    #[test]
    fn the_exponential_ends_where_floats_do() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(-87.0), exp(f32::NEG_INFINITY)), (0.0, 0.0));
        assert_eq!((exp(88.73), exp(f32::INFINITY)), (f32::INFINITY, f32::INFINITY));
        assert!(exp(88.72).is_finite() && exp(f32::NAN).is_nan());
    }

    proptest! {
        #[test]
        fn functions_are_accurate(x in -86.8f32..88.7, y in -8f32..8.0) {
            let wide = f64::from(x).exp();
            prop_assert!(near(exp(x), wide, 3e-7 * wide), "exp({x}) is {}", exp(x));
            let below = 0.5 * erfc(-f64::from(y) / 2f64.sqrt());
            let density = (-0.5 * f64::from(y).powi(2)).exp() / std::f64::consts::TAU.sqrt();
            prop_assert!(near(normal(y).0, below, 3e-7), "{y}: {} for {below}", normal(y).0);
            prop_assert!(near(normal(y).1, density, 3e-7), "{y}");
        }

        /// The vector versions, whichever this processor has, against the portable ones.
        #[test]
        fn vectors_and_scalars_agree(x in prop::collection::vec(-20f32..20.0, 1..200), n in 1usize..40) {
            for (got, x) in map(&x, exp).iter().zip(&x) {
                prop_assert!(near(*got, f64::from(exp(*x)), 1e-6 * f64::from(*got)));
            }
            let x = &x[..x.len() / n * n];
            let mut shares = vec![0.0; x.len()];
            softmax(x, &mut shares, n);
            for (row, shares) in x.chunks(n).zip(shares.chunks(n)) {
                let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
                for (v, share) in row.iter().zip(shares) {
                    prop_assert!(near(*share, f64::from(*v).exp() / sum, 1e-6));
                }
            }
            let mut sums = vec![0.0; n];
            columns(x, &mut sums);
            for (i, sum) in sums.iter().enumerate() {
                let want: f64 = x.iter().skip(i).step_by(n).map(|v| f64::from(*v)).sum();
                prop_assert!(near(*sum, want, 1e-3));
            }
        }

        #[test]
        fn a_transpose_is_one(rows in 1usize..80, cols in 1usize..150) {
            let x: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let turned = transpose(&x, cols);
            for (i, v) in turned.iter().enumerate() {
                prop_assert_eq!(*v, (i % rows * cols + i / rows) as f32);
            }
        }
    }

    #[test]
    fn pieces_meet_whatever_the_number_of_threads() {
        let x: Vec<f32> = (0..3 * PARALLEL + 7).map(|i| i as f32).collect();
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let got = pool.install(|| map2(&x, &x, |a, b| a + b));
            assert!(got.iter().zip(&x).all(|(got, x)| *got == x + x));
        }
    }
}
