//! Q4_K: blocks of eight groups of 32, weight = `d * scale * quant - dmin * min`.

use phalanx_cluster::checkpoint::TensorType;

use super::{
    Decoder,
    block::{BlockFormat, Widened, decoder},
    k_scales::scales_and_mins,
};

pub(super) const DECODER: Decoder = decoder::<Q4K, 144>();

struct Q4K;

impl BlockFormat<144> for Q4K {
    const DTYPE: TensorType = TensorType::Q4K;
    const GROUP: usize = 32;
    const MINS: bool = true;
    type Quant = u8;

    /// 16 bytes of scales, then four times 32 bytes whose low halves are one group and high halves the next.
    fn widen(block: &[u8; 144], out: &mut Widened<u8>) {
        scales_and_mins(block, &mut out.scales, &mut out.mins);
        let pairs = out.quants.as_chunks_mut::<64>().0;
        for (pair, bytes) in pairs.iter_mut().zip(block[16..].as_chunks::<32>().0) {
            for (i, byte) in bytes.iter().enumerate() {
                pair[i] = byte & 15;
                pair[i + 32] = byte >> 4;
            }
        }
    }
}
