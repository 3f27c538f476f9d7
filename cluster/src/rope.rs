//! Frequencies of the rotary embedding, scaling applied.
//!
//! Formulas are those of Hugging Face's `modeling_rope_utils`, so that its checkpoints give its numbers. They are
//! evaluated in f64 and rounded to f32 once. Powers and logarithms are `libm`'s: those of C libraries differ, and with
//! them the bits of every answer would.

use std::f64::consts::TAU;

use crate::model_config::{RopeConfig, RopeScaling};

impl RopeConfig {
    /// Radians per position of each pair, `[dims / 2]`, and the factor on cosine and sine.
    pub fn frequencies(&self) -> (Vec<f32>, f32) {
        let plain = (0..self.dims / 2).map(|i| libm::pow(self.theta, -2.0 * i as f64 / self.dims as f64));
        let mut magnitude = 1.0;
        let scaled: Vec<f64> = match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Factors(divisors) => plain.zip(divisors).map(|(f, d)| f / f64::from(*d)).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
                .map(|f| {
                    // How often the pair turns over the original context.
                    let turns = original_context * f / TAU;
                    // 0: divided; 1: kept.
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                })
                .collect(),
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate } => {
                magnitude = attention_factor.unwrap_or_else(|| yarn_magnitude(*factor, 1.0));
                // The dimension whose pair turns that often over the original context.
                let dim_of = |turns: f64| {
                    self.dims as f64 * libm::log(original_context / (turns * TAU)) / (2.0 * libm::log(self.theta))
                };
                let (mut low, mut high) = (dim_of(*beta_fast), dim_of(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(self.dims as f64 - 1.0));
                // A ramp without width would divide by zero.
                let width = if low == high { 0.001 } else { high - low };
                plain
                    .enumerate()
                    .map(|(i, f)| {
                        let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
                        f / factor * divided + f * (1.0 - divided)
                    })
                    .collect()
            }
        };
        (scaled.into_iter().map(|f| f as f32).collect(), magnitude as f32)
    }
}

/// YaRN's factor on cosine and sine for a stretch, with DeepSeek's multiplier `mscale` (1 elsewhere).
pub(crate) fn yarn_magnitude(factor: f64, mscale: f64) -> f64 {
    if factor > 1.0 { 0.1 * mscale * libm::log(factor) + 1.0 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Constants come from a transcription of Hugging Face's functions to plain Python floats.
    fn assert_frequencies(
        theta: f64,
        dims: usize,
        scaling: RopeScaling,
        every: usize,
        want: &[f64],
        want_magnitude: f64,
    ) {
        let (got, magnitude) = RopeConfig { theta, dims, interleaved: false, scaling }.frequencies();
        assert_eq!(got.len(), dims / 2);
        for (got, want) in got.iter().step_by(every).zip(want) {
            assert!((f64::from(*got) / want - 1.0).abs() < 1e-7, "{got:e}, {want:e}");
        }
        assert_eq!(got.len().div_ceil(every), want.len());
        assert!((f64::from(magnitude) - want_magnitude).abs() < 1e-7, "{magnitude}");
    }

    #[test]
    fn plain() {
        let want = [1.0, 3.162277660e-01, 1.0e-01, 3.162277660e-02, 1.0e-02, 3.162277660e-03, 1.0e-03, 3.162277660e-04];
        assert_frequencies(10_000.0, 16, RopeScaling::None, 1, &want, 1.0);
        assert_frequencies(10_000.0, 16, RopeScaling::Linear { factor: 4.0 }, 1, &want.map(|f| f / 4.0), 1.0);
        let divisors: Vec<f32> = (1..=8).map(|i| i as f32).collect();
        let mut divided = want;
        divided.iter_mut().zip(&divisors).for_each(|(f, d)| *f /= f64::from(*d));
        assert_frequencies(10_000.0, 16, RopeScaling::Factors(divisors), 1, &divided, 1.0);
    }

    #[test]
    fn llama3() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64.0 };
        let want = [
            1.0,
            7.940300918e-02,
            4.700753866e-03,
            9.115830922e-04,
            1.767766953e-04,
            3.428102196e-05,
            6.647869871e-06,
            1.289173172e-06,
        ];
        assert_frequencies(500_000.0, 16, scaling, 1, &want, 1.0);
    }

    fn yarn(factor: f64, original_context: f64, truncate: bool) -> RopeScaling {
        let (beta_fast, beta_slow, attention_factor) = (32.0, 1.0, None);
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate }
    }

    #[test]
    fn yarn_with_whole_dimensions() {
        let want = [
            1.0,
            1.111424631e-01,
            7.905694150e-03,
            1.405853313e-03,
            2.5e-04,
            4.445698525e-05,
            7.905694150e-06,
            1.405853313e-06,
        ];
        assert_frequencies(1e6, 16, yarn(4.0, 64.0, true), 1, &want, 1.138629436111989);
        let want = [
            1.0,
            1.778279410e-01,
            3.162277660e-02,
            5.375321491e-03,
            6.029411765e-04,
            4.445698525e-05,
            7.905694150e-06,
            1.405853313e-06,
        ];
        assert_frequencies(1e6, 128, yarn(4.0, 32_768.0, true), 8, &want, 1.138629436111989);
    }

    #[test]
    fn yarn_with_fractional_dimensions() {
        let want = [
            1.0,
            9.881383156e-02,
            6.351659352e-03,
            1.431778349e-03,
            3.227486122e-04,
            7.275334673e-05,
            1.639991393e-05,
            3.696835801e-06,
        ];
        assert_frequencies(150_000.0, 16, yarn(8.0, 64.0, false), 1, &want, 1.2079441541679836);
    }

    #[test]
    fn yarn_magnitude_can_be_given() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_context: 64.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: Some(0.75),
            truncate: true,
        };
        let rope = RopeConfig { theta: 1e6, dims: 16, interleaved: false, scaling };
        assert_eq!(rope.frequencies().1, 0.75);
        // Nothing is stretched: nothing to make up for.
        assert_eq!(yarn_magnitude(1.0, 1.0), 1.0);
        assert!((yarn_magnitude(40.0, 0.707) - 1.260_803_777).abs() < 1e-8);
    }
}
