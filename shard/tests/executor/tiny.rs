//! A tiny model with random weights, in memory.

use std::{borrow::Cow, collections::BTreeMap, ops::Range, path::PathBuf, sync::Arc};

use phalanx_cluster::{
    checkpoint::{Checkpoint, CheckpointError, TensorInfo, TensorType},
    model_config::{ModelConfig, RopeConfig, RopeScaling},
};
use phalanx_kernels::ops::Precision;
use phalanx_shard::offline::{LocalConfig, LocalGroup};

/// A checkpoint of f32 tensors.
#[derive(Clone)]
pub struct TinyModel {
    pub config: ModelConfig,
    pub values: BTreeMap<String, Vec<f32>>,
    tensors: Vec<TensorInfo>,
    path: PathBuf,
}

/// Random numbers of a seed: SplitMix64 (Steele, Lea and Flood, 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In -1..1.
    fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// 6 query and 3 KV heads, so that 2 ranks get unequal parts and 4 ranks must share KV heads; a vocabulary that
/// nothing divides.
pub fn config(architecture: &str, tied_embeddings: bool) -> ModelConfig {
    ModelConfig {
        architecture: architecture.to_owned(),
        name: "tiny".to_owned(),
        n_layers: 2,
        hidden: 64,
        ffn: 160,
        n_heads: 6,
        n_kv_heads: 3,
        head_dim: 16,
        vocab: 211,
        context_length: 256,
        norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 10_000.0,
            dims: 16,
            interleaved: architecture == "llama",
            scaling: RopeScaling::None,
        },
        tied_embeddings,
    }
}

impl TinyModel {
    pub fn new(architecture: &str, tied_embeddings: bool) -> Self {
        let config = config(architecture, tied_embeddings);
        let mut model = Self {
            values: BTreeMap::new(),
            tensors: Vec::new(),
            path: PathBuf::from("tiny.gguf"),
            config: config.clone(),
        };
        let mut random = Random(7);
        let (q_width, kv_width) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        // Wide enough that attention is far from uniform.
        model.add("token_embd.weight", config.vocab, config.hidden, 1.0, &mut random);
        for layer in 0..config.n_layers {
            let mut add = |name: &str, rows, cols, width| {
                model.add(&format!("blk.{layer}.{name}"), rows, cols, width, &mut random);
            };
            add("attn_norm.weight", 1, config.hidden, 2.0);
            add("attn_q.weight", q_width, config.hidden, 0.5);
            add("attn_k.weight", kv_width, config.hidden, 0.5);
            add("attn_v.weight", kv_width, config.hidden, 0.3);
            if architecture == "qwen2" {
                add("attn_q.bias", 1, q_width, 1.0);
                add("attn_k.bias", 1, kv_width, 1.0);
                add("attn_v.bias", 1, kv_width, 1.0);
            }
            add("attn_output.weight", config.hidden, q_width, 0.3);
            add("ffn_norm.weight", 1, config.hidden, 2.0);
            add("ffn_gate.weight", config.ffn, config.hidden, 0.3);
            add("ffn_up.weight", config.ffn, config.hidden, 0.3);
            add("ffn_down.weight", config.hidden, config.ffn, 0.3);
        }
        model.add("output_norm.weight", 1, config.hidden, 1.0, &mut random);
        if !tied_embeddings {
            model.add("output.weight", config.vocab, config.hidden, 0.5, &mut random);
        }
        model
    }

    fn add(&mut self, name: &str, rows: usize, cols: usize, width: f32, random: &mut Random) {
        let values = (0..rows * cols).map(|_| random.signed() * width).collect();
        self.insert(name, rows, cols, values);
    }

    pub fn insert(&mut self, name: &str, rows: usize, cols: usize, values: Vec<f32>) {
        self.remove(name);
        self.tensors.push(TensorInfo { name: name.to_owned(), dtype: TensorType::F32, rows, cols });
        self.values.insert(name.to_owned(), values);
    }

    pub fn remove(&mut self, name: &str) {
        self.tensors.retain(|t| t.name != name);
        self.values.remove(name);
    }

    pub fn group(&self, config: LocalConfig) -> LocalGroup {
        LocalGroup::of(Arc::new(self.clone()), config).expect("a good model")
    }
}

impl Checkpoint for TinyModel {
    fn path(&self) -> &PathBuf {
        &self.path
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let cols = self.find(name).map_or(0, |t| t.cols);
        Ok(bytemuck::cast_slice(&self.values[name][rows.start * cols..rows.end * cols]).into())
    }

    fn identity(&self) -> &str {
        "tiny"
    }
}

/// A small group: blocks of 16, steps of up to 64 rows.
pub fn small(world_size: usize, precision: Precision) -> LocalConfig {
    LocalConfig { kv_blocks: 128, max_step_rows: 64, ..LocalConfig::new(world_size, precision) }
}

/// Random tokens.
pub fn prompt(seed: u64, len: usize) -> Vec<u32> {
    let mut random = Random(seed);
    (0..len).map(|_| random.below(211) as u32).collect()
}
