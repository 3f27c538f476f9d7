//! A tile of weights times a block of activation rows, for every layout of weights.
//!
//! Order of the sums, for every output: from 0, input after input.
//! - dense: `acc = fma(w, x, acc)` for each input;
//! - quantized: for each group of weights `acc = fma(d_w * d_x, isum as f32, acc)`, where isum is the exact sum of the
//!   products of quants; then, if there are mins, `acc = fma(m_w, s_x, acc)`. With two levels of activations this is done
//!   for the first level of 32 inputs, then for the second, before the next 32 inputs.
#![allow(unsafe_code)]

use std::{hint::black_box, ops::Range};

use super::super::simd::{Dots, LANES, Line, NARROW_TERMS, Simd};
use crate::tensor::CACHE_LINE;

/// Steps that share a head.
pub(crate) use crate::layout::STEPS_PER_HEAD;

/// Sums of `T` tiles for `R` rows.
pub(crate) type Sums<const R: usize, const T: usize> = Line<[[[f32; LANES]; R]; T]>;

/// Fixed-point sums of `T` tiles for `R` rows.
pub(crate) type FixedSums<const R: usize, const T: usize> = Line<[[[i64; LANES]; R]; T]>;

/// The same in 32 bits, while they are small.
type NarrowSums<const R: usize, const T: usize> = Line<[[[i32; LANES]; R]; T]>;

/// A layout of weights.
pub(crate) trait Tile: Sized {
    /// Bytes of the weights in a step.
    const STEP_BYTES: usize;
    /// Bytes at the head of a tile for each 8 steps begun.
    const HEAD_BYTES: usize;
    /// Bytes of one row's activations in a step.
    const X_BYTES: usize;
    /// Whether a tile is brought to another layout if many rows meet it.
    const UNPACKS: bool;
    /// That layout, without heads; the same one where there is none.
    type Unpacked: Tile;

    /// Brings some steps of a tile to that layout, if it is another one.
    ///
    /// # Safety
    /// The CPU has `S`; the tile lies there, and `out` has room for these steps unpacked.
    unsafe fn unpack<S: Dots>(w: Weights, steps: Range<usize>, out: *mut u8);

    /// Sums over some of the steps of `T` tiles for a block of `R` rows. They go on from those in `out`, or begin with zeros.
    ///
    /// # Safety
    /// The CPU has `S`; `w` and `x` hold the steps.
    unsafe fn sums<S: Dots, const R: usize, const T: usize>(
        w: Weights,
        x: Inputs,
        steps: Range<usize>,
        goes_on: bool,
        out: &mut Sums<R, T>,
    );

    /// Adds to `out` the sums of each slice of `T` tiles for a block of `R` rows.
    ///
    /// # Safety
    /// As [`Tile::sums`], for all steps; a slice has at least one.
    #[inline(always)]
    unsafe fn fixed<S: Dots, const R: usize, const T: usize>(
        w: Weights,
        x: Inputs,
        steps_per_slice: usize,
        out: &mut FixedSums<R, T>,
    ) {
        // SAFETY: the contract above.
        unsafe { fixed_slices::<S, Self, R, T>(w, x, steps_per_slice, out) }
    }
}

/// What sums begin with.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub(crate) unsafe fn start<S: Simd, const R: usize, const T: usize>(goes_on: bool, out: &Sums<R, T>) -> [[S::F; R]; T] {
    // SAFETY: the contract above.
    unsafe {
        let mut acc = [[S::splat(0.0); R]; T];
        if goes_on {
            for t in 0..T {
                for r in 0..R {
                    acc[t][r] = S::load(out.0[t][r].as_ptr());
                }
            }
        }
        acc
    }
}

/// [`Tile::fixed`], slice by slice.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn fixed_slices<S: Dots, K: Tile, const R: usize, const T: usize>(
    w: Weights,
    x: Inputs,
    steps_per_slice: usize,
    out: &mut FixedSums<R, T>,
) {
    // SAFETY: the contract above.
    unsafe {
        // Of one row, what is around the additions costs as much as narrow ones save.
        if R == 1 {
            wide_slices::<S, K, R, T>(w, x, steps_per_slice, out);
        } else {
            let mut sum = |steps, _, slice: &mut Sums<R, T>| K::sums::<S, R, T>(w, x, steps, false, slice);
            narrow_slices::<S, R, T>(w.n_steps, steps_per_slice, &mut sum, out);
        }
    }
}

/// Adds slices in 64 bits.
///
/// # Safety
/// As [`fixed_slices`].
#[inline(always)]
unsafe fn wide_slices<S: Dots, K: Tile, const R: usize, const T: usize>(
    w: Weights,
    x: Inputs,
    steps_per_slice: usize,
    out: &mut FixedSums<R, T>,
) {
    let mut slice: Sums<R, T> = Line([[[0.0; LANES]; R]; T]);
    let mut step = 0;
    while step < w.n_steps {
        let end = w.n_steps.min(step + steps_per_slice);
        // Else the compiler carries the numbers from slice to slice in registers that it does not have.
        let out = black_box(&mut *out);
        // SAFETY: the contract above.
        unsafe {
            K::sums::<S, R, T>(w, x, step..end, false, &mut slice);
            for t in 0..T {
                for r in 0..R {
                    S::add_fixed(out.0[t][r].as_mut_ptr(), S::load(slice.0[t][r].as_ptr()));
                }
            }
        }
        step = end;
    }
}

/// Adds a few slices at a time in 32 bits, which takes half as many instructions. If a sum was too large for that, these
/// slices are done again in 64: in the same loop, which then is compiled once.
///
/// `sum` gives the sums of some steps. They follow those before, unless it is told to start.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub(crate) unsafe fn narrow_slices<S: Dots, const R: usize, const T: usize>(
    n_steps: usize,
    steps_per_slice: usize,
    sum: &mut impl FnMut(Range<usize>, bool, &mut Sums<R, T>),
    out: &mut FixedSums<R, T>,
) {
    let mut slice: Sums<R, T> = Line([[[0.0; LANES]; R]; T]);
    let mut narrow: NarrowSums<R, T> = Line([[[0; LANES]; R]; T]);
    let (mut part, mut is_narrow, mut is_start) = (0, true, true);
    while part < n_steps {
        let part_end = n_steps.min(part + steps_per_slice * NARROW_TERMS);
        let (mut step, mut n_slices) = (part, 0);
        // SAFETY: the contract above.
        unsafe {
            let mut largest = S::splat(0.0);
            while step < part_end {
                let end = part_end.min(step + steps_per_slice);
                // As above.
                let (out, narrow) = (black_box(&mut *out), black_box(&mut narrow));
                sum(step..end, is_start, &mut slice);
                is_start = false;
                for t in 0..T {
                    for r in 0..R {
                        let sums = S::load(slice.0[t][r].as_ptr());
                        if is_narrow {
                            largest = S::add_narrow(narrow.0[t][r].as_mut_ptr(), sums, largest);
                        } else {
                            S::add_fixed(out.0[t][r].as_mut_ptr(), sums);
                        }
                    }
                }
                (step, n_slices) = (end, n_slices + 1);
            }
            let is_done = !is_narrow || S::is_narrow(largest);
            if is_narrow && is_done {
                let excess = S::FIXED_EXCESS.wrapping_mul(n_slices);
                for t in 0..T {
                    for r in 0..R {
                        S::add_widened(out.0[t][r].as_mut_ptr(), narrow.0[t][r].as_ptr(), excess);
                    }
                }
            }
            narrow.0 = [[[0; LANES]; R]; T];
            (is_narrow, is_start) = (is_done, !is_done);
            if is_done {
                part = part_end;
            }
        }
    }
}

/// Where a block's activations lie.
#[derive(Clone, Copy)]
pub(crate) struct Inputs {
    /// The first step.
    pub at: *const u8,
    /// Levels of quantized activations in each step.
    pub n_levels: usize,
}

/// Where the weights of some tiles lie.
#[derive(Clone, Copy)]
pub(crate) struct Weights {
    /// The first tile.
    pub tile: *const u8,
    /// From tile to tile.
    pub tile_bytes: usize,
    /// Steps of a tile.
    pub n_steps: usize,
    /// What to ask for meanwhile.
    pub ahead: Ahead,
}

/// Weights that are to come from memory while others are computed with: cache lines to be asked for in each level.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// Those of the first level.
    pub at: *const u8,
    /// From level to level, in bytes.
    pub stride: usize,
    pub n_lines: usize,
}

impl Ahead {
    /// Nothing: what comes next is near.
    pub const NONE: Self = Self { at: std::ptr::null(), stride: 0, n_lines: 0 };

    /// How far ahead of a row of tiles: as much as a core gets in the time that a line takes.
    const BYTES: usize = 8 << 10;

    /// What lies further on, for a row of tiles from `tile` on that takes `level_bytes` in a level.
    pub fn further(tile: *const u8, level_bytes: usize) -> Self {
        let at = tile.wrapping_add(Self::BYTES);
        Self { at, stride: level_bytes, n_lines: level_bytes.div_ceil(CACHE_LINE) }
    }

    /// Asks for what belongs to level number `level` of a tile that begins `tile_offset` bytes behind the first.
    ///
    /// # Safety
    /// The CPU has `S`.
    #[inline(always)]
    pub unsafe fn fetch<S: Simd>(self, level: usize, tile_offset: usize) {
        let at = self.at.wrapping_add(level * self.stride + tile_offset);
        for line in 0..self.n_lines {
            // SAFETY: the contract above; nothing is read.
            unsafe { S::prefetch(at.wrapping_add(line * CACHE_LINE)) };
        }
    }
}

impl Weights {
    /// Heads and steps of tile number `t`.
    ///
    /// # Safety
    /// There is such a tile, of layout `K`.
    #[inline(always)]
    pub unsafe fn parts<K: Tile>(self, t: usize) -> (*const u8, *const u8) {
        // SAFETY: the contract above.
        unsafe {
            let head = self.tile.add(t * self.tile_bytes);
            (head, head.add(self.n_steps.div_ceil(STEPS_PER_HEAD) * K::HEAD_BYTES))
        }
    }
}

/// A dense type of weights.
pub(crate) trait Element {
    const BYTES: usize;

    /// 16 elements as f32.
    ///
    /// # Safety
    /// The CPU has `S`; `p` is valid for 16 elements.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

/// A type of the KV cache.
pub(crate) trait CacheElement: Element {
    /// Writes 16 elements, rounded half to even.
    ///
    /// # Safety
    /// The CPU has `S`; `p` is valid for 16 elements.
    unsafe fn store<S: Simd>(p: *mut u8, v: S::F);
}

impl CacheElement for F32 {
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, v: S::F) {
        // SAFETY: the trait's contract.
        unsafe { S::store(p.cast(), v) }
    }
}
impl CacheElement for F16 {
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, v: S::F) {
        // SAFETY: the trait's contract.
        unsafe { S::store_f16(p.cast(), v) }
    }
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load(p.cast()) }
    }
}
impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(p.cast()) }
    }
}
impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_bf16(p.cast()) }
    }
}

/// Dense weights.
pub(crate) struct Dense<E>(std::marker::PhantomData<E>);

impl<E: Element> Tile for Dense<E> {
    const STEP_BYTES: usize = E::BYTES * LANES;
    const HEAD_BYTES: usize = 0;
    const X_BYTES: usize = 4;
    const UNPACKS: bool = false;
    type Unpacked = Self;

    #[inline(always)]
    unsafe fn unpack<S: Dots>(_: Weights, _: Range<usize>, _: *mut u8) {}

    #[inline(always)]
    unsafe fn sums<S: Dots, const R: usize, const T: usize>(
        w: Weights,
        x: Inputs,
        steps: Range<usize>,
        goes_on: bool,
        out: &mut Sums<R, T>,
    ) {
        // SAFETY: the trait's contract; steps lie one after another in both.
        unsafe {
            let mut acc = start::<S, R, T>(goes_on, out);
            let x = x.at.cast::<f32>();
            for k in steps {
                for t in 0..T {
                    let p = w.parts::<Self>(t).1.add(k * Self::STEP_BYTES);
                    if R == 1 {
                        S::prefetch(p.wrapping_add(2048));
                    }
                    let w = E::load::<S>(p);
                    for r in 0..R {
                        acc[t][r] = S::fma(w, S::splat(*x.add(k * R + r)), acc[t][r]);
                    }
                }
            }
            for t in 0..T {
                for r in 0..R {
                    S::store(out.0[t][r].as_mut_ptr(), acc[t][r]);
                }
            }
        }
    }
}
