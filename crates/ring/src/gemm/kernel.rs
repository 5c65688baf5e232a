//! Kernels: one tile of a product, in the widest vectors that the processor has.

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

use super::Ahead;
#[cfg(target_arch = "x86_64")]
use crate::simd::{has_avx2, has_avx512};

/// Rows of the tallest tile that any kernel has.
pub(super) const MAX_ROWS: usize = 8;
/// Columns of the widest tile that any kernel has.
pub(super) const MAX_COLS: usize = 16;

/// How to compute tiles. All kernels give the same results.
pub(super) struct Kernel {
    /// For what tests report.
    #[cfg_attr(not(test), expect(dead_code))]
    pub name: &'static str,
    /// Most rows of a tile.
    pub rows: usize,
    /// Most columns of a tile: those of a panel.
    pub cols: usize,
    /// Columns of a vector: what the width of a panel is a multiple of.
    pub lanes: usize,
    /// One for sums modulo 2^52, if that is faster and the processor has IFMA. It takes the same panels.
    narrow: Option<&'static Kernel>,
    /// For a kernel that uses Winograd's inner product: the sums on the left, see [`Kernel::row_sums`]. Those on the
    /// right are one more row of every panel.
    row_sums: Option<RowSums>,
    run: unsafe fn(tile: &Tile, ahead: [&mut Ahead; 2], out: *mut u64, step: usize),
    transpose: Transpose,
    pack_rows: Pack,
    pack_columns: Pack,
}

type RowSums = unsafe fn(left: &[u64], step: usize, k: usize, sums: &mut [u64]);
type Transpose =
    unsafe fn(sums: &[u64], width: usize, rows: usize, cols: usize, first: bool, out: *mut u64, step: usize);
type Pack = unsafe fn(kernel: &Kernel, y: &[u64], step: usize, k: usize, cols: usize, panels: &mut [u64]);

impl Kernel {
    /// The kernel for sums modulo 2^52 that takes the same panels, where this processor has one.
    pub fn narrow(&self) -> Option<&'static Kernel> {
        #[cfg(target_arch = "x86_64")]
        let has = is_x86_feature_detected!("avx512ifma");
        #[cfg(not(target_arch = "x86_64"))]
        let has = false;
        self.narrow.filter(|_| has)
    }

    /// Words of the panels for `n` columns over `k` steps of the inner dimension.
    pub fn panel_len(&self, n: usize, k: usize) -> usize {
        n.next_multiple_of(self.lanes) * self.panel_rows(k)
    }

    /// Rows of a panel for `k` steps of the inner dimension.
    pub fn panel_rows(&self, k: usize) -> usize {
        k + usize::from(self.row_sums.is_some())
    }

    /// Makes panels for `cols` columns out of `k` rows of `y`, `step` words apart.
    pub fn pack_rows(&self, y: &[u64], step: usize, k: usize, cols: usize, panels: &mut [u64]) {
        assert!(y.len() >= (k - 1) * step + cols, "the matrix has all rows");
        assert_eq!(
            panels.len(),
            self.panel_len(cols, k),
            "the panels have room for all columns"
        );
        // SAFETY: `available` lists a kernel only where the processor has what it is compiled for. Sizes were checked.
        unsafe { (self.pack_rows)(self, y, step, k, cols, panels) }
    }

    /// Makes panels out of `cols` columns of `k` words, `step` words apart in `y`.
    pub fn pack_columns(&self, y: &[u64], step: usize, k: usize, cols: usize, panels: &mut [u64]) {
        assert_eq!(
            panels.len(),
            self.panel_len(cols, k),
            "the panels have room for all columns"
        );
        // SAFETY: as above.
        unsafe { (self.pack_columns)(self, y, step, k, cols, panels) }
    }

    /// Where the kernel needs it, for each row of `left`, `step` words apart, the sum of the products of neighbours
    /// (elements 0 and 1, 2 and 3, ...) among `k`.
    pub fn row_sums(&self, left: &[u64], step: usize, k: usize, sums: &mut [u64]) {
        if let Some(row_sums) = self.row_sums {
            // SAFETY: as above.
            unsafe { row_sums(left, step, k, sums) }
        }
    }

    /// Adds the product that `tile` describes to its rows in `out`, `step` words apart, or overwrites them. Meanwhile
    /// fetches some of what is `ahead`.
    ///
    /// # Safety
    /// `out` must have `tile.rows` rows of `tile.width` words, that nobody else uses meanwhile, and unless
    /// `tile.first`, they must be initialised.
    pub unsafe fn run(&self, tile: &Tile, ahead: [&mut Ahead; 2], out: *mut u64, step: usize) {
        assert!((1..=self.rows).contains(&tile.rows) && tile.width <= self.cols);
        assert!(tile.width > 0 && tile.width.is_multiple_of(self.lanes));
        assert!(
            tile.left.len() >= (tile.rows - 1) * tile.step + tile.k,
            "the left side has all rows"
        );
        assert!(tile.row_sums.len() >= tile.rows, "every row has its sum");
        assert_eq!(
            tile.panel.len(),
            self.panel_rows(tile.k) * tile.width,
            "the panel has all columns"
        );
        // SAFETY: the operands' sizes were just checked, the output is the caller's promise.
        unsafe { (self.run)(tile, ahead, out, step) }
    }

    /// Adds the `rows x cols` leading part of `sums`, whose rows are `width` words, to `cols` rows in `out`, or if
    /// `first`, overwrites them.
    ///
    /// # Safety
    /// `out` must have `cols` rows of `rows` words, `step` apart, that nobody else uses meanwhile, and unless `first`,
    /// they must be initialised.
    #[expect(clippy::too_many_arguments)]
    pub unsafe fn transpose(
        &self,
        sums: &[u64],
        width: usize,
        rows: usize,
        cols: usize,
        first: bool,
        out: *mut u64,
        step: usize,
    ) {
        assert!(rows <= MAX_ROWS && cols <= width && rows * width <= sums.len());
        // SAFETY: as for `run`.
        unsafe { (self.transpose)(sums, width, rows, cols, first, out, step) }
    }
}

/// One tile: `rows x k` words on the left, times a panel of `width` columns.
pub(super) struct Tile<'a> {
    pub rows: usize,
    pub k: usize,
    /// The left side's rows, `step` words apart.
    pub left: &'a [u64],
    pub step: usize,
    /// What [`Kernel::row_sums`] gave.
    pub row_sums: &'a [u64],
    /// `k` rows of `width` words, and perhaps one of sums.
    pub panel: &'a [u64],
    pub width: usize,
    /// Whether nothing was written to the output yet.
    pub first: bool,
    /// For a narrow kernel: the sums are shifted up by so many bits as they are written.
    pub shift: u32,
}

/// The kernels that this processor runs, slowest first.
pub(super) fn available() -> Vec<&'static Kernel> {
    #[allow(unused_mut, reason = "some architectures have the portable one only")]
    let mut kernels = vec![&PORTABLE];
    #[cfg(target_arch = "x86_64")]
    {
        kernels.extend(has_avx2().then_some(&x86::AVX2));
        kernels.extend(has_avx512().then_some(&x86::AVX512));
    }
    #[cfg(target_arch = "aarch64")]
    kernels.push(&neon::NEON);
    kernels
}

/// The fastest kernel that this processor runs.
pub(super) fn best() -> &'static Kernel {
    static BEST: LazyLock<&Kernel> = LazyLock::new(|| available().pop().expect("one is portable"));
    &BEST
}

static PORTABLE: Kernel = Kernel {
    name: "portable",
    rows: 4,
    cols: 4,
    lanes: 4,
    narrow: None,
    row_sums: None,
    run: run_portable,
    transpose: transpose_portable,
    pack_rows: pack_rows_portable,
    pack_columns: pack_columns_portable,
};

/// # Safety
/// As for [`Kernel::run`].
unsafe fn run_portable(tile: &Tile, ahead: [&mut Ahead; 2], out: *mut u64, step: usize) {
    ahead.into_iter().for_each(|ahead| ahead.go(ahead.pace));
    let mut sums = [[0u64; 4]; 4];
    for (k, y) in tile.panel.as_chunks::<4>().0.iter().enumerate() {
        for (row, sums) in sums[..tile.rows].iter_mut().enumerate() {
            let x = tile.left[row * tile.step + k];
            sums.iter_mut()
                .zip(y)
                .for_each(|(s, &y)| *s = s.wrapping_add(x.wrapping_mul(y)));
        }
    }
    for (row, sums) in sums[..tile.rows].iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { put(sums, 1, tile.first, out.add(row * step)) };
    }
}

/// # Safety
/// As for [`Kernel::transpose`].
unsafe fn transpose_portable(
    sums: &[u64],
    width: usize,
    rows: usize,
    cols: usize,
    first: bool,
    out: *mut u64,
    step: usize,
) {
    for col in 0..cols {
        // SAFETY: the caller's promise.
        unsafe {
            put(
                &sums[col..(rows - 1) * width + col + 1],
                width,
                first,
                out.add(col * step),
            )
        };
    }
}

/// Adds every `step`-th word of `sums` to those at `out`, or if `first`, overwrites them.
///
/// # Safety
/// `out` must have room for them, and unless `first`, be initialised.
#[inline(always)]
pub(super) unsafe fn put(sums: &[u64], step: usize, first: bool, out: *mut u64) {
    for (i, &sum) in sums.iter().step_by(step).enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out.add(i);
            out.write(if first { sum } else { out.read().wrapping_add(sum) });
        }
    }
}

/// # Safety
/// None; it is unsafe for the sake of its kind.
unsafe fn pack_rows_portable(
    kernel: &Kernel,
    y: &[u64],
    step: usize,
    k: usize,
    cols: usize,
    panels: &mut [u64],
) {
    pack_rows(kernel, y, step, k, cols, panels);
}

/// # Safety
/// None; it is unsafe for the sake of its kind.
unsafe fn pack_columns_portable(
    kernel: &Kernel,
    y: &[u64],
    step: usize,
    k: usize,
    cols: usize,
    panels: &mut [u64],
) {
    pack_columns(kernel, y, step, k, cols, panels);
}

/// [`Kernel::pack_rows`], compiled for whatever the caller is.
#[inline(always)]
fn pack_rows(kernel: &Kernel, y: &[u64], step: usize, k: usize, cols: usize, panels: &mut [u64]) {
    let rows = kernel.panel_rows(k);
    for (panel, first) in panels
        .chunks_mut(kernel.cols * rows)
        .zip((0..cols).step_by(kernel.cols))
    {
        let width = panel.len() / rows;
        let inside = width.min(cols - first);
        let (lines, sums) = panel.split_at_mut(k * width);
        for (row, line) in lines.chunks_exact_mut(width).enumerate() {
            line[..inside].copy_from_slice(&y[row * step + first..][..inside]);
            line[inside..].fill(0);
        }
        column_sums(lines, sums);
    }
}

/// [`Kernel::pack_columns`], likewise.
#[inline(always)]
fn pack_columns(kernel: &Kernel, y: &[u64], step: usize, k: usize, cols: usize, panels: &mut [u64]) {
    let rows = kernel.panel_rows(k);
    for (panel, first) in panels
        .chunks_mut(kernel.cols * rows)
        .zip((0..cols).step_by(kernel.cols))
    {
        let width = panel.len() / rows;
        let (lines, sums) = panel.split_at_mut(k * width);
        for i in 0..width {
            let line = lines[i..].iter_mut().step_by(width);
            match first + i < cols {
                true => line.zip(&y[(first + i) * step..][..k]).for_each(|(o, &y)| *o = y),
                false => line.for_each(|o| *o = 0),
            }
        }
        column_sums(lines, sums);
    }
}

/// Where a panel has a row of them, the sums of the products of neighbours in each column.
#[inline(always)]
fn column_sums(lines: &[u64], sums: &mut [u64]) {
    if sums.is_empty() {
        return;
    }
    sums.fill(0);
    for pair in lines.chunks_exact(2 * sums.len()) {
        let (even, odd) = pair.split_at(sums.len());
        for (sum, (x, y)) in sums.iter_mut().zip(even.iter().zip(odd)) {
            *sum = sum.wrapping_add(x.wrapping_mul(*y));
        }
    }
}
