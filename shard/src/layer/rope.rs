//! The rotary embedding from its configuration.

use phalanx_cluster::model_config::RopeConfig;
use phalanx_kernels::ops::{RopeSpec, RopeStyle};

/// The rotation that a configuration describes.
pub fn spec(config: &RopeConfig) -> RopeSpec {
    let (inv_freq, magnitude) = config.frequencies();
    let style = if config.interleaved { RopeStyle::Interleaved } else { RopeStyle::Half };
    RopeSpec { style, inv_freq, magnitude }
}
