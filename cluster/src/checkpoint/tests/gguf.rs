use std::path::PathBuf;

use super::exercise;
use crate::{
    checkpoint::{Checkpoint, TensorType, generation::GenerationDefaults, gguf::Gguf, testing::*},
    model_config::RopeScaling,
};

/// A folder for one test's files.
struct Scratch {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { path: folder.path().join("tiny.gguf"), _folder: folder }
    }

    fn write(&self, bytes: &[u8]) {
        write(&self.path, bytes);
    }

    fn open(&self, file: &GgufFile) -> Gguf {
        self.write(&file.bytes().0);
        Gguf::open(&self.path).expect("a right file")
    }
}

#[test]
fn a_right_file_is_read() {
    let scratch = Scratch::new();
    let gguf = scratch.open(&GgufFile::tiny());
    let config = gguf.config();
    assert_eq!((config.architecture.as_str(), config.name.as_str()), ("llama", "Tiny"));
    assert_eq!((config.n_layers, config.hidden, config.ffn, config.vocab), (1, 32, 64, 8));
    assert_eq!((config.n_heads, config.n_kv_heads, config.head_dim), (2, 1, 16));
    assert_eq!((config.context_length, config.norm_eps), (64, 1e-5));
    assert_eq!((config.rope.theta, config.rope.dims, config.rope.interleaved), (10_000.0, 16, true));
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert!(config.tied_embeddings);

    let table = gguf.require("token_embd.weight", 8, 32).expect("as it is");
    assert_eq!(table.dtype, TensorType::F32);
    let row: Vec<f32> = gguf
        .rows("token_embd.weight", 2..3)
        .expect("there are 8")
        .as_chunks()
        .0
        .iter()
        .map(|&c| f32::from_le_bytes(c))
        .collect();
    assert_eq!(row, (64..96).map(|i| i as f32).collect::<Vec<_>>());
    assert_eq!(gguf.rows("blk.0.attn_q.weight", 0..1).expect("one row").to_vec(), (0..34).collect::<Vec<u8>>());
    let error = gguf.require("token_embd.weight", 32, 8).expect_err("the other way round").to_string();
    assert!(error.ends_with("tensor token_embd.weight: want [32, 8], the file has [8, 32]"), "{error}");

    let tokenizer = gguf.tokenizer().expect("right types").expect("GGUF has one");
    assert_eq!((tokenizer.model.as_str(), tokenizer.tokens.len(), &*tokenizer.tokens[3]), ("gpt2", 8, "d"));
    assert_eq!((tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos), (Some(7), None, Some(true)));
    assert_eq!(tokenizer.token_types, [1, 1, 1, 1, 1, 1, 1, 0]);
}

#[test]
fn versions_families_and_ties() {
    let scratch = Scratch::new();
    let mut file = GgufFile::tiny();
    file.version = 2;
    file.push_f32("output.weight", &[32, 8]);
    assert!(!scratch.open(&file).config().tied_embeddings);
    for (key, ..) in &mut file.metadata {
        if let Some(rest) = key.strip_prefix(b"llama.") {
            *key = [b"qwen2.", rest].concat();
        }
    }
    file.set("general.architecture", STRING, string("qwen2"));
    assert!(!scratch.open(&file).config().rope.interleaved);
    // Per-layer counts are fine where the layers agree.
    file.set("qwen2.feed_forward_length", ARRAY, array(U32, &[vec![64, 0, 0, 0], vec![64, 0, 0, 0]]));
    assert_eq!(scratch.open(&file).config().ffn, 64);
}

#[test]
fn rope_scaling_is_read() {
    let scratch = Scratch::new();
    let scaling = |file: &GgufFile| scratch.open(file).config().rope.scaling.clone();
    let mut file = GgufFile::tiny();
    file.set_f32("llama.rope.scaling.factor", 4.0);
    assert_eq!(scaling(&file), RopeScaling::Linear { factor: 4.0 });
    file.set("llama.rope.scaling.type", STRING, string("yarn"));
    file.set_u32("llama.rope.scaling.original_context_length", 16);
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 16.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        truncate: true,
    };
    assert_eq!(scaling(&file), yarn);
    file.set("llama.rope.scaling.type", STRING, string("none"));
    assert_eq!(scaling(&file), RopeScaling::None);
    file.remove("llama.rope.scaling.factor");
    file.push_f32("rope_freqs.weight", &[8]);
    file.tensor("rope_freqs.weight").data = (1..=8).flat_map(|i| (i as f32).to_le_bytes()).collect();
    assert_eq!(scaling(&file), RopeScaling::Factors((1..=8).map(|i| i as f32).collect()));
}

#[test]
fn identity_is_of_header_size_and_samples() {
    let scratch = Scratch::new();
    let identity = |file: &GgufFile| scratch.open(file).identity().to_owned();
    let mut file = GgufFile::tiny();
    let first = identity(&file);
    assert_eq!(first, identity(&file));
    file.set("general.name", STRING, string("Tine"));
    assert_ne!(first, identity(&file));
    // A hole where weights were: another model, though the header is the same.
    let mut file = GgufFile::tiny();
    file.tensor("output_norm.weight").data.fill(0);
    assert_ne!(first, identity(&file));
    let mut file = GgufFile::tiny();
    file.push_f32("output.weight", &[32, 8]);
    assert_ne!(first, identity(&file));
}

/// Each lie, and what the error must mention.
#[test]
fn lies_are_found() {
    type Lie = (&'static str, &'static str, fn(&mut GgufFile));
    let lies: &[Lie] = &[
        ("version 1", "version 1", |f| f.version = 1),
        ("version 4", "version 4", |f| f.version = 4),
        ("big-endian", "big-endian", |f| f.version = 3u32.swap_bytes()),
        ("many tensors", "tensor count", |f| f.n_tensors = Some(u64::MAX)),
        ("more tensors than fit", "tensor count", |f| f.n_tensors = Some(1 << 20)),
        ("one tensor too many", "tensor : 0 dimensions", |f| f.n_tensors = Some(5)),
        ("many values", "metadata count", |f| f.n_values = Some(u64::MAX)),
        ("no values", "general.architecture: missing", |f| {
            f.metadata.clear();
        }),
        ("a key that is no text", "metadata key", |f| f.metadata[0].0 = vec![0xff, 0xfe]),
        ("a key twice", "general.name: the key is there twice", |f| {
            let again = f.metadata[1].clone();
            f.metadata.push(again);
        }),
        ("a value type", "value type 13", |f| f.metadata[1].1 = 13),
        ("an element type", "element type 99", |f| f.set("x", ARRAY, array(99, &[]))),
        ("a long array", "metadata x: a count of", |f| {
            f.set("x", ARRAY, [8u32.to_le_bytes().to_vec(), u64::MAX.to_le_bytes().to_vec()].concat());
        }),
        ("a long array of numbers", "metadata x: a count of", |f| {
            f.set("x", ARRAY, [6u32.to_le_bytes().to_vec(), (u64::MAX / 4).to_le_bytes().to_vec()].concat());
        }),
        ("a long string", "metadata x: a count of", |f| f.set("x", STRING, vec![0xff; 8])),
        ("a string that is no text", "utf-8", |f| f.set("x", STRING, string([0xc3, 0x28]))),
        ("deep arrays", "nested", |f| {
            let deep = (0..100).fold(array(U32, &[]), |inner, _| array(ARRAY, &[inner]));
            f.set("x", ARRAY, deep);
        }),
        ("a bool of 2", "a bool is 0 or 1", |f| f.set("x", BOOL, vec![2])),
        ("bools of 2", "a bool is 0 or 1", |f| f.set("x", ARRAY, array(BOOL, &[vec![1], vec![2]]))),
        ("alignment 0", "general.alignment", |f| f.set_u32("general.alignment", 0)),
        ("alignment 24", "general.alignment", |f| f.set_u32("general.alignment", 24)),
        ("alignment in words", "general.alignment", |f| f.set("general.alignment", STRING, string("32"))),
        ("an alignment that offsets don't have", "not a multiple", |f| f.set_u32("general.alignment", 4096)),
        ("no architecture", "general.architecture: missing", |f| f.remove("general.architecture")),
        ("architecture 3", "general.architecture: want a string", |f| f.set_u32("general.architecture", 3)),
        ("an architecture without sizes", "gpt9.embedding_length: missing", |f| {
            f.set("general.architecture", STRING, string("gpt9"));
        }),
        ("a part", "one of 2 parts", |f| f.set_u32("split.count", 2)),
        ("no layers", "layers: 0", |f| f.set_u32("llama.block_count", 0)),
        ("too many layers", "only 4 tensors", |f| f.set_u32("llama.block_count", 60_000)),
        ("far too many layers", "layers: 4294967295", |f| f.set_u32("llama.block_count", u32::MAX)),
        ("layers in words", "llama.block_count: want an integer", |f| {
            f.set("llama.block_count", STRING, string("1"));
        }),
        ("negative layers", "llama.block_count: want an integer", |f| {
            f.set("llama.block_count", I32, (-1i32).to_le_bytes().to_vec());
        }),
        ("no heads", "llama.attention.head_count: 0 heads", |f| f.set_u32("llama.attention.head_count", 0)),
        ("three heads", "3 heads don't divide", |f| f.set_u32("llama.attention.head_count", 3)),
        ("no KV heads", "key/value heads: 0", |f| f.set_u32("llama.attention.head_count_kv", 0)),
        ("more KV heads than heads", "key/value heads", |f| f.set_u32("llama.attention.head_count_kv", 4)),
        ("heads of nothing", "head width: 0", |f| f.set_u32("llama.attention.key_length", 0)),
        ("other value heads", "value heads of 8", |f| f.set_u32("llama.attention.value_length", 8)),
        ("no context", "context length: 0", |f| f.set_u32("llama.context_length", 0)),
        ("no context said", "llama.context_length: missing", |f| f.remove("llama.context_length")),
        ("another width", "the embedding table has rows of 32", |f| f.set_u32("llama.embedding_length", 64)),
        ("no feed-forward", "feed-forward width: 0", |f| f.set_u32("llama.feed_forward_length", 0)),
        ("uneven layers", "differs from layer to layer", |f| {
            f.set("llama.feed_forward_length", ARRAY, array(U32, &[vec![64, 0, 0, 0], vec![32, 0, 0, 0]]));
        }),
        ("layers of nothing", "differs from layer to layer", |f| {
            f.set("llama.feed_forward_length", ARRAY, array(U32, &[]));
        }),
        ("odd rope", "rotary dimensions: 15", |f| f.set_u32("llama.rope.dimension_count", 15)),
        ("no rope", "rotary dimensions: 0", |f| f.set_u32("llama.rope.dimension_count", 0)),
        ("wide rope", "rotary dimensions: 18", |f| f.set_u32("llama.rope.dimension_count", 18)),
        ("epsilon 0", "norm epsilon", |f| f.set_f32("llama.attention.layer_norm_rms_epsilon", 0.0)),
        ("epsilon -1", "norm epsilon", |f| f.set_f32("llama.attention.layer_norm_rms_epsilon", -1.0)),
        ("epsilon NaN", "norm epsilon", |f| f.set_f32("llama.attention.layer_norm_rms_epsilon", f32::NAN)),
        ("no epsilon", "layer_norm_rms_epsilon: missing", |f| f.remove("llama.attention.layer_norm_rms_epsilon")),
        ("base 0", "rope base", |f| f.set_f32("llama.rope.freq_base", 0.0)),
        ("base infinity", "rope base", |f| f.set_f32("llama.rope.freq_base", f32::INFINITY)),
        ("base in integers", "freq_base: want a float", |f| f.set_u32("llama.rope.freq_base", 10_000)),
        ("unknown scaling", "longrope can't be served", |f| {
            f.set("llama.rope.scaling.type", STRING, string("longrope"));
        }),
        ("scaling by NaN", "rope scaling factor", |f| f.set_f32("llama.rope.scaling.factor", f32::NAN)),
        ("negative scaling", "rope scaling factor", |f| f.set_f32("llama.rope.scaling.factor", -2.0)),
        ("yarn of nothing", "original_context_length: missing", |f| {
            f.set("llama.rope.scaling.type", STRING, string("yarn"));
        }),
        ("yarn of 0", "rope original context", |f| {
            f.set("llama.rope.scaling.type", STRING, string("yarn"));
            f.set_u32("llama.rope.scaling.original_context_length", 0);
        }),
        ("short rope factors", "rope_freqs.weight: want F32 [8]", |f| f.push_f32("rope_freqs.weight", &[4])),
        // The first factor that the writer makes is 0.
        ("rope factors of 0", "rope factors: 0", |f| f.push_f32("rope_freqs.weight", &[8])),
        ("no embeddings", "token_embd.weight: missing", |f| {
            f.tensors.remove(0);
        }),
        ("no dimensions", "0 dimensions", |f| f.tensors[0].dims.clear()),
        ("five dimensions", "5 dimensions", |f| f.tensors[0].dims = vec![1; 5]),
        ("many dimensions", "dimensions", |f| f.tensors[0].dims = vec![1; 100]),
        ("a dimension of 0", "a shape of [0, 32]", |f| f.tensors[0].dims = vec![32, 0]),
        ("rows of 0", "a shape of [8, 0]", |f| f.tensors[0].dims = vec![0, 8]),
        ("dimensions that overflow", "overflow", |f| f.tensors[0].dims = vec![32, 1 << 40, 1 << 40]),
        ("bytes that overflow", "beyond the file", |f| f.tensors[0].dims = vec![1 << 62, 1]),
        ("more rows than bytes", "beyond the file", |f| f.tensors[3].dims = vec![32, 1 << 40]),
        ("a cut block", "stores blocks of 32", |f| f.tensors[2].dims = vec![33, 1]),
        ("an unknown type", "type 77 (unknown)", |f| f.tensors[0].dtype = 77),
        ("a type that can't be read", "type 10 (Q2_K)", |f| f.tensors[0].dtype = 10),
        ("a misaligned offset", "not a multiple", |f| f.tensors[1].offset = Some(1025)),
        ("an offset beyond the file", "beyond the file", |f| f.tensors[1].offset = Some(1 << 40)),
        ("an offset that overflows", "beyond the file", |f| f.tensors[1].offset = Some(u64::MAX - 31)),
        ("tensors that overlap", "overlaps tensor token_embd.weight", |f| f.tensors[1].offset = Some(992)),
        ("a tensor twice", "there are two of that name", |f| f.tensors[1].name = b"token_embd.weight".to_vec()),
        ("a tensor's name that is no text", "name of tensor 1", |f| f.tensors[1].name = vec![0x80]),
        ("tokens that are numbers", "tokenizer.ggml.tokens: want strings", |f| {
            f.set("tokenizer.ggml.tokens", ARRAY, array(U32, &[]));
        }),
        ("tokenizer 7", "tokenizer.ggml.model: want a string", |f| f.set_u32("tokenizer.ggml.model", 7)),
        ("scores in words", "tokenizer.ggml.scores: want 32-bit floats", |f| {
            f.set("tokenizer.ggml.scores", ARRAY, array(STRING, &[]));
        }),
    ];
    let scratch = Scratch::new();
    for (what, mentions, lie) in lies {
        let mut file = GgufFile::tiny();
        lie(&mut file);
        scratch.write(&file.bytes().0);
        let error = exercise(&scratch.path).expect_err(what).to_string();
        assert!(error.contains(mentions), "{what}: {error}");
        assert!(error.contains("tiny.gguf"), "{what}: {error}");
    }
    assert!(lies.len() > 70);
}

#[test]
fn a_truncated_file_is_an_error_at_every_length() {
    let scratch = Scratch::new();
    let (bytes, _) = GgufFile::tiny().bytes();
    for len in 0..bytes.len() {
        scratch.write(&bytes[..len]);
        assert!(exercise(&scratch.path).is_err(), "{len} of {} bytes", bytes.len());
    }
    scratch.write(&bytes);
    exercise(&scratch.path).expect("whole");
}

#[test]
fn flipped_bits_and_wild_numbers_never_panic() {
    let scratch = Scratch::new();
    let (bytes, header_len) = GgufFile::tiny().bytes();
    let mut refused = 0;
    for bit in 0..8 * header_len {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        scratch.write(&bytes);
        refused += usize::from(exercise(&scratch.path).is_err());
    }
    // Most bits matter; those of names and numbers of no consequence don't.
    assert!(refused > 4 * header_len, "{refused} of {}", 8 * header_len);
    for offset in 0..header_len - 8 {
        for wild in [u64::MAX, 1 << 63, 1 << 40, (1 << 32) - 1, 0] {
            let mut bytes = bytes.clone();
            bytes[offset..offset + 8].copy_from_slice(&wild.to_le_bytes());
            scratch.write(&bytes);
            let _either = exercise(&scratch.path);
        }
    }
}

#[test]
fn what_its_makers_want_is_read() {
    let scratch = Scratch::new();
    assert_eq!(scratch.open(&GgufFile::tiny()).generation_defaults().expect("none"), GenerationDefaults::default());
    let mut file = GgufFile::tiny();
    file.set("general.sampling.temp", F32, 0.7f32.to_le_bytes().to_vec());
    file.set("general.sampling.top_k", I32, (-1i32).to_le_bytes().to_vec());
    file.set("general.sampling.penalty_repeat", F32, 1.1f32.to_le_bytes().to_vec());
    let want = GenerationDefaults {
        temperature: Some(0.7),
        top_k: Some(0),
        repetition_penalty: Some(1.1),
        ..GenerationDefaults::default()
    };
    assert_eq!(scratch.open(&file).generation_defaults().expect("right types"), want);
    for (key, kind, bytes) in [
        ("general.sampling.top_p", F32, 1.5f32.to_le_bytes().to_vec()),
        ("general.sampling.top_p", STRING, string("much")),
        ("general.sampling.top_k", F32, 2.5f32.to_le_bytes().to_vec()),
    ] {
        let mut file = GgufFile::tiny();
        file.set(key, kind, bytes);
        let error = scratch.open(&file).generation_defaults().expect_err("it can't be used").to_string();
        assert!(error.contains("general.sampling."), "{error}");
    }
}
