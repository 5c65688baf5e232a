//! Matrix products over Z_{2^64}.
//!
//! A product is cut, in the way of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008),
//! into blocks whose right side fits the second-level cache, and those into tiles whose sums fit the registers. The
//! left side is read where it lies; the right side is packed into panels, one row of a tile after the other.
//!
//! Kernels may use Winograd's inner product (1968), which is exact in any commutative ring: of every two
//! multiplications it turns one into additions,
//!
//! ```text
//! sum_k x_k y_k  =  sum_j (x_2j + y_2j+1)(x_2j+1 + y_2j)  -  sum_j x_2j x_2j+1  -  sum_j y_2j y_2j+1
//! ```
//!
//! where the last two sums cost one multiplication an element, not one a product. Vector units add on more ports than
//! they multiply on.
//!
//! A left side whose words are all multiples of 2^z, as masked values may be, is shifted down first: then the
//! product is needed modulo 2^(64-z) only, and from z = 12 on, instructions for 52 bits do.

mod kernel;
mod pack;

use std::ops::Range;

use kernel::{Kernel, MAX_COLS, MAX_ROWS, Tile};
use pack::Right;
use rayon::prelude::*;

pub use pack::Packed;

use crate::shape::{Walk, broadcast_strides, matmul_nt_shape, matmul_shape};
use crate::simd::{parallel, prefetch, vectorised};
use crate::{Error, Ring};

/// Multiply-adds that a task should at least do: some 15 us on one core.
const GRAIN: usize = 1 << 20;
/// Words of a cache line.
const LINE: usize = 8;

pub(crate) fn matmul(a: &Ring, b: &Ring) -> Result<Ring, Error> {
    let dims = matmul_shape(a.dims(), b.dims())?;
    Ok(product(kernel::best(), dims, a, b, Layout::Rows))
}

pub(crate) fn matmul_nt(a: &Ring, b: &Ring) -> Result<Ring, Error> {
    let dims = matmul_nt_shape(a.dims(), b.dims())?;
    Ok(product(kernel::best(), dims, a, b, Layout::Columns))
}

pub(crate) fn matmul_packed(a: &Ring, b: &Packed) -> Result<Ring, Error> {
    let dims = matmul_nt_shape(a.dims(), &b.dims())?;
    let [n, k] = b.dims();
    if k == 0 || a.is_empty() || n == 0 {
        return Ok(Ring::zeros(dims));
    }
    let shape = Shape { m: a.len() / k, n, k };
    let out = narrowed(b.kernel(), a.as_slice(), shape, |method, a| {
        run(method, shape, &[(a, Right::Packed(b))], false)
    });
    Ok(Ring::from_parts(dims, out))
}

/// How the right operand lies in memory: `[k, n]`, or `[n, k]`.
#[derive(Clone, Copy)]
enum Layout {
    Rows,
    Columns,
}

/// Rows, columns and inner dimension of a product.
#[derive(Clone, Copy)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
}

/// A kernel, and by how many bits its sums are shifted up.
#[derive(Clone, Copy)]
struct Method {
    kernel: &'static Kernel,
    shift: u32,
}

/// Bits that the words of a left side have to end in, all zero, for its product to be one of 52 bits.
const NARROW: u32 = 12;

/// Calls `multiply` with the left side and how to multiply it: shifted down, with a narrow kernel, where it ends in zeros. How it is
/// done depends on the words of the left side; where they are secret they are masked, and have the zeros that their kind has.
fn narrowed<T>(
    kernel: &'static Kernel,
    left: &[u64],
    shape: Shape,
    multiply: impl FnOnce(Method, &[u64]) -> T,
) -> T {
    // Of less, looking costs more than it brings; and a single row or column is not multiplied by a kernel.
    let large = shape.m >= 8 && shape.n >= 64;
    let narrow = kernel.narrow().filter(|_| large).and_then(|kernel| {
        // Most that have none say so at once.
        let ends = left.chunks(1 << 10).try_fold(0, |ends, words| {
            let ends = words.iter().fold(ends, |ends, word| ends | word);
            (ends.trailing_zeros() >= NARROW).then_some(ends)
        })?;
        let shift = ends.trailing_zeros().min(63);
        Some((
            Method { kernel, shift },
            left.iter().map(|x| x >> shift).collect::<Vec<_>>(),
        ))
    });
    match &narrow {
        Some((method, left)) => multiply(*method, left),
        None => multiply(Method { kernel, shift: 0 }, left),
    }
}

/// The operands of one product.
type Pair<'a> = (&'a [u64], Right<'a>);

/// The product of shape `dims`, which `a` and `b` are known to have.
fn product(kernel: &'static Kernel, dims: Vec<usize>, a: &Ring, b: &Ring, layout: Layout) -> Ring {
    let (batch, &[m, n]) = dims.split_last_chunk().expect("a product has two dimensions");
    let (batch_a, &[_, k]) = a.dims().split_last_chunk().expect("so has its left side");
    let (batch_b, _) = b.dims().split_last_chunk::<2>().expect("and its right side");
    let count: usize = batch.iter().product();
    if [count, m, n, k].contains(&0) {
        return Ring::zeros(dims);
    }
    let (x, y) = (a.as_slice(), b.as_slice());
    let right = |y| match layout {
        Layout::Rows => Right::Rows(y),
        Layout::Columns => Right::Columns(y),
    };
    // A right side that all share: one product, of all the rows on the left.
    let shared = y.len() == k * n;
    let shape = Shape {
        m: if shared { count * m } else { m },
        n,
        k,
    };
    let out = narrowed(kernel, x, shape, |method, x| {
        if shared {
            return run_either(method, shape, &[(x, right(y))]);
        }
        let mut strides = [
            broadcast_strides(batch_a, batch),
            broadcast_strides(batch_b, batch),
        ];
        strides.iter_mut().for_each(|s| s.push(1));
        let walk = Walk {
            dims: [batch, &[1]].concat(),
            strides,
        };
        let pair = |at: usize| {
            let [i, j] = walk.offsets(at);
            (&x[i * m * k..][..m * k], right(&y[j * n * k..][..n * k]))
        };
        run_either(method, shape, &(0..count).map(pair).collect::<Vec<_>>())
    });
    Ring::from_parts(dims, out)
}

/// Runs the products as they are, or as their transposes: of two operands that lie alike, the smaller is packed.
fn run_either<'a>(method: Method, shape: Shape, pairs: &[Pair<'a>]) -> Vec<u64> {
    let Shape { m, n, k } = shape;
    let swap = |(a, b): &Pair<'a>| match b {
        Right::Columns(b) => Some((*b, Right::Columns(a))),
        Right::Rows(b) if n == 1 => Some((*b, Right::Columns(a))), // A column lies as it would in columns.
        _ => None,
    };
    let swapped = || pairs.iter().map(swap).collect::<Option<Vec<Pair>>>();
    if m == 1 {
        return vectors(shape, pairs);
    }
    match swapped().filter(|_| m < n || n == 1) {
        Some(pairs) if n == 1 => vectors(Shape { m: 1, n: m, k }, &pairs),
        Some(pairs) => run(method, Shape { m: n, n: m, k }, &pairs, true),
        None => run(method, shape, pairs, false),
    }
}

/// Vector times matrix: nothing is used twice, so nothing is packed.
fn vectors(shape: Shape, pairs: &[Pair]) -> Vec<u64> {
    /// Columns that are summed up at a time: few enough to stay in the first-level cache.
    const WIDTH: usize = 1024;
    let Shape { n, k, .. } = shape;
    let mut out = vec![0; pairs.len() * n];
    let piece = |(at, piece): (usize, &mut [u64])| {
        let (batch, col) = (at / n.div_ceil(WIDTH), at % n.div_ceil(WIDTH) * WIDTH);
        match &pairs[batch] {
            (x, Right::Rows(y)) => add_rows(x, &y[col..], n, piece),
            (x, Right::Columns(y)) => dot_columns(x, &y[col * k..], piece),
            (_, Right::Packed(_)) => unreachable!("packed operands go to `run`"),
        }
    };
    let pieces = out
        .chunks_mut(n)
        .flat_map(|row| row.chunks_mut(WIDTH))
        .enumerate();
    if parallel(pairs.len() * n * k) {
        pieces.collect::<Vec<_>>().into_par_iter().for_each(piece);
    } else {
        pieces.for_each(piece);
    }
    out
}

vectorised! {
    /// The products of `x` and each column in `y`.
    fn dot_columns(x: &[u64], y: &[u64], out: &mut [u64]) {
        for (o, y) in out.iter_mut().zip(y.chunks_exact(x.len())) {
            *o = x.iter().zip(y).fold(0, |sum, (&x, &y)| sum.wrapping_add(x.wrapping_mul(y)));
        }
    }
}

vectorised! {
    /// Adds to `out` the product of `x` and as many leading columns of `y`, whose rows are `n` words apart.
    fn add_rows(x: &[u64], y: &[u64], n: usize, out: &mut [u64]) {
        let width = out.len();
        let mut rows = y.chunks(n).map(|row| &row[..width]);
        let (fours, rest) = x.as_chunks::<4>();
        for &[a, b, c, d] in fours {
            let mut row = || rows.next().expect("a row for every word");
            let (ra, rb, rc, rd) = (row(), row(), row(), row());
            for ((((o, &ra), &rb), &rc), &rd) in out.iter_mut().zip(ra).zip(rb).zip(rc).zip(rd) {
                let (one, two) = (a.wrapping_mul(ra).wrapping_add(b.wrapping_mul(rb)), c.wrapping_mul(rc));
                *o = o.wrapping_add(one.wrapping_add(two).wrapping_add(d.wrapping_mul(rd)));
            }
        }
        for (&a, row) in rest.iter().zip(rows) {
            out.iter_mut().zip(row).for_each(|(o, &y)| *o = o.wrapping_add(a.wrapping_mul(y)));
        }
    }
}

/// The product of every pair, one after the other: `m x n` words each, or `n x m` where `transposed`.
fn run(method: Method, shape: Shape, pairs: &[Pair], transposed: bool) -> Vec<u64> {
    let Shape { m, n, k } = shape;
    assert!(
        k > 0 && pairs.iter().all(|(left, _)| left.len() == m * k),
        "every left side has m x k words"
    );
    let len = pairs.len() * m * n;
    let mut words = Vec::with_capacity(len);
    let out = Out {
        start: words.as_mut_ptr(),
        step: if transposed { m } else { n },
        transposed,
    };
    let grid = Grid::new(method.kernel, shape, pairs);
    let task = |task: usize| {
        let (batch, row, col) = grid.locate(task);
        let (left, right) = &pairs[batch];
        let (rows, cols) = (row..m.min(row + grid.rows), col..n.min(col + grid.cols));
        // SAFETY: there is room for the products one after the other. Each task has a rectangle of its own.
        unsafe {
            let out = out.skip(batch * m * n);
            Task {
                method,
                shape,
                left,
                right,
                out,
                rows,
                cols,
            }
            .run();
        }
    };
    match grid.tasks() {
        1 => task(0),
        tasks => (0..tasks).into_par_iter().for_each(task),
    }
    // SAFETY: the tasks' rectangles cover the products, and each wrote all of its own.
    unsafe { words.set_len(len) };
    words
}

/// Where the results go. Tasks write disjoint rectangles of it.
#[derive(Clone, Copy)]
struct Out {
    start: *mut u64,
    /// Words from one row in memory to the next.
    step: usize,
    /// Whether memory holds the transpose: what the kernel calls a row is a column there.
    transposed: bool,
}

// SAFETY: only tasks use the pointer, and each writes a rectangle that no other touches.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// Starting `words` later.
    ///
    /// # Safety
    /// The output must go on for that long.
    unsafe fn skip(self, words: usize) -> Out {
        // SAFETY: the caller's promise.
        let start = unsafe { self.start.add(words) };
        Out { start, ..self }
    }

    /// Starting at this row and column of the product.
    ///
    /// # Safety
    /// The output must have that row and column.
    unsafe fn at(self, row: usize, col: usize) -> Out {
        let (row, col) = if self.transposed { (col, row) } else { (row, col) };
        // SAFETY: the caller's promise.
        unsafe { self.skip(row * self.step + col) }
    }

    /// Fetches the `rows x cols` words from here on that are about to be used.
    fn prefetch(self, rows: usize, cols: usize) {
        let (rows, cols) = if self.transposed {
            (cols, rows)
        } else {
            (rows, cols)
        };
        for row in 0..rows {
            (0..cols)
                .step_by(LINE)
                .for_each(|col| prefetch(self.start.wrapping_add(row * self.step + col)));
        }
    }
}

/// How products are cut into tasks.
struct Grid {
    batch: usize,
    /// Tasks along the rows and columns of a product.
    tall: usize,
    wide: usize,
    /// Rows and columns of a task, the last ones excepted.
    rows: usize,
    cols: usize,
}

impl Grid {
    fn new(kernel: &Kernel, Shape { m, n, k }: Shape, pairs: &[Pair]) -> Grid {
        let batch = pairs.len();
        let work = (batch * m).saturating_mul(n).saturating_mul(k);
        let threads = rayon::current_num_threads();
        let (mut tall, mut wide) = (1, 1);
        if threads > 1 && work >= 2 * GRAIN {
            let wanted = (2 * threads).min(work / GRAIN).div_ceil(batch);
            let (most_tall, most_wide) = (m.div_ceil(4 * kernel.rows), n.div_ceil(2 * kernel.cols));
            // Tasks beside each other pack different columns, tasks below each other the same ones again. But a right
            // side that lies in columns is the smaller one.
            if let Right::Rows(_) = pairs[0].1 {
                wide = wanted.min(most_wide);
                tall = wanted.div_ceil(wide).min(most_tall);
            } else {
                tall = wanted.min(most_tall);
                wide = wanted.div_ceil(tall).min(most_wide);
            }
        }
        let rows = m.div_ceil(tall).next_multiple_of(kernel.rows);
        let cols = n.div_ceil(wide).next_multiple_of(kernel.cols);
        Grid {
            batch,
            tall: m.div_ceil(rows),
            wide: n.div_ceil(cols),
            rows,
            cols,
        }
    }

    fn tasks(&self) -> usize {
        self.batch * self.tall * self.wide
    }

    /// The product, and the first row and column, of a task.
    fn locate(&self, task: usize) -> (usize, usize, usize) {
        let (batch, task) = (task / (self.tall * self.wide), task % (self.tall * self.wide));
        (batch, task / self.wide * self.rows, task % self.wide * self.cols)
    }
}

/// A rectangle of one product.
struct Task<'a> {
    method: Method,
    shape: Shape,
    left: &'a [u64],
    right: &'a Right<'a>,
    /// Where the whole product goes.
    out: Out,
    rows: Range<usize>,
    cols: Range<usize>,
}

/// The part of the right side that is multiplied at a time.
struct Block {
    ks: Range<usize>,
    cols: Range<usize>,
}

impl Task<'_> {
    /// Writes the rectangle to the output.
    ///
    /// # Safety
    /// The output must have room for the whole product, and nobody else may use the rectangle meanwhile.
    unsafe fn run(&self) {
        let Task {
            method: Method { kernel, .. },
            shape,
            left,
            right,
            ..
        } = self;
        let (height, width) = right.block();
        let cols = || {
            self.cols
                .clone()
                .step_by(width)
                .map(|col| col..self.cols.end.min(col + width))
        };
        let blocks: Vec<_> = k_blocks(shape.k, height)
            .flat_map(|ks| cols().map(move |cols| Block { ks: ks.clone(), cols }))
            .collect();
        let mut row_sums = vec![0; self.rows.len()];
        for (i, block) in blocks.iter().enumerate() {
            let tiles = self.rows.len().div_ceil(kernel.rows) * block.cols.len().div_ceil(kernel.cols);
            let mut coming = blocks
                .get(i + 1)
                .map_or(Ahead::NOTHING, |next| right.ahead(next, tiles));
            right.with_panels(kernel, *shape, block, |panels| {
                for (row, sums) in self
                    .rows
                    .clone()
                    .step_by(kernel.rows)
                    .zip(row_sums.chunks_mut(kernel.rows))
                {
                    if block.cols.start == self.cols.start {
                        kernel.row_sums(
                            &left[row * shape.k + block.ks.start..],
                            shape.k,
                            block.ks.len(),
                            sums,
                        );
                    }
                    let rows = row..self.rows.end.min(row + kernel.rows);
                    // SAFETY: the caller's promise; the rows and columns are within the rectangle.
                    unsafe { self.stripe(rows, block, panels, sums, &mut coming) };
                }
            });
        }
    }

    /// Adds what a block contributes to a row of tiles, meanwhile fetching the next one's left side, and some of the
    /// block that is coming.
    ///
    /// # Safety
    /// As for [`Task::run`].
    unsafe fn stripe(
        &self,
        rows: Range<usize>,
        block: &Block,
        panels: &[u64],
        row_sums: &[u64],
        coming: &mut Ahead,
    ) {
        let &Task {
            method: Method { kernel, shift },
            shape,
            left,
            ..
        } = self;
        let Block { ks, cols } = block;
        let (row, height, k) = (rows.start, rows.len(), ks.len());
        let next = &left[rows.end.min(self.rows.end - 1) * shape.k + ks.start..];
        let tiles = cols.len().div_ceil(kernel.cols);
        let mut ahead = Ahead::new(next, kernel.rows.min(self.rows.end - rows.end), k, shape.k, tiles);
        let left = &left[row * shape.k + ks.start..];
        let mut sums = [0; MAX_ROWS * MAX_COLS];
        for (panel, col) in panels
            .chunks(kernel.panel_len(kernel.cols, k))
            .zip(cols.clone().step_by(kernel.cols))
        {
            let width = panel.len() / kernel.panel_rows(k);
            let inside = width.min(cols.end - col);
            // SAFETY: the caller's promise.
            let out = unsafe { self.out.at(row, col) };
            out.prefetch(height, inside);
            let first = ks.start == 0;
            let tile = Tile {
                rows: height,
                k,
                left,
                step: shape.k,
                row_sums,
                panel,
                width,
                first,
                shift,
            };
            if !out.transposed && inside == width {
                // SAFETY: the whole tile lies within the rectangle.
                unsafe { kernel.run(&tile, [&mut ahead, coming], out.start, out.step) };
                continue;
            }
            // SAFETY: the sums have room for the largest tile.
            unsafe {
                kernel.run(
                    &Tile { first: true, ..tile },
                    [&mut ahead, coming],
                    sums.as_mut_ptr(),
                    width,
                )
            };
            if out.transposed {
                // SAFETY: `inside` rows in memory, of one word for every row of the tile, lie within the rectangle.
                unsafe { kernel.transpose(&sums, width, height, inside, first, out.start, out.step) };
            } else {
                for (r, sums) in sums.chunks_exact(width).take(height).enumerate() {
                    // SAFETY: `inside` words of every row of the tile lie within the rectangle, and unless this is the
                    // first block, they were written before.
                    unsafe { kernel::put(&sums[..inside], 1, first, out.start.add(r * out.step)) };
                }
            }
        }
    }
}

/// The ranges of at most `most` that the inner dimension is cut into: as even as they can be, all but the last of even
/// length.
fn k_blocks(k: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let size = k.div_ceil(k.div_ceil(most).max(1)).next_multiple_of(2).max(2);
    (0..k).step_by(size).map(move |start| start..k.min(start + size))
}

/// Memory that will be needed soon, fetched little by little meanwhile.
struct Ahead {
    row: *const u64,
    /// Rows still to fetch, of how many words, how far apart.
    rows: usize,
    len: usize,
    step: usize,
    /// Words of the current row that were fetched.
    done: usize,
    /// Lines to fetch in one tile.
    pace: usize,
}

impl Ahead {
    const NOTHING: Ahead = Ahead {
        row: std::ptr::null(),
        rows: 0,
        len: 0,
        step: 0,
        done: 0,
        pace: 0,
    };

    /// `rows` rows of `len` words, `step` apart, from the start of `words` on, in the course of `tiles` tiles.
    fn new(words: &[u64], rows: usize, len: usize, step: usize, tiles: usize) -> Ahead {
        let pace = (rows * len.div_ceil(LINE)).div_ceil(tiles);
        Ahead {
            row: words.as_ptr(),
            rows,
            len,
            step,
            done: 0,
            pace,
        }
    }

    /// Fetches the next `lines` lines.
    #[inline(always)]
    fn go(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.rows == 0 {
                return;
            }
            prefetch(self.row.wrapping_add(self.done));
            self.done += LINE;
            if self.done >= self.len {
                (self.done, self.rows, self.row) = (0, self.rows - 1, self.row.wrapping_add(self.step));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::broadcast_shape;
    use crate::prg::{Prg, Seed};

    /// `[m, k] x [k, n]` by the definition.
    fn naive(a: &[u64], b: &[u64], m: usize, k: usize, n: usize) -> Vec<u64> {
        let word = |i: usize, j: usize| {
            (0..k).fold(0u64, |s, t| {
                s.wrapping_add(a[i * k + t].wrapping_mul(b[t * n + j]))
            })
        };
        (0..m * n).map(|at| word(at / n, at % n)).collect()
    }

    /// Full-width words with runs of extremes among them.
    fn tensor(dims: &[usize], seed: u8) -> Ring {
        let x = Prg::new(&Seed::from_bytes([seed; 16]), 0, 0).ring(dims);
        x.map(|x| match x % 8 {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << 63,
            3 => u64::from(u32::MAX),
            _ => x,
        })
    }

    /// Every kernel against the definition, in every layout; `batch_a` and `batch_b` broadcast.
    fn check(batch_a: &[usize], batch_b: &[usize], m: usize, k: usize, n: usize) {
        let a = tensor(&[batch_a, &[m, k]].concat(), 1);
        let b = tensor(&[batch_b, &[k, n]].concat(), 2);
        let batch = broadcast_shape(batch_a, batch_b).unwrap();
        let dims = [&batch[..], &[m, n]].concat();
        let all = |x: &Ring, rows, cols| {
            x.broadcast_to([&batch[..], &[rows, cols]].concat())
                .unwrap()
                .into_vec()
        };
        let (wide_a, wide_b) = (all(&a, m, k), all(&b, k, n));
        let count = batch.iter().product::<usize>();
        let expected: Vec<u64> = (0..count)
            .flat_map(|i| {
                naive(
                    &wide_a[i * m * k..][..m * k],
                    &wide_b[i * k * n..][..k * n],
                    m,
                    k,
                    n,
                )
            })
            .collect();
        let transposed = b.transpose(batch_b.len(), batch_b.len() + 1).unwrap();
        for kernel in kernel::available() {
            let rows = product(kernel, dims.clone(), &a, &b, Layout::Rows);
            assert_eq!(rows.dims(), dims);
            assert!(rows.as_slice() == expected, "{} x rows", kernel.name);
            let columns = product(kernel, dims.clone(), &a, &transposed, Layout::Columns);
            assert!(columns.as_slice() == expected, "{} x columns", kernel.name);
            if batch_b.is_empty() {
                let packed = Packed::with_kernel(kernel, &transposed).unwrap();
                assert!(
                    a.matmul_packed(&packed).unwrap().as_slice() == expected,
                    "{} x packed",
                    kernel.name
                );
            }
        }
    }

    /// A left side that ends in so many zeros, by the kernel for them where there is one.
    fn check_narrow(batch: &[usize], m: usize, k: usize, n: usize, zeros: u32) {
        let a = tensor(&[batch, &[m, k]].concat(), 3).map(|x| x << zeros);
        let b = tensor(&[k, n], 4);
        let transposed = b.transpose(0, 1).unwrap();
        let dims = [batch, &[m, n]].concat();
        let rows = batch.iter().product::<usize>() * m;
        let expected = naive(a.as_slice(), b.as_slice(), rows, k, n);
        for kernel in kernel::available() {
            let rows = product(kernel, dims.clone(), &a, &b, Layout::Rows);
            assert!(rows.as_slice() == expected, "{} x rows", kernel.name);
            let columns = product(kernel, dims.clone(), &a, &transposed, Layout::Columns);
            assert!(columns.as_slice() == expected, "{} x columns", kernel.name);
            let packed = Packed::with_kernel(kernel, &transposed).unwrap();
            let packed = a.matmul_packed(&packed).unwrap();
            assert!(packed.as_slice() == expected, "{} x packed", kernel.name);
        }
    }

    proptest! {
        #[test]
        fn zeros_at_the_end_change_nothing(m in 1usize..40, k in 1usize..50, n in 60usize..90, zeros in 10u32..=63) {
            check_narrow(&[2], m, k, n, zeros);
        }

        #[test]
        fn kernels_agree_with_the_definition(m in 0usize..40, k in 0usize..50, n in 0usize..70) {
            check(&[], &[], m, k, n);
        }

        #[test]
        fn batches_broadcast(
            dims in proptest::collection::vec(0usize..4, 0..3),
            one in proptest::collection::vec(any::<bool>(), 2),
            left in any::<bool>(),
            m in 1usize..12, k in 1usize..10, n in 1usize..20,
        ) {
            let other: Vec<_> = dims.iter().zip(&one).map(|(&d, &one)| if one { 1 } else { d }).collect();
            if left { check(&dims, &other, m, k, n) } else { check(&other, &dims, m, k, n) }
        }
    }

    /// Sizes that take several blocks each way, on one thread and on three.
    #[test]
    fn blocks_and_threads() {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                check(&[], &[], 70, 1030, 277);
                check_narrow(&[], 70, 1030, 277, 18);
                check_narrow(&[], 277, 1030, 70, 12);
                check(&[], &[], 301, 33, 513);
                check(&[], &[], 1, 600, 4500);
                check(&[], &[], 600, 200, 5);
                check(&[3, 4], &[4], 65, 64, 66);
                check(&[9], &[9], 1, 300, 700);
                check(&[3], &[3], 1500, 40, 1);
            });
        }
    }
}
