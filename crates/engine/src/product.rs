//! Matrix products of the float interpreter: operands are read where they lie, however they are strided.
//!
//! Candle's own product wants its operands packed and the number of threads from the environment; these run on the caller's
//! rayon pool, and compute no gradient of what does not train.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use gemm::Parallelism;
use rayon::prelude::*;

use crate::float::{self, slice, width};

/// Rows of a linear layer's input that are worked on at a time: their outputs stay in a core's second-level cache while
/// the bias is added.
const ROWS: usize = 258;

/// x W^T + b of `x [rows, k]`, `w [out, k]`, `b [out]`; no size is zero.
pub(crate) fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let x = x.contiguous()?;
    match b {
        Some(b) => x.apply_op3(w, &b.contiguous()?, Linear),
        None => x.apply_op2(w, Linear),
    }
}

/// a b of `a [.., m, k]`, `b [.., k, n]` whose leading dimensions agree; no size is zero. Where b is a view of heads that
/// lie side by side (`[batch, n, heads, width]` with the middle dimensions exchanged), so is the result.
pub(crate) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if side_by_side(b) {
        return a.apply_op2(b, Matmul { side_by_side: true })?.transpose(1, 2);
    }
    a.apply_op2(b, Matmul { side_by_side: false })
}

fn side_by_side(x: &Tensor) -> bool {
    match (x.dims(), x.stride()) {
        (&[_, heads, n, width], &[_, head, row, 1]) => {
            heads > 1 && n > 1 && head == width && row == heads * width
        }
        _ => false,
    }
}

/// The numbers of a tensor from its first on.
fn from_start<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[layout.start_offset()..])
}

/// A matrix somewhere in a slice.
#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

impl<'a> View<'a> {
    /// The last two dimensions, at the start of the data.
    fn new(data: &'a [f32], layout: &Layout) -> Self {
        let (dims, stride, r) = (layout.dims(), layout.stride(), layout.dims().len());
        View {
            data,
            rows: dims[r - 2],
            cols: dims[r - 1],
            row: stride[r - 2],
            col: stride[r - 1],
        }
    }

    fn t(self) -> Self {
        View {
            rows: self.cols,
            cols: self.rows,
            row: self.col,
            col: self.row,
            ..self
        }
    }

    fn from(self, start: usize) -> Self {
        View {
            data: &self.data[start..],
            ..self
        }
    }
}

/// Writes a b to `out`, whose rows begin `stride` apart and are not shorter than b's; with `add`, to what is there.
///
/// # Safety
/// With `add`, what is there is initialised.
unsafe fn product(
    out: &mut [MaybeUninit<f32>],
    stride: usize,
    a: View,
    b: View,
    add: bool,
    parallelism: Parallelism,
) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    let end = |rows: usize, cols: usize, row: usize, col: usize| (rows - 1) * row + (cols - 1) * col;
    assert!(
        k == b.rows
            && n <= stride
            && end(m, n, stride, 1) < out.len()
            && end(m, k, a.row, a.col) < a.data.len()
            && end(k, n, b.row, b.col) < b.data.len(),
        "operands fit"
    );
    // SAFETY: all three matrices lie within their slices, rows of `out` do not overlap, and it is read with `add` alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr().cast::<f32>(),
            1,
            stride as isize,
            add,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn threads(n: usize) -> Parallelism {
    match n {
        1 => Parallelism::None,
        n => Parallelism::Rayon(n),
    }
}

/// `len` numbers in chunks that `f` writes wholly, in parallel if there is more than one and a thread for it.
///
/// # Safety
/// `f` initialises every number of the chunk that it is given.
unsafe fn fill(len: usize, chunk: usize, f: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync) -> Vec<f32> {
    let mut out = Vec::with_capacity(len);
    let room = &mut out.spare_capacity_mut()[..len];
    if rayon::current_num_threads() == 1 || chunk >= len {
        room.chunks_mut(chunk).enumerate().for_each(|(i, out)| f(i, out));
    } else {
        room.par_chunks_mut(chunk)
            .enumerate()
            .for_each(|(i, out)| f(i, out));
    }
    // SAFETY: the capacity is at least `len`, and by contract every chunk was written.
    unsafe { out.set_len(len) };
    out
}

/// x W^T, and + b.
struct Linear;

impl Linear {
    fn forward(x: &[f32], k: usize, w: View, bias: Option<&[f32]>) -> Vec<f32> {
        let (rows, n, pool) = (x.len() / k, w.rows, rayon::current_num_threads());
        let blocks = rows.div_ceil(ROWS);
        // Packing W costs each block anew, so blocks are for a W that need not be packed, and for threads.
        let (rows_each, inner) = match blocks {
            _ if blocks < 2 * pool && pool > 1 => (rows, pool),
            _ if w.row == 1 => (rows.div_ceil(blocks).next_multiple_of(6), 1),
            _ => (rows.div_ceil(pool).next_multiple_of(6), 1),
        };
        let write = |i: usize, out: &mut [MaybeUninit<f32>]| {
            if let Some(bias) = bias {
                for row in out.chunks_exact_mut(n) {
                    row.write_copy_of_slice(bias);
                }
            }
            let x = View {
                data: &x[i * rows_each * k..],
                rows: out.len() / n,
                cols: k,
                row: k,
                col: 1,
            };
            // SAFETY: with a bias, `out` was just filled with it.
            unsafe { product(out, n, x, w.t(), bias.is_some(), threads(inner)) };
        };
        // SAFETY: the product writes all rows and columns of its chunk.
        unsafe { fill(rows * n, rows_each * n, write) }
    }

    fn gradients(x: &Tensor, w: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let plain = Matmul { side_by_side: false };
        let dx = x.track_op().then(|| g.apply_op2_no_bwd(w, &plain));
        let dw = w.track_op().then(|| g.t()?.apply_op2_no_bwd(x, &plain));
        Ok((dx.transpose()?, dw.transpose()?))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let w = View::new(from_start(w, lw)?, lw);
        let y = Linear::forward(slice(x, lx)?, width(lx), w, None);
        Ok((CpuStorage::F32(y), (lx.dims()[0], w.rows).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Linear::gradients(x, w, g)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (w, b) = (View::new(from_start(w, lw)?, lw), slice(b, lb)?);
        if b.len() != w.rows {
            bail!("a bias of {} for {} outputs", b.len(), w.rows);
        }
        let y = Linear::forward(slice(x, lx)?, width(lx), w, Some(b));
        Ok((CpuStorage::F32(y), (lx.dims()[0], w.rows).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = Linear::gradients(x, w, g)?;
        let db = b.track_op().then(|| g.contiguous()?.apply_op1_no_bwd(&Columns));
        Ok((dx, dw, db.transpose()?))
    }
}

/// a b over any leading dimensions.
struct Matmul {
    /// Whether the result is laid out as `[batch, m, heads, n]`.
    side_by_side: bool,
}

impl Matmul {
    /// Where the matrices of a batch begin, relative to the first.
    fn starts(layout: &Layout) -> Vec<usize> {
        let r = layout.dims().len();
        let lead = layout.dims()[..r - 2].iter().zip(layout.stride());
        lead.fold(vec![0], |starts, (&dim, &stride)| {
            starts
                .iter()
                .flat_map(|s| (0..dim).map(move |i| s + i * stride))
                .collect()
        })
    }
}

impl CustomOp2 for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (starts_a, starts_b) = (Matmul::starts(la), Matmul::starts(lb));
        let (a, b) = (
            View::new(from_start(a, la)?, la),
            View::new(from_start(b, lb)?, lb),
        );
        let (m, n, count, pool) = (a.rows, b.cols, starts_a.len(), rayon::current_num_threads());
        let mut dims = la.dims()[..la.dims().len() - 2].to_vec();
        // A group is what is written in one piece: one matrix, or as many as there are heads.
        let (group, stride) = match (self.side_by_side, &dims[..]) {
            (true, &[batch, heads]) => {
                dims = vec![batch, m, heads, n];
                (heads, heads * n)
            }
            _ => {
                dims.extend([m, n]);
                (1, n)
            }
        };
        let inner = if count == group { pool } else { 1 };
        let write = |i: usize, out: &mut [MaybeUninit<f32>]| {
            for head in 0..group {
                let (a, b) = (
                    a.from(starts_a[i * group + head]),
                    b.from(starts_b[i * group + head]),
                );
                // SAFETY: nothing is added to.
                unsafe { product(&mut out[head * n..], stride, a, b, false, threads(inner)) };
            }
        };
        // SAFETY: the products of a group write all of its rows, each its own columns.
        let out = unsafe { fill(count * m * n, group * m * n, write) };
        Ok((CpuStorage::F32(out), dims.into()))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let r = a.rank();
        let g = if self.side_by_side {
            g.transpose(1, 2)?
        } else {
            g.clone()
        };
        let plain = Matmul { side_by_side: false };
        let da = a
            .track_op()
            .then(|| g.apply_op2_no_bwd(&b.transpose(r - 2, r - 1)?, &plain));
        let db = b
            .track_op()
            .then(|| a.transpose(r - 2, r - 1)?.apply_op2_no_bwd(&g, &plain));
        Ok((da.transpose()?, db.transpose()?))
    }
}

/// The sum of each column of a matrix.
pub(crate) struct Columns;

impl CustomOp1 for Columns {
    fn name(&self) -> &'static str {
        "columns"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = width(l);
        let mut sum = vec![0f32; n];
        float::columns(slice(x, l)?, &mut sum);
        Ok((CpuStorage::F32(sum), n.into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Blocks, threads, a packed and a transposed W: all are one function.
    #[test]
    fn a_linear_layer_is_the_same_in_blocks() {
        let (k, n) = (5, 3);
        let ramp = |dims: (usize, usize)| {
            let values: Vec<f32> = (0..dims.0 * dims.1).map(|i| (i as f32 * 0.7).sin()).collect();
            Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
        };
        let w = ramp((n, k));
        let turned = w.t().unwrap().contiguous().unwrap().t().unwrap();
        let bias = ramp((1, n)).flatten_all().unwrap();
        for rows in [1, ROWS - 1, 3 * ROWS + 1, 9 * ROWS] {
            let x = ramp((rows, k));
            let want = x.matmul(&w.t().unwrap()).unwrap();
            let with_bias = want.broadcast_add(&bias).unwrap();
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                for w in [&w, &turned] {
                    let near = |got: Tensor, want: &Tensor| {
                        let apart = (got - want).unwrap().abs().unwrap().max_all().unwrap();
                        assert!(apart.to_scalar::<f32>().unwrap() < 1e-5, "{rows} rows");
                    };
                    near(pool.install(|| linear(&x, w, None)).unwrap(), &want);
                    near(pool.install(|| linear(&x, w, Some(&bias))).unwrap(), &with_bias);
                }
            }
        }
    }
}
