//! What is wrong with a checkpoint is said with file and tensor.

use std::sync::Arc;

use phalanx_kernels::ops::Precision;
use phalanx_shard::offline::LocalGroup;

use crate::tiny::{TinyModel, small};

fn refused(change: impl FnOnce(&mut TinyModel), world_size: usize) -> String {
    let mut model = TinyModel::new("llama", true);
    change(&mut model);
    match LocalGroup::of(Arc::new(model), small(world_size, Precision::Auto)) {
        Ok(_) => panic!("a bad model was loaded"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let text = refused(|model| model.remove("blk.1.ffn_up.weight"), 1);
    assert!(text.contains("tiny.gguf") && text.contains("blk.1.ffn_up.weight"), "{text}");
    let text = refused(|model| model.insert("blk.0.attn_k.weight", 47, 64, vec![0.0; 47 * 64]), 2);
    assert!(text.contains("blk.0.attn_k.weight") && text.contains("[48, 64]") && text.contains("[47, 64]"), "{text}");
    let text = refused(|model| model.insert("output_norm.weight", 1, 32, vec![0.0; 32]), 1);
    assert!(text.contains("output_norm.weight"), "{text}");
}

#[test]
fn a_required_bias_must_be_there() {
    let text = refused(|model| model.config.architecture = "qwen2".to_owned(), 1);
    assert!(text.contains("blk.0.attn_q.bias"), "{text}");
}

#[test]
fn a_tensor_that_nobody_reads_is_refused() {
    let text = refused(|model| model.insert("blk.0.attn_q_norm.weight", 1, 16, vec![1.0; 16]), 1);
    assert!(text.contains("blk.0.attn_q_norm.weight") && text.contains("not supported"), "{text}");
}

#[test]
fn an_unknown_family_is_refused_with_the_known_ones() {
    let text = refused(|model| model.config.architecture = "mamba".to_owned(), 1);
    assert!(text.contains("mamba") && text.contains("llama, qwen2"), "{text}");
}

#[test]
fn more_ranks_than_heads_are_refused() {
    let text = refused(|_| {}, 7);
    assert!(text.contains("6 query heads"), "{text}");
}
