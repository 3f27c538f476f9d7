use serde_json::{Value, json};

use super::exercise;
use crate::{
    checkpoint::{Checkpoint, TensorType, safetensors::Safetensors, testing::*},
    model_config::RopeScaling,
};

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn tiny_weights() -> Vec<u8> {
    safetensors_file(TINY_HEADER, TINY_DATA)
}

/// The configuration that the tiny folder has with these keys changed.
fn opened(changes: Value) -> Safetensors {
    let folder = scratch();
    write_folder(folder.path(), changed(changes).to_string().as_bytes(), &tiny_weights());
    Safetensors::open(folder.path()).expect("a right folder")
}

fn changed(changes: Value) -> Value {
    let mut config = tiny_config();
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

#[test]
fn a_right_folder_is_read() {
    let checkpoint = opened(json!({}));
    let config = checkpoint.config();
    assert_eq!(config.architecture, "llama");
    assert_eq!((config.n_layers, config.hidden, config.ffn, config.vocab), (1, 4, 8, 3));
    assert_eq!((config.n_heads, config.n_kv_heads, config.head_dim), (2, 1, 2));
    assert_eq!((config.context_length, config.norm_eps, config.rope.dims), (64, 1e-6, 2));
    assert!(!config.rope.interleaved);
    // There's no lm_head.
    assert!(config.tied_embeddings);
    let names: Vec<_> = checkpoint.tensors().iter().map(|t| (t.name.as_str(), t.dtype, t.rows, t.cols)).collect();
    let want = [
        ("token_embd.weight", TensorType::F32, 3, 4),
        ("output_norm.weight", TensorType::Bf16, 1, 4),
        ("blk.0.attn_q.weight", TensorType::F16, 4, 4),
    ];
    assert_eq!(names, want);
    let row = checkpoint.rows("blk.0.attn_q.weight", 1..3).expect("there are four");
    assert_eq!(row.to_vec(), (64..80).collect::<Vec<u8>>());
    assert!(checkpoint.tokenizer().expect("none is fine").is_none());
}

#[test]
fn rope_scaling_is_read() {
    let scaling = |changes| opened(changes).config().rope.scaling.clone();
    assert_eq!(scaling(json!({"rope_scaling": null})), RopeScaling::None);
    assert_eq!(scaling(json!({"rope_scaling": {"rope_type": "default"}})), RopeScaling::None);
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(scaling(json!({"rope_scaling": {"type": "linear", "factor": 4}})), linear);
    assert_eq!(scaling(json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0}})), linear);
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16});
    let want = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 16.0 };
    assert_eq!(scaling(json!({"rope_scaling": llama3})), want);

    let yarn = |factor, original_context, attention_factor, truncate| RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor,
        truncate,
    };
    let original = json!({"type": "yarn", "original_max_position_embeddings": 16});
    assert_eq!(scaling(json!({"rope_scaling": original})), yarn(4.0, 16.0, None, true));
    let mscale = json!({"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "truncate": false,
        "beta_fast": 0});
    assert_eq!(scaling(json!({"rope_scaling": mscale})), yarn(40.0, 64.0, Some(1.0), false));
    let given = json!({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.5, "mscale": 1.0,
        "mscale_all_dim": 2.0});
    assert_eq!(scaling(json!({"rope_scaling": given})), yarn(2.0, 64.0, Some(0.5), true));
}

#[test]
fn theta_heads_ties_and_windows() {
    let inside = json!({"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.5});
    let rope = opened(json!({"rope_parameters": inside, "rope_theta": null, "head_dim": 8})).config().rope.clone();
    assert_eq!((rope.theta, rope.dims), (5e5, 4));
    assert_eq!(opened(json!({"rope_theta": null})).config().rope.theta, 1e4);
    assert_eq!(opened(json!({"num_key_value_heads": null})).config().n_kv_heads, 2);
    // A window is served as far as it is no window.
    let window = json!({"model_type": "mistral", "sliding_window": 24});
    let config = opened(window).config().clone();
    assert_eq!((config.architecture.as_str(), config.context_length), ("llama", 24));
    let unused = json!({"model_type": "qwen2", "sliding_window": 24, "use_sliding_window": false});
    assert_eq!(opened(unused).config().context_length, 64);

    let folder = scratch();
    let header =
        TINY_HEADER.replace("model.layers.0.self_attn.q_proj.weight", "lm_head.weight").replace("[4,4]", "[2,8]");
    write_folder(folder.path(), tiny_config().to_string().as_bytes(), &safetensors_file(&header, TINY_DATA));
    assert!(!Safetensors::open(folder.path()).expect("a right folder").config().tied_embeddings);
}

/// Two files and their index.
fn write_parts(folder: &std::path::Path, weight_map: Value) {
    let table = r#"{"model.embed_tokens.weight":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]}}"#;
    let norm = r#"{"model.norm.weight":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    for (name, bytes) in [
        ("config.json", tiny_config().to_string().into_bytes()),
        ("a.safetensors", safetensors_file(table, 48)),
        ("b.safetensors", safetensors_file(norm, 16)),
        ("model.safetensors.index.json", json!({"metadata": {}, "weight_map": weight_map}).to_string().into_bytes()),
    ] {
        std::fs::write(folder.join(name), bytes).expect("writable");
    }
}

#[test]
fn parts_are_read_by_their_index() {
    let folder = scratch();
    let right = json!({"model.embed_tokens.weight": "a.safetensors", "model.norm.weight": "b.safetensors"});
    write_parts(folder.path(), right);
    exercise(folder.path()).expect("right");
    let checkpoint = Safetensors::open(folder.path()).expect("right");
    assert_eq!(checkpoint.rows("output_norm.weight", 0..1).expect("in the second file").len(), 16);

    for (weight_map, mentions) in [
        (json!({"model.embed_tokens.weight": "../a.safetensors"}), "is not a file name"),
        (json!({"model.embed_tokens.weight": "/etc/passwd"}), "is not a file name"),
        (json!({"model.embed_tokens.weight": ""}), "is not a file name"),
        (json!({"model.embed_tokens.weight": "c.safetensors"}), "c.safetensors: No such file"),
        (json!({"model.embed_tokens.weight": "b.safetensors"}), "model.embed_tokens.weight: missing"),
        (json!({"model.norm.weight": "b.safetensors"}), "model.embed_tokens.weight: missing"),
        (json!({}), "model.embed_tokens.weight: missing"),
        (json!({"model.embed_tokens.weight": 3}), "invalid type"),
        (json!([]), "invalid type"),
    ] {
        write_parts(folder.path(), weight_map);
        let error = exercise(folder.path()).expect_err(mentions).to_string();
        assert!(error.contains(mentions), "{error}");
    }
    std::fs::remove_file(folder.path().join("model.safetensors.index.json")).expect("it's there");
    assert!(exercise(folder.path()).expect_err("no weights").to_string().contains("has neither model.safetensors nor"));
}

#[test]
fn lies_in_the_configuration_are_found() {
    for (changes, mentions) in [
        (json!({"model_type": null}), "model_type: missing"),
        (json!({"model_type": 3}), "model_type: want a string, got 3"),
        (json!({"hidden_size": 8}), "hidden_size: 8, but the embedding table has rows of 4"),
        (json!({"hidden_size": "4"}), "hidden_size: want an integer"),
        (json!({"hidden_size": -4}), "hidden_size: want an integer"),
        (json!({"hidden_size": 4.5}), "hidden_size: want an integer"),
        (json!({"hidden_size": 1e30}), "hidden_size: want an integer"),
        (json!({"intermediate_size": null}), "intermediate_size: missing"),
        (json!({"intermediate_size": 0}), "feed-forward width: 0"),
        (json!({"num_hidden_layers": 0}), "layers: 0"),
        (json!({"num_hidden_layers": 1000}), "only 3 tensors"),
        (json!({"num_attention_heads": 0}), "0 heads don't divide"),
        (json!({"num_attention_heads": 3}), "3 heads don't divide"),
        (json!({"num_attention_heads": 0, "head_dim": 2}), "query heads: 0"),
        (json!({"num_key_value_heads": 0}), "key/value heads: 0"),
        (json!({"num_attention_heads": 3, "head_dim": 2, "num_key_value_heads": 2}), "2 don't divide the 3"),
        (json!({"head_dim": 0}), "head width: 0"),
        (json!({"head_dim": 3}), "rotary dimensions: 3"),
        (json!({"head_dim": u64::MAX}), "head width"),
        (json!({"max_position_embeddings": 0}), "context length: 0"),
        (json!({"rms_norm_eps": 0}), "norm epsilon: 0"),
        (json!({"rms_norm_eps": null}), "rms_norm_eps: missing"),
        (json!({"rms_norm_eps": "1e-5"}), "rms_norm_eps: want a number"),
        (json!({"rope_theta": 0}), "rope base: 0"),
        (json!({"rope_theta": -1e4}), "rope base"),
        (json!({"partial_rotary_factor": 2}), "partial_rotary_factor: 2"),
        (json!({"partial_rotary_factor": -1}), "partial_rotary_factor: -1"),
        (json!({"rope_scaling": []}), "rope_scaling: want an object"),
        (json!({"rope_scaling": {"type": "dynamic", "factor": 2}}), "rope_scaling.rope_type: dynamic can't be served"),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor: missing"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "rope scaling factor: 0"),
        (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8}}), "low_freq_factor: missing"),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}),
            "rope high_freq_factor: 4",
        ),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}}),
            "rope scaling factor: inf",
        ),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_slow": -1}}), "rope beta_slow: -1"),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": 1}}), "truncate: want true or false"),
        (json!({"hidden_act": "gelu"}), "hidden_act: gelu"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings: want true or false"),
        (json!({"quantization_config": {"quant_method": "awq"}}), "quantized by awq"),
    ] {
        let folder = scratch();
        write_folder(folder.path(), changed(changes).to_string().as_bytes(), &tiny_weights());
        let error = exercise(folder.path()).expect_err(mentions).to_string();
        assert!(error.contains(mentions) && error.contains("config.json"), "want {mentions}: {error}");
    }
    for text in ["", "[]", "{", "nul", &"[".repeat(100_000), "{\"model_type\":\"\u{0}\"}"] {
        let folder = scratch();
        write_folder(folder.path(), text.as_bytes(), &tiny_weights());
        assert!(exercise(folder.path()).is_err(), "{text}");
    }
}

#[test]
fn lies_in_the_header_are_found() {
    let dims = format!("[{}4]", "1,".repeat(1000));
    let deep = format!(r#"{{"__metadata__":{}"#, "[".repeat(100_000));
    let twice = TINY_HEADER.replace("model.norm.weight", "model.embed_tokens.weight");
    let replaced = |from: &str, to: &str| {
        assert!(TINY_HEADER.contains(from), "{from}");
        TINY_HEADER.replacen(from, to, 1)
    };
    for (header, mentions) in [
        (String::new(), "header: EOF"),
        ("{}".to_owned(), "model.embed_tokens.weight: missing"),
        ("[]".to_owned(), "header: invalid type"),
        (deep, "header: EOF"),
        (twice, "there are two tensors named model.embed_tokens.weight"),
        (replaced("model.norm.weight", "embed_tokens.weight"), "another tensor is token_embd.weight already"),
        (replaced("[0,48]", "[48,0]"), "data_offsets [48, 0]"),
        (replaced("[0,48]", "[0,4800]"), "data_offsets [0, 4800]"),
        (replaced("[0,48]", "[0,18446744073709551615]"), "data_offsets"),
        (replaced("[0,48]", "[0,18446744073709551616]"), "header: "),
        (replaced("[0,48]", "[-1,48]"), "header: "),
        (replaced("[0,48]", "[0]"), "header: "),
        (replaced("[0,48]", "[0,44]"), "does not take the 44 bytes"),
        (replaced("[48,56]", "[40,48]"), "overlaps tensor"),
        (replaced("[3,4]", "[3,5]"), "does not take the 48 bytes"),
        (replaced("[3,4]", "[4294967296,4294967296,3]"), "does not take"),
        (replaced("[3,4]", "[4611686018427387904,4,3]"), "does not take"),
        (replaced("[3,4]", "[-3,4]"), "header: "),
        (replaced("[3,4]", &dims), "more than 8 dimensions"),
        (replaced("[4]", "4"), "header: "),
        (replaced("BF16", "F8_E4M3"), "type F8_E4M3; F32, F16 and BF16 can be read"),
        (replaced("\"dtype\":\"F32\",", ""), "missing field `dtype`"),
        (replaced("\"dtype\":\"F32\"", "\"dtype\":32"), "header: "),
    ] {
        let folder = scratch();
        let config = tiny_config().to_string();
        write_folder(folder.path(), config.as_bytes(), &safetensors_file(&header, TINY_DATA));
        let error = exercise(folder.path()).expect_err(mentions).to_string();
        assert!(error.contains(mentions), "want {mentions}: {error}");
    }
    // No elements: fine as a leftover, not as a weight.
    let folder = scratch();
    let empty = replaced("[48,56]", "[48,48]").replace("\"shape\":[4]", "\"shape\":[0]");
    write_folder(folder.path(), tiny_config().to_string().as_bytes(), &safetensors_file(&empty, TINY_DATA));
    assert!(exercise(folder.path()).expect_err("an empty norm").to_string().contains("no elements"));
}

#[test]
fn header_lengths_are_bounded_by_the_file() {
    let folder = scratch();
    for len in [u64::MAX, 1 << 63, 100_000_001, 1 << 20, TINY_HEADER.len() as u64 + TINY_DATA as u64 + 1] {
        let mut weights = tiny_weights();
        weights[..8].copy_from_slice(&len.to_le_bytes());
        write_folder(folder.path(), tiny_config().to_string().as_bytes(), &weights);
        let error = exercise(folder.path()).expect_err("too long").to_string();
        assert!(error.contains("header length"), "{error}");
    }
}

#[test]
fn truncations_and_flipped_bits_never_panic() {
    let folder = scratch();
    let config = tiny_config().to_string().into_bytes();
    let weights = tiny_weights();
    for len in 0..weights.len() {
        write_folder(folder.path(), &config, &weights[..len]);
        assert!(exercise(folder.path()).is_err(), "{len} of {} bytes", weights.len());
    }
    for len in 0..config.len() {
        write_folder(folder.path(), &config[..len], &weights);
        assert!(exercise(folder.path()).is_err(), "{len} of {} bytes", config.len());
    }
    for bit in 0..8 * (8 + TINY_HEADER.len()) {
        let mut weights = weights.clone();
        weights[bit / 8] ^= 1 << (bit % 8);
        write_folder(folder.path(), &config, &weights);
        let _either = exercise(folder.path());
    }
    for bit in 0..8 * config.len() {
        let mut config = config.clone();
        config[bit / 8] ^= 1 << (bit % 8);
        write_folder(folder.path(), &config, &weights);
        let _either = exercise(folder.path());
    }
}
