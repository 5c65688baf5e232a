//! The float interpreter: candle tensors on the CPU, differentiable.
//!
//! It serves public backbones, trains adapters through candle's autograd, and is what the private interpreters are
//! compared with. Softmax, normalisation and bias addition are fused operations with their own gradients: composed
//! from candle's elementary ones they would take most of a training step.

use std::cell::{Cell, RefCell};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Shape, Tensor};

use crate::float::{self, Fourier, Guard, Scale, Softmax, Sum, moments, slice, width};
use crate::product::{self, Columns};
use crate::series::Series;
use crate::{Activation, Backend, Error, NormSpec, Owner, Party, Range, Result, Revealed, SoftmaxSpec};

/// Float tensors. Owners play no part: everything is plain.
#[derive(Debug, Default)]
pub struct Plain {
    recorder: Option<Recorder>,
    /// Training: each batch norm's own mean and variance.
    batches: Option<RefCell<Vec<Moments>>>,
}

/// Mean and variance of each feature.
type Moments = (Vec<f32>, Vec<f32>);

/// What one calibrated verb of a forward pass has seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Site {
    /// Which verb, and so what `input` bounds.
    pub verb: Verb,
    /// Largest magnitude that entered: of the row for a norm, the score for a softmax, x for an activation.
    pub input: f64,
    /// Smallest and largest sqrt(var + eps) of a norm, or x of a reciprocal.
    pub range: Option<(f64, f64)>,
}

/// The verbs whose ranges are calibrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// [`Backend::normalize`].
    Normalize,
    /// [`Backend::softmax`].
    Softmax,
    /// [`Backend::activation`].
    Activation,
    /// [`Backend::reciprocal`].
    Reciprocal,
}

/// Sites in the order in which a forward pass meets them, which is the same in every pass.
#[derive(Debug, Default)]
struct Recorder {
    sites: RefCell<Vec<Site>>,
    next: Cell<usize>,
}

impl Plain {
    /// An interpreter that computes and nothing else.
    pub fn new() -> Self {
        Self::default()
    }

    /// An interpreter that also notes what enters each calibrated verb. Call [`Plain::rewind`] before each pass.
    pub fn recording() -> Self {
        Plain {
            recorder: Some(Recorder::default()),
            ..Plain::default()
        }
    }

    /// An interpreter whose batch norms use the batch's own mean and variance, and note them. Call [`Plain::rewind`]
    /// before each pass.
    pub fn training() -> Self {
        Plain {
            batches: Some(RefCell::default()),
            ..Plain::default()
        }
    }

    /// Mean and variance (the mean squared deviation) of each batch norm since [`Plain::rewind`], in program order; empty
    /// unless training.
    pub fn statistics(&self) -> Vec<(Vec<f32>, Vec<f32>)> {
        self.batches
            .as_ref()
            .map_or_else(Vec::new, |b| b.borrow().clone())
    }

    /// The next calibrated verb or batch norm is again the first of the program.
    pub fn rewind(&self) {
        if let Some(b) = &self.batches {
            b.borrow_mut().clear();
        }
        if let Some(r) = &self.recorder {
            r.next.set(0);
        }
    }

    /// What was seen so far, in program order; empty unless recording.
    pub fn sites(&self) -> Vec<Site> {
        self.recorder
            .as_ref()
            .map_or_else(Vec::new, |r| r.sites.borrow().clone())
    }

    /// Notes what enters a calibrated verb; `range` is that of its site, from the values.
    fn record(
        &self,
        op: &'static str,
        verb: Verb,
        x: &Tensor,
        range: impl FnOnce(&[f32]) -> Option<(f64, f64)>,
    ) -> Result<()> {
        let Some(r) = &self.recorder else { return Ok(()) };
        let values = floats(op, x)?;
        let input = values.iter().fold(0.0, |m, v| f64::max(m, v.abs() as f64));
        let range = range(&values);
        let mut sites = r.sites.borrow_mut();
        match sites.get_mut(r.next.get()) {
            None => sites.push(Site { verb, input, range }),
            Some(site) if site.verb == verb => {
                site.input = site.input.max(input);
                site.range = match (site.range, range) {
                    (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.max(b.1))),
                    (a, b) => a.or(b),
                };
            }
            Some(_) => {
                return Err(Error::program(
                    op,
                    "this pass differs from the recorded one; rewind first",
                ));
            }
        }
        r.next.set(r.next.get() + 1);
        Ok(())
    }
}

impl Backend for Plain {
    type Tensor = Tensor;
    type Weight = Tensor;

    fn dims(&self, x: &Tensor) -> Vec<usize> {
        x.dims().to_vec()
    }

    fn input(&self, _: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<Tensor> {
        enter("input", dims, values)
    }

    fn weight(&self, _: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<Tensor> {
        // A matrix lies transposed in memory, as products read it fastest.
        match (dims, values) {
            (&[rows, cols], Some(values)) if rows.checked_mul(cols) == Some(values.len()) => {
                Tensor::from_vec(float::transpose(values, cols), (cols, rows), &Device::Cpu)
                    .and_then(|t| t.t())
                    .map_err(wrong("weight"))
            }
            _ => enter("weight", dims, values),
        }
    }

    fn linear(&self, x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
        let (&[out, k], Some(&last)) = (w.dims(), x.dims().last()) else {
            return Err(Error::program(
                "linear",
                format!("x is {:?}, w is {:?}", x.dims(), w.dims()),
            ));
        };
        if k != last || b.is_some_and(|b| b.dims() != [out]) {
            let bias = b.map(Tensor::dims);
            return Err(Error::program(
                "linear",
                format!("x is {:?}, w is {:?}, b is {bias:?}", x.dims(), w.dims()),
            ));
        }
        let mut dims = x.dims().to_vec();
        *dims.last_mut().expect("x has a last dimension") = out;
        let rows = dims[..dims.len() - 1].iter().product::<usize>();
        if rows * out * k == 0 {
            let zeros = zeros("linear", &dims)?;
            return b.map_or(Ok(zeros.clone()), |b| self.add_weight(&zeros, b));
        }
        x.reshape((rows, k))
            .and_then(|x| product::linear(&x, w, b)?.reshape(dims))
            .map_err(wrong("linear"))
    }

    fn matmul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let mismatch = || Error::program("matmul", format!("{:?} x {:?}", a.dims(), b.dims()));
        let (da, db) = (a.dims(), b.dims());
        if da.len() < 2 || da.len() != db.len() || da[..da.len() - 2] != db[..db.len() - 2] {
            return Err(mismatch());
        }
        let (batch, m, k, n) = (
            &da[..da.len() - 2],
            da[da.len() - 2],
            da[da.len() - 1],
            db[db.len() - 1],
        );
        if k != db[db.len() - 2] {
            return Err(mismatch());
        }
        if batch.iter().product::<usize>() * m * k * n == 0 {
            return zeros("matmul", &[batch, &[m, n]].concat());
        }
        product::matmul(a, b).map_err(wrong("matmul"))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        if a.dims() == b.dims() && a.elem_count() > 0 {
            let sum = || a.contiguous()?.apply_op2(&b.contiguous()?, Sum);
            return sum().map_err(wrong("add"));
        }
        a.broadcast_add(b).map_err(wrong("add"))
    }

    fn sub(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.broadcast_sub(b).map_err(wrong("sub"))
    }

    fn mul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.broadcast_mul(b).map_err(wrong("mul"))
    }

    fn scale(&self, x: &Tensor, c: f64) -> Result<Tensor> {
        as_it_lies(x, |x| x.apply_op1(Scale(c as f32))).map_err(wrong("scale"))
    }

    fn add_weight(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        row_op("add_weight", x, w, RowOp::Add)
    }

    fn mul_weight(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        row_op("mul_weight", x, w, RowOp::Mul)
    }

    fn sum(&self, x: &Tensor, dim: usize) -> Result<Tensor> {
        x.sum_keepdim(dim).map_err(wrong("sum"))
    }

    fn reshape(&self, x: &Tensor, dims: &[usize]) -> Result<Tensor> {
        count("reshape", dims)?;
        x.reshape(dims).map_err(wrong("reshape"))
    }

    fn transpose(&self, x: &Tensor, a: usize, b: usize) -> Result<Tensor> {
        x.transpose(a, b).map_err(wrong("transpose"))
    }

    fn narrow(&self, x: &Tensor, dim: usize, start: usize, len: usize) -> Result<Tensor> {
        match x.dims().get(dim) {
            Some(&n) if start.checked_add(len).is_some_and(|end| end <= n) => {
                x.narrow(dim, start, len).map_err(wrong("narrow"))
            }
            _ => Err(Error::program(
                "narrow",
                format!("{len} from {start} of dimension {dim} of {:?}", x.dims()),
            )),
        }
    }

    fn cat(&self, xs: &[&Tensor], dim: usize) -> Result<Tensor> {
        Tensor::cat(xs, dim).map_err(wrong("cat"))
    }

    fn relu(&self, x: &Tensor) -> Result<Tensor> {
        x.relu().map_err(wrong("relu"))
    }

    fn activation(&self, x: &Tensor, f: Activation, range: Range) -> Result<Tensor> {
        self.record("activation", Verb::Activation, x, |_| None)?;
        let (bound, guarded) = match range {
            Range::Exact => {
                return as_it_lies(x, |x| float::activation(x, f)).map_err(wrong("activation"));
            }
            Range::Within(bound) => (bound, false),
            Range::Guarded(bound) => (bound, true),
        };
        let grows = matches!(f, Activation::Gelu | Activation::Silu);
        let guard = guarded.then_some(Guard { bound, grows });
        let fourier = Fourier::new(&*Series::for_activation(f, bound)?, guard);
        x.contiguous()
            .and_then(|x| x.apply_op1(fourier))
            .map_err(wrong("activation"))
    }

    fn turns(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        let x = x.contiguous()?;
        let [sin, cos] = Fourier::turns();
        Ok([x.apply_op1(sin)?, x.apply_op1(cos)?])
    }

    fn softmax(&self, x: &Tensor, _: &SoftmaxSpec) -> Result<Tensor> {
        self.record("softmax", Verb::Softmax, x, |_| None)?;
        row_wise("softmax", x, |x| x.apply_op1(Softmax))
    }

    fn normalize(&self, x: &Tensor, spec: &NormSpec) -> Result<Tensor> {
        let width = x.dims().last().copied().unwrap_or(1).max(1);
        let sigmas = |values: &[f32]| extremes(values.chunks(width).map(|row| moments(row, spec).1));
        self.record("normalize", Verb::Normalize, x, sigmas)?;
        row_wise("normalize", x, |x| x.apply_op1(Normalize(*spec)))
    }

    fn reciprocal(&self, x: &Tensor, _: (f64, f64)) -> Result<Tensor> {
        self.record("reciprocal", Verb::Reciprocal, x, |v| extremes(v.iter().copied()))?;
        x.recip().map_err(wrong("reciprocal"))
    }

    fn batch_norm(&self, x: &Tensor, mean: &Tensor, variance: &Tensor, eps: f64) -> Result<Tensor> {
        let op = "batch norm";
        let features = x.dims().last().copied().unwrap_or(0);
        if features == 0 || mean.dims() != [features] || variance.dims() != [features] {
            return Err(Error::program(
                op,
                format!(
                    "x is {:?}, mean {:?}, variance {:?}",
                    x.dims(),
                    mean.dims(),
                    variance.dims()
                ),
            ));
        }
        let own = match &self.batches {
            Some(noted) => {
                let (mean, variance) = batch_moments(x, features).map_err(wrong(op))?;
                noted
                    .borrow_mut()
                    .push((floats(op, &mean)?, floats(op, &variance)?));
                Some((mean, variance))
            }
            None => None,
        };
        let (mean, variance) = own.as_ref().map_or((mean, variance), |(m, v)| (m, v));
        let shift = mean.neg().map_err(wrong(op))?;
        let gain = (variance + eps)
            .and_then(|v| v.sqrt()?.recip())
            .map_err(wrong(op))?;
        row_op(op, &row_op(op, x, &shift, RowOp::Add)?, &gain, RowOp::Mul)
    }

    fn argmax(&self, x: &Tensor) -> Result<Tensor> {
        let values = floats("argmax", x)?;
        let width = x.dims().last().copied().unwrap_or(1);
        let mut hot = vec![0f32; values.len()];
        for (row, hot) in values.chunks(width.max(1)).zip(hot.chunks_mut(width.max(1))) {
            let first = (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
            hot[first] = 1.0;
        }
        Tensor::from_vec(hot, x.dims(), &Device::Cpu).map_err(wrong("argmax"))
    }

    fn prepare(&self, _: &[&Tensor]) -> Result<()> {
        Ok(())
    }

    fn deliver(&self, x: &Tensor) -> Result<Option<Revealed>> {
        self.reveal(x, Party::P0)
    }

    fn reveal(&self, x: &Tensor, _: Party) -> Result<Option<Revealed>> {
        let values = floats("reveal", x)?.into_iter().map(f64::from).collect();
        Ok(Some(Revealed {
            dims: x.dims().to_vec(),
            values,
        }))
    }
}

/// A candle failure as a complaint about the program: on the CPU nothing but shapes can be wrong.
fn wrong(op: &'static str) -> impl Fn(candle_core::Error) -> Error {
    move |e| Error::program(op, e.to_string())
}

fn count(op: &'static str, dims: &[usize]) -> Result<usize> {
    dims.iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .ok_or_else(|| Error::program(op, format!("{dims:?} overflows")))
}

fn enter(op: &'static str, dims: &[usize], values: Option<&[f32]>) -> Result<Tensor> {
    let values =
        values.ok_or_else(|| Error::program(op, "the float interpreter needs values from every owner"))?;
    if count(op, dims)? != values.len() {
        return Err(Error::program(
            op,
            format!("{} values for shape {dims:?}", values.len()),
        ));
    }
    Tensor::from_slice(values, dims, &Device::Cpu).map_err(wrong(op))
}

fn zeros(op: &'static str, dims: &[usize]) -> Result<Tensor> {
    Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu).map_err(wrong(op))
}

fn floats(op: &'static str, x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all().and_then(|x| x.to_vec1()).map_err(wrong(op))
}

/// Mean and variance of each feature over everything else; differentiable.
fn batch_moments(x: &Tensor, features: usize) -> candle_core::Result<(Tensor, Tensor)> {
    let n = x.elem_count() / features;
    if n == 0 {
        candle_core::bail!("an empty batch has no mean");
    }
    // As in a row operation's gradient: a product with ones is the faster sum.
    let ones = Tensor::full(1.0 / n as f32, (1, n), x.device())?;
    let mean_of = |x: &Tensor| ones.matmul(x)?.flatten_all();
    let rows = x.reshape((n, features))?.contiguous()?;
    let mean = mean_of(&rows)?;
    let variance = mean_of(&rows.apply_op2(&mean.neg()?, RowOp::Add)?.sqr()?)?;
    Ok((mean, variance))
}

/// Smallest and largest; None of nothing.
fn extremes(values: impl Iterator<Item = f32>) -> Option<(f64, f64)> {
    values.map(f64::from).fold(None, |seen, v| {
        let (low, high) = seen.unwrap_or((v, v));
        Some((low.min(v), high.max(v)))
    })
}

/// Applies an elementwise `f` to x in the order in which it lies in memory, where that is a simple one: heads need not be
/// brought together for it.
fn as_it_lies(x: &Tensor, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Tensor> {
    if x.is_contiguous() {
        return f(x);
    }
    if let Some(i) = x.rank().checked_sub(3) {
        let turned = x.transpose(i, i + 1)?;
        if turned.is_contiguous() {
            return f(&turned)?.transpose(i, i + 1);
        }
    }
    f(&x.contiguous()?)
}

/// Applies `f` to x laid out as rows of its last dimension; nothing to do without elements.
fn row_wise(
    op: &'static str,
    x: &Tensor,
    f: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    match x.dims() {
        [] => Err(Error::program(op, "a scalar has no last dimension")),
        _ if x.elem_count() == 0 => Ok(x.clone()),
        _ => x.contiguous().and_then(|x| f(&x)).map_err(wrong(op)),
    }
}

/// x with w broadcast to it: the fused operation where w is a trailing block of x, candle's otherwise.
fn row_op(op: &'static str, x: &Tensor, w: &Tensor, f: RowOp) -> Result<Tensor> {
    let lead = w.dims().iter().take_while(|&&d| d == 1).count();
    let block = &w.dims()[lead..];
    let apply = || {
        if x.elem_count() > 0 && !block.is_empty() && x.dims().ends_with(block) && w.rank() <= x.rank() {
            let len = w.elem_count();
            let rows = x.reshape((x.elem_count() / len, len))?.contiguous()?;
            return rows
                .apply_op2(&w.reshape(len)?.contiguous()?, f)?
                .reshape(x.shape());
        }
        let y = match f {
            RowOp::Add => x.broadcast_add(w)?,
            RowOp::Mul => x.broadcast_mul(w)?,
        };
        if y.dims() != x.dims() {
            candle_core::bail!("{:?} does not broadcast to {:?}", w.dims(), x.dims());
        }
        Ok(y)
    };
    apply().map_err(wrong(op))
}

/// A row vector added to, or multiplied with, every row of a matrix.
#[derive(Clone, Copy)]
enum RowOp {
    Add,
    Mul,
}

impl CustomOp2 for RowOp {
    fn name(&self) -> &'static str {
        "row-op"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(x, lx)?, slice(w, lw)?);
        let y = match self {
            RowOp::Add => float::rows(x, w, |x, w| x + w),
            RowOp::Mul => float::rows(x, w, |x, w| x * w),
        };
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let g = g.contiguous()?;
        let dx = x.track_op().then(|| match self {
            RowOp::Add => Ok(g.clone()),
            RowOp::Mul => g.apply_op2_no_bwd(&w.contiguous()?, self),
        });
        let dw = w.track_op().then(|| match self {
            RowOp::Add => g.apply_op1_no_bwd(&Columns),
            RowOp::Mul => (&g * x)?.apply_op1_no_bwd(&Columns),
        });
        Ok((dx.transpose()?, dw.transpose()?))
    }
}

/// Normalisation over the last dimension.
struct Normalize(NormSpec);

impl CustomOp1 for Normalize {
    fn name(&self) -> &'static str {
        "normalize"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, n) = (slice(x, l)?, width(l));
        let y = float::build(x.len(), n, |start, out| {
            float::normalize(&x[start..start + out.len()], out, n, &self.0);
        });
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(x.apply_op3_no_bwd(
            y,
            &g.contiguous()?,
            &NormalizeGradient(self.0),
        )?))
    }
}

/// dx = (g - mean(g) - y mean(g y)) / sigma, without mean(g) for RMS, from x, y and g.
struct NormalizeGradient(NormSpec);

impl CustomOp3 for NormalizeGradient {
    fn name(&self) -> &'static str {
        "normalize-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        y: &CpuStorage,
        ly: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, y, g, n) = (slice(x, lx)?, slice(y, ly)?, slice(g, lg)?, width(lx));
        let dx = float::build(x.len(), n, |start, out| {
            let end = start + out.len();
            float::normalize_gradient(&x[start..end], &y[start..end], &g[start..end], out, n, &self.0);
        });
        Ok((CpuStorage::F32(dx), lx.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use proptest::prelude::*;

    use super::*;
    use crate::NormKind;

    const NORM: NormSpec = NormSpec {
        kind: NormKind::Layer,
        eps: 1e-5,
        sigma: (1e-3, 1e3),
    };

    fn tensor(dims: &[usize], values: &[f32]) -> Tensor {
        Plain::new().input(Owner::Public, dims, Some(values)).unwrap()
    }

    fn ramp(dims: &[usize]) -> Tensor {
        let count = dims.iter().product::<usize>();
        tensor(
            dims,
            &(0..count)
                .map(|i| (i as f32 * 0.7).sin() * 2.0)
                .collect::<Vec<_>>(),
        )
    }

    fn values(x: &Tensor) -> Vec<f32> {
        floats("test", x).unwrap()
    }

    fn assert_near(a: &Tensor, b: &Tensor, bound: f32) {
        assert_eq!(a.dims(), b.dims());
        for (a, b) in values(a).iter().zip(values(b)) {
            assert!((a - b).abs() <= bound, "{a} against {b}");
        }
    }

    /// The gradient that autograd gives for sum(f(x) * weights), against central differences.
    fn check_gradient(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) {
        let var = Var::from_tensor(x).unwrap();
        let weights = ramp(f(x).unwrap().dims()).affine(0.5, 0.3).unwrap();
        let objective = |x: &Tensor| (f(x).unwrap() * &weights).unwrap().sum_all().unwrap();
        let grad = values(objective(var.as_tensor()).backward().unwrap().get(&var).unwrap());
        let base = values(x);
        for i in 0..base.len() {
            let moved = |by: f32| {
                let mut at = base.clone();
                at[i] += by;
                objective(&tensor(x.dims(), &at)).to_scalar::<f32>().unwrap()
            };
            let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!(
                (grad[i] - numeric).abs() < 2e-2 * (1.0 + numeric.abs()),
                "{i}: {} against {numeric}",
                grad[i]
            );
        }
    }

    #[test]
    fn fused_operations_have_the_right_gradients() {
        let (b, x) = (Plain::new(), ramp(&[3, 5]));
        let rms = NormSpec {
            kind: NormKind::Rms,
            ..NORM
        };
        check_gradient(&x, |x| b.normalize(x, &NORM));
        check_gradient(&x, |x| b.normalize(x, &rms));
        check_gradient(&x, |x| b.softmax(x, &SoftmaxSpec { bound: 8.0 }));
        for range in [Range::Within(4.0), Range::Guarded(1.0)] {
            check_gradient(&x, |x| b.activation(x, Activation::Gelu, range));
        }
        let row = ramp(&[5]);
        check_gradient(&x, |x| b.mul_weight(&b.add_weight(x, &row)?, &row));
        check_gradient(&row, |w| b.mul_weight(&b.add_weight(&x, w)?, w));
        let positive = x.affine(0.2, 1.0).unwrap();
        check_gradient(&positive, |x| b.reciprocal(x, (0.5, 2.0)));
        let own = Plain::training();
        for b in [&b, &own] {
            check_gradient(&ramp(&[2, 3, 5]), |x| {
                b.batch_norm(x, &row, &positive.get(0).unwrap(), 1e-3)
            });
        }
        check_gradient(&ramp(&[2, 3, 4]), |x| b.matmul(&b.transpose(x, 1, 2)?, x));
        let (x, w, bias) = (ramp(&[2, 3, 4]), ramp(&[2, 4]), ramp(&[2]));
        check_gradient(&x, |x| b.linear(x, &w, Some(&bias)));
        check_gradient(&x, |x| b.linear(x, &w, None));
        check_gradient(&x, |x| {
            b.linear(x, &b.weight(Owner::Public, &[2, 4], Some(&values(&w)))?, None)
        });
        check_gradient(&w, |w| b.linear(&x, w, Some(&bias)));
        check_gradient(&w, |w| b.linear(&x, w, None));
        check_gradient(&bias, |bias| b.linear(&x, &w, Some(bias)));
        check_gradient(&x, |x| b.add(x, &b.scale(x, 0.5)?));
        for f in [
            Activation::Gelu,
            Activation::Silu,
            Activation::Sigmoid,
            Activation::Exp,
            Activation::Tanh,
        ] {
            check_gradient(&x, |x| b.activation(x, f, Range::Exact));
        }
    }

    #[test]
    fn heads_that_lie_side_by_side_have_the_right_products_and_gradients() {
        let (b, x) = (Plain::new(), ramp(&[2, 3, 2 * 4]));
        let heads = |x: &Tensor| b.transpose(&b.reshape(x, &[2, 3, 2, 4])?, 1, 2);
        let attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let scores = b.matmul(&b.scale(q, 0.5)?, &b.transpose(k, 2, 3)?)?;
            b.matmul(&b.softmax(&scores, &SoftmaxSpec { bound: 8.0 })?, v)
        };
        check_gradient(&x, |x| {
            let h = heads(x)?;
            b.reshape(&b.transpose(&attend(&h, &h, &h)?, 1, 2)?, &[2, 3, 8])
        });
        let h = heads(&x).unwrap();
        let together = h.contiguous().unwrap();
        let got = attend(&h, &h, &h).unwrap();
        assert_near(&got, &attend(&together, &together, &together).unwrap(), 1e-6);
        assert!(got.transpose(1, 2).unwrap().is_contiguous(), "nothing to copy");
    }

    #[test]
    fn what_does_not_train_has_no_gradient() {
        let (b, w) = (Plain::new(), ramp(&[2, 4]));
        let x = Var::from_tensor(&ramp(&[3, 4])).unwrap();
        let y = b.linear(&x, &w, None).unwrap();
        let grads = b.mul_weight(&y, &ramp(&[2])).unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&w).is_none());
    }

    #[test]
    fn softmax_and_norms_are_what_they_should_be() {
        let b = Plain::new();
        let p = values(
            &b.softmax(
                &tensor(&[1, 3], &[1000.0, 999.0, -1000.0]),
                &SoftmaxSpec { bound: 24.0 },
            )
            .unwrap(),
        );
        let e = 1.0 / (1.0 + (-1f32).exp());
        assert!(
            (p[0] - e).abs() < 1e-6 && (p[1] - (1.0 - e)).abs() < 1e-6 && p[2] == 0.0,
            "{p:?}"
        );

        // Longer than one run of lanes, so that the remainder counts too.
        let x = ramp(&[2, 37]);
        for (row, normal) in values(&x)
            .chunks(37)
            .zip(values(&b.normalize(&x, &NORM).unwrap()).chunks(37))
        {
            let mean = row.iter().sum::<f32>() / 37.0;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 37.0;
            for (v, n) in row.iter().zip(normal) {
                assert!(((v - mean) / (variance + 1e-5).sqrt() - n).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn batch_norms_train_with_the_batch_and_serve_with_what_they_are_given() {
        let (b, x) = (Plain::training(), tensor(&[2, 1, 2], &[1.0, -4.0, 3.0, 8.0]));
        let (mean, variance) = (tensor(&[2], &[1.0, 0.0]), tensor(&[2], &[4.0, 16.0]));
        let fixed = Plain::new().batch_norm(&x, &mean, &variance, 0.0).unwrap();
        assert_near(&fixed, &tensor(&[2, 1, 2], &[0.0, -1.0, 1.0, 2.0]), 1e-6);
        for _ in 0..2 {
            b.rewind();
            let y = b.batch_norm(&x, &mean, &variance, 0.0).unwrap();
            assert_near(&y, &tensor(&[2, 1, 2], &[-1.0, -1.0, 1.0, 1.0]), 1e-6);
            b.batch_norm(&y, &mean, &variance, 0.0).unwrap();
        }
        let noted = b.statistics();
        assert_eq!(noted[0], (vec![2.0, 2.0], vec![1.0, 36.0]));
        assert_eq!((noted.len(), &noted[1].1), (2, &vec![1.0, 1.0]));
        assert!(Plain::new().statistics().is_empty());
    }

    #[test]
    fn series_follow_the_functions_and_guards_their_asymptotes() {
        let (b, x) = (Plain::new(), ramp(&[64]));
        for f in [
            Activation::Gelu,
            Activation::Silu,
            Activation::Tanh,
            Activation::Sigmoid,
            Activation::Exp,
            Activation::Sin,
            Activation::Cos,
        ] {
            let exact = b.activation(&x, f, Range::Exact).unwrap();
            assert_near(&b.activation(&x, f, Range::Within(4.0)).unwrap(), &exact, 1e-3);
        }
        let far = tensor(&[2], &[50.0, -50.0]);
        let gelu = |range| b.activation(&far, Activation::Gelu, range).unwrap();
        assert_near(&gelu(Range::Guarded(6.0)), &tensor(&[2], &[50.0, 0.0]), 1e-3);
        let tanh = b.activation(&far, Activation::Tanh, Range::Guarded(6.0)).unwrap();
        assert_near(&tanh, &tensor(&[2], &[1.0, -1.0]), 1e-3);
        // Unguarded, the series does what it likes, and so does the private evaluation.
        assert!((values(&gelu(Range::Within(6.0)))[0] - 50.0).abs() > 1.0);
        assert!(
            b.activation(&x, Activation::Gelu, Range::Within(f64::NAN))
                .is_err()
        );
    }

    #[test]
    fn wrong_shapes_are_program_errors() {
        let (b, x) = (Plain::new(), ramp(&[2, 3]));
        let program = |r: Result<Tensor>| assert!(matches!(r, Err(Error::Program { .. })), "{r:?}");
        program(b.input(Owner::Public, &[2, 3], Some(&[1.0])));
        program(b.input(Owner::Party(Party::P0), &[1], None));
        program(b.weight(Owner::Public, &[usize::MAX, 2], Some(&[1.0])));
        program(b.linear(&x, &ramp(&[4, 2]), None));
        program(b.linear(&x, &ramp(&[4, 3]), Some(&ramp(&[3]))));
        program(b.linear(&x, &ramp(&[3]), None));
        program(b.matmul(&x, &x));
        program(b.matmul(&ramp(&[2, 2, 3]), &ramp(&[3, 3, 2])));
        program(b.add(&x, &ramp(&[2])));
        program(b.add_weight(&x, &ramp(&[4, 2, 3])));
        program(b.batch_norm(&x, &ramp(&[3]), &ramp(&[2]), 1e-5));
        program(Plain::training().batch_norm(&tensor(&[0, 3], &[]), &ramp(&[3]), &ramp(&[3]), 1e-5));
        program(b.sum(&x, 2));
        program(b.reshape(&x, &[4]));
        program(b.reshape(&x, &[usize::MAX, 2]));
        program(b.transpose(&x, 0, 2));
        program(b.narrow(&x, 1, usize::MAX, 2));
        program(b.cat(&[&x, &ramp(&[2, 2])], 0));
        program(b.cat(&[], 0));
    }

    #[test]
    fn nothing_in_gives_nothing_out() {
        let (b, x) = (Plain::new(), tensor(&[0, 3], &[]));
        let dims = |r: Result<Tensor>| r.unwrap().dims().to_vec();
        assert_eq!(dims(b.linear(&x, &ramp(&[2, 3]), Some(&ramp(&[2])))), [0, 2]);
        assert_eq!(
            dims(b.matmul(&tensor(&[2, 2, 0], &[]), &tensor(&[2, 0, 2], &[]))),
            [2, 2, 2]
        );
        assert_eq!(dims(b.softmax(&x, &SoftmaxSpec { bound: 1.0 })), [0, 3]);
        assert_eq!(dims(b.normalize(&x, &NORM)), [0, 3]);
        assert_eq!(dims(b.relu(&x)), [0, 3]);
        assert_eq!(dims(b.argmax(&x)), [0, 3]);
        assert_eq!(dims(b.add_weight(&x, &ramp(&[3]))), [0, 3]);
    }

    #[test]
    fn argmax_takes_the_first_of_equals() {
        let hot = Plain::new()
            .argmax(&tensor(&[2, 3], &[1.0, 4.0, 4.0, -1.0, -2.0, -1.0]))
            .unwrap();
        assert_eq!(values(&hot), [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn a_recording_keeps_extremes_by_site() {
        let b = Plain::recording();
        for factor in [1.0, 3.0] {
            b.rewind();
            let x = b.scale(&tensor(&[1, 2], &[1.0, -1.0]), factor).unwrap();
            b.normalize(&x, &NORM).unwrap();
            b.softmax(&x, &SoftmaxSpec { bound: 8.0 }).unwrap();
            b.reciprocal(&b.scale(&tensor(&[2], &[0.5, 4.0]), factor).unwrap(), (0.1, 20.0))
                .unwrap();
        }
        let sites = b.sites();
        assert_eq!(sites.len(), 3);
        assert_eq!(
            (sites[2].verb, sites[2].range),
            (Verb::Reciprocal, Some((0.5, 12.0)))
        );
        let (low, high) = sites[0].range.unwrap();
        assert!(
            (low - 1.0).abs() < 1e-4 && (high - 3.0).abs() < 1e-4,
            "{low} {high}"
        );
        assert_eq!(
            (sites[1].verb, sites[1].input, sites[1].range),
            (Verb::Softmax, 3.0, None)
        );
        b.rewind();
        assert!(
            b.softmax(&ramp(&[2]), &SoftmaxSpec { bound: 8.0 }).is_err(),
            "another program"
        );
    }

    proptest! {
        #[test]
        fn products_agree_with_their_definition(
            (batch, m, k, n) in (0usize..3, 0usize..4, 0usize..20, 0usize..4),
            turned in any::<bool>(),
        ) {
            let b = Plain::new();
            let (x, y) = (ramp(&[batch, m, k]), ramp(&[batch, k, n]));
            // The same matrices in another memory layout.
            let x = if turned { x.t().unwrap().contiguous().unwrap().t().unwrap() } else { x };
            let got = values(&b.matmul(&x, &y).unwrap());
            let (x, y) = (values(&x), values(&y));
            for (i, got) in got.iter().enumerate() {
                let (s, row, column) = (i / (m * n), i / n % m, i % n);
                let want: f32 = (0..k).map(|j| x[(s * m + row) * k + j] * y[(s * k + j) * n + column]).sum();
                prop_assert!((got - want).abs() < 1e-4);
            }
            let linear = b.linear(&ramp(&[batch, m, k]), &ramp(&[n, k]), None).unwrap();
            prop_assert_eq!(linear.dims(), &[batch, m, n][..]);
        }
    }
}
