//! Shapes: what comes out of an operation, and how a strided walk over it is made short.

use crate::Error;

/// The shape that numpy broadcasting gives two operands: aligned at the last dimension, a missing dimension or one
/// of size 1 stretches to the other's.
pub fn broadcast_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>, Error> {
    broadcast("broadcast", a, b)
}

/// Shape of `[.., m, k] x [.., k, n]`; leading dimensions broadcast.
pub fn matmul_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>, Error> {
    product_shape("matmul", a, b, 1)
}

/// Shape of `[.., m, k] x [.., n, k]` (second operand transposed); leading dimensions broadcast.
pub fn matmul_nt_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>, Error> {
    product_shape("matmul_nt", a, b, 2)
}

/// `n_back`: how far from the end of `b` its free dimension stands.
fn product_shape(op: &'static str, a: &[usize], b: &[usize], n_back: usize) -> Result<Vec<usize>, Error> {
    let misfit = || Error::Shape {
        op,
        left: a.to_vec(),
        right: b.to_vec(),
    };
    let (Some((batch_a, [m, k])), Some((batch_b, last))) =
        (a.split_last_chunk::<2>(), b.split_last_chunk::<2>())
    else {
        return Err(misfit());
    };
    if last[n_back - 1] != *k {
        return Err(misfit());
    }
    let mut dims = broadcast(op, batch_a, batch_b).map_err(|_| misfit())?;
    dims.extend([*m, last[2 - n_back]]);
    count(&dims).map(|_| dims).ok_or_else(misfit)
}

fn broadcast(op: &'static str, a: &[usize], b: &[usize]) -> Result<Vec<usize>, Error> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], i: usize| (i + dims.len()).checked_sub(rank).map_or(1, |i| dims[i]);
    let stretch = |i| match (at(a, i), at(b, i)) {
        (x, y) if x == y => Some(x),
        (1, y) => Some(y),
        (x, 1) => Some(x),
        _ => None,
    };
    let dims = (0..rank)
        .map(stretch)
        .collect::<Option<Vec<_>>>()
        .filter(|dims| count(dims).is_some());
    dims.ok_or_else(|| Error::Shape {
        op,
        left: a.to_vec(),
        right: b.to_vec(),
    })
}

/// Number of elements; `None` where it, or the product of any of the dimensions, exceeds what memory can hold.
pub(crate) fn count(dims: &[usize]) -> Option<usize> {
    let most = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
    most.filter(|&n| n <= isize::MAX as usize / size_of::<u64>())?;
    Some(dims.iter().product())
}

/// Row-major strides of `dims` read as if it were `out` (which it broadcasts to): 0 along stretched dimensions.
pub(crate) fn broadcast_strides(dims: &[usize], out: &[usize]) -> Vec<usize> {
    let mut strides = vec![0; out.len()];
    let mut step = 1;
    for (stride, &d) in strides.iter_mut().rev().zip(dims.iter().rev()) {
        *stride = if d == 1 { 0 } else { step };
        step *= d;
    }
    strides
}

/// A walk over `dims` in row-major order that reads `N` operands at their own strides, with dimensions of size 1
/// dropped and neighbours merged wherever every operand steps through them evenly.
pub(crate) struct Walk<const N: usize> {
    pub dims: Vec<usize>,
    pub strides: [Vec<usize>; N],
}

impl<const N: usize> Walk<N> {
    pub fn new(dims: &[usize], strides: [&[usize]; N]) -> Self {
        let mut walk = Walk {
            dims: Vec::with_capacity(dims.len()),
            strides: [(); N].map(|()| Vec::new()),
        };
        for (i, &d) in dims.iter().enumerate().filter(|&(_, &d)| d != 1) {
            let even = |n: usize| walk.strides[n].last().is_some_and(|&s| s == strides[n][i] * d);
            if (0..N).all(even) {
                *walk.dims.last_mut().expect("a stride has its dimension") *= d;
                (0..N).for_each(|n| *walk.strides[n].last_mut().expect("checked by even") = strides[n][i]);
            } else {
                walk.dims.push(d);
                (0..N).for_each(|n| walk.strides[n].push(strides[n][i]));
            }
        }
        if walk.dims.is_empty() {
            walk.dims.push(1);
            (0..N).for_each(|n| walk.strides[n].push(1));
        }
        walk
    }

    /// Where each operand stands at the `row`-th step over all dimensions but the last.
    pub fn offsets(&self, mut row: usize) -> [usize; N] {
        let mut at = [0; N];
        for i in (0..self.dims.len() - 1).rev() {
            let index = row % self.dims[i];
            row /= self.dims[i];
            (0..N).for_each(|n| at[n] += index * self.strides[n][i]);
        }
        at
    }
}
