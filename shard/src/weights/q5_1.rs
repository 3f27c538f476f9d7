//! Q5_1: groups of 32, weight = `d * quant + m`.

use phalanx_cluster::checkpoint::TensorType;

use super::{
    Decoder,
    block::{BlockFormat, Widened, decoder, half},
};

pub(super) const DECODER: Decoder = decoder::<Q5_1, 24>();

struct Q5_1;

impl BlockFormat<24> for Q5_1 {
    const DTYPE: TensorType = TensorType::Q5_1;
    const GROUP: usize = 32;
    const MINS: bool = true;
    type Quant = i8;

    /// `d`, `m`, the 32 high bits, then 16 bytes whose low halves are the first 16 quants.
    fn widen(block: &[u8; 24], out: &mut Widened<i8>) {
        out.scales[0] = half(block, 0);
        out.mins[0] = half(block, 2);
        let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
        for (i, byte) in block[8..].iter().enumerate() {
            out.quants[i] = ((byte & 15) | (((high >> i) & 1) as u8 * 16)) as i8;
            out.quants[i + 16] = ((byte >> 4) | (((high >> (i + 16)) & 1) as u8 * 16)) as i8;
        }
    }
}
