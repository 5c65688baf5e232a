//! Run-time choice of vector instructions, and of how many threads a loop is worth.

use rayon::prelude::*;

/// Words that one task should at least handle: 128 KiB, far above the cost of handing it to another thread.
const GRAIN: usize = 1 << 14;

/// Defines a function whose body is compiled several times over, for the widest vectors that the processor may have,
/// and chosen from at run time: loops are vectorised accordingly (64-bit multiplication above all, which is one
/// instruction from AVX-512DQ on and a dozen before it). Type parameters stand in brackets.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$($type:ident: $bound:path),*])? ($($arg:ident: $ty:ty),* $(,)?)
    $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$($type: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($type: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx512bw,avx2")]
                fn avx512 $(<$($type: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }

                #[target_feature(enable = "avx2")]
                fn avx2 $(<$($type: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }

                if $crate::simd::has_avx512() {
                    // SAFETY: the features that it is compiled for were just detected.
                    return unsafe { avx512($($arg),*) };
                }
                if $crate::simd::has_avx2() {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorised;

#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx2")
}

#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
}

/// Whether `words` of work are worth spreading over the current pool.
pub(crate) fn parallel(words: usize) -> bool {
    words >= 2 * GRAIN && rayon::current_num_threads() > 1
}

/// Hands out `out` in pieces of whole rows of `row` words, as `(first row, piece)`; in parallel where that pays.
pub(crate) fn fill_rows<T: Send>(out: &mut [T], row: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if out.is_empty() {
        return;
    }
    if !parallel(out.len()) {
        return f(0, out);
    }
    let rows = GRAIN.div_ceil(row);
    let pieces = out.par_chunks_mut(rows * row).enumerate();
    pieces.for_each(|(i, piece)| f(i * rows, piece));
}

/// Hints that the cache line at `at`, which may be any address, is needed soon.
#[inline(always)]
pub(crate) fn prefetch(at: *const u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the processor ignores the hint where there is nothing to fetch; SSE is part of the architecture.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
