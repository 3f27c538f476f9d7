//! Q4_1: groups of 32, weight = `d * quant + m`.

use phalanx_cluster::checkpoint::TensorType;

use super::{
    Decoder,
    block::{BlockFormat, Widened, decoder, half},
};

pub(super) const DECODER: Decoder = decoder::<Q4_1, 20>();

struct Q4_1;

impl BlockFormat<20> for Q4_1 {
    const DTYPE: TensorType = TensorType::Q4_1;
    const GROUP: usize = 32;
    const MINS: bool = true;
    type Quant = u8;

    /// `d`, `m`, then 16 bytes whose low halves are the first 16 quants.
    fn widen(block: &[u8; 20], out: &mut Widened<u8>) {
        out.scales[0] = half(block, 0);
        out.mins[0] = half(block, 2);
        for (i, byte) in block[4..].iter().enumerate() {
            out.quants[i] = byte & 15;
            out.quants[i + 16] = byte >> 4;
        }
    }
}
