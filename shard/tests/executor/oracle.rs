//! The model straight from its formulas, in f64, one position after the other.

use std::collections::BTreeMap;

use crate::tiny::TinyModel;

/// A row for each position.
type Rows = Vec<Vec<f64>>;

/// Log-probabilities over the vocabulary after each token.
pub fn log_probabilities(model: &TinyModel, tokens: &[u32]) -> Rows {
    let c = &model.config;
    let mut caches = vec![(Rows::new(), Rows::new()); c.n_layers];
    tokens
        .iter()
        .enumerate()
        .map(|(position, token)| {
            let mut x = row(&model.values["token_embd.weight"], *token as usize, c.hidden);
            for (layer, (keys, values)) in caches.iter_mut().enumerate() {
                let name = |n: &str| format!("blk.{layer}.{n}");
                let h = norm(&x, &model.values[&name("attn_norm.weight")], c.norm_eps);
                let project = |n: &str| {
                    let mut y = matmul(&model.values[&name(&format!("{n}.weight"))], &h);
                    if let Some(bias) = model.values.get(&name(&format!("{n}.bias"))) {
                        y.iter_mut().zip(bias).for_each(|(y, b)| *y += f64::from(*b));
                    }
                    y
                };
                let (mut q, mut k, v) = (project("attn_q"), project("attn_k"), project("attn_v"));
                rotate(&mut q, model, position);
                rotate(&mut k, model, position);
                keys.push(k);
                values.push(v);
                let mut attended = Vec::new();
                for head in 0..c.n_heads {
                    let kv = head / (c.n_heads / c.n_kv_heads) * c.head_dim;
                    let q = &q[head * c.head_dim..][..c.head_dim];
                    let scores: Vec<f64> =
                        keys.iter().map(|k| dot(q, &k[kv..kv + c.head_dim]) / (c.head_dim as f64).sqrt()).collect();
                    let weights = softmax(&scores);
                    for d in 0..c.head_dim {
                        attended.push(weights.iter().zip(values.iter()).map(|(w, v)| w * v[kv + d]).sum());
                    }
                }
                add(&mut x, &matmul(&model.values[&name("attn_output.weight")], &attended));
                let h = norm(&x, &model.values[&name("ffn_norm.weight")], c.norm_eps);
                let gate = matmul(&model.values[&name("ffn_gate.weight")], &h);
                let up = matmul(&model.values[&name("ffn_up.weight")], &h);
                let inner: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(&mut x, &matmul(&model.values[&name("ffn_down.weight")], &inner));
            }
            let h = norm(&x, &model.values["output_norm.weight"], c.norm_eps);
            let output = if c.tied_embeddings { "token_embd.weight" } else { "output.weight" };
            softmax(&matmul(&model.values[output], &h)).into_iter().map(f64::ln).collect()
        })
        .collect()
}

/// The most probable token after some tokens, and by how much it leads.
pub fn best(log_probabilities: &[f64]) -> (u32, f64) {
    let ranked: BTreeMap<_, _> =
        log_probabilities.iter().enumerate().map(|(id, p)| (ordered::Ordered(-p), id as u32)).collect();
    let mut best = ranked.into_iter();
    match (best.next(), best.next()) {
        (Some((a, id)), Some((b, _))) => (id, b.0 - a.0),
        _ => panic!("a vocabulary has two tokens"),
    }
}

mod ordered {
    /// A float that is not NaN.
    #[derive(PartialEq, PartialOrd)]
    pub struct Ordered(pub f64);
    impl Eq for Ordered {}
    #[allow(clippy::derive_ord_xor_partial_ord)]
    impl Ord for Ordered {
        fn cmp(&self, other: &Self) -> std::cmp::Ordering {
            self.0.total_cmp(&other.0)
        }
    }
}

fn row(matrix: &[f32], idx: usize, width: usize) -> Vec<f64> {
    matrix[idx * width..(idx + 1) * width].iter().copied().map(f64::from).collect()
}

fn matmul(matrix: &[f32], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], delta: &[f64]) {
    x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
}

fn norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * f64::from(*w)).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / sum).collect()
}

fn rotate(x: &mut [f64], model: &TinyModel, position: usize) {
    let (c, rope) = (&model.config, &model.config.rope);
    for head in x.chunks_mut(c.head_dim) {
        for i in 0..rope.dims / 2 {
            let (a, b) = if rope.interleaved { (2 * i, 2 * i + 1) } else { (i, i + rope.dims / 2) };
            let angle = position as f64 * rope.theta.powf(-2.0 * i as f64 / rope.dims as f64);
            (head[a], head[b]) =
                (head[a] * angle.cos() - head[b] * angle.sin(), head[b] * angle.cos() + head[a] * angle.sin());
        }
    }
}
