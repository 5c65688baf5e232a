//! Packing the right side of a product into panels.
//!
//! A panel holds, for a range of the inner dimension, as many columns as a tile is wide: one row of the tile after
//! the other, columns beyond the matrix as zeros. Where the kernel uses Winograd's inner product, one more row at the
//! end has, for each column, the sum of the products of neighbours (rows 0 and 1, 2 and 3, ...).

use std::cell::RefCell;
use std::fmt;

use rayon::prelude::*;

use super::kernel::{self, Kernel};
use super::{Ahead, Block, LINE, Shape, k_blocks};
use crate::simd::parallel;
use crate::{Error, Ring};

/// Rows of a block of a [`Packed`] operand.
const PACKED_ROWS: usize = 256;

/// A right operand that was packed once for the kernel, for one that is used many times: a static weight.
#[derive(Clone)]
pub struct Packed {
    kernel: &'static Kernel,
    n: usize,
    k: usize,
    words: Vec<u64>,
    /// Where the panels start in `words`, at a cache line.
    start: usize,
}

impl Packed {
    /// Packs `weight` of shape `[n, k]`, the layout of a linear layer's weight, for [`Ring::matmul_packed`].
    ///
    /// # Errors
    /// [`Error::Shape`] if it is not a matrix.
    pub fn new_nt(weight: &Ring) -> Result<Packed, Error> {
        Packed::with_kernel(kernel::best(), weight)
    }

    pub(super) fn with_kernel(kernel: &'static Kernel, weight: &Ring) -> Result<Packed, Error> {
        let &[n, k] = weight.dims() else {
            return Err(Error::Shape {
                op: "pack",
                left: weight.dims().to_vec(),
                right: vec![],
            });
        };
        let blocks: usize = k_blocks(k, PACKED_ROWS)
            .map(|ks| kernel.panel_len(n, ks.len()))
            .sum();
        let mut words = vec![0; blocks + LINE];
        let start = line_start(&words);
        let mut rest = &mut words[start..];
        for ks in k_blocks(k, PACKED_ROWS) {
            let (block, later) = rest.split_at_mut(kernel.panel_len(n, ks.len()));
            let panel = kernel.panel_len(kernel.cols, ks.len());
            let pack = |(i, panel): (usize, &mut [u64])| {
                let (first, y) = (i * kernel.cols, weight.as_slice());
                kernel.pack_columns(
                    &y[first * k + ks.start..],
                    k,
                    ks.len(),
                    kernel.cols.min(n - first),
                    panel,
                );
            };
            if parallel(block.len()) {
                block.par_chunks_mut(panel).enumerate().for_each(pack);
            } else {
                block.chunks_mut(panel).enumerate().for_each(pack);
            }
            rest = later;
        }
        Ok(Packed {
            kernel,
            n,
            k,
            words,
            start,
        })
    }

    /// Shape of the operand: `[n, k]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.n, self.k]
    }

    pub(super) fn kernel(&self) -> &'static Kernel {
        self.kernel
    }

    fn panels(&self, Block { ks, cols }: &Block) -> &[u64] {
        let before = k_blocks(self.k, PACKED_ROWS).take_while(|b| b.start < ks.start);
        let before: usize = before.map(|b| self.kernel.panel_len(self.n, b.len())).sum();
        let start = self.start + before + self.kernel.panel_len(cols.start, ks.len());
        &self.words[start..][..self.kernel.panel_len(cols.len(), ks.len())]
    }
}

/// The shape alone: a weight may be secret.
impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({:?})", self.dims())
    }
}

/// The right side of a product of inner dimension k, with n columns.
pub(super) enum Right<'a> {
    /// `k` rows of `n` words.
    Rows(&'a [u64]),
    /// `n` columns of `k` words.
    Columns(&'a [u64]),
    /// Packed already.
    Packed(&'a Packed),
}

impl Right<'_> {
    /// Most rows and columns of a block. All are sized for a second-level cache of 1 MiB.
    pub fn block(&self) -> (usize, usize) {
        match self {
            // Half of the cache, and rows long enough to be worth fetching.
            Right::Rows(_) => (256, 256),
            // Half of the cache, and deep: the output, often a transpose, is gone over as rarely as may be.
            Right::Columns(_) => (512, 128),
            // A quarter, because the next block is fetched meanwhile.
            Right::Packed(_) => (PACKED_ROWS, 128),
        }
    }

    /// What to fetch of the next block in the course of `tiles` tiles. To pack it will do the same.
    pub fn ahead(&self, next: &Block, tiles: usize) -> Ahead {
        let Right::Packed(packed) = self else {
            return Ahead::NOTHING;
        };
        let panels = packed.panels(next);
        Ahead::new(panels, 1, panels.len(), 0, tiles)
    }

    /// Calls `f` with the panels of a block, whose columns start where a panel does.
    pub fn with_panels(&self, kernel: &Kernel, shape: Shape, block: &Block, f: impl FnOnce(&[u64])) {
        let (Shape { n, k, .. }, Block { ks, cols }) = (shape, block);
        let len = kernel.panel_len(cols.len(), ks.len());
        match self {
            Right::Rows(y) => with_buffer(len, |panels| {
                kernel.pack_rows(&y[ks.start * n + cols.start..], n, ks.len(), cols.len(), panels);
                f(panels);
            }),
            Right::Columns(y) => with_buffer(len, |panels| {
                kernel.pack_columns(&y[cols.start * k + ks.start..], k, ks.len(), cols.len(), panels);
                f(panels);
            }),
            Right::Packed(packed) => f(packed.panels(block)),
        }
    }
}

/// The first index in `words` where a cache line starts.
fn line_start(words: &[u64]) -> usize {
    words.as_ptr().align_offset(LINE * size_of::<u64>())
}

/// Calls `f` with `len` words, of arbitrary content, that start at a cache line. The memory is this thread's and
/// lasts, so that a small product does not pay for fresh pages.
fn with_buffer(len: usize, f: impl FnOnce(&mut [u64])) {
    thread_local!(static BUFFER: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) });
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < len + LINE {
            *buffer = vec![0; len + LINE];
        }
        let start = line_start(buffer);
        f(&mut buffer[start..][..len]);
    });
}
