//! Sums of selected rows of a table: what a server of a private lookup computes with its share of the selection.
//!
//! Every query needs half of the table's rows on average, so a batch is a product of a matrix of bits with one of words.
//! It is computed by the method of the four Russians (Arlazarov, Dinic, Kronrod, Faradzev, 1970): the sums of all subsets
//! of four rows are tabulated once for all queries, which then add one vector for every four rows. The tables are made
//! for a strip of 16 columns at a time, where those of 64 rows fit the first cache.

use std::ops::Range;

use rayon::prelude::*;

use crate::Error;
use crate::simd::{fill_rows, parallel, vectorised};

/// Columns of a strip: two cache lines.
const STRIP: usize = 16;
/// Rows whose subsets are tabulated together.
const GROUP: usize = 4;
const SUBSETS: usize = 1 << GROUP;
/// Rows that one word of a selection covers, and whose tables (32 KiB) are used at a time.
const WORD: usize = 64;
/// Words of the table that are held at a time: 2 MiB.
const BUFFER: usize = 1 << 18;

/// A row's part in a strip. A vector that straddles cache lines takes two loads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Strip([u64; STRIP]);

const ZERO: Strip = Strip([0; STRIP]);

/// For each query the sum, modulo 2^64, of the rows that it selects from a table of shape `[rows, width]`: a matrix of
/// shape `[bits.len(), width]`, row by row. Bit `j % 64` of word `j / 64` of a query says whether it takes row `j`; bits
/// beyond the last row are ignored.
///
/// `fill` writes the rows of a range, one after the other. It is called once for every part of the table, from several
/// threads, with ranges that start at multiples of 64, so that the table need not be in memory: a
/// [`Prg`](crate::prg::Prg) can [`seek`](crate::prg::Prg::seek) to where a range starts, for any width.
///
/// Time depends on the shapes alone, but which cache lines are read depends on `bits`.
///
/// # Errors
/// [`Error::Shape`] if a query does not have `rows.div_ceil(64)` words.
///
/// # Panics
/// If the result is larger than the address space: shapes must not come unchecked from a peer.
///
/// # Example
/// ```
/// use veiltune_ring::select::subset_sums;
/// # fn main() -> Result<(), veiltune_ring::Error> {
/// let (table, width) = ([1, 2, 10, 20, 100, 200], 2);
/// let fill = |rows: std::ops::Range<usize>, out: &mut [u64]| {
///     out.copy_from_slice(&table[rows.start * width..rows.end * width]);
/// };
/// assert_eq!(subset_sums(3, width, fill, &[vec![0b101], vec![0b110]])?, [101, 202, 110, 220]);
/// # Ok(())
/// # }
/// ```
pub fn subset_sums(
    rows: usize,
    width: usize,
    fill: impl Fn(Range<usize>, &mut [u64]) + Sync,
    bits: &[Vec<u64>],
) -> Result<Vec<u64>, Error> {
    if let Some(query) = bits.iter().find(|query| query.len() != rows.div_ceil(WORD)) {
        return Err(Error::Shape {
            op: "subset_sums",
            left: vec![rows, width],
            right: vec![bits.len(), query.len()],
        });
    }
    let len = bits.len().checked_mul(width).expect("the result fits a usize");
    let mut out = vec![0; len];
    if out.is_empty() || rows == 0 {
        return Ok(out);
    }

    // Strip by strip, the sums of all queries, which a strip's tables then go over in one sweep.
    let mut sums = vec![ZERO; width.div_ceil(STRIP) * bits.len()];
    let words = (BUFFER / (WORD * width)).clamp(1, rows.div_ceil(WORD));
    let mut buffer = vec![0; words * WORD * width];
    for first in (0..rows.div_ceil(WORD)).step_by(words) {
        let held = first * WORD..rows.min((first + words) * WORD);
        let buffer = &mut buffer[..held.len().next_multiple_of(WORD) * width];
        fill_held(held, width, &fill, buffer);
        let selections: Vec<u64> = (first..)
            .take(buffer.len() / (WORD * width))
            .flat_map(|word| bits.iter().map(move |query| query[word]))
            .collect();
        let add = |(strip, sums): (usize, &mut [Strip])| {
            add_strip(buffer, width, STRIP * strip, &selections, sums);
        };
        if parallel(buffer.len() * bits.len() / WORD) {
            sums.par_chunks_mut(bits.len()).enumerate().for_each(add);
        } else {
            sums.chunks_mut(bits.len()).enumerate().for_each(add);
        }
    }

    fill_rows(&mut out, width, |query, piece| {
        for (query, out) in (query..).zip(piece.chunks_exact_mut(width)) {
            for (out, sums) in out.chunks_mut(STRIP).zip(sums.chunks_exact(bits.len())) {
                out.copy_from_slice(&sums[query].0[..out.len()]);
            }
        }
    });
    Ok(out)
}

/// Fills `buffer` with the rows `held`, and with zeros up to a whole number of words of the selections.
fn fill_held(
    held: Range<usize>,
    width: usize,
    fill: impl Fn(Range<usize>, &mut [u64]) + Sync,
    buffer: &mut [u64],
) {
    fill_rows(buffer, WORD * width, |word, piece| {
        let start = held.start + WORD * word;
        let end = held.end.min(start + piece.len() / width);
        let (piece, beyond) = piece.split_at_mut((end - start) * width);
        fill(start..end, piece);
        beyond.fill(0);
    });
}

/// Adds what the queries select of `table`'s strip that starts at `column`. `selections` has one word of every query for
/// each 64 rows.
fn add_strip(table: &[u64], width: usize, column: usize, selections: &[u64], sums: &mut [Strip]) {
    let mut rows = [ZERO; WORD];
    let mut tables = [[ZERO; SUBSETS]; WORD / GROUP];
    let cut = STRIP.min(width - column);
    let parts = table
        .chunks_exact(WORD * width)
        .zip(selections.chunks_exact(sums.len()));
    for (part, selections) in parts {
        for (row, from) in rows.iter_mut().zip(part.chunks_exact(width)) {
            match from[column..].first_chunk() {
                Some(whole) => row.0 = *whole,
                None => row.0[..cut].copy_from_slice(&from[column..]),
            }
        }
        tabulate(rows.as_chunks().0, &mut tables);
        add_subsets(&tables, selections, sums);
    }
}

vectorised! {
    /// The sums of all subsets of each group of rows: bit `i` of a sum's place says whether row `i` is part of it.
    fn tabulate(groups: &[[Strip; GROUP]], tables: &mut [[Strip; SUBSETS]]) {
        for (group, table) in groups.iter().zip(tables) {
            for (i, row) in group.iter().enumerate() {
                let (without, with) = table.split_at_mut(1 << i);
                for (with, without) in with.iter_mut().zip(without) {
                    for (with, (a, b)) in with.0.iter_mut().zip(without.0.iter().zip(row.0)) {
                        *with = a.wrapping_add(b);
                    }
                }
            }
        }
    }
}

vectorised! {
    /// Adds to each query's sum the subset of each group that its selection names, four bits a group. The tables are a
    /// slice because the compiler makes a mess of the loop where it knows their number.
    fn add_subsets(tables: &[[Strip; SUBSETS]], selections: &[u64], sums: &mut [Strip]) {
        for (selection, out) in selections.iter().zip(sums) {
            let (mut selection, mut sum) = (*selection, *out);
            for table in tables {
                let subset = &table[selection as usize % SUBSETS];
                for (sum, x) in sum.0.iter_mut().zip(subset.0) {
                    *sum = sum.wrapping_add(x);
                }
                selection >>= GROUP;
            }
            *out = sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prg::{Prg, Seed};
    use proptest::prelude::*;

    fn stream(name: u64) -> Prg {
        Prg::new(&Seed::from_bytes([7; 16]), name, 0)
    }

    /// The definition.
    fn naive(table: &[u64], width: usize, bits: &[Vec<u64>]) -> Vec<u64> {
        let sum = |query: &Vec<u64>| {
            let mut sum = vec![0u64; width];
            for (j, row) in table.chunks_exact(width).enumerate() {
                if query[j / 64] >> (j % 64) & 1 == 1 {
                    sum.iter_mut().zip(row).for_each(|(s, x)| *s = s.wrapping_add(*x));
                }
            }
            sum
        };
        bits.iter().flat_map(sum).collect()
    }

    fn check(rows: usize, width: usize, queries: usize, name: u64) {
        let table = stream(name).vec(rows * width);
        let mut selections = stream(!name);
        let bits: Vec<_> = (0..queries).map(|_| selections.vec(rows.div_ceil(64))).collect();
        let expected = naive(&table, width, &bits);
        let stored = |range: Range<usize>, out: &mut [u64]| {
            out.copy_from_slice(&table[range.start * width..range.end * width]);
        };
        assert!(subset_sums(rows, width, stored, &bits).unwrap() == expected);
        let drawn = |range: Range<usize>, out: &mut [u64]| {
            let mut prg = stream(name);
            prg.seek((range.start * width / 2) as u64);
            prg.fill_u64(out);
        };
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let sums = pool.unwrap().install(|| subset_sums(rows, width, drawn, &bits));
            assert!(sums.unwrap() == expected, "{threads} threads");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn sums_are_those_of_the_definition(
            rows in 1usize..300, width in 1usize..70, queries in 1usize..40, name: u64,
        ) {
            check(rows, width, queries, name);
        }
    }

    #[test]
    fn large_tables_are_summed_in_parts() {
        check(1000, 777, 70, 1);
        check(130, BUFFER / 64 + 5, 3, 2);
    }

    #[test]
    fn every_subset_of_a_group_is_right() {
        let fill = |rows: Range<usize>, out: &mut [u64]| {
            for (row, out) in rows.zip(out) {
                *out = 1 << row;
            }
        };
        let bits: Vec<_> = (0..=0xffff).map(|subset| vec![subset]).collect();
        let expected: Vec<u64> = (0..=0xffff).collect();
        assert!(subset_sums(16, 1, fill, &bits).unwrap() == expected);
    }

    #[test]
    fn empty_shapes_and_wrong_ones() {
        let ones = |_: Range<usize>, out: &mut [u64]| out.fill(1);
        assert_eq!(subset_sums(5, 3, ones, &[]), Ok(vec![]));
        assert_eq!(subset_sums(5, 0, ones, &[vec![1]]), Ok(vec![]));
        assert_eq!(subset_sums(0, 2, ones, &[vec![]]), Ok(vec![0, 0]));
        assert_eq!(subset_sums(5, 2, ones, &[vec![u64::MAX]]), Ok(vec![5, 5]));
        let refused = Err(Error::Shape {
            op: "subset_sums",
            left: vec![64, 2],
            right: vec![2, 2],
        });
        assert_eq!(subset_sums(64, 2, ones, &[vec![1], vec![1, 1]]), refused);
    }
}
