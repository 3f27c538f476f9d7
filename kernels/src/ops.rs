//! Every operation that a model needs of a device.
//!
//! Operands are handles to memory of the device, so that the same model code drives a CPU and a GPU. All matrices are
//! row-major. `n_rows` is the number of rows of the step; an output row never depends on the other rows, nor on how many
//! there are (*batch invariance*): every reduction has an order that only the operation's shapes fix.
//!
//! **Exact sums.** A row-parallel product is cut along its inputs into slices of a fixed width. Inside a slice floats
//! are summed in order; at its end the sum is rounded to a multiple of 2^-24 ([`FIXED_ONE`]) and added as an integer.
//! Integer addition is associative: any dealing of slices to ranks gives the same bits.

use crate::{
    collective::Collective,
    cpu::RowMath,
    error::KernelError,
    pages::KvPages,
    slots::{KvRange, SlotSet},
};

/// One in the fixed-point numbers of exact sums: they count multiples of 2^-24.
pub const FIXED_ONE: f32 = 16_777_216.0;

/// Handle of an f32 buffer on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buf(pub(crate) u32);

/// Handle of a buffer of 64-bit fixed-point numbers on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedBuf(pub(crate) u32);

/// Handle of a packed weight matrix on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    pub(crate) id: u32,
    /// Rows of the matrix: outputs.
    pub n_out: usize,
    /// Columns of the matrix: inputs.
    pub n_in: usize,
}

/// Handle of a rotary embedding's frequencies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rope(pub(crate) u32);

/// How numbers are kept and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Quantized weights stay packed and meet activations of 8 bits (groups of 32, f32 scale; see [`ActivationLevels`]);
    /// dense weights meet f32 activations; the KV cache is f16.
    Auto,
    /// Activations and KV cache in f32; quantized weights are expanded to exactly the f32 values they stand for.
    Float32,
}

/// A weight matrix `[n_out, n_in]` as a loader hands it over, to be packed for the device.
#[derive(Debug)]
pub struct LinearSource<'a> {
    /// Rows: outputs.
    pub n_out: usize,
    /// Columns: inputs.
    pub n_in: usize,
    /// The numbers, row-major.
    pub data: WeightData<'a>,
    /// Added to each output, `[n_out]`; where inputs are dealt to ranks, one rank alone has it.
    pub bias: Option<&'a [f32]>,
    /// Width of exact-sum slices along the inputs, for [`Ops::linear_exact`]; divides `n_in`. `None`: for [`Ops::linear`].
    pub slice_width: Option<usize>,
    /// How finely activations are quantized that meet quantized weights.
    pub activations: ActivationLevels,
}

/// How finely activations are quantized where weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ActivationLevels {
    /// 8 bits in groups of 32.
    #[default]
    One,
    /// 8 bits in groups of 32, and what they miss in 8 bits more: some 15 bits, for twice the multiplications. For products
    /// whose errors grow afterwards, as scores of attention do.
    Two,
}

impl ActivationLevels {
    /// As a number.
    pub fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }
}

/// The numbers of a weight matrix, row-major.
#[derive(Debug, Clone, Copy)]
pub enum WeightData<'a> {
    /// `[n_out * n_in]`.
    F32(&'a [f32]),
    /// `[n_out * n_in]`.
    F16(&'a [half::f16]),
    /// `[n_out * n_in]`.
    Bf16(&'a [half::bf16]),
    /// 4-bit quant groups of 32: weight = `scale * quant + min`.
    Q4 {
        /// One quant (0..=15) per byte, `[n_out * n_in]`.
        quants: &'a [u8],
        /// `[n_out * n_in / 32]`.
        scales: &'a [f32],
        /// `[n_out * n_in / 32]`.
        mins: &'a [f32],
    },
    /// 8-bit quant groups: weight = `scale * quant`, plus `min` where there are mins.
    Q8 {
        /// `[n_out * n_in]`.
        quants: &'a [i8],
        /// Weights that share a scale: 16 or 32.
        group: usize,
        /// `[n_out * n_in / group]`.
        scales: &'a [f32],
        /// `[n_out * n_in / group]`, groups of 32 only.
        mins: Option<&'a [f32]>,
    },
}

/// Rows that a product takes, `[n_rows, n_in]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Input {
    /// As they are.
    Rows(Buf),
    /// Root mean square norm (Zhang and Sennrich, 2019): `x[r] / sqrt(mean(x[r]^2) + eps) * weight`.
    Normed {
        /// `[n_rows, n_in]`.
        x: Buf,
        /// `[n_in]`.
        weight: Buf,
        /// Added to the mean of squares.
        eps: f32,
    },
    /// Gated linear units with SiLU (Shazeer, 2020, arXiv:2002.05202): `gate[i] / (1 + exp(-gate[i])) * up[i]`.
    Gated {
        /// `[n_rows, n_in]`.
        gate: Buf,
        /// `[n_rows, n_in]`.
        up: Buf,
    },
}

impl From<Buf> for Input {
    fn from(rows: Buf) -> Self {
        Self::Rows(rows)
    }
}

/// Which elements of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// Elements 2i and 2i + 1 (GGUF files of Llama-like models).
    Interleaved,
    /// Elements i and i + rotary / 2 (Hugging Face checkpoints, Qwen2).
    Half,
}

/// A rotary position embedding (Su et al., 2021, arXiv:2104.09864), scaling already applied to the frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Which elements rotate together.
    pub style: RopeStyle,
    /// Radians per position of each pair, `[rotary / 2]`. Elements of a head after the first `rotary` pass unchanged.
    pub inv_freq: Vec<f32>,
    /// Factor on cosine and sine (YaRN's attention factor; 1 otherwise).
    pub magnitude: f32,
}

/// Size of the paged KV cache of this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that have a cache.
    pub n_layers: usize,
    /// Pages; a block of the scheduler is one page in every layer.
    pub n_blocks: usize,
    /// Positions in a page.
    pub block_size: usize,
    /// KV heads of this rank.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// Rows of a step that belong to one sequence: consecutive positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowChunk {
    /// Index of the first row in the step.
    pub first_row: usize,
    /// Number of rows.
    pub n_rows: usize,
    /// Position of the first row.
    pub start: usize,
    /// Pages of the sequence: position p is in page `blocks[p / block_size]`.
    pub blocks: Vec<u32>,
}

/// The rows of one step, set by [`Ops::begin_step`] for the operations that need positions or pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepRows {
    /// In row order, without gaps.
    pub chunks: Vec<RowChunk>,
}

impl StepRows {
    /// Rows of all chunks together.
    pub fn n_rows(&self) -> usize {
        self.chunks.iter().map(|c| c.n_rows).sum()
    }
}

/// Attention of some query heads over the paged cache of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Which layer's pages.
    pub layer: usize,
    /// Query heads of this rank.
    pub n_heads: usize,
    /// KV head (of this rank) that each query head reads, `[n_heads]`, ascending.
    pub kv_head_of: &'a [u32],
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// A device's operations. Shapes are checked; a mismatch is an error, never undefined behaviour.
///
/// Handles are of the device that made them and live as long as it does. Input and output buffers of one call are
/// different buffers unless the operation says otherwise.
pub trait Ops: Send {
    /// Short name, such as `cpu (avx512-vnni, 2 threads)`.
    fn name(&self) -> String;

    /// What decides the bits of this device's results. Devices with equal fingerprints compute equal bits.
    fn fingerprint(&self) -> String;

    /// Bytes that weights, buffers and KV pages take now.
    fn resident_bytes(&self) -> u64;

    // ---- memory, before the first step -----------------------------------------------------------------------------

    /// Threads of the host that weights may be read and packed with.
    fn host_threads(&self) -> usize {
        1
    }

    /// What sampling computes of rows in the host's memory.
    fn row_math(&self) -> RowMath {
        RowMath::default()
    }

    /// A buffer of `len` f32, zeroed.
    fn alloc(&mut self, len: usize) -> Result<Buf, KernelError>;

    /// A buffer of `len` fixed-point numbers, zeroed.
    fn alloc_fixed(&mut self, len: usize) -> Result<FixedBuf, KernelError>;

    /// A buffer with these values (norm weights).
    fn load_vector(&mut self, values: &[f32]) -> Result<Buf, KernelError>;

    /// Packs a weight matrix for this device.
    fn load_linear(&mut self, source: LinearSource<'_>) -> Result<Linear, KernelError>;

    /// A rotary embedding.
    fn load_rope(&mut self, spec: &RopeSpec) -> Result<Rope, KernelError>;

    /// Bytes of one block in all layers of a KV cache of this shape.
    fn kv_bytes_per_block(&self, shape: KvShape) -> u64;

    /// Allocates the KV cache, in place of an earlier one. Pages of the same kind that were never written and are enough
    /// stay, touched or not.
    fn alloc_kv(&mut self, shape: KvShape) -> Result<(), KernelError>;

    /// Takes these pages over as the KV cache, in place of an earlier one.
    fn adopt_kv(&mut self, pages: KvPages) -> Result<(), KernelError>;

    /// Touches some of the memory that steps will write, so that no step waits for the system to find it: that of the
    /// buffers and the next KV pages where nothing else is to be done (`is_idle`), else only KV pages that are needed soon. About
    /// 2 MiB; `false` if there is no more to do.
    fn prefault(&mut self, _is_idle: bool) -> bool {
        false
    }

    // ---- copies of KV rows, between steps --------------------------------------------------------------------------

    /// Shape of the KV cache, if there is one.
    fn kv_shape(&self) -> Option<KvShape>;

    /// Slots of the KV cache that have been written since it was allocated, or before it was adopted.
    fn written_kv(&self) -> Option<&SlotSet>;

    /// Appends the rows of all layers of these slots to `rows`, in the format of [`crate::pages`].
    fn read_kv(&mut self, ranges: &[KvRange], rows: &mut Vec<u8>) -> Result<(), KernelError>;

    // ---- a step ----------------------------------------------------------------------------------------------------

    /// Sets the rows of the step; called before any operation below that mentions positions or pages.
    fn begin_step(&mut self, rows: &StepRows) -> Result<(), KernelError>;

    /// Rows of an embedding table: `out[r] = table[local_ids[r]]` as the bits of the f32 values, zero-extended to 64
    /// bits, and all 0 where `local_ids[r]` is `u32::MAX` (another rank's row). Summed over ranks the bits are whole
    /// again: see [`Ops::bits_to_f32`]. `out`: `[n_rows, table.n_in]`.
    fn embed(&mut self, table: Linear, local_ids: &[u32], out: FixedBuf) -> Result<(), KernelError>;

    /// `dst[i]` = the f32 whose bits are `src[i]`, for `len` elements.
    fn bits_to_f32(&mut self, src: FixedBuf, dst: Buf, len: usize) -> Result<(), KernelError>;

    /// `out = x · weightᵀ + bias` for each pair; the weights share `n_in` and [`ActivationLevels`], and `x` is computed and
    /// quantized once for all of them.
    /// `x`: `[n_rows, n_in]`; each `out`: `[n_rows, n_out]`.
    fn linear(&mut self, x: Input, n_rows: usize, outputs: &[(Linear, Buf)]) -> Result<(), KernelError>;

    /// `out = x · weightᵀ` as exact sums over this rank's slices; a bias counts as one more slice, so that one rank alone
    /// must have it.
    /// `x`: `[n_rows, n_in]`; `out`: `[n_rows, n_out]`.
    fn linear_exact(&mut self, x: Input, n_rows: usize, weight: Linear, out: FixedBuf) -> Result<(), KernelError>;

    /// Adds the first `len` elements over all ranks; every rank has the sum afterwards.
    fn all_reduce(&mut self, buf: FixedBuf, len: usize, collective: &mut dyn Collective) -> Result<(), KernelError>;

    /// `x[i] += sum * 2^-24`, the sum of `delta[i]` over all ranks, for `len` elements. `x` is the same on every rank, before and
    /// afterwards, for ranks may do a part each and exchange them; `delta` holds nothing in particular afterwards.
    fn add_reduced(
        &mut self,
        x: Buf,
        delta: FixedBuf,
        len: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), KernelError>;

    /// Rotates each head of each row in place by the row's position, in each of some buffers and its number of heads.
    /// Each `x`: `[n_rows, n_heads, head_dim]`.
    fn rope(&mut self, xs: &[(Buf, usize)], head_dim: usize, rope: Rope) -> Result<(), KernelError>;

    /// Writes the rows' keys and values to their slots in the pages of `layer`. `k`, `v`: `[n_rows, n_kv_heads, head_dim]`.
    fn store_kv(&mut self, layer: usize, k: Buf, v: Buf) -> Result<(), KernelError>;

    /// Causal attention (Vaswani et al., 2017; paged as in Kwon et al., 2023): each row attends to the positions of its
    /// sequence up to its own, which [`Ops::store_kv`] has written. `q`, `out`: `[n_rows, n_heads, head_dim]`.
    fn attention(&mut self, attention: Attention<'_>, q: Buf, out: Buf) -> Result<(), KernelError>;

    /// Copies rows: `dst[i] = src[rows[i]]`, rows of `width` elements.
    fn gather_rows(&mut self, src: Buf, rows: &[u32], width: usize, dst: Buf) -> Result<(), KernelError>;

    /// For each row the largest element and its lowest index; NaN counts as the smallest. `x`: `[n_rows, width]`.
    fn argmax(&mut self, x: Buf, n_rows: usize, width: usize, out: &mut [(f32, u32)]) -> Result<(), KernelError>;

    /// Copies elements from `offset` on to the host.
    fn read(&mut self, src: Buf, offset: usize, dst: &mut [f32]) -> Result<(), KernelError>;

    /// Copies elements from the host to `offset` on.
    fn write(&mut self, dst: Buf, offset: usize, src: &[f32]) -> Result<(), KernelError>;
}
