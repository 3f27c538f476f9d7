//! The kernels, generic over the instruction set. `table.rs` makes machine code of them.

pub(crate) mod attention;
pub(crate) mod elementwise;
pub(crate) mod linear;
pub(crate) mod quantize;
pub(crate) mod tile;
