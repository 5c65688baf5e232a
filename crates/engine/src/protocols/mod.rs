//! The protocols, one a file: what it computes, its source, rounds, bytes, error bound; then the offline walk
//! (dealer, preparing party and cost at once), the party's online side, and the fixed-point twin.
//!
//! Protocols composed of others (activations, softmax, normalisation, argmax, inverses) are written once over
//! [`Gates`](crate::gates::Gates).

pub mod activation;
pub mod argmax;
pub mod carried;
pub mod coarse_max;
pub mod compare;
pub mod compare_bits;
pub mod deliver;
pub mod inverse;
pub mod lines;
pub mod lookup;
pub mod normalize;
pub mod product;
pub mod reveal;
pub mod softmax;
pub mod trigonometric;
pub mod truncate;
