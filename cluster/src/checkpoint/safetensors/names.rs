//! Hugging Face's tensor names to canonical ones.

/// Outside the layers, after the `model.` prefix.
const GLOBAL: &[(&str, &str)] = &[("embed_tokens", "token_embd"), ("norm", "output_norm"), ("lm_head", "output")];

/// Inside a layer, after `layers.N.`.
const LAYER: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The canonical name; `None` if the tensor isn't one that decoders have.
pub(super) fn canonical(name: &str) -> Option<String> {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let (module, kind) = name.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let find = |table: &[(&str, &'static str)], module: &str| {
        table.iter().find(|(theirs, _)| *theirs == module).map(|(_, ours)| *ours)
    };
    match module.strip_prefix("layers.") {
        None => Some(format!("{}.{kind}", find(GLOBAL, module)?)),
        Some(in_layer) => {
            let (layer, module) = in_layer.split_once('.')?;
            // As written by a program: `07` or `+7` would make two names of one.
            let layer = layer.parse::<u32>().ok().filter(|n| n.to_string() == layer)?;
            Some(format!("blk.{layer}.{}.{kind}", find(LAYER, module)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn names_of_a_decoder() {
        for (theirs, ours) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
            ("model.layers.12.self_attn.k_proj.bias", "blk.12.attn_k.bias"),
            ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
            ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
            ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ] {
            assert_eq!(canonical(theirs).as_deref(), Some(ours));
        }
    }

    #[test]
    fn others_have_none() {
        for name in [
            "",
            "weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.x.mlp.down_proj.weight",
            "model.layers.00.mlp.down_proj.weight",
            "model.layers.99999999999.mlp.down_proj.weight",
            "model.layers.0.weight",
            "model.layers.0.mlp.experts.1.weight",
        ] {
            assert_eq!(canonical(name), None, "{name}");
        }
    }
}
