//! Arithmetic of veiltune, without any I/O: everything the protocols compute, they compute in Z_{2^64}.
//!
//! - [`Ring`]: contiguous tensors of wrapping 64-bit integers, with broadcasting and views;
//! - [`Ring::matmul`], [`Ring::matmul_nt`], [`Packed`]: matrix products by the fastest kernel that the processor
//!   runs (AVX-512, AVX2, NEON or portable, equal bit for bit);
//! - [`codec`]: real numbers to fixed point and back;
//! - [`prg`]: seeds, and the AES-128-CTR streams that masks are drawn from;
//! - [`pack`](mod@pack): values of a few bits each as bytes;
//! - [`select`]: sums of selected rows of a table, for private lookups.
//!
//! Work is spread over the *current* rayon pool, and stays on the calling thread where that pool has one thread or
//! the tensor is small. No result depends on the number of threads or on the kernel.

pub mod codec;
mod error;
mod gemm;
pub mod harmonics;
pub mod pack;
pub mod prg;
pub mod select;
mod shape;
mod simd;
mod tensor;
#[cfg(target_arch = "x86_64")]
pub mod vaes;

pub use error::Error;
pub use gemm::Packed;
pub use shape::{broadcast_shape, matmul_nt_shape, matmul_shape};
pub use tensor::Ring;
