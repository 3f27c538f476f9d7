//! The kernels, generic over the instruction set. `table.rs` makes machine code of them.

// Loops over constant bounds are what the compiler unrolls to keep arrays of vectors in registers.
#![allow(clippy::needless_range_loop)]

pub(crate) mod attention;
pub(crate) mod elementwise;
pub(crate) mod layouts;
pub(crate) mod linear;
pub(crate) mod matrix;
pub(crate) mod packed;
pub(crate) mod quantize;
pub(crate) mod quantized;
pub(crate) mod store;
pub(crate) mod tile;
