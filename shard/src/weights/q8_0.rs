//! Q8_0: groups of 32, weight = `d * quant`.

use phalanx_cluster::checkpoint::TensorType;

use super::{
    Decoder,
    block::{BlockFormat, Widened, decoder, half},
};

pub(super) const DECODER: Decoder = decoder::<Q8_0, 34>();

struct Q8_0;

impl BlockFormat<34> for Q8_0 {
    const DTYPE: TensorType = TensorType::Q8_0;
    const GROUP: usize = 32;
    const MINS: bool = false;
    type Quant = i8;

    /// `d`, then the quants.
    fn widen(block: &[u8; 34], out: &mut Widened<i8>) {
        out.scales[0] = half(block, 0);
        for (quant, byte) in out.quants.iter_mut().zip(&block[2..]) {
            *quant = *byte as i8;
        }
    }
}
