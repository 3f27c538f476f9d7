//! The packed scales of Q4_K and Q5_K.

use super::block::half;

/// Groups in a block.
const N_GROUPS: usize = 8;

/// Scale and min of each group, from a block's first 16 bytes: two half-precision factors `d` and `dmin`, then eight
/// 6-bit scales and eight 6-bit mins in 12 bytes. The first four of each are the low six bits of bytes 0..4 and 4..8;
/// the others have their low four bits in bytes 8..12 and their high two in the high bits of the first eight.
pub(super) fn scales_and_mins(block: &[u8], scales: &mut [f32], mins: &mut [f32]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let packed = &block[4..16];
    for i in 0..N_GROUPS {
        let (scale, min) = if i < 4 {
            (packed[i] & 63, packed[i + 4] & 63)
        } else {
            (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
        };
        scales[i] = d * f32::from(scale);
        mins[i] = -(dmin * f32::from(min));
    }
}
