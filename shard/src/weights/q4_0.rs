//! Q4_0: groups of 32, weight = `d * (quant - 8)`.

use phalanx_cluster::checkpoint::TensorType;

use super::{
    Decoder,
    block::{BlockFormat, Widened, decoder, half},
};

pub(super) const DECODER: Decoder = decoder::<Q4_0, 18>();

struct Q4_0;

impl BlockFormat<18> for Q4_0 {
    const DTYPE: TensorType = TensorType::Q4_0;
    const GROUP: usize = 32;
    const MINS: bool = true;
    type Quant = u8;

    /// `d`, then 16 bytes whose low halves are the first 16 quants.
    fn widen(block: &[u8; 18], out: &mut Widened<u8>) {
        out.scales[0] = half(block, 0);
        // Exact: a half's 11 bits times 8. So is the sum with `d * quant`.
        out.mins[0] = -8.0 * out.scales[0];
        for (i, byte) in block[2..].iter().enumerate() {
            out.quants[i] = byte & 15;
            out.quants[i + 16] = byte >> 4;
        }
    }
}
