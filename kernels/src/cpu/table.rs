//! The kernels of each instruction set, as a table of functions chosen once.
#![allow(unsafe_code)]

use super::{
    generic::{
        attention::{self, AttentionTask},
        elementwise,
        layouts::{Q4, Q6, Q6Half, Q8, Q8Half},
        linear::{self, Apart, LinearTask},
        packed::{Factored, ScaleF16, ScaleF32},
        quantize::{self, QuantPlace},
        store,
        tile::{Bf16, Dense, F16, F32, FixedSums, Inputs, Sums, Tile, Weights},
    },
    isa::Isa,
    matrix::NoMatrix,
    scalar::{self as plain, Scalar},
    simd::{Dots, Simd},
};
use crate::{
    layout::{Kind, Scale},
    ops::RopeStyle,
};

pub(crate) type LinearFn = unsafe fn(&LinearTask);
pub(crate) type StoreFn = unsafe fn(usize, usize, *mut u8, *mut u8, *const f32, *const f32);
pub(crate) type AttentionFn = unsafe fn(&AttentionTask, *mut f32);

/// Kernels of one instruction set. Safety: the CPU has it, and as the functions in `generic` say.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    pub products: Products,
    /// Queries for which attention reads the cache once.
    pub queries: usize,
    pub quantize_row: unsafe fn(*const f32, usize, QuantPlace, *mut u8),
    pub pack_rows: unsafe fn(*const f32, usize, usize, *mut f32),
    pub store_f16: StoreFn,
    pub store_f32: StoreFn,
    pub attention_f16: AttentionFn,
    pub attention_f32: AttentionFn,
    pub attention_scratch_len: fn(usize) -> usize,
    pub rms_norm: unsafe fn(*const f32, *const f32, f32, *mut f32, usize),
    pub silu_mul: unsafe fn(*const f32, *const f32, *mut f32, usize),
    pub add_fixed: unsafe fn(*mut f32, *const i64, usize),
    pub rope: unsafe fn(*mut f32, usize, usize, RopeStyle, &[f32], &[f32]),
    pub argmax: unsafe fn(*const f32, usize) -> (f32, u32),
    pub odds: unsafe fn(*const f32, f32, f32, *mut f32, usize),
    #[cfg(test)]
    pub exp: unsafe fn(&[f32; 16]) -> [f32; 16],
}

/// Kernels of products, and how they want rows and tiles.
#[derive(Clone, Copy)]
pub(crate) struct Products {
    /// Rows of a block of activations.
    pub rows: usize,
    /// Blocks of rows from which on a task unpacks tiles.
    pub unpack_blocks: usize,
    pub linear: fn(Kind) -> LinearFn,
}

/// The table of an instruction set. Panics if this build has no such kernels, which [`Isa::is_available`] says.
pub(crate) fn table(isa: Isa) -> Table {
    match isa {
        Isa::Scalar => scalar::TABLE,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::TABLE,
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => Table { products: avx_vnni::PRODUCTS, ..avx2::TABLE },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => avx512::TABLE,
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => Table { products: amx::PRODUCTS, ..avx512::TABLE },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni | Isa::Amx => unreachable!("not available on this architecture"),
    }
}

/// Kernels around a matrix unit that is loops.
#[cfg(test)]
pub(crate) fn with_matrix_unit() -> Table {
    Table { products: scalar_matrix::PRODUCTS, ..scalar::TABLE }
}

/// Kernels of products.
macro_rules! products {
    ($module:ident, $simd:ty $(, #[$features:meta])?) => {
        #[allow(clippy::undocumented_unsafe_blocks)] // Each only passes its caller's promise on.
        mod $module {
            use super::*;

            $(#[$features])?
            unsafe fn linear_of<K: Tile>(task: &LinearTask) {
                unsafe { linear::linear::<$simd, K>(task) }
            }
            impl Apart for $simd {
                #[inline(always)]
                unsafe fn sums<K: Tile, const R: usize, const T: usize>(
                    w: Weights,
                    x: Inputs,
                    goes_on: bool,
                    out: &mut Sums<R, T>,
                ) {
                    unsafe { sums_of::<K, R, T>(w, x, goes_on, out) }
                }
                #[inline(always)]
                unsafe fn fixed<K: Tile, const R: usize, const T: usize>(
                    w: Weights,
                    x: Inputs,
                    steps_per_slice: usize,
                    out: &mut FixedSums<R, T>,
                ) {
                    unsafe { fixed_of::<K, R, T>(w, x, steps_per_slice, out) }
                }
            }
            $(#[$features])?
            #[inline(never)]
            unsafe fn sums_of<K: Tile, const R: usize, const T: usize>(
                w: Weights,
                x: Inputs,
                goes_on: bool,
                out: &mut Sums<R, T>,
            ) {
                unsafe { linear::sums::<$simd, K, R, T>(w, x, goes_on, out) }
            }
            $(#[$features])?
            #[inline(never)]
            unsafe fn fixed_of<K: Tile, const R: usize, const T: usize>(
                w: Weights,
                x: Inputs,
                steps_per_slice: usize,
                out: &mut FixedSums<R, T>,
            ) {
                unsafe { linear::fixed::<$simd, K, R, T>(w, x, steps_per_slice, out) }
            }
            fn linear(kind: Kind) -> LinearFn {
                match kind {
                    Kind::F32 => linear_of::<Dense<F32>>,
                    Kind::F16 => linear_of::<Dense<F16>>,
                    Kind::Bf16 => linear_of::<Dense<Bf16>>,
                    Kind::Q4(Scale::F32) => linear_of::<Q4<ScaleF32>>,
                    Kind::Q4(Scale::F16) => linear_of::<Q4<ScaleF16>>,
                    Kind::Q4(Scale::Factored) => linear_of::<Q4<Factored>>,
                    Kind::Q8(Scale::F32) => linear_of::<Q8<ScaleF32, false>>,
                    Kind::Q8(Scale::F16) => linear_of::<Q8<ScaleF16, false>>,
                    Kind::Q8Min(Scale::F32) => linear_of::<Q8<ScaleF32, true>>,
                    Kind::Q8Min(Scale::F16) => linear_of::<Q8<ScaleF16, true>>,
                    Kind::Q8Min(Scale::Factored) => linear_of::<Q8<Factored, true>>,
                    Kind::Q8Half(Scale::F32) => linear_of::<Q8Half<ScaleF32>>,
                    Kind::Q6(Scale::F32) => linear_of::<Q6<ScaleF32>>,
                    Kind::Q6(Scale::F16) => linear_of::<Q6<ScaleF16>>,
                    Kind::Q6Half(Scale::F32) => linear_of::<Q6Half<ScaleF32>>,
                    Kind::Q6Half(Scale::Factored) => linear_of::<Q6Half<Factored>>,
                    Kind::Q8(Scale::Factored)
                    | Kind::Q8Half(Scale::F16 | Scale::Factored)
                    | Kind::Q6(Scale::Factored)
                    | Kind::Q6Half(Scale::F16) => {
                        unreachable!("`layout.rs` packs no {kind:?}")
                    }
                }
            }

            pub(super) const PRODUCTS: Products = Products {
                rows: <$simd as Dots>::ROWS,
                unpack_blocks: <$simd as Dots>::UNPACK_BLOCKS,
                linear,
            };
        }
    };
}

/// All other kernels, and those products.
macro_rules! kernels {
    ($module:ident, $simd:ty, $products:ident $(, #[$features:meta])?) => {
        #[allow(clippy::undocumented_unsafe_blocks)] // Each only passes its caller's promise on.
        mod $module {
            use super::*;

            $(#[$features])?
            unsafe fn quantize_row(x: *const f32, n_groups: usize, place: QuantPlace, out: *mut u8) {
                unsafe { quantize::quantize_row::<$simd>(x, n_groups, place, out) }
            }
            $(#[$features])?
            unsafe fn pack_rows(x: *const f32, n_in: usize, block_rows: usize, out: *mut f32) {
                unsafe { quantize::pack_rows(x, n_in, block_rows, out) }
            }
            $(#[$features])?
            unsafe fn store_f16(
                head_dim: usize,
                slot: usize,
                keys: *mut u8,
                values: *mut u8,
                k: *const f32,
                v: *const f32,
            ) {
                unsafe { store::store_head::<$simd, F16>(head_dim, slot, keys, values, k, v) }
            }
            $(#[$features])?
            unsafe fn store_f32(
                head_dim: usize,
                slot: usize,
                keys: *mut u8,
                values: *mut u8,
                k: *const f32,
                v: *const f32,
            ) {
                unsafe { store::store_head::<$simd, F32>(head_dim, slot, keys, values, k, v) }
            }
            $(#[$features])?
            unsafe fn attention_f16(task: &AttentionTask, scratch: *mut f32) {
                unsafe { attention::attention::<$simd, F16>(task, scratch) }
            }
            $(#[$features])?
            unsafe fn attention_f32(task: &AttentionTask, scratch: *mut f32) {
                unsafe { attention::attention::<$simd, F32>(task, scratch) }
            }
            $(#[$features])?
            unsafe fn rms_norm(x: *const f32, weight: *const f32, eps: f32, out: *mut f32, width: usize) {
                unsafe { elementwise::rms_norm::<$simd>(x, weight, eps, out, width) }
            }
            $(#[$features])?
            unsafe fn silu_mul(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
                unsafe { elementwise::silu_mul::<$simd>(gate, up, out, len) }
            }
            $(#[$features])?
            unsafe fn add_fixed(x: *mut f32, delta: *const i64, len: usize) {
                unsafe { elementwise::add_fixed(x, delta, len) }
            }
            $(#[$features])?
            unsafe fn rope(x: *mut f32, n_heads: usize, head_dim: usize, style: RopeStyle, cos: &[f32], sin: &[f32]) {
                unsafe { elementwise::rope(x, n_heads, head_dim, style, cos, sin) }
            }
            $(#[$features])?
            unsafe fn argmax(x: *const f32, width: usize) -> (f32, u32) {
                unsafe { elementwise::argmax::<$simd>(x, width) }
            }
            $(#[$features])?
            unsafe fn odds(x: *const f32, largest: f32, factor: f32, out: *mut f32, len: usize) {
                unsafe { elementwise::odds::<$simd>(x, largest, factor, out, len) }
            }
            #[cfg(test)]
            $(#[$features])?
            unsafe fn exp(x: &[f32; 16]) -> [f32; 16] {
                let mut out = [0.0; 16];
                unsafe { <$simd>::store(out.as_mut_ptr(), elementwise::exp::<$simd>(<$simd>::load(x.as_ptr()))) };
                out
            }

            pub(super) const TABLE: Table = Table {
                products: $products::PRODUCTS,
                queries: <$simd as Simd>::QUERIES,
                quantize_row,
                pack_rows,
                store_f16,
                store_f32,
                attention_f16,
                attention_f32,
                attention_scratch_len: attention::scratch_len::<$simd>,
                rms_norm,
                silu_mul,
                add_fixed,
                rope,
                argmax,
                odds,
                #[cfg(test)]
                exp,
            };
        }
    };
}

products!(scalar_products, Scalar<NoMatrix<{ plain::ROWS }>>);
kernels!(scalar, Scalar<NoMatrix<{ plain::ROWS }>>, scalar_products);
#[cfg(test)]
products!(scalar_matrix, Scalar<crate::cpu::tests::matrix::Plain<2>>);

#[cfg(target_arch = "x86_64")]
mod x86 {
    pub(super) use crate::cpu::{
        amx::Amx,
        avx_vnni::Vnni,
        avx2::{Avx2, Words},
        avx512::{self, Avx512},
    };
}

#[cfg(target_arch = "x86_64")]
products!(avx2_products, x86::Avx2<x86::Words>, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
kernels!(avx2, x86::Avx2<x86::Words>, avx2_products, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
products!(avx_vnni, x86::Avx2<x86::Vnni>, #[target_feature(enable = "avx2,fma,f16c,avxvnni")]);
#[cfg(target_arch = "x86_64")]
products!(
    avx512_products,
    x86::Avx512<NoMatrix<{ x86::avx512::ROWS }>>,
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512,
    x86::Avx512<NoMatrix<{ x86::avx512::ROWS }>>,
    avx512_products,
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
);
#[cfg(target_arch = "x86_64")]
products!(
    amx,
    x86::Avx512<x86::Amx>,
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
);
