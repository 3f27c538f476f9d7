//! Frequencies of the rotary embedding from its configuration.

use std::f64::consts::PI;

use phalanx_cluster::model_config::{RopeConfig, RopeScaling};
use phalanx_kernels::ops::{RopeSpec, RopeStyle};

/// The rotation that a configuration describes. Formulas are those of Hugging Face's `modeling_rope_utils`.
pub fn spec(config: &RopeConfig) -> RopeSpec {
    let n_pairs = config.dims / 2;
    let plain = (0..n_pairs).map(|i| config.theta.powf(-2.0 * i as f64 / config.dims as f64));
    let mut magnitude = 1.0;
    let inv_freq: Vec<f64> = match &config.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Factors(divisors) => plain.zip(divisors).map(|(f, d)| f / f64::from(*d)).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
            .map(|f| {
                let rotations = original_context * f / (2.0 * PI);
                if rotations > *high_freq_factor {
                    f
                } else if rotations < *low_freq_factor {
                    f / factor
                } else {
                    let keep = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - keep) * f / factor + keep * f
                }
            })
            .collect(),
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate } => {
            magnitude = attention_factor.unwrap_or(if *factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 });
            // The pair that turns `rotations` times over the original context.
            let pair_of = |rotations: f64| {
                config.dims as f64 * (original_context / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln())
            };
            let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, high) = (low.max(0.0), high.min(config.dims as f64 - 1.0));
            // A ramp of no width would divide by zero.
            let width = if high == low { 0.001 } else { high - low };
            plain
                .enumerate()
                .map(|(i, f)| {
                    let divide = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    f / factor * divide + f * (1.0 - divide)
                })
                .collect()
        }
    };
    RopeSpec {
        style: if config.interleaved { RopeStyle::Interleaved } else { RopeStyle::Half },
        inv_freq: inv_freq.into_iter().map(|f| f as f32).collect(),
        magnitude: magnitude as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dims: usize, scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta: 10_000.0, dims, interleaved: false, scaling }
    }

    #[test]
    fn plain_frequencies_fall_from_one() {
        let spec = spec(&config(4, RopeScaling::None));
        assert_eq!(spec.inv_freq, [1.0, 0.01]);
        assert_eq!(spec.magnitude, 1.0);
    }

    #[test]
    fn linear_and_factors_divide() {
        assert_eq!(spec(&config(4, RopeScaling::Linear { factor: 4.0 })).inv_freq, [0.25, 0.0025]);
        assert_eq!(spec(&config(4, RopeScaling::Factors(vec![2.0, 4.0]))).inv_freq, [0.5, 0.0025]);
    }

    #[test]
    fn llama3_keeps_fast_and_divides_slow_pairs() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        let stretched = spec(&RopeConfig { theta: 500_000.0, dims: 128, interleaved: true, scaling });
        let plain = spec(&RopeConfig { theta: 500_000.0, dims: 128, interleaved: true, scaling: RopeScaling::None });
        assert_eq!(stretched.inv_freq[0], plain.inv_freq[0]);
        assert_eq!(stretched.inv_freq[63], plain.inv_freq[63] / 8.0);
        // Between: pair 32 turns 8192 / (2 pi sqrt(theta)) = 1.8438 times, so it is kept by (1.8438 - 1) / 3.
        let keep = (8192.0 / (2.0 * PI * 500_000_f64.sqrt()) - 1.0) / 3.0;
        let want = f64::from(plain.inv_freq[32]) * (keep + (1.0 - keep) / 8.0);
        assert!((f64::from(stretched.inv_freq[32]) / want - 1.0).abs() < 1e-6);
        assert_eq!(stretched.style, RopeStyle::Interleaved);
    }

    #[test]
    fn yarn_ramps_between_its_corners() {
        let scaling = |truncate| RopeScaling::Yarn {
            factor: 4.0,
            original_context: 32768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            truncate,
        };
        let with = |scaling| spec(&RopeConfig { theta: 1e6, dims: 128, interleaved: false, scaling });
        let (plain, yarn) = (with(RopeScaling::None), with(scaling(true)));
        // Corners: 128 ln(32768 / 64 pi) / (2 ln 1e6) = 23.59 and, for one rotation, 39.65.
        assert_eq!(yarn.inv_freq[23], plain.inv_freq[23]);
        assert!(yarn.inv_freq[24] < plain.inv_freq[24]);
        assert!(yarn.inv_freq[39] > plain.inv_freq[39] / 4.0);
        assert_eq!(yarn.inv_freq[40], plain.inv_freq[40] / 4.0);
        let want = f64::from(plain.inv_freq[31]) * (0.25 * 8.0 / 17.0 + 9.0 / 17.0);
        assert!((f64::from(yarn.inv_freq[31]) / want - 1.0).abs() < 1e-6);
        assert!((f64::from(yarn.magnitude) - (0.1 * 4_f64.ln() + 1.0)).abs() < 1e-6);
        assert!(with(scaling(false)).inv_freq[31] != yarn.inv_freq[31]);
    }
}
