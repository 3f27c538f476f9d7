//! The scalar truth of every operation: plain loops over row-major matrices, with the order of every sum spelt out.
//!
//! Slow, and meant to be read. Every kernel of every device is compared with these bit for bit (but for which NaN a NaN
//! is).

mod attention;
mod elementwise;
mod linear;

pub use attention::{Sequence, attention};
pub use elementwise::{add_fixed, argmax, exp, odds, rms_norm, rope, silu_mul};
pub use linear::{embed, linear, linear_exact, quantize, to_fixed};

/// Adds 16 numbers as a tree: number i and i + 8, then i + 4, i + 2, i + 1.
fn fold(mut lanes: [f32; 16]) -> f32 {
    for n in [8, 4, 2, 1] {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}
