//! Function secret sharing with a trusted dealer and two semi-honest evaluators.
//!
//! A dealer who knows a secret `alpha` hands out *keys*; the two parties evaluate them on public points and obtain
//! shares of a function of the point and `alpha`, without talking to each other:
//!
//! | module    | the parties' shares add up to                                        | key bytes (`bits` large)   |
//! |-----------|----------------------------------------------------------------------|----------------------------|
//! | [`cmp`]   | the bit `1{x < alpha}` (XOR)                                         | `16 * (bits - 6)`          |
//! | [`dpf`]   | `1{x == alpha}` in Z_{2^64}                                          | `16 * bits`                |
//! | [`table`] | `sum_j 1{j == alpha} * T[j + offset]` in Z_{2^64}, for public tables | `16 * bits`                |
//! | [`point`] | the one-hot vector of `alpha` (XOR), all of it                        | `16 * (bits - 5)`, root included |
//! | [`dcf`]   | `beta * 1{x < alpha}` in Z_{2^64}, at many points a key              | `24 * (bits - 2) + 32`, of a pair of `beta` `32 * (bits - 2) + 64` |
//!
//! # Keys
//! Keys come in batches. A batch is one flat byte string of correction words, key after key, **identical for both
//! parties**; that is all the dealer sends. The root seeds are given by the caller: each party expands its own from a
//! PRG it shares with the dealer, so that they cost no traffic. Roots must be uniform, secret from the other party, and
//! never used for a second key. The lowest bit of a root is overwritten by the party's number.
//!
//! # Construction
//! The tree is that of a distributed point function with early termination (Boyle, Gilboa, Ishai, CCS 2016), expanded
//! as the correlated tree of Guo et al., *Half-Tree* (Eurocrypt 2023): a node's children are `H(s)` and `H(s) ^ s`, so
//! that on the path to `alpha` the parties' seeds differ by the same `delta = root_0 ^ root_1` at every depth and are
//! equal off it. The control bit is the lowest bit of the seed, and a correction word is exactly one block. Evaluating
//! a point costs one AES call a level, dealing two, and expanding the whole domain half a call a node. Leaves are
//! hashed under tweaks that the inner nodes do not use; two blocks of leaf hang below each node of the last level.
//!
//! # Assumption
//! `H(x) = AES_k(sigma(x)) ^ sigma(x)` with `sigma(l || r) = (l ^ r) || l` and a fixed, public `k` is circular
//! correlation robust when `AES_k` is modelled as a random permutation (Guo, Katz, Wang, Yu, S&P 2020). An attacker who
//! spends `T` AES calls on `N` blocks of correction words has an advantage of about `N * T / 2^127`: some 2^122 calls
//! against one key, and 2^92 to break any one of a session's keys if they have 2^35 blocks in all.
//!
//! All functions check the length of every buffer. They run on the current rayon pool, and inline where it has one
//! thread. An evaluator's time and memory accesses depend on the batch's shape, the points and the offsets, which are
//! public, and not on seeds or keys.
//!
//! # Example
//! ```
//! use veiltune_fss::cmp;
//! # fn main() -> veiltune_fss::Result<()> {
//! // In truth, uniform blocks from the PRG that each party shares with the dealer.
//! let roots = [[0x5eed_0001, 0x5eed_0002], [0x5eed_0003, 0x5eed_0004]];
//! let keys = cmp::generate(24, &[1000, 1000], [&roots[0], &roots[1]])?;
//! let shares = [cmp::evaluate(0, 24, &roots[0], &keys, &[999, 1000])?, cmp::evaluate(1, 24, &roots[1], &keys, &[999, 1000])?];
//! assert_eq!(shares[0][0] ^ shares[1][0], 0b01); // 999 < 1000, but not 1000 < 1000
//! # Ok(())
//! # }
//! ```

#[cfg(test)]
mod tests;

pub mod cmp;
pub mod dcf;
pub mod dpf;
mod hash;
pub mod point;
pub mod table;
mod tree;

/// A seed or a correction word: 128 bits, little-endian where it becomes bytes.
pub type Block = u128;

/// The length of a seed in bits.
pub const LAMBDA: usize = 128;

/// What was wrong with a call. No variant carries a secret.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A domain of this many bits is not supported.
    #[error("a domain of {bits} bits is outside 1..={max}")]
    Bits {
        /// The bits asked for.
        bits: u32,
        /// The most this gate supports.
        max: u32,
    },
    /// A party is number 0 or 1.
    #[error("party {0} is neither 0 nor 1")]
    Party(usize),
    /// A buffer does not have the length that the others imply.
    #[error("{what}: {actual} elements where {expected} belong")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// The length it should have.
        expected: usize,
        /// The length it has.
        actual: usize,
    },
    /// An entry of `what` is not below `2^bits`.
    #[error("{what}[{index}] is not below 2^{bits}")]
    Range {
        /// Which buffer.
        what: &'static str,
        /// Which entry.
        index: usize,
        /// The bits of the domain.
        bits: u32,
    },
    /// An index lies outside its domain.
    #[error("the index is not below the domain of {domain} points")]
    Index {
        /// Points of the domain.
        domain: usize,
    },
    /// A key belongs to the other party.
    #[error("the key was dealt to the other party")]
    OtherParty,
}

/// The result of a call to this crate.
pub type Result<T> = std::result::Result<T, Error>;
