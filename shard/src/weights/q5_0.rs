//! Q5_0: groups of 32, weight = `d * (quant - 16)`.

use phalanx_cluster::checkpoint::TensorType;

use super::{
    Decoder,
    block::{BlockFormat, Widened, decoder, half},
};

pub(super) const DECODER: Decoder = decoder::<Q5_0, 22>();

struct Q5_0;

impl BlockFormat<22> for Q5_0 {
    const DTYPE: TensorType = TensorType::Q5_0;
    const GROUP: usize = 32;
    const MINS: bool = false;
    type Quant = i8;

    /// `d`, the 32 high bits, then 16 bytes whose low halves are the first 16 quants.
    fn widen(block: &[u8; 22], out: &mut Widened<i8>) {
        out.scales[0] = half(block, 0);
        let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        for (i, byte) in block[6..].iter().enumerate() {
            out.quants[i] = ((byte & 15) | (((high >> i) & 1) as u8 * 16)) as i8 - 16;
            out.quants[i + 16] = ((byte >> 4) | (((high >> (i + 16)) & 1) as u8 * 16)) as i8 - 16;
        }
    }
}
