use std::arch::x86_64::*;
use std::array::from_fn;

use super::{Ahead, Kernel, Tile, pack_columns, pack_rows, transpose_portable};
use crate::simd::prefetch;

/// 8 rows of 16 columns, paired: 16 sums, the 4 vectors of a pair of rows, and room to work in.
pub(super) static AVX512: Kernel = Kernel {
    name: "avx512",
    rows: 8,
    cols: 16,
    lanes: 8,
    narrow: Some(&AVX512_NARROW),
    row_sums: Some(row_sums_avx512),
    run: run_avx512,
    transpose: transpose_avx512,
    pack_rows: pack_rows_avx512,
    pack_columns: pack_columns_avx512,
};

/// The same modulo 2^52, by the multiply-add of AVX-512 IFMA: one instruction in place of two.
static AVX512_NARROW: Kernel = Kernel {
    name: "avx512 narrow",
    rows: 8,
    cols: 16,
    lanes: 8,
    narrow: None,
    row_sums: Some(row_sums_avx512),
    run: run_avx512_narrow,
    transpose: transpose_avx512,
    pack_rows: pack_rows_avx512,
    pack_columns: pack_columns_avx512,
};

/// Defines a kernel's function, and that of a tile, for processors with these features, by what multiplies and adds.
macro_rules! tiles {
    ($run:ident, $tile:ident, $features:literal, |$sum:ident, $a:ident, $b:ident| $multiply_add:expr) => {
        /// # Safety
        /// As for [`Kernel::run`]; the processor must have the features.
        #[target_feature(enable = $features)]
        unsafe fn $run(tile: &Tile, ahead: [&mut Ahead; 2], out: *mut u64, step: usize) {
            // SAFETY: passed on.
            unsafe {
                match (tile.rows, tile.width / 8) {
                    (8, 2) => $tile::<8, 2>(tile, ahead, out, step),
                    (7, 2) => $tile::<7, 2>(tile, ahead, out, step),
                    (6, 2) => $tile::<6, 2>(tile, ahead, out, step),
                    (5, 2) => $tile::<5, 2>(tile, ahead, out, step),
                    (4, 2) => $tile::<4, 2>(tile, ahead, out, step),
                    (3, 2) => $tile::<3, 2>(tile, ahead, out, step),
                    (2, 2) => $tile::<2, 2>(tile, ahead, out, step),
                    (1, 2) => $tile::<1, 2>(tile, ahead, out, step),
                    (8, 1) => $tile::<8, 1>(tile, ahead, out, step),
                    (7, 1) => $tile::<7, 1>(tile, ahead, out, step),
                    (6, 1) => $tile::<6, 1>(tile, ahead, out, step),
                    (5, 1) => $tile::<5, 1>(tile, ahead, out, step),
                    (4, 1) => $tile::<4, 1>(tile, ahead, out, step),
                    (3, 1) => $tile::<3, 1>(tile, ahead, out, step),
                    (2, 1) => $tile::<2, 1>(tile, ahead, out, step),
                    (1, 1) => $tile::<1, 1>(tile, ahead, out, step),
                    _ => unreachable!("checked by Kernel::run"),
                }
            }
        }

        /// A tile of `R` rows and `V` vectors of 8 columns.
        ///
        /// # Safety
        /// As for [`Kernel::run`], the processor must have the features, and `tile` must have that size.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $tile<const R: usize, const V: usize>(
            tile: &Tile,
            ahead: [&mut Ahead; 2],
            out: *mut u64,
            step: usize,
        ) {
            let (mut y, mut x) = (tile.panel.as_ptr(), tile.left.as_ptr());
            // SAFETY: `Kernel::run` checked that the panel has `k + 1` rows of `8 V` words, and the left side `R` rows of `k`.
            // `out` is the caller's promise.
            unsafe {
                let load = |y: *const u64, v: usize| _mm512_loadu_si512(y.add(8 * v).cast());
                let each = |x: *const u64, r: usize| _mm512_set1_epi64(*x.add(r * tile.step) as i64);
                let multiply_add = |$sum: __m512i, $a: __m512i, $b: __m512i| $multiply_add;
                let last: [_; V] = from_fn(|v| load(y.add(tile.k * 8 * V), v));
                let mut sums: [[__m512i; V]; R] = from_fn(|r| {
                    let pairs = _mm512_set1_epi64(tile.row_sums[r] as i64);
                    from_fn(|v| _mm512_sub_epi64(_mm512_setzero_si512(), _mm512_add_epi64(pairs, last[v])))
                });
                // A few lines ahead every so often, so that they never queue up.
                let [one, two] = ahead;
                let lines = [&one, &two].map(|ahead| ahead.pace.div_ceil((tile.k / 8).max(1)));
                for pair in 0..tile.k / 2 {
                    if pair % 4 == 0 {
                        one.go(lines[0]);
                        two.go(lines[1]);
                    }
                    let even: [_; V] = from_fn(|v| load(y, v));
                    let odd: [_; V] = from_fn(|v| load(y, V + v));
                    for r in 0..R {
                        let (first, second) = (each(x, r), each(x.add(1), r));
                        for v in 0..V {
                            let (a, b) = (
                                _mm512_add_epi64(first, odd[v]),
                                _mm512_add_epi64(second, even[v]),
                            );
                            sums[r][v] = multiply_add(sums[r][v], a, b);
                        }
                    }
                    (x, y) = (x.add(2), y.add(16 * V));
                }
                if tile.k % 2 == 1 {
                    for r in 0..R {
                        for v in 0..V {
                            sums[r][v] = multiply_add(sums[r][v], each(x, r), load(y, v));
                        }
                    }
                }
                let shift = _mm_cvtsi64_si128(i64::from(tile.shift));
                for r in 0..R {
                    for v in 0..V {
                        let out = out.add(r * step + 8 * v);
                        let before = if tile.first {
                            _mm512_setzero_si512()
                        } else {
                            _mm512_loadu_si512(out.cast())
                        };
                        _mm512_storeu_si512(
                            out.cast(),
                            _mm512_add_epi64(before, _mm512_sll_epi64(sums[r][v], shift)),
                        );
                    }
                }
            }
        }
    };
}

tiles!(run_avx512, tile_avx512, "avx512f,avx512dq", |sum, a, b| {
    _mm512_add_epi64(sum, _mm512_mullo_epi64(a, b))
});
tiles!(
    run_avx512_narrow,
    tile_avx512_narrow,
    "avx512f,avx512dq,avx512ifma",
    |sum, a, b| _mm512_madd52lo_epu64(sum, a, b)
);

/// # Safety
/// As for [`Kernel::transpose`]; the processor must have AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn transpose_avx512(
    sums: &[u64],
    width: usize,
    rows: usize,
    cols: usize,
    first: bool,
    out: *mut u64,
    step: usize,
) {
    if rows != 8 || !cols.is_multiple_of(8) {
        // SAFETY: passed on.
        return unsafe { transpose_portable(sums, width, rows, cols, first, out, step) };
    }
    for col in (0..cols).step_by(8) {
        let square = from_fn(|r| load(&sums[r * width + col..]));
        for (i, sum) in transpose(square).into_iter().enumerate() {
            // SAFETY: row `col + i` of the output has `rows`, that is 8, words by the caller's promise.
            unsafe {
                let out = out.add((col + i) * step).cast();
                let before = if first {
                    _mm512_setzero_si512()
                } else {
                    _mm512_loadu_si512(out)
                };
                _mm512_storeu_si512(out, _mm512_add_epi64(before, sum));
            }
        }
    }
}

/// # Safety
/// As for [`Kernel::row_sums`]; the processor must have AVX-512F and DQ.
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn row_sums_avx512(left: &[u64], step: usize, k: usize, sums: &mut [u64]) {
    for (row, sum) in sums.iter_mut().enumerate() {
        let mut total = _mm512_setzero_si512();
        for x in left[row * step..][..k / 2 * 2].chunks(8) {
            let x = load(x);
            let exchanged = _mm512_shuffle_epi32::<_MM_PERM_BADC>(x);
            total = _mm512_add_epi64(total, _mm512_mullo_epi64(x, exchanged));
        }
        // Every product stands in both places of its pair.
        *sum = _mm512_mask_reduce_add_epi64(0b0101_0101, total) as u64;
    }
}

/// # Safety
/// As for [`Kernel::pack_rows`]; the processor must have AVX-512F and DQ.
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn pack_rows_avx512(_: &Kernel, y: &[u64], step: usize, k: usize, cols: usize, panels: &mut [u64]) {
    /// Rows that are fetched ahead of their turn.
    const AHEAD: usize = 4;
    // Row by row over all panels, because that is how they lie in memory; two by two for the sums.
    for row in (0..k).step_by(2) {
        let even = y[row * step..].as_ptr();
        let odd = (row + 1 < k).then(|| even.wrapping_add(step));
        for col in (0..cols).step_by(8) {
            prefetch(even.wrapping_add(AHEAD * step + col));
            prefetch(even.wrapping_add((AHEAD + 1) * step + col));
            let panel = col / 16 * 16;
            let width = if cols - panel > 8 { 16 } else { 8 };
            let mask = (0xff_u32 >> (8 - (cols - col).min(8))) as __mmask8;
            // SAFETY: `Kernel::pack_rows` checked that `y` has `cols` words in each of the rows, and the panels room for
            // `k + 1` rows of all columns.
            unsafe {
                let to = panels.as_mut_ptr().add(panel * (k + 1) + col % 16);
                let even = _mm512_maskz_loadu_epi64(mask, even.add(col).cast());
                _mm512_storeu_si512(to.add(row * width).cast(), even);
                let sums = to.add(k * width).cast();
                let mut sum = if row == 0 {
                    _mm512_setzero_si512()
                } else {
                    _mm512_loadu_si512(sums)
                };
                if let Some(odd) = odd {
                    let odd = _mm512_maskz_loadu_epi64(mask, odd.add(col).cast());
                    _mm512_storeu_si512(to.add((row + 1) * width).cast(), odd);
                    sum = _mm512_add_epi64(sum, _mm512_mullo_epi64(even, odd));
                }
                _mm512_storeu_si512(sums, sum);
            }
        }
    }
}

/// # Safety
/// The processor must have AVX-512F and DQ.
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn pack_columns_avx512(_: &Kernel, y: &[u64], step: usize, k: usize, cols: usize, panels: &mut [u64]) {
    for (panel, first) in panels.chunks_mut(16 * (k + 1)).zip((0..cols).step_by(16)) {
        let width = panel.len() / (k + 1);
        for v in (0..width).step_by(8) {
            let mut sum = _mm512_setzero_si512();
            for at in (0..k).step_by(8) {
                let len = (k - at).min(8);
                let square = transpose(from_fn(|i| {
                    let col = first + v + i;
                    load(if col < cols {
                        &y[col * step + at..][..len]
                    } else {
                        &[]
                    })
                }));
                for pair in square.chunks_exact(2) {
                    sum = _mm512_add_epi64(sum, _mm512_mullo_epi64(pair[0], pair[1]));
                }
                for (i, &row) in square[..len].iter().enumerate() {
                    store(&mut panel[(at + i) * width + v..], row);
                }
            }
            store(&mut panel[k * width + v..], sum);
        }
    }
}

/// The leading 8 words, with zeros for those that are missing.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(words: &[u64]) -> __m512i {
    let mask = if words.len() < 8 {
        (1 << words.len()) - 1
    } else {
        0xff
    };
    // SAFETY: only words of the slice are read.
    unsafe { _mm512_maskz_loadu_epi64(mask, words.as_ptr().cast()) }
}

/// Sets the leading 8 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(words: &mut [u64], values: __m512i) {
    let words = words.first_chunk_mut::<8>().expect("room for 8 words");
    // SAFETY: there is room for 8 words.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), values) };
}

/// The 8 x 8 words of `rows`, transposed: first within pairs of rows, then by pairs of words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 8]) -> [__m512i; 8] {
    let low: [_; 4] = from_fn(|i| _mm512_unpacklo_epi64(rows[2 * i], rows[2 * i + 1]));
    let high: [_; 4] = from_fn(|i| _mm512_unpackhi_epi64(rows[2 * i], rows[2 * i + 1]));
    let quarter = |[a, b, c, d]: [__m512i; 4]| {
        let even = (
            _mm512_shuffle_i64x2::<0x88>(a, b),
            _mm512_shuffle_i64x2::<0x88>(c, d),
        );
        let odd = (
            _mm512_shuffle_i64x2::<0xdd>(a, b),
            _mm512_shuffle_i64x2::<0xdd>(c, d),
        );
        [
            _mm512_shuffle_i64x2::<0x88>(even.0, even.1),
            _mm512_shuffle_i64x2::<0x88>(odd.0, odd.1),
            _mm512_shuffle_i64x2::<0xdd>(even.0, even.1),
            _mm512_shuffle_i64x2::<0xdd>(odd.0, odd.1),
        ]
    };
    let (even, odd) = (quarter(low), quarter(high));
    [even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3]]
}

/// 4 rows of 4 columns, paired: two sums for each row, the vectors of a pair, and room to work in. See [`tile_avx2`].
pub(super) static AVX2: Kernel = Kernel {
    name: "avx2",
    rows: 4,
    cols: 4,
    lanes: 4,
    narrow: None,
    row_sums: Some(row_sums_avx2),
    run: run_avx2,
    transpose: transpose_portable,
    pack_rows: pack_rows_avx2,
    pack_columns: pack_columns_avx2,
};

/// # Safety
/// As for [`Kernel::run`]; the processor must have AVX2.
#[target_feature(enable = "avx2")]
unsafe fn run_avx2(tile: &Tile, ahead: [&mut Ahead; 2], out: *mut u64, step: usize) {
    // SAFETY: passed on.
    unsafe {
        match tile.rows {
            4 => tile_avx2::<4>(tile, ahead, out, step),
            3 => tile_avx2::<3>(tile, ahead, out, step),
            2 => tile_avx2::<2>(tile, ahead, out, step),
            1 => tile_avx2::<1>(tile, ahead, out, step),
            _ => unreachable!("checked by Kernel::run"),
        }
    }
}

/// A tile of `R` rows and 4 columns. With a = a1 2^32 + a0 and b likewise, ab = a0 b0 + (a0 b1 + a1 b0) 2^32: the first product is
/// summed in 64 bits, and the others in 32, both at once, the halves of a exchanged.
///
/// # Safety
/// As for [`run_avx2`], and `tile` must have that size.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn tile_avx2<const R: usize>(tile: &Tile, ahead: [&mut Ahead; 2], out: *mut u64, step: usize) {
    let (mut y, mut x) = (tile.panel.as_ptr(), tile.left.as_ptr());
    // SAFETY: `Kernel::run` checked that the panel has `k + 1` rows of 4 words, and the left side `R` rows of `k`. `out` is
    // the caller's promise.
    unsafe {
        ahead.into_iter().for_each(|ahead| ahead.go(ahead.pace));
        let load = |y: *const u64| _mm256_loadu_si256(y.cast());
        let each = |x: *const u64, r: usize| _mm256_set1_epi64x(*x.add(r * tile.step) as i64);
        let last = load(y.add(tile.k * 4));
        let mut low: [__m256i; R] = from_fn(|r| {
            let pairs = _mm256_set1_epi64x(tile.row_sums[r] as i64);
            _mm256_sub_epi64(_mm256_setzero_si256(), _mm256_add_epi64(pairs, last))
        });
        let mut cross = [_mm256_setzero_si256(); R];
        let mut add = |r: usize, a: __m256i, b: __m256i| {
            let exchanged = _mm256_shuffle_epi32::<0b10_11_00_01>(a);
            low[r] = _mm256_add_epi64(low[r], _mm256_mul_epu32(a, b));
            cross[r] = _mm256_add_epi32(cross[r], _mm256_mullo_epi32(exchanged, b));
        };
        for _ in 0..tile.k / 2 {
            let (even, odd) = (load(y), load(y.add(4)));
            for r in 0..R {
                let (first, second) = (each(x, r), each(x.add(1), r));
                add(r, _mm256_add_epi64(first, odd), _mm256_add_epi64(second, even));
            }
            (x, y) = (x.add(2), y.add(8));
        }
        if tile.k % 2 == 1 {
            for r in 0..R {
                add(r, each(x, r), load(y));
            }
        }
        for r in 0..R {
            let out = out.add(r * step).cast();
            let both = _mm256_add_epi64(cross[r], _mm256_srli_epi64::<32>(cross[r]));
            let sum = _mm256_add_epi64(low[r], _mm256_slli_epi64::<32>(both));
            let before = if tile.first {
                _mm256_setzero_si256()
            } else {
                _mm256_loadu_si256(out)
            };
            _mm256_storeu_si256(out, _mm256_add_epi64(before, sum));
        }
    }
}

/// # Safety
/// The processor must have AVX2.
#[target_feature(enable = "avx2")]
unsafe fn row_sums_avx2(left: &[u64], step: usize, k: usize, sums: &mut [u64]) {
    for (row, sum) in sums.iter_mut().enumerate() {
        let pairs = left[row * step..][..k].as_chunks::<2>().0.iter();
        *sum = pairs.fold(0, |sum, [x, y]| sum.wrapping_add(x.wrapping_mul(*y)));
    }
}

/// # Safety
/// The processor must have AVX2.
#[target_feature(enable = "avx2")]
unsafe fn pack_rows_avx2(kernel: &Kernel, y: &[u64], step: usize, k: usize, cols: usize, panels: &mut [u64]) {
    pack_rows(kernel, y, step, k, cols, panels);
}

/// # Safety
/// The processor must have AVX2.
#[target_feature(enable = "avx2")]
unsafe fn pack_columns_avx2(
    kernel: &Kernel,
    y: &[u64],
    step: usize,
    k: usize,
    cols: usize,
    panels: &mut [u64],
) {
    pack_columns(kernel, y, step, k, cols, panels);
}
