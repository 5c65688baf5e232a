//! Comparison by masked bits: `[c < r]` of a public c and the dealer's mask r, by a tree of ANDs on shared bits. The
//! other way to the one bit that [comparison](super::compare) needs; everything around it is the same.
//!
//! For values of k bits, in ceil(k/4) groups of four:
//!
//! 1. The dealer deals, group by group, the one-hot vector of r's four bits, shared by xor. The public bits of c select
//!    from it and from its suffix sums: both parties hold shares of e = \[c_g = r_g\] and l = \[c_g < r_g\] without a
//!    message.
//! 2. Neighbouring groups merge in a binary tree: l = l_high xor e_high l_low, e = e_high e_low. The factors are opened
//!    under random masks of which the dealer deals the products (Beaver triples over bits; the mask of e_high serves both
//!    products). The lowest group needs no e.
//!
//! All bits are sliced: one word holds the same bit of 64 elements.
//!
//! With k = scale + VALUE_BITS, the whole comparison takes ceil(log2 ceil(k/4)) + 2 rounds (one less if x is open
//! already): 5 for 16 fractional bits, 6 for 32. Beyond the 8 bytes an element of opening x, each way 17 bits an element
//! for 16 fractional bits and 29 for 32, the last bit of [compare](super::compare) included. Dealer, to the second party
//! alone: 115 and 183 bits an element, where a comparison key is 352 and 608 bytes to both; and compare's 16 or 8 bytes.
//! Bits travel in whole words of 64 elements. Exact. (Damgard et al. 2006 for the tree; Boolean masked-value gates as in
//! ABY2.0; one-hot vectors as in Ishai et al. 2013.)

use super::product::take;
use crate::Result;
use crate::material::Material;
use crate::offline::Offline;
use crate::online::Online;
use crate::opening::GateId;

/// Bits of a group.
const GROUP: usize = 4;
/// Slot of the one-hot vectors.
const ONE_HOT: u16 = 0;
/// Slots 1 to 3 belong to [compare](super::compare); the masks of each level and their products follow.
const FIRST_LEVEL: u16 = 4;

/// The offline part: deals for `n` masks `r` (given at the dealer), of which the low `bits` bits are compared.
pub(crate) fn offline(o: &Offline, gate: GateId, n: usize, bits: u32, r: &[u64]) -> Result<()> {
    let words = n.div_ceil(64);
    if n == 0 {
        return Ok(());
    }
    let (bits, mut slot) = (bits as usize, FIRST_LEVEL);
    let entries = bits / GROUP * ((1 << GROUP) - 1) + (1 << (bits % GROUP)) - 1;
    o.deal_bits("compare", (gate, ONE_HOT), entries * words, || {
        Ok(one_hot(&planes(r, bits), words))
    })?;
    let mut nodes = bits.div_ceil(GROUP);
    while nodes > 1 {
        let (pairs, even) = (nodes / 2, usize::from(nodes % 2 == 0));
        let opened = (3 * pairs - even) * words;
        o.exchanged("compare", [8 * opened as u64; 2]);
        let masks = o.bit_mask(gate, slot, opened);
        o.deal_bits("compare", (gate, slot + 1), (2 * pairs - even) * words, || {
            Ok(factors(&masks.unwrap_or_default(), words)
                .flat_map(|(x, y)| and(x, y))
                .collect())
        })?;
        nodes -= pairs;
        slot += 2;
    }
    Ok(())
}

/// This party's share of the bits `[c < r]`, 64 a word; `c` below 2^`bits`.
pub(crate) fn online(
    p: &Online,
    gate: GateId,
    material: &mut Material,
    bits: u32,
    c: &[u64],
) -> Result<Vec<u64>> {
    let words = c.len().div_ceil(64);
    if words == 0 {
        return Ok(Vec::new());
    }
    let one_hot = take(&mut material.words)?;
    let c = planes(c, bits as usize);
    let mut rest = &one_hot[..];
    // From the lowest group to the highest, then the other way round.
    let mut nodes = Vec::new();
    for group in c.chunks(GROUP * words) {
        let (dealt, next) = rest.split_at((1 << (group.len() / words)) * words - words);
        nodes.push(Node::leaf(group, dealt, words, p.is_first()));
        rest = next;
    }
    nodes[0].equal.clear();
    nodes.reverse();

    let mut slot = FIRST_LEVEL;
    while nodes.len() > 1 {
        // A pair's factors: e_high, l_low and, but for the lowest, e_low.
        let mut mine = Vec::new();
        for pair in nodes.chunks_exact(2) {
            [&pair[0].equal, &pair[1].less, &pair[1].equal]
                .into_iter()
                .for_each(|plane| mine.extend(plane));
        }
        let masks = p.bit_mask(gate, slot, mine.len());
        mine.iter_mut().zip(&masks).for_each(|(m, mask)| *m ^= mask);
        let opened = p.open_bits(&mine)?;
        let dealt = take(&mut material.words)?;
        let first = if p.is_first() { !0 } else { 0 };
        let mut products = factors(&opened, words)
            .zip(factors(&masks, words))
            .zip(dealt.chunks_exact(words))
            .map(|(((x, y), (mask_x, mask_y)), cross)| -> Vec<u64> {
                let public = (0..words).map(|i| x[i] & (y[i] & first ^ mask_y[i]) ^ y[i] & mask_x[i]);
                public.zip(cross).map(|(v, c)| v ^ c).collect()
            });
        let mut merged = Vec::new();
        let mut old = nodes.into_iter();
        while let Some(high) = old.next() {
            merged.push(match old.next() {
                None => high,
                Some(low) => {
                    let (mut less, product) = (high.less, products.next().unwrap_or_default());
                    less.iter_mut().zip(product).for_each(|(l, x)| *l ^= x);
                    let equal = if low.equal.is_empty() {
                        Vec::new()
                    } else {
                        products.next().unwrap_or_default()
                    };
                    Node { less, equal }
                }
            });
        }
        nodes = merged;
        slot += 2;
    }
    Ok(nodes.swap_remove(0).less)
}

/// Shares of how a run of bits of c compares with those of r.
struct Node {
    less: Vec<u64>,
    equal: Vec<u64>,
}

impl Node {
    /// Selects from the one-hot vector (without its entry 0, which is what the others leave of 1).
    fn leaf(c: &[u64], one_hot: &[u64], words: usize, first: bool) -> Node {
        let (mut less, mut equal) = (Vec::with_capacity(words), Vec::with_capacity(words));
        for word in 0..words {
            // above[j] = [r > j], is[j] = [r = j]
            let (mut above, mut is) = ([0; 1 << GROUP], [0; 1 << GROUP]);
            let entries = one_hot.len() / words;
            for j in (0..entries).rev() {
                is[j + 1] = one_hot[j * words + word];
                above[j] = above[j + 1] ^ is[j + 1];
            }
            is[0] = above[0] ^ if first { !0 } else { 0 };
            for (bit, plane) in c.chunks_exact(words).enumerate() {
                for table in [&mut above, &mut is] {
                    for j in 0..(entries + 1) >> (bit + 1) {
                        table[j] = table[2 * j] ^ plane[word] & (table[2 * j] ^ table[2 * j + 1]);
                    }
                }
            }
            less.push(above[0]);
            equal.push(is[0]);
        }
        Node { less, equal }
    }
}

/// The factors (x, y) of each product of a level: of three planes of a pair, the first with the second and the third.
fn factors(planes: &[u64], words: usize) -> impl Iterator<Item = (&[u64], &[u64])> {
    planes.chunks(3 * words).flat_map(move |pair| {
        let (x, ys) = pair.split_at(words);
        ys.chunks_exact(words).map(move |y| (x, y))
    })
}

fn and<'a>(x: &'a [u64], y: &'a [u64]) -> impl Iterator<Item = u64> + 'a {
    x.iter().zip(y).map(|(x, y)| x & y)
}

/// The entries from 1 up of the one-hot vector of each group of bits, planes in, planes out.
fn one_hot(bits: &[u64], words: usize) -> Vec<u64> {
    let mut out = Vec::new();
    for group in bits.chunks(GROUP * words) {
        for value in 1..1 << (group.len() / words) {
            out.extend((0..words).map(|word| {
                let planes = group.chunks_exact(words).enumerate();
                planes.fold(!0, |all, (bit, plane)| {
                    all & if value >> bit & 1 == 1 {
                        plane[word]
                    } else {
                        !plane[word]
                    }
                })
            }));
        }
    }
    out
}

/// The low `bits` bits of each value, sliced: plane after plane, 64 elements a word.
fn planes(values: &[u64], bits: usize) -> Vec<u64> {
    let words = values.len().div_ceil(64);
    let mut out = vec![0; bits * words];
    for (word, values) in values.chunks(64).enumerate() {
        let mut square = [0; 64];
        square[..values.len()].copy_from_slice(values);
        transpose(&mut square);
        for (bit, plane) in square[..bits].iter().enumerate() {
            out[bit * words + word] = *plane;
        }
    }
    out
}

/// Bit i of word j becomes bit j of word i: ever smaller off-diagonal squares change places.
fn transpose(square: &mut [u64; 64]) {
    let (mut width, mut mask) = (32, u64::from(u32::MAX));
    while width > 0 {
        for i in (0..64).filter(|i| i & width == 0) {
            let swap = (square[i] >> width ^ square[i + width]) & mask;
            square[i] ^= swap << width;
            square[i + width] ^= swap;
        }
        width /= 2;
        mask ^= mask << width;
    }
}

#[cfg(test)]
mod tests {
    use veiltune_ring::prg::{Prg, Seed};

    use super::*;

    #[test]
    fn transposing_moves_each_bit() {
        let mut square = [0; 64];
        Prg::new(&Seed::from_bytes([3; 16]), 0, 0).fill_u64(&mut square);
        let before = square;
        transpose(&mut square);
        for (i, row) in square.iter().enumerate() {
            for (j, column) in before.iter().enumerate() {
                assert_eq!(row >> j & 1, column >> i & 1);
            }
        }
    }

    #[test]
    fn a_leaf_compares_a_group() {
        for width in 1..=GROUP {
            for r in 0..1u64 << width {
                let dealt = one_hot(&planes(&vec![r; 1 << width], width), 1);
                let zeros = vec![0; dealt.len()];
                let c = planes(&(0..1 << width).collect::<Vec<u64>>(), width);
                let shares = [Node::leaf(&c, &dealt, 1, true), Node::leaf(&c, &zeros, 1, false)];
                for c in 0..1u64 << width {
                    assert_eq!((shares[0].less[0] ^ shares[1].less[0]) >> c & 1, u64::from(c < r));
                    assert_eq!(
                        (shares[0].equal[0] ^ shares[1].equal[0]) >> c & 1,
                        u64::from(c == r)
                    );
                }
            }
        }
    }
}
