use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::shape::{Walk, broadcast_shape, broadcast_strides, count};
use crate::simd::{fill_rows, parallel, vectorised};
use crate::{Error, Packed, gemm};

/// A contiguous, row-major tensor over Z_{2^64}; arithmetic wraps.
///
/// Cloning is cheap, and [`reshape`](Ring::reshape) and [`narrow`](Ring::narrow) of the leading dimension share
/// storage; writing to a shared tensor copies it first. A tensor of shape `[]` is a scalar, and a dimension may be 0.
/// `Debug` shows the shape alone: what a tensor holds may be a secret.
#[derive(Clone)]
pub struct Ring {
    data: Arc<Vec<u64>>,
    offset: usize,
    len: usize,
    dims: Vec<usize>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({:?})", self.dims)
    }
}

/// Making tensors and looking into them.
impl Ring {
    /// The tensor of shape `dims` with elements `data`, row by row.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements is not the product of `dims`.
    pub fn new(dims: impl Into<Vec<usize>>, data: Vec<u64>) -> Result<Ring, Error> {
        let dims = dims.into();
        if count(&dims) != Some(data.len()) {
            return Err(Error::Shape {
                op: "new",
                left: dims,
                right: vec![data.len()],
            });
        }
        Ok(Self::from_parts(dims, data))
    }

    /// All zeros.
    ///
    /// # Panics
    /// As [`full`](Ring::full).
    pub fn zeros(dims: impl Into<Vec<usize>>) -> Ring {
        Self::full(dims, 0)
    }

    /// All `value`.
    ///
    /// # Panics
    /// If the tensor is larger than the address space: `dims` must not come unchecked from a file or a peer.
    pub fn full(dims: impl Into<Vec<usize>>, value: u64) -> Ring {
        let dims = dims.into();
        let len = count(&dims).expect("the number of elements fits a usize");
        Self::from_parts(dims, vec![value; len])
    }

    /// `data.len()` is known to be the product of `dims`.
    pub(crate) fn from_parts(dims: Vec<usize>, data: Vec<u64>) -> Ring {
        debug_assert_eq!(count(&dims), Some(data.len()));
        Ring {
            offset: 0,
            len: data.len(),
            data: Arc::new(data),
            dims,
        }
    }

    /// The shape.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, row by row.
    pub fn as_slice(&self) -> &[u64] {
        &self.data[self.range()]
    }

    /// The elements, without a copy where no other tensor shares them.
    pub fn into_vec(self) -> Vec<u64> {
        let range = self.range();
        match Arc::try_unwrap(self.data) {
            Ok(data) if range == (0..data.len()) => data,
            Ok(data) => data[range].to_vec(),
            Err(shared) => shared[range].to_vec(),
        }
    }

    /// The elements for writing; copied first where another tensor shares them.
    pub fn make_mut(&mut self) -> &mut [u64] {
        let mut range = self.range();
        if Arc::get_mut(&mut self.data).is_none() {
            *self = Self::from_parts(self.dims.clone(), self.as_slice().to_vec());
            range = self.range();
        }
        &mut Arc::get_mut(&mut self.data).expect("no other tensor shares the storage")[range]
    }

    fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// Arithmetic, element by element.
impl Ring {
    /// `self + other`, broadcasting.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not broadcast.
    pub fn add(&self, other: &Ring) -> Result<Ring, Error> {
        self.zip(other, u64::wrapping_add)
    }

    /// `self - other`, broadcasting.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not broadcast.
    pub fn sub(&self, other: &Ring) -> Result<Ring, Error> {
        self.zip(other, u64::wrapping_sub)
    }

    /// `self * other` element by element, broadcasting.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not broadcast.
    pub fn mul(&self, other: &Ring) -> Result<Ring, Error> {
        self.zip(other, u64::wrapping_mul)
    }

    /// Adds `other` in place; it may broadcast to this tensor's shape, but not stretch it.
    ///
    /// # Errors
    /// [`Error::Shape`] otherwise.
    pub fn add_assign(&mut self, other: &Ring) -> Result<(), Error> {
        self.fold(other, "add_assign", u64::wrapping_add)
    }

    /// Subtracts `other` in place; it may broadcast to this tensor's shape, but not stretch it.
    ///
    /// # Errors
    /// [`Error::Shape`] otherwise.
    pub fn sub_assign(&mut self, other: &Ring) -> Result<(), Error> {
        self.fold(other, "sub_assign", u64::wrapping_sub)
    }

    /// Replaces every element by `f` of it and that of `other`.
    fn fold(
        &mut self,
        other: &Ring,
        op: &'static str,
        f: impl Fn(u64, u64) -> u64 + Sync,
    ) -> Result<(), Error> {
        if broadcast_shape(&self.dims, &other.dims).ok().as_ref() != Some(&self.dims) {
            let (left, right) = (self.dims.clone(), other.dims.clone());
            return Err(Error::Shape { op, left, right });
        }
        let walk = Walk::new(&self.dims, [&broadcast_strides(&other.dims, &self.dims)]);
        let (cols, stride) = (
            walk.dims[walk.dims.len() - 1],
            walk.strides[0][walk.dims.len() - 1],
        );
        let y = other.as_slice();
        fill_rows(self.make_mut(), 1, |first, piece| {
            each_row(first, piece, cols, |row, col, out| {
                let [at] = walk.offsets(row);
                match stride {
                    0 => fold_one_to(out, y[at], &f),
                    _ => fold_to(out, &y[at + col..], &f),
                }
            });
        });
        Ok(())
    }

    /// `-self`.
    pub fn neg(&self) -> Ring {
        self.map(u64::wrapping_neg)
    }

    /// Every element times `k`.
    pub fn mul_scalar(&self, k: u64) -> Ring {
        self.map(|x| x.wrapping_mul(k))
    }

    /// Every element plus `k`.
    pub fn add_scalar(&self, k: u64) -> Ring {
        self.map(|x| x.wrapping_add(k))
    }

    /// Every element shifted left by `bits`; 0 from 64 bits on.
    pub fn shl(&self, bits: u32) -> Ring {
        self.mul_scalar(1u64.checked_shl(bits).unwrap_or(0))
    }

    /// `f` of every element.
    pub fn map(&self, f: impl Fn(u64) -> u64 + Sync) -> Ring {
        let x = self.as_slice();
        if !parallel(self.len) {
            return Self::from_parts(self.dims.clone(), map_new(x, &f));
        }
        let mut out = vec![0; self.len];
        fill_rows(&mut out, 1, |first, piece| map_to(piece, &x[first..], &f));
        Self::from_parts(self.dims.clone(), out)
    }

    fn zip(&self, other: &Ring, f: impl Fn(u64, u64) -> u64 + Sync) -> Result<Ring, Error> {
        let (x, y) = (self.as_slice(), other.as_slice());
        if self.dims == other.dims && !parallel(self.len) {
            return Ok(Self::from_parts(self.dims.clone(), zip_new(x, y, &f)));
        }
        let dims = broadcast_shape(&self.dims, &other.dims)?;
        let strides = [
            broadcast_strides(&self.dims, &dims),
            broadcast_strides(&other.dims, &dims),
        ];
        let walk = Walk::new(&dims, [&strides[0], &strides[1]]);
        let last = walk.dims.len() - 1;
        let cols = walk.dims[last];
        let mut out = Ring::zeros(dims);
        fill_rows(out.make_mut(), 1, |first, piece| {
            each_row(first, piece, cols, |row, col, out| {
                let [i, j] = walk.offsets(row);
                match (walk.strides[0][last], walk.strides[1][last]) {
                    (0, _) => map_to(out, &y[j + col..], |y| f(x[i], y)),
                    (_, 0) => map_to(out, &x[i + col..], |x| f(x, y[j])),
                    _ => zip_to(out, &x[i + col..], &y[j + col..], &f),
                }
            });
        });
        Ok(out)
    }
}

vectorised! {
    fn map_new[F: Fn(u64) -> u64](x: &[u64], f: F) -> Vec<u64> {
        x.iter().map(|&x| f(x)).collect()
    }
}

vectorised! {
    fn zip_new[F: Fn(u64, u64) -> u64](x: &[u64], y: &[u64], f: F) -> Vec<u64> {
        x.iter().zip(y).map(|(&x, &y)| f(x, y)).collect()
    }
}

vectorised! {
    fn map_to[F: Fn(u64) -> u64](out: &mut [u64], x: &[u64], f: F) {
        out.iter_mut().zip(x).for_each(|(o, &x)| *o = f(x));
    }
}

vectorised! {
    fn zip_to[F: Fn(u64, u64) -> u64](out: &mut [u64], x: &[u64], y: &[u64], f: F) {
        out.iter_mut().zip(x).zip(y).for_each(|((o, &x), &y)| *o = f(x, y));
    }
}

vectorised! {
    fn fold_to[F: Fn(u64, u64) -> u64](out: &mut [u64], x: &[u64], f: F) {
        out.iter_mut().zip(x).for_each(|(o, &x)| *o = f(*o, x));
    }
}

vectorised! {
    fn fold_one_to[F: Fn(u64, u64) -> u64](out: &mut [u64], x: u64, f: F) {
        out.iter_mut().for_each(|o| *o = f(*o, x));
    }
}

vectorised! {
    fn total(x: &[u64]) -> u64 {
        x.iter().fold(0, |sum, &x| sum.wrapping_add(x))
    }
}

/// Cuts `piece`, which starts at element `first`, where rows of `cols` end, and calls `f` with every part's row, the
/// column that it starts at, and the part.
#[inline]
fn each_row(first: usize, mut piece: &mut [u64], cols: usize, f: impl Fn(usize, usize, &mut [u64])) {
    let (mut row, mut col) = (first / cols.max(1), first % cols.max(1));
    while !piece.is_empty() {
        let (part, rest) = piece.split_at_mut(piece.len().min(cols - col));
        f(row, col, part);
        (row, col, piece) = (row + 1, 0, rest);
    }
}

/// Moving elements around.
impl Ring {
    /// The same elements in another shape; shares storage.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshape(&self, dims: impl Into<Vec<usize>>) -> Result<Ring, Error> {
        let dims = dims.into();
        if count(&dims) != Some(self.len) {
            return Err(Error::Shape {
                op: "reshape",
                left: self.dims.clone(),
                right: dims,
            });
        }
        Ok(Ring { dims, ..self.clone() })
    }

    /// Dimensions `d1` and `d2` exchanged.
    ///
    /// # Errors
    /// [`Error::Range`] if there is no such dimension.
    pub fn transpose(&self, d1: usize, d2: usize) -> Result<Ring, Error> {
        self.dim("transpose", d1.max(d2))?;
        let mut order: Vec<usize> = (0..self.dims.len()).collect();
        order.swap(d1, d2);
        self.permute(&order)
    }

    /// The tensor whose `i`-th dimension is this one's `order[i]`-th.
    ///
    /// # Errors
    /// [`Error::Shape`] if `order` does not name every dimension once.
    pub fn permute(&self, order: &[usize]) -> Result<Ring, Error> {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..self.dims.len()) {
            return Err(Error::Shape {
                op: "permute",
                left: self.dims.clone(),
                right: order.to_vec(),
            });
        }
        let strides = broadcast_strides(&self.dims, &self.dims);
        let pick = |from: &[usize]| order.iter().map(|&d| from[d]).collect::<Vec<_>>();
        Ok(self.gather(pick(&self.dims), &pick(&strides)))
    }

    /// Stretched to `dims` by broadcasting.
    ///
    /// # Errors
    /// [`Error::Shape`] if this shape does not broadcast to `dims`.
    pub fn broadcast_to(&self, dims: impl Into<Vec<usize>>) -> Result<Ring, Error> {
        let dims = dims.into();
        if broadcast_shape(&self.dims, &dims).ok().as_ref() != Some(&dims) || count(&dims).is_none() {
            return Err(Error::Shape {
                op: "broadcast_to",
                left: self.dims.clone(),
                right: dims,
            });
        }
        let strides = broadcast_strides(&self.dims, &dims);
        Ok(self.gather(dims, &strides))
    }

    /// The `len` elements of dimension `dim` from `start` on; shares storage where no larger dimension precedes it.
    ///
    /// # Errors
    /// [`Error::Range`] if they are not all there.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Ring, Error> {
        let [outer, size, inner] = self.split("narrow", dim)?;
        let end = start.checked_add(len).filter(|&end| end <= size);
        let index = start.saturating_add(len);
        end.ok_or_else(|| Error::Range {
            op: "narrow",
            index,
            dims: self.dims.clone(),
        })?;
        let dims = self.with_dim(dim, len);
        if outer == 1 {
            return Ok(Ring {
                offset: self.offset + start * inner,
                len: len * inner,
                dims,
                ..self.clone()
            });
        }
        let x = self.as_slice();
        Ok(Self::from_rows(dims, len * inner, |row, col, out| {
            out.copy_from_slice(&x[(row * size + start) * inner + col..][..out.len()]);
        }))
    }

    /// `parts` one after the other along dimension `dim`; their other dimensions must agree.
    ///
    /// # Errors
    /// [`Error::Shape`] if they do not, or if there is no part; [`Error::Range`] if there is no such dimension.
    pub fn cat(parts: &[&Ring], dim: usize) -> Result<Ring, Error> {
        let Some(first) = parts.first() else {
            return Err(Error::Shape {
                op: "cat",
                left: vec![],
                right: vec![],
            });
        };
        let [_, _, inner] = first.split("cat", dim)?;
        for part in parts {
            if part
                .dims
                .get(dim)
                .is_none_or(|&d| part.dims != first.with_dim(dim, d))
            {
                let (left, right) = (first.dims.clone(), part.dims.clone());
                return Err(Error::Shape {
                    op: "cat",
                    left,
                    right,
                });
            }
        }
        let size = parts.iter().map(|p| p.dims[dim]).sum::<usize>();
        Ok(Self::from_rows(
            first.with_dim(dim, size),
            size * inner,
            |row, mut col, mut out| {
                for part in parts {
                    let n = part.dims[dim] * inner;
                    let (now, later) = out.split_at_mut(n.saturating_sub(col).min(out.len()));
                    now.copy_from_slice(&part.as_slice()[row * n..][..n][col.min(n)..][..now.len()]);
                    (col, out) = (col.saturating_sub(n), later);
                }
            },
        ))
    }

    /// The sum along dimension `dim`, which stays with size 1.
    ///
    /// # Errors
    /// [`Error::Range`] if there is no such dimension.
    pub fn sum(&self, dim: usize) -> Result<Ring, Error> {
        let [_, size, inner] = self.split("sum", dim)?;
        let x = self.as_slice();
        Ok(Self::from_rows(self.with_dim(dim, 1), inner, |row, col, out| {
            let block = &x[row * size * inner..][..size * inner];
            if inner == 1 {
                out[0] = total(block);
            } else {
                block
                    .chunks_exact(inner)
                    .for_each(|line| fold_to(out, &line[col..], u64::wrapping_add));
            }
        }))
    }

    /// Elements before dimension `dim`, along it, and after it.
    fn split(&self, op: &'static str, dim: usize) -> Result<[usize; 3], Error> {
        self.dim(op, dim)?;
        let product = |dims: &[usize]| dims.iter().product::<usize>();
        Ok([
            product(&self.dims[..dim]),
            self.dims[dim],
            product(&self.dims[dim + 1..]),
        ])
    }

    fn dim(&self, op: &'static str, dim: usize) -> Result<(), Error> {
        let out_of_range = || Error::Range {
            op,
            index: dim,
            dims: self.dims.clone(),
        };
        if dim < self.dims.len() {
            Ok(())
        } else {
            Err(out_of_range())
        }
    }

    fn with_dim(&self, dim: usize, size: usize) -> Vec<usize> {
        let mut dims = self.dims.clone();
        dims[dim] = size;
        dims
    }

    /// A tensor whose rows of `cols` words `f` writes, as [`each_row`] calls it; they start as zeros.
    fn from_rows(dims: Vec<usize>, cols: usize, f: impl Fn(usize, usize, &mut [u64]) + Sync) -> Ring {
        let mut out = Ring::zeros(dims);
        fill_rows(out.make_mut(), 1, |first, piece| each_row(first, piece, cols, &f));
        out
    }

    /// The tensor of shape `dims` that reads this one's elements at `strides`.
    fn gather(&self, dims: Vec<usize>, strides: &[usize]) -> Ring {
        let walk = Walk::new(&dims, [strides]);
        let mut out = Ring::zeros(dims);
        if !out.is_empty() {
            let inner: usize = walk.dims[1..].iter().product();
            let (steps, x) = (&walk.strides[0], self.as_slice());
            fill_rows(out.make_mut(), inner, |first, piece| {
                let mut dims = walk.dims.clone();
                dims[0] = piece.len() / inner;
                copy_strided(piece, &dims, &x[first * steps[0]..], steps);
            });
        }
        out
    }
}

/// Side of the squares in which a transposition goes over memory: a cache line's words.
const TILE: usize = 8;

/// Fills `out`, of shape `dims`, with the elements of `x` at `strides`. Neither is empty.
fn copy_strided(out: &mut [u64], dims: &[usize], x: &[u64], strides: &[usize]) {
    let last = dims.len() - 1;
    let (cols, step) = (dims[last], strides[last]);
    // The dimension along which the source is contiguous, where it is not the last.
    let along = (0..last).find(|&d| strides[d] == 1 && step > 1);
    let Some(along) = along else {
        let walk = Walk {
            dims: dims.to_vec(),
            strides: [strides.to_vec()],
        };
        return each_row(0, out, cols, |row, _, out| {
            let [at] = walk.offsets(row);
            match step {
                0 => out.fill(x[at]),
                1 => out.copy_from_slice(&x[at..][..cols]),
                _ => out
                    .iter_mut()
                    .zip(x[at..].iter().step_by(step))
                    .for_each(|(o, &x)| *o = x),
            }
        });
    };
    // Every pair of the source's contiguous dimension and the last one is a matrix to transpose.
    let mut others = (dims.to_vec(), strides.to_vec(), broadcast_strides(dims, dims));
    (others.0[along], others.0[last]) = (1, 1);
    let others = Walk {
        dims: [&others.0[..], &[1]].concat(),
        strides: [others.1, others.2],
    };
    let rows = dims[along];
    let row_step = dims[along + 1..].iter().product::<usize>();
    for matrix in 0..others.dims.iter().product() {
        let [from, to] = others.offsets(matrix);
        let (x, out) = (&x[from..], &mut out[to..]);
        for r0 in (0..rows).step_by(TILE) {
            for c0 in (0..cols).step_by(TILE) {
                for r in r0..rows.min(r0 + TILE) {
                    let line = &mut out[r * row_step..][c0..cols.min(c0 + TILE)];
                    line.iter_mut().zip(c0..).for_each(|(o, c)| *o = x[c * step + r]);
                }
            }
        }
    }
}

/// Matrix products.
impl Ring {
    /// `self x other`, `[.., m, k] x [.., k, n]`; leading dimensions broadcast.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn matmul(&self, other: &Ring) -> Result<Ring, Error> {
        gemm::matmul(self, other)
    }

    /// `self x other^T`, `[.., m, k] x [.., n, k]`: the layout of a linear layer's weight. Leading dimensions
    /// broadcast.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn matmul_nt(&self, other: &Ring) -> Result<Ring, Error> {
        gemm::matmul_nt(self, other)
    }

    /// [`matmul_nt`](Ring::matmul_nt) with an operand that was packed beforehand.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit.
    pub fn matmul_packed(&self, other: &Packed) -> Result<Ring, Error> {
        gemm::matmul_packed(self, other)
    }
}
