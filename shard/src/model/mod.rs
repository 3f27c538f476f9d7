//! Model families. A family is one file and one line in [`ARCHITECTURES`].
//!
//! A family says which tensors its layers have and which ranks hold which part of them ([`TensorSpec`]), and builds a
//! layer from the loaded tensors out of the blocks in [`crate::layer`]. Everything else, embedding, loading, the step,
//! is common.

pub mod error;
mod llama;
pub mod loader;
mod qwen2;

use std::ops::Range;

use phalanx_cluster::{
    model_config::ModelConfig,
    partition::{PartitionPlan, RankSlice},
};
use phalanx_kernels::{
    error::KernelError,
    ops::{ActivationLevels, Rope},
};

pub use error::LoadError;
pub use loader::{LoadedModel, load};

use crate::layer::{Pass, tensors::LayerTensors};

/// All families that can be run.
pub static ARCHITECTURES: &[&dyn Architecture] = &[&llama::Llama, &qwen2::Qwen2];

/// A family of models.
pub trait Architecture: Sync {
    /// The name that GGUF gives the family.
    fn name(&self) -> &'static str;

    /// Tensors of each layer, named without `blk.N.`.
    fn layer_tensors(&self) -> &'static [TensorSpec];

    /// A layer over its loaded tensors.
    ///
    /// # Errors
    /// If a tensor that [`Architecture::layer_tensors`] does not list is asked for.
    fn layer(&self, tensors: &LayerTensors, shape: &RankShape) -> Result<Box<dyn DecoderLayer>, LoadError>;
}

/// A decoder layer: reads the residual stream and adds to it.
pub trait DecoderLayer: Send {
    /// Runs the step's rows through the layer.
    ///
    /// # Errors
    /// What the device or the collective says.
    fn run(&self, pass: &mut Pass<'_>) -> Result<(), KernelError>;
}

/// The family of that name.
pub fn find(name: &str) -> Option<&'static dyn Architecture> {
    ARCHITECTURES.iter().copied().find(|architecture| architecture.name() == name)
}

/// A tensor of a layer, and how it is dealt to ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name between `blk.N.` and `.weight`.
    pub name: &'static str,
    /// How it is dealt.
    pub part: Part,
    /// Whether `.bias` belongs to it.
    pub bias: Bias,
}

/// How a tensor is dealt to ranks, which also says its shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A vector `[hidden]`, whole on every rank (norms).
    Hidden,
    /// Matrix `[n_heads * head_dim, hidden]`: a rank holds the rows of its query heads.
    QueryRows,
    /// Matrix `[n_kv_heads * head_dim, hidden]`: a rank holds the rows of its KV heads.
    KvRows,
    /// Matrix `[hidden, n_heads * head_dim]`: a rank holds the columns of its query heads; exact sums per head.
    QueryColumns,
    /// Matrix `[ffn, hidden]`: a rank holds the rows of its feed-forward range.
    FfnRows,
    /// Matrix `[hidden, ffn]`: a rank holds the columns of its feed-forward range; exact sums per slice.
    FfnColumns,
    /// Matrix `[vocab, hidden]`: a rank holds its vocabulary rows.
    VocabRows,
}

/// Whether a matrix has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// Never.
    None,
    /// Added if the checkpoint has one.
    IfPresent,
    /// A checkpoint without it is refused.
    Required,
}

impl TensorSpec {
    /// A norm's weight.
    pub const fn norm(name: &'static str) -> Self {
        Self { name, part: Part::Hidden, bias: Bias::None }
    }

    /// A matrix.
    pub const fn matrix(name: &'static str, part: Part, bias: Bias) -> Self {
        Self { name, part, bias }
    }
}

/// Sizes of the model and of one rank's slice of it.
#[derive(Debug, Clone, PartialEq)]
pub struct RankShape {
    /// The model.
    pub config: ModelConfig,
    /// What the rank holds.
    pub slice: RankSlice,
    /// Width of the feed-forward slices of exact sums.
    pub ffn_slice_width: usize,
    /// KV head (of this rank) that each of its query heads reads.
    pub kv_head_of: Vec<u32>,
    /// Vocabulary rows of every rank, in rank order.
    pub vocab_of_ranks: Vec<Range<usize>>,
}

impl RankShape {
    /// The shape of one rank of a plan.
    pub fn new(config: &ModelConfig, plan: &PartitionPlan, rank: usize) -> Self {
        let slice = plan.ranks[rank].clone();
        let heads_per_kv_head = config.n_heads / config.n_kv_heads;
        let kv_head_of = slice.q_heads.clone().map(|q| (q / heads_per_kv_head - slice.kv_heads.start) as u32).collect();
        Self {
            config: config.clone(),
            slice,
            ffn_slice_width: plan.ffn_slice_width,
            kv_head_of,
            vocab_of_ranks: plan.ranks.iter().map(|r| r.vocab.clone()).collect(),
        }
    }

    /// Query heads of the rank.
    pub fn n_heads(&self) -> usize {
        self.slice.q_heads.len()
    }

    /// KV heads of the rank.
    pub fn n_kv_heads(&self) -> usize {
        self.slice.kv_heads.len()
    }

    /// Width of the rank's queries, `n_heads * head_dim`.
    pub fn q_width(&self) -> usize {
        self.n_heads() * self.config.head_dim
    }

    /// Width of the rank's keys, `n_kv_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads() * self.config.head_dim
    }

    /// Feed-forward columns of the rank.
    pub fn ffn(&self) -> usize {
        self.slice.ffn.len()
    }

    /// Vocabulary rows of the rank.
    pub fn vocab(&self) -> usize {
        self.slice.vocab.len()
    }

    /// Shape `(rows, cols)` of a whole tensor that is dealt so.
    pub fn whole(&self, part: Part) -> (usize, usize) {
        let c = &self.config;
        let (q_width, kv_width) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        match part {
            Part::Hidden => (1, c.hidden),
            Part::QueryRows => (q_width, c.hidden),
            Part::KvRows => (kv_width, c.hidden),
            Part::QueryColumns => (c.hidden, q_width),
            Part::FfnRows => (c.ffn, c.hidden),
            Part::FfnColumns => (c.hidden, c.ffn),
            Part::VocabRows => (c.vocab, c.hidden),
        }
    }

    /// Rows and columns of such a tensor that this rank holds.
    pub fn mine(&self, part: Part) -> (Range<usize>, Range<usize>) {
        let (rows, cols) = self.whole(part);
        let heads = |range: &Range<usize>| range.start * self.config.head_dim..range.end * self.config.head_dim;
        match part {
            Part::Hidden => (0..rows, 0..cols),
            Part::QueryRows => (heads(&self.slice.q_heads), 0..cols),
            Part::KvRows => (heads(&self.slice.kv_heads), 0..cols),
            Part::QueryColumns => (0..rows, heads(&self.slice.q_heads)),
            Part::FfnRows => (self.slice.ffn.clone(), 0..cols),
            Part::FfnColumns => (0..rows, self.slice.ffn.clone()),
            Part::VocabRows => (self.slice.vocab.clone(), 0..cols),
        }
    }

    /// How finely the activations are quantized that meet a tensor: a score of attention is the exponent of a weight, so
    /// what queries and keys are off by is multiplied; measured, they account for most of what 8 bits cost.
    pub fn activations(&self, part: Part) -> ActivationLevels {
        match part {
            Part::QueryRows | Part::KvRows => ActivationLevels::Two,
            Part::Hidden | Part::QueryColumns | Part::FfnRows | Part::FfnColumns | Part::VocabRows => {
                ActivationLevels::One
            }
        }
    }

    /// Width of the slices of exact sums, for tensors that are cut along their inputs.
    pub fn slice_width(&self, part: Part) -> Option<usize> {
        match part {
            Part::QueryColumns => Some(self.config.head_dim),
            Part::FfnColumns => Some(self.ffn_slice_width),
            Part::Hidden | Part::QueryRows | Part::KvRows | Part::FfnRows | Part::VocabRows => None,
        }
    }
}

/// What layers are given besides their tensors.
#[derive(Debug, Clone, Copy)]
pub struct LayerPlace {
    /// Index of the layer.
    pub idx: usize,
    /// The model's rotary embedding.
    pub rope: Rope,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (idx, architecture) in ARCHITECTURES.iter().enumerate() {
            assert!(ARCHITECTURES[..idx].iter().all(|other| other.name() != architecture.name()));
        }
    }

    #[test]
    fn no_family_names_a_tensor_twice() {
        for architecture in ARCHITECTURES {
            let specs = architecture.layer_tensors();
            for (idx, spec) in specs.iter().enumerate() {
                assert!(specs[..idx].iter().all(|other| other.name != spec.name), "{}", spec.name);
            }
        }
    }
}
