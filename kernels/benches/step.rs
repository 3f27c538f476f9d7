//! Steps of a small model's layers, operation after operation as a rank runs them:
//! `cargo bench -p phalanx-kernels --bench step [-- [THREADS [ISA [ROUNDS]]]]`.
//!
//! What an operation leaves in which core's caches decides how fast the next one is: operations alone say little of steps.

use std::time::{Duration, Instant};

use phalanx_kernels::{
    CpuConfig, CpuOps, Isa,
    collective::{Collective, CollectiveConfig, PeerAddress, connect},
    ops::{
        ActivationLevels, Attention, Buf, FixedBuf, Input, KvShape, Linear, LinearSource, Ops, Precision, Rope,
        RopeSpec, RopeStyle, RowChunk, StepRows, WeightData,
    },
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const N_LAYERS: usize = 30;
const HIDDEN: usize = 576;
const FFN: usize = 1536;
const HEAD_DIM: usize = 64;
const N_HEADS: usize = 9;
const N_KV_HEADS: usize = 3;
const BLOCK_SIZE: usize = 16;
const MOST_ROWS: usize = 512;
/// Where a sequence stands that decodes.
const CONTEXT: usize = 128;
const OPERATIONS: [&str; 7] = ["q k v", "rope, store", "attention", "output", "add", "gate, up", "down"];

struct Layer {
    qkv: [Linear; 3],
    output: Linear,
    gate_up: [Linear; 2],
    down: Linear,
}

struct Model {
    ops: CpuOps,
    alone: Box<dyn Collective>,
    layers: Vec<Layer>,
    norm: Buf,
    rope: Rope,
    residual: Buf,
    delta: FixedBuf,
    q: Buf,
    k: Buf,
    v: Buf,
    attended: Buf,
    gate: Buf,
    up: Buf,
}

impl Model {
    fn new(mut ops: CpuOps) -> Result<Self> {
        let quants: Vec<u8> = (0..FFN * HIDDEN).map(|i| (i * 7 % 16) as u8).collect();
        let scales = vec![1.0 / 128.0; FFN * HIDDEN / 32];
        let mut weight = |n_out: usize, n_in: usize, slice_width| {
            let n = n_out * n_in;
            let data = WeightData::Q4 { quants: &quants[..n], scales: &scales[..n / 32], mins: &scales[..n / 32] };
            let (bias, activations) = (None, ActivationLevels::One);
            ops.load_linear(LinearSource { n_out, n_in, data, bias, slice_width, activations })
        };
        let mut layers = Vec::new();
        for _ in 0..N_LAYERS {
            let kv = N_KV_HEADS * HEAD_DIM;
            layers.push(Layer {
                qkv: [weight(HIDDEN, HIDDEN, None)?, weight(kv, HIDDEN, None)?, weight(kv, HIDDEN, None)?],
                output: weight(HIDDEN, HIDDEN, Some(64))?,
                gate_up: [weight(FFN, HIDDEN, None)?, weight(FFN, HIDDEN, None)?],
                down: weight(HIDDEN, FFN, Some(128))?,
            });
        }
        let inv_freq = (0..HEAD_DIM / 2).map(|i| 10_000_f32.powf(-2.0 * i as f32 / HEAD_DIM as f32)).collect();
        let n_blocks = MOST_ROWS / BLOCK_SIZE * 32;
        let shape = KvShape {
            n_layers: N_LAYERS,
            n_blocks,
            block_size: BLOCK_SIZE,
            n_kv_heads: N_KV_HEADS,
            head_dim: HEAD_DIM,
        };
        ops.alloc_kv(shape)?;
        let config = CollectiveConfig {
            epoch: 1,
            rank: 0,
            world_size: 1,
            secret: Vec::new(),
            peers: vec![PeerAddress { host_id: String::new(), address: String::new() }],
            time_limit: Duration::from_secs(1),
        };
        let start: Vec<f32> = (0..MOST_ROWS * HIDDEN).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
        let mut room = |width: usize| ops.alloc(MOST_ROWS * width);
        let (q, attended, gate, up) = (room(HIDDEN)?, room(HIDDEN)?, room(FFN)?, room(FFN)?);
        let (k, v) = (room(N_KV_HEADS * HEAD_DIM)?, room(N_KV_HEADS * HEAD_DIM)?);
        Ok(Self {
            alone: connect(&config, None, None)?,
            layers,
            // Scores and what is gated are as small as in models.
            norm: ops.load_vector(&vec![1.0 / 16.0; HIDDEN])?,
            rope: ops.load_rope(&RopeSpec { style: RopeStyle::Interleaved, inv_freq, magnitude: 1.0 })?,
            residual: ops.load_vector(&start)?,
            delta: ops.alloc_fixed(MOST_ROWS * HIDDEN)?,
            q,
            k,
            v,
            attended,
            gate,
            up,
            ops,
        })
    }

    /// Seconds that each operation takes in one step, in all layers.
    fn step(&mut self, rows: &StepRows) -> Result<[f64; OPERATIONS.len()]> {
        let kv_head_of: Vec<u32> = (0..N_HEADS).map(|head| (head * N_KV_HEADS / N_HEADS) as u32).collect();
        let n_rows = rows.n_rows();
        let normed = Input::Normed { x: self.residual, weight: self.norm, eps: 1e-5 };
        let mut seconds = [0.0; OPERATIONS.len()];
        let ops = &mut self.ops;
        ops.begin_step(rows)?;
        let mut begun = Instant::now();
        let mut done = |operation: usize| {
            let now = Instant::now();
            seconds[operation] += (now - begun).as_secs_f64();
            begun = now;
        };
        for (i, layer) in self.layers.iter().enumerate() {
            let [q, k, v] = layer.qkv;
            ops.linear(normed, n_rows, &[(q, self.q), (k, self.k), (v, self.v)])?;
            done(0);
            ops.rope(&[(self.q, N_HEADS), (self.k, N_KV_HEADS)], HEAD_DIM, self.rope)?;
            ops.store_kv(i, self.k, self.v)?;
            done(1);
            let attention = Attention { layer: i, n_heads: N_HEADS, kv_head_of: &kv_head_of, scale: 0.125 };
            ops.attention(attention, self.q, self.attended)?;
            done(2);
            ops.linear_exact(self.attended.into(), n_rows, layer.output, self.delta)?;
            done(3);
            ops.add_reduced(self.residual, self.delta, n_rows * HIDDEN, &mut *self.alone)?;
            done(4);
            let [gate, up] = layer.gate_up;
            ops.linear(normed, n_rows, &[(gate, self.gate), (up, self.up)])?;
            done(5);
            ops.linear_exact(Input::Gated { gate: self.gate, up: self.up }, n_rows, layer.down, self.delta)?;
            done(6);
            ops.add_reduced(self.residual, self.delta, n_rows * HIDDEN, &mut *self.alone)?;
            done(4);
        }
        Ok(seconds)
    }
}

fn chunk(sequence: usize, first_row: usize, start: usize, n_rows: usize) -> RowChunk {
    let per_sequence = MOST_ROWS / BLOCK_SIZE;
    let blocks = (0..per_sequence).map(|i| (sequence * per_sequence + i) as u32).collect();
    RowChunk { first_row, n_rows, start, blocks }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let threads = args.first().map_or(Ok(2), |arg| arg.parse())?;
    let isa = args.get(1).map(|arg| arg.parse::<Isa>()).transpose()?;
    let rounds: usize = args.get(2).map_or(Ok(20), |arg| arg.parse())?;
    let ops = CpuOps::new(CpuConfig { threads, isa, ..CpuConfig::new(Precision::Auto) })?;
    println!("{}; layers alone, tokens/s and ms of the median step", ops.name());
    let mut model = Model::new(ops)?;
    let decode = |n: usize| StepRows { chunks: (0..n).map(|i| chunk(i, i, CONTEXT, 1)).collect() };
    let prefill = |n: usize| StepRows { chunks: vec![chunk(0, 0, 0, n)] };
    let steps = [1, 8, 32].map(|n| (format!("decode {n}"), decode(n)));
    for (name, rows) in steps.into_iter().chain([128, 512].map(|n| (format!("prefill {n}"), prefill(n)))) {
        let mut runs = (0..rounds.max(1)).map(|_| model.step(&rows)).collect::<Result<Vec<_>>>()?;
        let mut median = |of: &dyn Fn(&[f64; OPERATIONS.len()]) -> f64| {
            runs.sort_by(|a, b| of(a).total_cmp(&of(b)));
            runs.get(runs.len() / 2).map_or(f64::NAN, of)
        };
        let all = median(&|run| run.iter().sum());
        print!("{name:>11}: {:7.1} tokens/s, {:7.2} ms:", rows.n_rows() as f64 / all, all * 1e3);
        for (i, operation) in OPERATIONS.iter().enumerate() {
            print!("  {operation} {:.2}", median(&|run| run[i]) * 1e3);
        }
        println!();
    }
    Ok(())
}
