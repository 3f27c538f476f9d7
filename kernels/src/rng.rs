//! Random numbers without state: a draw is a function of its key and counter, so that a replayed sequence draws the same.
//!
//! Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32 with 10 rounds).

/// Multipliers of the two lanes.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Weyl increments of the two key words: the golden ratio and the square root of 3, less 1.
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Philox4x32-10: 128 random bits for a 128-bit counter under a 64-bit key, as four words.
#[must_use]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key[0] = key[0].wrapping_add(KEY_STEPS[0]);
            key[1] = key[1].wrapping_add(KEY_STEPS[1]);
        }
        let (high0, low0) = split(u64::from(MULTIPLIERS[0]) * u64::from(counter[0]));
        let (high1, low1) = split(u64::from(MULTIPLIERS[1]) * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
    }
    counter
}

/// A number in `[0, 1)` with 53 random bits, which depends on nothing but the arguments.
///
/// `draw` numbers the draws that are made for one counter.
#[must_use]
pub fn uniform(seed: u64, counter: u64, draw: u32) -> f64 {
    let (counter_high, counter_low) = split(counter);
    let (seed_high, seed_low) = split(seed);
    let words = philox4x32([counter_low, counter_high, draw, 0], [seed_low, seed_high]);
    let bits = (u64::from(words[1]) << 32 | u64::from(words[0])) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

/// The high and the low half.
fn split(wide: u64) -> (u32, u32) {
    ((wide >> 32) as u32, wide as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The vectors that the authors publish with the Random123 library (philox4x32, 10 rounds).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_is_in_range_and_has_the_moments_of_a_uniform() {
        let n = 20_000;
        let draws: Vec<f64> = (0..n).map(|counter| uniform(42, counter, 0)).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        let mean = draws.iter().sum::<f64>() / n as f64;
        let variance = draws.iter().map(|draw| (draw - mean).powi(2)).sum::<f64>() / n as f64;
        // Five standard errors: 1/sqrt(12 n) of the mean, 1/sqrt(180 n) of the variance.
        assert!((mean - 0.5).abs() < 5.0 / (12.0 * n as f64).sqrt(), "mean {mean}");
        assert!((variance - 1.0 / 12.0).abs() < 5.0 / (180.0 * n as f64).sqrt(), "variance {variance}");
    }

    #[test]
    fn each_argument_changes_the_draw() {
        let draw = uniform(1, 2, 3);
        assert_eq!(draw.to_bits(), uniform(1, 2, 3).to_bits());
        for other in
            [uniform(0, 2, 3), uniform(1, 3, 3), uniform(1, 2, 4), uniform(1 << 40, 2, 3), uniform(1, 2 | 1 << 40, 3)]
        {
            assert_ne!(draw.to_bits(), other.to_bits());
        }
    }
}
