//! The CPU device.
//!
//! Kernels are written once over a few vector instructions (`simd.rs`, `generic/`) and compiled for each instruction set
//! (`table.rs`), one of which is chosen at start. **All instruction sets, any number of threads and any grouping of rows
//! compute the same bits** as the plain loops of [`crate::reference`]: lanes of a vector are output rows, positions or
//! elements, so that every output is summed in an order that only shapes fix; sums of quants are integers; there is
//! no approximate instruction. Only which NaN a NaN is, is not promised.
//!
//! - Quantized products, quantization of activations: `generic/quantize.rs`, `generic/tile.rs`. A unit that multiplies matrices
//!   (`matrix.rs`) makes sums of quants, which are integers: `generic/matrix.rs`.
//! - Exact sums: each slice's f32 sum is multiplied by 2^24, clamped to 2^51 either way (NaN counts as -2^51), rounded
//!   half to even and added as an integer, wrapping.
//! - Norm, exponential, rotation: `generic/elementwise.rs`. Attention: `generic/attention.rs`.
//! - Cosine and sine of a rotation: the angle is position * frequency in f32; its f64 cosine and sine are rounded to f32
//!   and multiplied by the magnitude. They are `libm`'s: the C library's are others with each library, version and CPU.
//! - The KV cache is f16 (rounded half to even) in [`Precision::Auto`], f32 in [`Precision::Float32`]; a block is a multiple
//!   of 16 positions.

#[cfg(target_arch = "x86_64")]
mod amx;
pub(crate) mod arena;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
mod buffers;
mod generic;
mod input;
mod isa;
pub(crate) mod kv;
mod kv_rows;
mod linear;
mod matrix;
pub(crate) mod open_tiles;
mod ops;
pub(crate) mod pages;
pub(crate) mod pool;
mod prefault;
mod rows;
mod scalar;
mod simd;
mod steps;
mod table;
#[cfg(test)]
mod tests;

pub use isa::Isa;
pub use rows::RowMath;

use crate::{error::KernelError, layout::Packed, ops::Precision, tensor::Aligned};

/// How to use the CPU.
#[derive(Debug, Clone)]
pub struct CpuConfig {
    /// Threads that work on an operation, the caller's among them: 1 to 1024.
    pub threads: usize,
    /// How numbers are kept and multiplied.
    pub precision: Precision,
    /// The instruction set; `None` for the fastest that the CPU has.
    pub isa: Option<Isa>,
    /// Cores to keep the threads on that are not the caller's: the first for the second thread, and so on. Threads
    /// without a core go where the system puts them. Linux only.
    pub pin: Vec<usize>,
}

impl CpuConfig {
    /// One thread, unpinned, fastest instruction set.
    pub fn new(precision: Precision) -> Self {
        Self { threads: 1, precision, isa: None, pin: Vec::new() }
    }
}

/// The CPU as a device: implements [`crate::ops::Ops`].
pub struct CpuOps {
    isa: Isa,
    precision: Precision,
    table: table::Table,
    pool: pool::Pool,
    buffers: buffers::Buffers,
    weights: Vec<Packed>,
    arena: arena::Arena,
    ropes: Vec<steps::RopeTable>,
    kv: Option<kv::KvCache>,
    step: steps::Step,
    /// Quantized activations.
    quantized: Aligned<u8>,
    /// Unpacked weights, a part of a tile for each thread.
    unpacked: Aligned<u8>,
    /// Interleaved f32 activations.
    interleaved: Aligned<f32>,
    /// Rows that are normed or gated, a few for each thread.
    computed: Aligned<f32>,
    /// Queries and scores of attention, a stretch for each thread.
    scores: Aligned<f32>,
    products: Vec<linear::Product>,
    attention_tasks: Vec<generic::attention::AttentionTask>,
}

// SAFETY: the raw pointers in `products` and `attention_tasks` are leftovers of the last operation, kept for their room only.
#[allow(unsafe_code)]
unsafe impl Send for CpuOps {}

impl CpuOps {
    /// Chooses kernels and starts threads.
    pub fn new(config: CpuConfig) -> Result<Self, KernelError> {
        let isa = config.isa.unwrap_or_else(Isa::detect);
        if !isa.is_available() {
            return Err(KernelError::NoDevice {
                name: format!("cpu ({})", isa.name()),
                reason: format!(
                    "this CPU lacks the instruction set: use one of {}",
                    Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>().join(", ")
                ),
            });
        }
        Ok(Self {
            isa,
            precision: config.precision,
            table: table::table(isa),
            pool: pool::Pool::new(config.threads, &config.pin)?,
            buffers: buffers::Buffers::default(),
            weights: Vec::new(),
            arena: arena::Arena::default(),
            ropes: Vec::new(),
            kv: None,
            step: steps::Step::default(),
            quantized: Aligned::zeroed("quantized activations", 0)?,
            unpacked: Aligned::zeroed("unpacked weights", 0)?,
            interleaved: Aligned::zeroed("activations", 0)?,
            computed: Aligned::zeroed("activations", 0)?,
            scores: Aligned::zeroed("attention scores", 0)?,
            products: Vec::new(),
            attention_tasks: Vec::new(),
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// Lets threads share what they use disjoint parts of.
#[derive(Clone, Copy)]
struct Shared<T>(T);

impl<T: Copy> Shared<T> {
    /// The shared thing. (A method, so that a closure captures the wrapper and not what is in it.)
    fn get(&self) -> T {
        self.0
    }
}

// SAFETY: only pointers are put in; whoever dereferences one says why nobody else touches its part.
#[allow(unsafe_code)]
unsafe impl<T> Sync for Shared<T> {}

fn shape_error(op: &'static str, want: impl Into<String>, got: impl Into<String>) -> KernelError {
    KernelError::Shape { op, want: want.into(), got: got.into() }
}
