use std::arch::aarch64::*;
use std::array::from_fn;

use super::{Ahead, Kernel, Tile, pack_columns_portable, pack_rows_portable, transpose_portable};

/// 4 rows of 4 columns: two sums for each vector, see [`tile_neon`].
pub(super) static NEON: Kernel = Kernel {
    name: "neon",
    rows: 4,
    cols: 4,
    lanes: 2,
    narrow: None,
    row_sums: None,
    run: run_neon,
    transpose: transpose_portable,
    pack_rows: pack_rows_portable,
    pack_columns: pack_columns_portable,
};

/// # Safety
/// As for [`Kernel::run`].
unsafe fn run_neon(tile: &Tile, ahead: [&mut Ahead; 2], out: *mut u64, step: usize) {
    // SAFETY: passed on; every AArch64 processor that this can be compiled for has NEON.
    unsafe {
        match (tile.rows, tile.width / 2) {
            (4, 2) => tile_neon::<4, 2>(tile, ahead, out, step),
            (3, 2) => tile_neon::<3, 2>(tile, ahead, out, step),
            (2, 2) => tile_neon::<2, 2>(tile, ahead, out, step),
            (1, 2) => tile_neon::<1, 2>(tile, ahead, out, step),
            (4, 1) => tile_neon::<4, 1>(tile, ahead, out, step),
            (3, 1) => tile_neon::<3, 1>(tile, ahead, out, step),
            (2, 1) => tile_neon::<2, 1>(tile, ahead, out, step),
            (1, 1) => tile_neon::<1, 1>(tile, ahead, out, step),
            _ => unreachable!("checked by Kernel::run"),
        }
    }
}

/// A tile of `R` rows and `V` vectors of 2 columns. With x = x1 2^32 + x0 and y likewise, xy = x0 y0 + (x0 y1 + x1 y0) 2^32:
/// the first product is summed in 64 bits, and the others in 32, both at once, the halves of x exchanged.
///
/// # Safety
/// As for [`run_neon`], and `tile` must have that size.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn tile_neon<const R: usize, const V: usize>(
    tile: &Tile,
    ahead: [&mut Ahead; 2],
    out: *mut u64,
    step: usize,
) {
    let (mut y, mut x) = (tile.panel.as_ptr(), tile.left.as_ptr());
    // SAFETY: `Kernel::run` checked that the panel has `k` rows of `2 V` words and more, and the left side `R` rows of
    // `k`. `out` is the caller's promise.
    unsafe {
        ahead.into_iter().for_each(|ahead| ahead.go(ahead.pace));
        let (mut low, mut cross) = ([[vdupq_n_u64(0); V]; R], [[vdupq_n_u32(0); V]; R]);
        for _ in 0..tile.k {
            let row: [uint64x2_t; V] = from_fn(|v| vld1q_u64(y.add(2 * v)));
            let row_low: [uint32x2_t; V] = from_fn(|v| vmovn_u64(row[v]));
            for r in 0..R {
                let word = *x.add(r * tile.step);
                let each = vdup_n_u32(word as u32);
                let exchanged = vreinterpretq_u32_u64(vdupq_n_u64(word.rotate_left(32)));
                for v in 0..V {
                    low[r][v] = vmlal_u32(low[r][v], each, row_low[v]);
                    cross[r][v] = vmlaq_u32(cross[r][v], exchanged, vreinterpretq_u32_u64(row[v]));
                }
            }
            (x, y) = (x.add(1), y.add(2 * V));
        }
        for r in 0..R {
            for v in 0..V {
                let out = out.add(r * step + 2 * v);
                let high = vshlq_n_u64::<32>(vpaddlq_u32(cross[r][v]));
                let sum = vaddq_u64(low[r][v], high);
                let before = if tile.first {
                    vdupq_n_u64(0)
                } else {
                    vld1q_u64(out)
                };
                vst1q_u64(out, vaddq_u64(before, sum));
            }
        }
    }
}
