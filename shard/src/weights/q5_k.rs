//! Q5_K: blocks of eight groups of 32, weight = `d * scale * quant - dmin * min`.

use phalanx_cluster::checkpoint::TensorType;

use super::{
    Decoder,
    block::{BlockFormat, Widened, decoder},
    k_scales::scales_and_mins,
};

pub(super) const DECODER: Decoder = decoder::<Q5K, 176>();

struct Q5K;

impl BlockFormat<176> for Q5K {
    const DTYPE: TensorType = TensorType::Q5K;
    const GROUP: usize = 32;
    const MINS: bool = true;
    type Quant = i8;

    /// 16 bytes of scales; 32 bytes, bit g of which is the high bit of group g; then four times 32 bytes whose low
    /// halves are one group and high halves the next.
    fn widen(block: &[u8; 176], out: &mut Widened<i8>) {
        scales_and_mins(block, &mut out.scales, &mut out.mins);
        let high = &block[16..48];
        let pairs = out.quants.as_chunks_mut::<64>().0;
        for (p, (pair, bytes)) in pairs.iter_mut().zip(block[48..].as_chunks::<32>().0).enumerate() {
            for (i, (byte, high)) in bytes.iter().zip(high).enumerate() {
                pair[i] = ((byte & 15) | (((high >> (2 * p)) & 1) * 16)) as i8;
                pair[i + 32] = ((byte >> 4) | (((high >> (2 * p + 1)) & 1) * 16)) as i8;
            }
        }
    }
}
