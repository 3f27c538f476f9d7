//! Q6_K: blocks of sixteen groups of 16, weight = `d * scale * (quant - 32)`.

use phalanx_cluster::checkpoint::TensorType;

use super::{
    Decoder,
    block::{BlockFormat, Widened, decoder, half},
};

pub(super) const DECODER: Decoder = decoder::<Q6K, 210>();

struct Q6K;

impl BlockFormat<210> for Q6K {
    const DTYPE: TensorType = TensorType::Q6K;
    const GROUP: usize = 16;
    const MINS: bool = false;
    type Quant = i8;

    /// 128 bytes of low halves, 64 bytes of high pairs, 16 signed scales, `d`. Either half of the block has 128 quants:
    /// four runs of 32 that share 64 bytes of low halves and 32 bytes of high pairs.
    fn widen(block: &[u8; 210], out: &mut Widened<i8>) {
        let d = half(block, 208);
        for (scale, &byte) in out.scales.iter_mut().zip(&block[192..208]) {
            *scale = d * f32::from(byte as i8);
        }
        let halves = out.quants.as_chunks_mut::<128>().0;
        let low = block[..128].as_chunks::<64>().0;
        let high = block[128..192].as_chunks::<32>().0;
        for ((quants, low), high) in halves.iter_mut().zip(low).zip(high) {
            for i in 0..32 {
                quants[i] = ((low[i] & 15) | (high[i] & 3) << 4) as i8 - 32;
                quants[i + 32] = ((low[i + 32] & 15) | ((high[i] >> 2) & 3) << 4) as i8 - 32;
                quants[i + 64] = ((low[i] >> 4) | ((high[i] >> 4) & 3) << 4) as i8 - 32;
                quants[i + 96] = ((low[i + 32] >> 4) | high[i] >> 6 << 4) as i8 - 32;
            }
        }
    }
}
