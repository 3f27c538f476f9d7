//! Writers of small checkpoints for tests: right ones, and ones that lie.

use std::{io::Write as _, path::Path};

/// Metadata value types and tensor types by GGUF's numbers.
pub(crate) const U32: u32 = 4;
pub(crate) const I32: u32 = 5;
pub(crate) const F32: u32 = 6;
pub(crate) const BOOL: u32 = 7;
pub(crate) const STRING: u32 = 8;
pub(crate) const ARRAY: u32 = 9;
pub(crate) const TENSOR_F32: u32 = 0;
pub(crate) const TENSOR_Q8_0: u32 = 8;

/// A tensor as the header will describe it.
#[derive(Debug, Clone)]
pub(crate) struct RawTensor {
    pub(crate) name: Vec<u8>,
    pub(crate) dims: Vec<u64>,
    pub(crate) dtype: u32,
    pub(crate) data: Vec<u8>,
    /// In place of the right one.
    pub(crate) offset: Option<u64>,
}

/// A GGUF file, every part of which a test can change before it's written.
#[derive(Debug, Clone)]
pub(crate) struct GgufFile {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    /// In place of the right ones.
    pub(crate) n_tensors: Option<u64>,
    pub(crate) n_values: Option<u64>,
    /// Key, type number, value's bytes.
    pub(crate) metadata: Vec<(Vec<u8>, u32, Vec<u8>)>,
    pub(crate) tensors: Vec<RawTensor>,
}

pub(crate) fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// An array's bytes: element type, count, elements.
pub(crate) fn array(kind: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    [kind.to_le_bytes().to_vec(), (elements.len() as u64).to_le_bytes().to_vec(), elements.concat()].concat()
}

impl GgufFile {
    /// A Llama of one layer: width 32, two heads of 16 on one KV head, 8 tokens.
    pub(crate) fn tiny() -> Self {
        let mut file = Self {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_values: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
        };
        file.set("general.architecture", STRING, string("llama"));
        file.set("general.name", STRING, string("Tiny"));
        for (key, value) in [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", 32),
            ("feed_forward_length", 64),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("rope.dimension_count", 16),
        ] {
            file.set_u32(&format!("llama.{key}"), value);
        }
        file.set_f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        file.set_f32("llama.rope.freq_base", 10_000.0);
        file.set("tokenizer.ggml.model", STRING, string("gpt2"));
        let tokens: Vec<Vec<u8>> = (b'a'..=b'h').map(|c| string([c])).collect();
        file.set("tokenizer.ggml.tokens", ARRAY, array(STRING, &tokens));
        let types: Vec<Vec<u8>> = (0..8).map(|i| i32::from(i != 7).to_le_bytes().to_vec()).collect();
        file.set("tokenizer.ggml.token_type", ARRAY, array(I32, &types));
        file.set_u32("tokenizer.ggml.eos_token_id", 7);
        file.set_u32("tokenizer.ggml.padding_token_id", u32::MAX);
        file.set("tokenizer.ggml.add_bos_token", BOOL, vec![1]);

        file.push_f32("token_embd.weight", &[32, 8]);
        file.push_f32("blk.0.attn_norm.weight", &[32]);
        // Odd lengths, so that padding matters: one row of 32 in 34 bytes.
        let data = (0..34u8).collect();
        let (name, dims) = (b"blk.0.attn_q.weight".to_vec(), vec![32, 1]);
        file.tensors.push(RawTensor { name, dims, dtype: TENSOR_Q8_0, data, offset: None });
        file.push_f32("output_norm.weight", &[32]);
        file
    }

    /// Adds a value or replaces it.
    pub(crate) fn set(&mut self, key: &str, kind: u32, bytes: Vec<u8>) {
        self.metadata.retain(|(k, ..)| k != key.as_bytes());
        self.metadata.push((key.into(), kind, bytes));
    }

    pub(crate) fn set_u32(&mut self, key: &str, value: u32) {
        self.set(key, U32, value.to_le_bytes().to_vec());
    }

    pub(crate) fn set_f32(&mut self, key: &str, value: f32) {
        self.set(key, F32, value.to_le_bytes().to_vec());
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(k, ..)| k != key.as_bytes());
    }

    /// Adds a tensor whose element i is i.
    pub(crate) fn push_f32(&mut self, name: &str, dims: &[u64]) {
        let data = (0..dims.iter().product::<u64>()).flat_map(|i| (i as f32).to_le_bytes()).collect();
        self.tensors.push(RawTensor { name: name.into(), dims: dims.to_vec(), dtype: TENSOR_F32, data, offset: None });
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut RawTensor {
        self.tensors.iter_mut().find(|t| t.name == name.as_bytes()).expect("a tensor of the tiny file")
    }

    /// The file, and the length of its header.
    pub(crate) fn bytes(&self) -> (Vec<u8>, usize) {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_values.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.dtype.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
        }
        let header_len = out.len();
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        (out, header_len)
    }
}

/// A safetensors file with that header and that many bytes of data.
pub(crate) fn safetensors_file(header: &str, n_bytes: usize) -> Vec<u8> {
    let data = (0..n_bytes).map(|i| (i % 251) as u8);
    (header.len() as u64).to_le_bytes().into_iter().chain(header.bytes()).chain(data).collect()
}

/// `config.json` of a Llama of one layer: width 4, two heads of 2 on one KV head.
pub(crate) fn tiny_config() -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_act": "silu", "vocab_size": 3, "tie_word_embeddings": false,
    })
}

/// Header of a file with an embedding table [3, 4], an output norm [4], a query matrix [4, 4], and an I64 leftover.
pub(crate) const TINY_HEADER: &str = r#"{"__metadata__":{"format":"pt"},
"model.embed_tokens.weight":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]},
"model.norm.weight":{"dtype":"BF16","shape":[4],"data_offsets":[48,56]},
"model.layers.0.self_attn.q_proj.weight":{"dtype":"F16","shape":[4,4],"data_offsets":[56,88]},
"position_ids":{"dtype":"I64","shape":[1],"data_offsets":[88,96]}}"#;

/// Bytes of data that go with [`TINY_HEADER`].
pub(crate) const TINY_DATA: usize = 96;

/// Writes a folder of `config.json` and `model.safetensors`.
pub(crate) fn write_folder(folder: &Path, config: &[u8], weights: &[u8]) {
    write(&folder.join("config.json"), config);
    write(&folder.join("model.safetensors"), weights);
}

/// Writes a file, over an earlier one of that name in place: file systems that flush whenever a file is emptied and
/// written anew would make thousands of mutations take a minute.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    let write = || {
        let mut file = std::fs::File::options().write(true).create(true).truncate(false).open(path)?;
        file.write_all(bytes)?;
        file.set_len(bytes.len() as u64)
    };
    write().expect("a temporary folder can be written");
}
