//! Every decoder against candle's dequantization, bit for bit, on random blocks.

use std::{borrow::Cow, path::PathBuf};

use candle_core::{
    Device,
    quantized::{GgmlDType, QStorage, QTensor},
};
use phalanx_cluster::model_config::{ModelConfig, RopeConfig, RopeScaling};

use super::*;

const ROWS: usize = 5;
const COLS: usize = 512;

/// Each quantized type, candle's name for it, and where its blocks have half-precision factors.
const QUANTIZED: &[(TensorType, GgmlDType, &[usize])] = &[
    (TensorType::Q4_0, GgmlDType::Q4_0, &[0]),
    (TensorType::Q4_1, GgmlDType::Q4_1, &[0, 2]),
    (TensorType::Q5_0, GgmlDType::Q5_0, &[0]),
    (TensorType::Q5_1, GgmlDType::Q5_1, &[0, 2]),
    (TensorType::Q8_0, GgmlDType::Q8_0, &[0]),
    (TensorType::Q4K, GgmlDType::Q4K, &[0, 2]),
    (TensorType::Q5K, GgmlDType::Q5K, &[0, 2]),
    (TensorType::Q6K, GgmlDType::Q6K, &[208]),
];

/// A checkpoint of one tensor.
struct OneTensor {
    path: PathBuf,
    config: ModelConfig,
    tensors: Vec<TensorInfo>,
    bytes: Vec<u8>,
}

impl Checkpoint for OneTensor {
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
        let row_bytes = self.tensors[0].row_bytes();
        self.bytes
            .get(rows.start * row_bytes..rows.end * row_bytes)
            .map(Cow::Borrowed)
            .ok_or_else(|| tensor_error(self, name, format!("rows {rows:?}")))
    }

    fn identity(&self) -> &str {
        "one tensor"
    }
}

fn checkpoint(dtype: TensorType, rows: usize, cols: usize, bytes: Vec<u8>) -> OneTensor {
    let tensors = vec![TensorInfo { name: "w".to_owned(), dtype, rows, cols }];
    assert_eq!(bytes.len(), rows * tensors[0].row_bytes());
    let rope = RopeConfig { theta: 1e4, dims: 64, interleaved: false, scaling: RopeScaling::None };
    let config = ModelConfig {
        architecture: "llama".to_owned(),
        name: "test".to_owned(),
        n_layers: 1,
        hidden: cols,
        ffn: rows,
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: 64,
        vocab: rows,
        context_length: 1,
        norm_eps: 1e-5,
        rope,
        tied_embeddings: true,
    };
    OneTensor { path: PathBuf::from("test.gguf"), config, tensors, bytes }
}

/// xorshift64* bytes.
fn random_bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A tensor of random blocks. Factors are finite and of either sign, some of them subnormal.
fn random_tensor(dtype: TensorType, factors: &[usize]) -> OneTensor {
    let mut bytes =
        random_bytes(ROWS * COLS / dtype.block_len() * dtype.block_bytes(), 77 + dtype.block_bytes() as u64);
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for &offset in factors {
            // Not the highest exponent: infinities and NaN.
            if block[offset + 1] & 0x7c == 0x7c {
                block[offset + 1] &= !0x40;
            }
        }
    }
    checkpoint(dtype, ROWS, COLS, bytes)
}

/// The f32 values that the numbers stand for, as a device would expand them.
fn expand(weight: &OwnedWeight) -> Vec<f32> {
    match weight.data() {
        WeightData::F32(v) => v.to_vec(),
        WeightData::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
        WeightData::Bf16(v) => v.iter().map(|x| x.to_f32()).collect(),
        WeightData::Q4 { quants, scales, mins } => quants
            .iter()
            .enumerate()
            .map(|(i, &q)| {
                assert!(q < 16);
                scales[i / 32] * f32::from(q) + mins[i / 32]
            })
            .collect(),
        WeightData::Q8 { quants, group, scales, mins } => quants
            .iter()
            .enumerate()
            .map(|(i, &q)| scales[i / group] * f32::from(q) + mins.map_or(-0.0, |m| m[i / group]))
            .collect(),
    }
}

/// Zeros are equal whatever their sign; all else must have the same bits.
fn assert_same_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!(
            got.to_bits() == want.to_bits() || (got == 0.0 && want == 0.0),
            "{what}: element {i}: {got:e}, {want:e}"
        );
    }
}

fn load(checkpoint: &OneTensor, rows: Range<usize>, cols: Range<usize>) -> OwnedWeight {
    OwnedWeight::load(checkpoint, "w", rows, cols, &mut Workshop::new(3)).expect("inside the tensor")
}

#[test]
fn every_tensor_type_has_one_decoder() {
    use TensorType::*;
    for dtype in [F32, F16, Bf16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
        assert_eq!(DECODERS.iter().filter(|d| d.dtype == dtype).count(), 1, "{dtype:?}");
    }
}

#[test]
fn widened_weights_are_those_of_ggml() {
    for &(dtype, oracle, factors) in QUANTIZED {
        let checkpoint = random_tensor(dtype, factors);
        let storage =
            QStorage::from_data(Cow::Borrowed(&checkpoint.bytes), &Device::Cpu, oracle).expect("whole blocks");
        let tensor = QTensor::new(storage, (ROWS, COLS)).and_then(|t| t.dequantize(&Device::Cpu)).expect("on the CPU");
        let want = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
        let got = load(&checkpoint, 0..ROWS, 0..COLS);
        assert_same_bits(&expand(&got), &want, &format!("{dtype:?}"));
    }
}

#[test]
fn a_cut_is_the_same_part_of_the_whole() {
    for &(dtype, _, factors) in QUANTIZED {
        let checkpoint = random_tensor(dtype, factors);
        let whole = expand(&load(&checkpoint, 0..ROWS, 0..COLS));
        // Whole blocks, inside one block, over a block's end, empty.
        for (rows, cols) in
            [(1..3, 0..256), (0..5, 32..96), (2..5, 224..320), (4..5, 480..512), (0..0, 0..32), (1..2, 64..64)]
        {
            let part = load(&checkpoint, rows.clone(), cols.clone());
            assert_eq!((part.n_out(), part.n_in()), (rows.len(), cols.len()));
            let want: Vec<f32> = rows.flat_map(|r| whole[r * COLS..][cols.clone()].to_vec()).collect();
            assert_same_bits(&expand(&part), &want, &format!("{dtype:?} {cols:?}"));
        }
    }
}

#[test]
fn dense_tensors_are_copied() {
    let values: Vec<f32> = (0..24).map(|i| i as f32 * 0.5 - 3.0).collect();
    let f32s = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let f16s = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
    let bf16s = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    for (dtype, bytes) in [(TensorType::F32, f32s), (TensorType::F16, f16s), (TensorType::Bf16, bf16s)] {
        let matrix = checkpoint(dtype, 4, 6, bytes);
        let part = load(&matrix, 1..3, 2..5);
        assert_eq!(expand(&part), [&values[8..11], &values[14..17]].concat(), "{dtype:?}");
        assert!(load_vector(&matrix, "w", 0..6).is_err(), "a matrix is no vector");
        let vector = checkpoint(dtype, 1, 24, matrix.bytes);
        assert_eq!(load_vector(&vector, "w", 3..9).expect("a vector"), values[3..9], "{dtype:?}");
    }
}

#[test]
fn wrong_ranges_are_errors_that_name_the_tensor() {
    let checkpoint = random_tensor(TensorType::Q4K, &[0, 2]);
    let text = |rows, cols| match OwnedWeight::load(&checkpoint, "w", rows, cols, &mut Workshop::new(1)) {
        Ok(_) => panic!("loaded"),
        Err(error) => error.to_string(),
    };
    assert_eq!(text(0..1, 0..768), "test.gguf: tensor w: want columns 0..768, the file has 512");
    assert_eq!(text(0..1, 16..64), "test.gguf: tensor w: columns 16..64 cut a quant group of 32 (Q4K)");
    assert!(text(4..6, 0..32).contains("rows 4..6"));
    let missing = OwnedWeight::load(&checkpoint, "v", 0..1, 0..32, &mut Workshop::new(1)).expect_err("no such tensor");
    assert_eq!(missing.to_string(), "test.gguf: tensor v: missing");
    let quantized = load_vector(&super::tests::checkpoint(TensorType::Q8_0, 1, 32, vec![0; 34]), "w", 0..32);
    assert!(quantized.expect_err("quantized").to_string().contains("must not be quantized"));
}

#[test]
fn threads_and_used_memory_decode_the_same() {
    let n_rows = 1000;
    let mut used = Workshop::new(3);
    for &(dtype, ..) in QUANTIZED {
        let n_bytes = n_rows * 512 / dtype.block_len() * dtype.block_bytes();
        let bytes = (0..n_bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 & 0xbb).collect();
        let checkpoint = checkpoint(dtype, n_rows, 512, bytes);
        // The first one's memory is larger than the others need.
        for cols in [0..512, 64..288, 256..512] {
            let decode = |workshop: &mut Workshop| {
                OwnedWeight::load(&checkpoint, "w", 0..n_rows, cols.clone(), workshop).expect("inside the tensor")
            };
            let (alone, dealt) = (decode(&mut Workshop::new(1)), decode(&mut used));
            assert_eq!(alone, dealt, "{dtype:?} {cols:?}");
            used.take_back(dealt);
        }
    }
}
