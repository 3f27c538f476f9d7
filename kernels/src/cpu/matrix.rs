//! Units that multiply whole blocks of quants, such as AMX: what the kernels want of one.
#![allow(unsafe_code)]

/// A unit that multiplies a block of activations by a tile of weights, group after group. The sums are whole numbers, so that
/// it gives the same bits as vectors do.
///
/// # Safety
/// All methods: the CPU has the unit.
pub(crate) trait MatrixUnit {
    /// Whether there is one. If not, no method is called.
    const EXISTS: bool;
    /// Rows of a block of activations.
    const ROWS: usize;

    /// Prepares the calling thread's unit for products.
    unsafe fn start();

    /// Gives it back.
    unsafe fn stop();

    /// Makes, in set `SET` (0 or 1) of the unit's sums, the products of the `INPUTS` (16 or 32) activations of row `r` at `x + 32 * r` and
    /// those weights of output row `lane`, which lie as [`layout`](crate::layout) says, a byte for each, unsigned.
    ///
    /// # Safety
    /// The unit is started; `x` is valid for `ROWS` groups, `w` for `16 * INPUTS` bytes.
    unsafe fn multiply<const INPUTS: usize, const SET: usize>(x: *const i8, w: *const u8);

    /// `out[r * 16 + lane]` = sum `[r][lane]` of set `SET`. It waits for the products: other work may go on meanwhile.
    ///
    /// # Safety
    /// The unit is started; `out` is valid for `ROWS * 16` numbers.
    unsafe fn store<const SET: usize>(out: *mut i32);
}

/// No such unit; blocks of `ROWS` rows.
pub(crate) struct NoMatrix<const ROWS: usize>;

// SAFETY: no method is called.
impl<const ROWS: usize> MatrixUnit for NoMatrix<ROWS> {
    const EXISTS: bool = false;
    const ROWS: usize = ROWS;

    unsafe fn start() {}
    unsafe fn stop() {}
    unsafe fn multiply<const INPUTS: usize, const SET: usize>(_: *const i8, _: *const u8) {}
    unsafe fn store<const SET: usize>(_: *mut i32) {}
}
