/// What can go wrong in ring arithmetic. No variant carries a tensor's values: they may be secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The operands' shapes, or a shape and the number of elements, do not fit together.
    #[error("{op}: shapes {left:?} and {right:?} do not fit")]
    Shape {
        /// The operation that was asked for.
        op: &'static str,
        /// Shape of the left operand.
        left: Vec<usize>,
        /// Shape of the right operand, the shape asked for, or the number of elements.
        right: Vec<usize>,
    },
    /// A dimension or an index lies outside the tensor.
    #[error("{op}: {index} is out of range for shape {dims:?}")]
    Range {
        /// The operation that was asked for.
        op: &'static str,
        /// The offending dimension, index, or end of a range.
        index: usize,
        /// The tensor's shape.
        dims: Vec<usize>,
    },
    /// A value that fixed point cannot hold: NaN, infinite, or of magnitude 2^(63 - scale) or more.
    #[error("entry {index} is not finite or too large for {scale} fraction bits")]
    Encode {
        /// Position of the value in the input.
        index: usize,
        /// Fraction bits asked for.
        scale: u32,
    },
    /// More fraction bits than a 64-bit integer has room for.
    #[error("{0} fraction bits do not fit a signed 64-bit integer (at most {max})", max = crate::codec::MAX_SCALE)]
    Scale(u32),
    /// The operating system gave no randomness.
    #[error("the operating system gave no randomness")]
    Random,
}
