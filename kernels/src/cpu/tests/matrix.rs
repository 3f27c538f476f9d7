//! A matrix unit as plain loops: the kernels around such units are tested with it everywhere, and real units compared with it.
#![allow(unsafe_code)]

use std::cell::RefCell;

use super::super::matrix::MatrixUnit;
use crate::layout::{GROUP, TILE};

thread_local! {
    /// The sets of sums.
    static SUMS: RefCell<[Vec<i32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Loops, for blocks of `ROWS` rows.
pub(crate) struct Plain<const ROWS: usize>;

// SAFETY: plain loads and stores of what the trait's contract says is valid.
impl<const ROWS: usize> MatrixUnit for Plain<ROWS> {
    const EXISTS: bool = true;
    const ROWS: usize = ROWS;

    unsafe fn start() {}
    unsafe fn stop() {}
    unsafe fn multiply<const INPUTS: usize, const SET: usize>(x: *const i8, w: *const u8) {
        let sum = |i: usize| {
            let (r, lane) = (i / TILE, i % TILE);
            // SAFETY: as above.
            let product = |k: usize| unsafe {
                i32::from(*x.add(GROUP * r + k)) * i32::from(*w.add(4 * TILE * (k / 4) + 4 * lane + k % 4))
            };
            (0..INPUTS).map(product).sum()
        };
        SUMS.with_borrow_mut(|sums| sums[SET] = (0..ROWS * TILE).map(sum).collect());
    }
    unsafe fn store<const SET: usize>(out: *mut i32) {
        // SAFETY: as above.
        SUMS.with_borrow(|sums| unsafe { out.copy_from_nonoverlapping(sums[SET].as_ptr(), ROWS * TILE) });
    }
}

/// The products of a unit.
///
/// # Safety
/// The CPU has it; it is started.
#[cfg(target_arch = "x86_64")]
unsafe fn products<U: MatrixUnit, const INPUTS: usize, const SET: usize>(x: &[i8], w: &[u8]) -> Vec<i32> {
    assert!(x.len() == 16 * GROUP && w.len() == GROUP * TILE);
    let mut out = vec![i32::MAX; 16 * TILE];
    // SAFETY: this function's contract; lengths are as wanted.
    unsafe {
        U::multiply::<INPUTS, SET>(x.as_ptr(), w.as_ptr());
        U::store::<SET>(out.as_mut_ptr());
    }
    out
}

#[cfg(target_arch = "x86_64")]
#[test]
fn amx_multiplies_as_loops_do() {
    use super::{
        super::{Isa, amx::Amx},
        Random,
    };

    if !Isa::Amx.is_available() {
        println!("AMX: not on this machine");
        return;
    }
    let mut random = Random(21);
    for _ in 0..100 {
        let x: Vec<i8> = (0..16 * GROUP).map(|_| random.below(255) as i32 - 127).map(|x| x as i8).collect();
        let w: Vec<u8> = (0..GROUP * TILE).map(|_| random.below(256) as u8).collect();
        // SAFETY: the unit is there, and started meanwhile.
        unsafe {
            Amx::start();
            assert_eq!(products::<Amx, 32, 0>(&x, &w), products::<Plain<16>, 32, 0>(&x, &w));
            assert_eq!(products::<Amx, 32, 1>(&x, &w), products::<Plain<16>, 32, 1>(&x, &w));
            assert_eq!(products::<Amx, 16, 0>(&x, &w), products::<Plain<16>, 16, 0>(&x, &w));
            assert_eq!(products::<Amx, 16, 1>(&x, &w), products::<Plain<16>, 16, 1>(&x, &w));
            Amx::stop();
        }
    }
}
