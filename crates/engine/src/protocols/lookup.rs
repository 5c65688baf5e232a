//! Table lookup: T\[x\] for an integer x in 0..2^b and public tables T.
//!
//! Open c = x + t mod 2^b; a distributed point function at -t gives shares of a one-hot vector which, rotated by c,
//! selects T\[x\]. (Boyle, Gilboa, Ishai 2016; Wagh 2022 for tables.) One round, b bits an element each way;
//! dealer: a table key of b bits an element to both. Exact. Any number of tables shares one key. 2^b multiply-adds an
//! element and table.

use std::sync::Arc;

use veiltune_fss::table;
use veiltune_ring::Ring;

use super::product::take;
use crate::fixed::{Fixed, FixedTensor};
use crate::gates::{Gates, Meta};
use crate::offline::{OffTensor, Offline, low_bits};
use crate::online::{Online, Share};
use crate::{Error, Owner, Result};

/// Widest index.
const MAX_BITS: u32 = 16;

fn check(x: &Meta, bits: u32, tables: &[Arc<Vec<u64>>]) -> Result<()> {
    if x.scale != 0 {
        return Err(Error::program(
            "lookup",
            format!("the index has {} fractional bits; it must be an integer", x.scale),
        ));
    }
    if !(1..=MAX_BITS).contains(&bits) || tables.iter().any(|t| t.len() != 1 << bits) {
        return Err(Error::program(
            "lookup",
            format!("tables of 2^{bits} entries; 1 to {MAX_BITS} bits are possible"),
        ));
    }
    Ok(())
}

fn output(x: &Meta, scale: u32) -> Meta {
    Meta {
        dims: x.dims.clone(),
        scale,
        owner: Owner::Shared,
        zeros: 0,
    }
}

pub(crate) fn offline(
    o: &Offline,
    x: &OffTensor,
    bits: u32,
    tables: &[Arc<Vec<u64>>],
    scale: u32,
) -> Result<Vec<OffTensor>> {
    check(o.meta(x), bits, tables)?;
    let n = o.meta(x).len();
    let mut detail = vec![bits as u8];
    tables
        .iter()
        .flat_map(|t| t.iter())
        .for_each(|v| detail.extend(v.to_le_bytes()));
    let gate = o.gate("lookup", &detail);
    o.exchanged("lookup", [veiltune_ring::pack::packed_len(n, bits) as u64; 2]);
    let t = o.small_mask(gate, 0, n, bits).unwrap_or_default();
    o.keys(
        "lookup",
        (gate, 1),
        n,
        table::key_bytes(bits),
        |range, roots, keys| {
            let alphas: Vec<u64> = t[range]
                .iter()
                .map(|t| t.wrapping_neg() & low_bits(bits))
                .collect();
            Ok(table::generate_into(bits, &alphas, roots, keys)?)
        },
    )?;
    o.end_gate()?;
    Ok(tables
        .iter()
        .map(|_| o.tensor(output(o.meta(x), scale)))
        .collect())
}

pub(crate) fn online(
    p: &Online,
    x: &Share,
    bits: u32,
    tables: &[Arc<Vec<u64>>],
    scale: u32,
) -> Result<Vec<Share>> {
    check(p.meta(x), bits, tables)?;
    let meta = output(p.meta(x), scale);
    let (gate, mut material) = p.gate()?;
    let mut mine = p.small_mask(gate, 0, meta.len(), bits);
    if let Some(share) = p.share(x) {
        mine.iter_mut()
            .zip(share.as_slice())
            .for_each(|(m, x)| *m = m.wrapping_add(*x) & low_bits(bits));
    }
    let c = p.open_words(mine, bits)?;
    let (roots, keys) = take(&mut material.keys)?;
    let tables: Vec<&[u64]> = tables.iter().map(|t| t.as_slice()).collect();
    let outs = table::lookup(p.party().index(), bits, &roots, &keys, &c, &tables)?;
    outs.into_iter()
        .map(|o| Ok(p.tensor(meta.clone(), Some(Ring::new(meta.dims.clone(), o)?))))
        .collect()
}

pub(crate) fn fixed(
    f: &Fixed,
    x: &FixedTensor,
    bits: u32,
    tables: &[Arc<Vec<u64>>],
    scale: u32,
) -> Result<Vec<FixedTensor>> {
    check(f.meta(x), bits, tables)?;
    if f.ring(x).as_slice().iter().any(|x| *x > low_bits(bits)) {
        return Err(Error::Range {
            op: "lookup",
            detail: format!("an index is outside 0..2^{bits}"),
        });
    }
    f.gate();
    let meta = output(f.meta(x), scale);
    Ok(tables
        .iter()
        .map(|t| f.tensor(meta.clone(), f.ring(x).map(|x| t[x as usize])))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use veiltune_ring::prg::{Prg, Seed};

    use super::*;
    use crate::gates::Local;
    use crate::material::{ParameterStore, Queue, Sink, Source};
    use crate::protocols::compare::Comparison;
    use crate::{Party, Revealed};

    const BITS: u32 = 6;
    const N: usize = 100;

    /// Material in memory.
    #[derive(Clone, Default)]
    struct Pipe(Arc<Mutex<VecDeque<u8>>>);

    impl Sink for Pipe {
        fn put(&mut self, bytes: &[u8]) -> Result<()> {
            self.0.lock().expect("no panic").extend(bytes);
            Ok(())
        }
        fn finish(&mut self) -> Result<()> {
            Ok(())
        }
    }

    impl Source for Pipe {
        fn take(&mut self, buf: &mut [u8]) -> Result<()> {
            let mut bytes = self.0.lock().expect("no panic");
            buf.iter_mut()
                .for_each(|b| *b = bytes.pop_front().expect("enough was dealt"));
            Ok(())
        }
    }

    /// Two tables at once, of indices that the second party knows.
    fn walk<G: Gates>(g: &G, indices: Option<&[f32]>) -> Result<Vec<Option<Revealed>>> {
        let tables =
            [0, 1].map(|slot| Arc::new(Prg::new(&Seed::from_bytes([8; 16]), 0, slot).bits(1 << BITS, 40)));
        // Read as integers.
        let scaled: Option<Vec<f32>> = indices.map(|v| v.iter().map(|v| v / 65536.0).collect());
        let x = g.enter(Owner::Party(Party::P1), &[N], scaled.as_deref())?;
        let x = g.local(&x, &Local::Relabel(0))?;
        g.lookup(&x, BITS, &tables, 4)?
            .iter()
            .map(|y| g.reveal_to(y, Party::P0))
            .collect()
    }

    #[test]
    fn parties_find_what_is_in_the_tables() {
        let indices: Vec<f32> = (0..N).map(|i| (i * 37 % (1 << BITS)) as f32).collect();
        let seeds = [1, 2].map(|b| Seed::from_bytes([b; 16]));
        let expected = walk(&Fixed::with_seeds(seeds.clone()), Some(&indices)).expect("in the clear");

        let pipes = [Pipe::default(), Pipe::default()];
        let sinks = pipes.clone().map(|p| Box::new(p) as Box<dyn Sink>);
        walk(&Offline::dealer(Comparison::Fss, seeds.clone(), sinks), None).expect("dealt");
        let dealt = pipes.each_ref().map(|p| p.0.lock().expect("no panic").len());
        assert_eq!(dealt, [N * 16 * BITS as usize; 2]);

        let (a, b) = veiltune_wire::memory::pair();
        let links: [Arc<dyn veiltune_wire::Link>; 2] = [Arc::new(a), Arc::new(b)];
        let party = |i: usize| {
            let (party, seed, link, pipe) = (
                [Party::P0, Party::P1][i],
                seeds[i].clone(),
                links[i].clone(),
                pipes[i].clone(),
            );
            let known = (i == 1).then_some(&indices[..]);
            move || -> Result<Vec<Option<Revealed>>> {
                let parameters = Arc::new(ParameterStore::default());
                let (queue, material) = Queue::new(None);
                walk(
                    &Offline::party(
                        Comparison::Fss,
                        party,
                        seed.clone(),
                        Box::new(pipe),
                        queue,
                        parameters.clone(),
                    ),
                    None,
                )?;
                walk(
                    &Online::new(
                        Comparison::Fss,
                        party,
                        seed,
                        link,
                        material,
                        parameters,
                        Box::new(VecDeque::new()),
                    ),
                    known,
                )
            }
        };
        let found = std::thread::scope(|scope| {
            let runs = [0, 1].map(|i| scope.spawn(party(i)));
            runs.map(|run| run.join().expect("no panic").expect("a good run"))
        });
        assert_eq!(found[0], expected);
        assert_eq!(found[1], [None, None]);
        // One round for both tables, and two reveals.
        let opening = (N * BITS as usize / 8) as u64;
        assert_eq!(
            links.each_ref().map(|l| (l.meter().sent, l.meter().rounds)),
            [(opening, 3), (opening + 16 * N as u64, 3)]
        );
    }

    #[test]
    fn an_index_beyond_the_table_is_refused() {
        let fixed = Fixed::with_seeds([1, 2].map(|b| Seed::from_bytes([b; 16])));
        let indices = vec![(1 << BITS) as f32; N];
        assert!(matches!(
            walk(&fixed, Some(&indices)),
            Err(Error::Range { op: "lookup", .. })
        ));
    }
}
