//! The private lookup of words: the servers get shares of rows of the model owner's word table and learn neither the table nor
//! which rows.
//!
//! The owner splits its table E, in fixed point, as E' - R0 - R1: both servers have E', server i and the assistant can expand
//! R_i from a seed. So each of the three tables is known to two of the three, and to nobody else: E' to the servers, R0 to server
//! 0 and the assistant, R1 to server 1 and the assistant. For each row the data owner deals three pairs of keys of a
//! [distributed point function](veiltune_fss::point), one pair for each table; who has a key and the table adds up the rows that
//! the key's bits select. The two sums differ by the row wanted, up to a sign that the data owner alone knows and brings into
//! the computation as a shared input.
//!
//! The assistant's sums go to the server that does not know the table, under a mask that the other server adds too. So a
//! table's row is secret from everybody, and what anybody sees is random as long as no two of the three work together, which
//! the protocols rest on anyway. Cost, once a run, for n rows of a table of V rows of w words: 6 n keys of 16 (log2 V - 5) bytes
//! from the data owner, 8 n w bytes from the assistant to each server, about n V w / 2 additions a table at each who has it. A
//! one-hot product would take n V w multiply-adds at each server for the online phase alone, and 8 n V bytes.

use veiltune_fss::point::{self, Key};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_ring::select::subset_sums;
use veiltune_wire::Link;

use crate::{Error, Result};

/// Who can answer for which table, and with which half of its pairs of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Server 0: E' and R0.
    First,
    /// Server 1: E' and R1.
    Second,
    /// The assistant: R0 and R1.
    Assistant,
}

/// Table number t (E', R0, R1) and half of its keys, for both tables of a holder.
pub fn halves(holder: Holder) -> [(usize, usize); 2] {
    match holder {
        Holder::First => [(0, 0), (1, 0)],
        Holder::Second => [(0, 1), (2, 0)],
        Holder::Assistant => [(1, 1), (2, 1)],
    }
}

/// The data owner's keys for one row.
pub struct RowKeys {
    /// For each table, the pair.
    keys: [[Key; 2]; 3],
    /// What makes the sums' differences the row, and what takes the masks off it: the sign of each table.
    pub signs: [f32; 3],
}

/// Deals the keys for row `index` of `rows`.
pub fn deal(index: usize, rows: usize) -> Result<RowKeys> {
    let failed = |e: veiltune_fss::Error| Error::Input(format!("the word lookup: {e}"));
    let mut signs = [0.0; 3];
    let mut one = |t: usize| -> Result<[Key; 2]> {
        let mut roots = [0; 2];
        for root in &mut roots {
            let seed = Seed::random().map_err(veiltune_engine::Error::from)?;
            *root = u128::from_le_bytes(*seed.expose());
        }
        let keys = point::generate(index, rows, roots).map_err(failed)?;
        signs[t] = point::sign(&keys, index).map_err(failed)? as f32;
        Ok(keys)
    };
    let keys = [one(0)?, one(1)?, one(2)?];
    Ok(RowKeys { keys, signs })
}

/// Sends a holder its halves of all rows' keys, the first table's first.
pub fn send_keys(link: &dyn Link, holder: Holder, rows: &[RowKeys]) -> Result<()> {
    for (table, half) in halves(holder) {
        for keys in rows.chunks(512) {
            let bytes: Vec<u8> = keys.iter().flat_map(|k| k.keys[table][half].to_bytes()).collect();
            link.send(bytes)?;
        }
    }
    Ok(())
}

/// One table's keys as bits: for each row, which rows of the table are selected.
pub type Selections = Vec<Vec<u64>>;

/// Receives what [`send_keys`] sent.
pub fn receive_keys(link: &dyn Link, holder: Holder, rows: usize, domain: usize) -> Result<[Selections; 2]> {
    let failed = |e: veiltune_fss::Error| Error::Refused(format!("a key of the word lookup: {e}"));
    let size = point::key_bytes(domain).map_err(failed)?;
    let mut tables = [Vec::new(), Vec::new()];
    for ((_, half), selections) in halves(holder).into_iter().zip(&mut tables) {
        for start in (0..rows).step_by(512) {
            let mut bytes = vec![0; size * 512.min(rows - start)];
            link.recv(&mut bytes)?;
            for key in bytes.chunks_exact(size) {
                selections.push(Key::from_bytes(half, domain, key).map_err(failed)?.bits());
            }
        }
    }
    Ok(tables)
}

/// Sums of the masked table's selected rows, `[rows, width]`.
pub fn table_sums(table: &[u64], width: usize, selections: &Selections) -> Result<Vec<u64>> {
    let rows = table.len() / width.max(1);
    let fill = |range: std::ops::Range<usize>, out: &mut [u64]| {
        out.copy_from_slice(&table[range.start * width..range.end * width]);
    };
    sums(rows, width, fill, selections)
}

fn sums(
    rows: usize,
    width: usize,
    fill: impl Fn(std::ops::Range<usize>, &mut [u64]) + Sync,
    selections: &Selections,
) -> Result<Vec<u64>> {
    Ok(subset_sums(rows, width, fill, selections).map_err(veiltune_engine::Error::from)?)
}

/// Sums of the selected rows of a mask that is expanded from its seed.
pub fn mask_sums(seed: &Seed, rows: usize, width: usize, selections: &Selections) -> Result<Vec<u64>> {
    let fill = |range: std::ops::Range<usize>, out: &mut [u64]| mask_rows(seed, range, width, out);
    sums(rows, width, fill, selections)
}

/// Some rows of a mask of the word table.
pub fn mask_rows(seed: &Seed, rows: std::ops::Range<usize>, width: usize, out: &mut [u64]) {
    for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&Prg::new(seed, row as u64, 0).vec(width));
    }
}

/// Bytes of a holder's [`Selections`] for both of its tables.
pub fn selected_bytes(rows: usize, domain: usize) -> u64 {
    2 * rows as u64 * 8 * domain.div_ceil(64) as u64
}

/// What hides the assistant's sums from the server that they go to; server `i` expands the same. `fresh` is the assistant's, and never
/// the same twice.
pub fn blind(seed: &Seed, fresh: &[u8; 16], sums: &mut [u64]) {
    let mask = Prg::new(&seed.derive(fresh), 0, 0).vec(sums.len());
    sums.iter_mut()
        .zip(mask)
        .for_each(|(s, m)| *s = s.wrapping_add(m));
}

/// The same words with the other sign.
pub fn negated(mut words: Vec<u64>) -> Vec<u64> {
    words.iter_mut().for_each(|w| *w = w.wrapping_neg());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the servers end up with is the wanted rows, and no table is needed by who must not have it.
    #[test]
    fn shares_of_the_wanted_rows() {
        let (rows, width) = (300, 5);
        let table: Vec<u64> = (0..(rows * width) as u64)
            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        let seeds = [1, 2].map(|i| Seed::from_bytes([i; 16]));
        let mut masked = table.clone();
        for seed in &seeds {
            let mut mask = vec![0; rows * width];
            mask_rows(seed, 0..rows, width, &mut mask);
            masked
                .iter_mut()
                .zip(mask)
                .for_each(|(t, m)| *t = t.wrapping_add(m));
        }
        let wanted = [7, 0, 299, 7, 128];
        let keys: Vec<RowKeys> = wanted.iter().map(|&i| deal(i, rows).unwrap()).collect();
        let received = |holder| {
            let (a, b) = veiltune_wire::memory::pair();
            send_keys(&a, holder, &keys).unwrap();
            receive_keys(&b, holder, wanted.len(), rows).unwrap()
        };
        let run = [9; 16];
        let [first, second, assistant] = [Holder::First, Holder::Second, Holder::Assistant].map(received);
        let mut r0 = [&first[1], &assistant[0]].map(|s| mask_sums(&seeds[0], rows, width, s).unwrap());
        let mut r1 = [&second[1], &assistant[1]].map(|s| mask_sums(&seeds[1], rows, width, s).unwrap());
        r0.iter_mut().for_each(|s| blind(&seeds[0], &run, s));
        r1.iter_mut().for_each(|s| blind(&seeds[1], &run, s));
        let e = [&first[0], &second[0]].map(|s| table_sums(&masked, width, s).unwrap());
        // Terms: E' as the difference of both servers' sums, the masks with the other sign.
        for (r, &index) in wanted.iter().enumerate() {
            for c in 0..width {
                let i = r * width + c;
                let terms = [
                    e[0][i].wrapping_sub(e[1][i]),
                    r0[1][i].wrapping_sub(r0[0][i]),
                    r1[1][i].wrapping_sub(r1[0][i]),
                ];
                let sum = terms.iter().zip(keys[r].signs).fold(0u64, |sum, (t, s)| {
                    sum.wrapping_add(t.wrapping_mul(s as i64 as u64))
                });
                assert_eq!(sum, table[index * width + c], "row {r} column {c}");
            }
        }
    }
}
