//! AMX (Intel Architecture Instruction Set Extensions, chapter 3): tiles of 16 rows of 64 bytes, one of them times another in one
//! instruction. Inline assembly, for there are no intrinsics in stable Rust.
#![allow(unsafe_code)]

use std::{
    arch::{
        asm,
        x86_64::{__cpuid, __cpuid_count},
    },
    sync::OnceLock,
};

use super::{matrix::MatrixUnit, simd::Line};

/// The unit for 8-bit integers.
///
/// Tile registers 0 and 1 hold sums (16 rows of 16 numbers) of the two sets; 2 and 3 the activations of 16 rows, 32 each, 4 and 5 the
/// weights of 32 inputs; 6 and 7 activations and weights of 16 inputs.
pub(crate) struct Amx;

/// What `ldtilecfg` reads.
#[repr(C)]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Line<TileConfig> = Line(TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 32, 32, 64, 64, 16, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 8, 8, 16, 4, 0, 0, 0, 0, 0, 0, 0, 0],
});

/// `$x` (activations), `$w` (weights) and `$sum`: the tile registers of this product. Compilers use none by themselves, so that sums stay
/// there until they are stored.
macro_rules! product {
    ($sum:literal, $x:literal, $w:literal, $at_x:expr, $at_w:expr) => {
        asm!(
            concat!("tilezero ", $sum),
            concat!("tileloadd ", $x, ", [{x} + {row}*1]"),
            concat!("tileloadd ", $w, ", [{w} + {line}*1]"),
            concat!("tdpbsud ", $sum, ", ", $x, ", ", $w),
            x = in(reg) $at_x,
            w = in(reg) $at_w,
            row = in(reg) 32usize,
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(readonly, nostack, preserves_flags)
        )
    };
}

/// `$sum`: the tile registers of these sums.
macro_rules! store {
    ($sum:literal, $out:expr) => {
        asm!(
            concat!("tilestored [{out} + {line}*1], ", $sum),
            out = in(reg) $out,
            line = in(reg) 64usize,
            options(nostack, preserves_flags)
        )
    };
}

// SAFETY (all methods): the trait's contract gives the unit and the pointers' validity; no alignment is needed.
#[allow(clippy::undocumented_unsafe_blocks)]
impl MatrixUnit for Amx {
    const EXISTS: bool = true;
    const ROWS: usize = 16;

    #[inline(always)]
    unsafe fn start() {
        unsafe { asm!("ldtilecfg [{0}]", in(reg) &raw const CONFIG, options(nostack, preserves_flags)) }
    }
    #[inline(always)]
    unsafe fn stop() {
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
    #[inline(always)]
    unsafe fn multiply<const INPUTS: usize, const SET: usize>(x: *const i8, w: *const u8) {
        unsafe {
            match (INPUTS, SET) {
                (32, 0) => product!("tmm0", "tmm2", "tmm4", x, w),
                (32, _) => product!("tmm1", "tmm3", "tmm5", x, w),
                (_, 0) => product!("tmm0", "tmm6", "tmm7", x, w),
                (..) => product!("tmm1", "tmm6", "tmm7", x, w),
            }
        }
    }
    #[inline(always)]
    unsafe fn store<const SET: usize>(out: *mut i32) {
        unsafe {
            match SET {
                0 => store!("tmm0", out),
                _ => store!("tmm1", out),
            }
        }
    }
}

/// Number of the tiles' data among the parts of a thread's state.
const TILE_DATA: u32 = 18;
/// `arch_prctl`: asks for the right to use a part of the state.
const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;

/// Whether this process may use the unit: the CPU has it, the system keeps its state and has been asked for it.
pub(super) fn is_available() -> bool {
    static IS_AVAILABLE: OnceLock<bool> = OnceLock::new();
    *IS_AVAILABLE.get_or_init(|| is_in_cpu() && is_kept() && is_granted())
}

/// AMX-TILE and AMX-INT8.
fn is_in_cpu() -> bool {
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8
}

/// Whether the system saves tiles and their configuration when it goes from thread to thread.
fn is_kept() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILES: u32 = 1 << 17 | 1 << TILE_DATA;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let state: u32;
    // SAFETY: the instruction is there, as OSXSAVE says; it reads a register.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") state, out("edx") _, options(nomem, nostack, preserves_flags)) };
    state & TILES == TILES
}

/// Linux wants to be asked, once for all threads to come; threads that run already may use it too.
#[cfg(target_os = "linux")]
fn is_granted() -> bool {
    // SAFETY: this call changes nothing but what the process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// Other systems are not asked: their way is not known here.
#[cfg(not(target_os = "linux"))]
fn is_granted() -> bool {
    false
}
