//! AMX on CPUs without it: the kernels' machine code runs, and a handler of SIGILL does what the instructions would.
//!
//! What each does is in the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, their encoding as VEX in chapter 2.
#![allow(unsafe_code)]

use std::{
    ffi::{c_int, c_void},
    sync::Mutex,
};

use super::{
    super::table,
    linear::{linear, linear_exact},
    *,
};
use crate::reference;

/// Rows of a tile register, and bytes of a row.
const ROWS: usize = 16;
const ROW_BYTES: usize = 64;

/// Tile registers, as wide as they are configured.
struct Tiles {
    is_configured: bool,
    n_rows: [usize; 8],
    row_bytes: [usize; 8],
    data: [[[u8; ROW_BYTES]; ROWS]; 8],
}

/// Those of the one thread that runs here.
static TILES: Mutex<Tiles> = Mutex::new(Tiles::RELEASED);

/// An instruction with a VEX prefix of three bytes, in map 0F38.
struct Instruction {
    opcode: u8,
    /// 0, or 1 to 3 for 66, F3, F2.
    prefix: u8,
    vvvv: usize,
    reg: usize,
    operand: Operand,
    len: usize,
}

enum Operand {
    Register(usize),
    Memory { base: u64, index: u64, displacement: i64 },
}

/// Of registers by their numbers, where the context of a signal keeps them.
#[rustfmt::skip]
const REGISTERS: [c_int; 16] = [
    libc::REG_RAX, libc::REG_RCX, libc::REG_RDX, libc::REG_RBX, libc::REG_RSP, libc::REG_RBP, libc::REG_RSI, libc::REG_RDI,
    libc::REG_R8, libc::REG_R9, libc::REG_R10, libc::REG_R11, libc::REG_R12, libc::REG_R13, libc::REG_R14, libc::REG_R15,
];

impl Instruction {
    /// The one at `code`.
    fn decode(code: &[u8], registers: impl Fn(usize) -> u64) -> Option<Self> {
        let &[0xc4, first, second, opcode, modrm, ..] = code else { return None };
        // Map 0F38, no W, 128 bits.
        if first & 0x1f != 2 || second & 0x84 != 0 {
            return None;
        }
        let [x, b] = [0x40, 0x20].map(|bit| if first & bit == 0 { 8 } else { 0 });
        let (mode, rm) = (modrm >> 6, usize::from(modrm & 7));
        let mut len = 5;
        let operand = if mode == 3 {
            Operand::Register(rm)
        } else {
            let (base, index) = if rm == 4 {
                let sib = *code.get(len)?;
                len += 1;
                let number = usize::from(sib >> 3 & 7) + x;
                // Register 4 is no index.
                let index = if number == 4 { 0 } else { registers(number) << (sib >> 6) };
                (usize::from(sib & 7), index)
            } else {
                (rm, 0)
            };
            if mode == 0 && base == 5 {
                return None;
            }
            let (displacement, n_bytes) = match mode {
                0 => (0, 0),
                1 => (i64::from(*code.get(len)? as i8), 1),
                _ => (i64::from(i32::from_le_bytes(code.get(len..len + 4)?.try_into().ok()?)), 4),
            };
            len += n_bytes;
            Operand::Memory { base: registers(base + b), index, displacement }
        };
        let vvvv = usize::from(!second >> 3 & 15);
        Some(Self { opcode, prefix: second & 3, vvvv, reg: usize::from(modrm >> 3 & 7), operand, len })
    }
}

impl Tiles {
    const RELEASED: Self =
        Self { is_configured: false, n_rows: [0; 8], row_bytes: [0; 8], data: [[[0; ROW_BYTES]; ROWS]; 8] };

    /// Does what an instruction says. `None`: it is none of these, or not allowed.
    ///
    /// # Safety
    /// Its memory is valid.
    unsafe fn run(&mut self, instruction: &Instruction) -> Option<()> {
        let Instruction { opcode, prefix, vvvv, reg, .. } = *instruction;
        match (opcode, prefix, &instruction.operand) {
            // SAFETY: this function's contract.
            (0x49, 0, Operand::Memory { base, displacement, .. }) if reg == 0 => unsafe {
                self.configure(&*((base.wrapping_add_signed(*displacement)) as *const [u8; 64]))
            },
            (0x49, 0, Operand::Register(0)) if reg == 0 => {
                *self = Self::RELEASED;
                Some(())
            }
            _ if !self.is_configured || self.n_rows[reg] == 0 => None,
            (0x49, 3, Operand::Register(0)) => {
                self.data[reg] = [[0; ROW_BYTES]; ROWS];
                Some(())
            }
            (0x4b, 3 | 2, Operand::Memory { base, index, displacement }) => {
                for row in 0..self.n_rows[reg] {
                    let at = base.wrapping_add_signed(*displacement).wrapping_add(index.wrapping_mul(row as u64));
                    let len = self.row_bytes[reg];
                    // SAFETY: this function's contract.
                    unsafe {
                        if prefix == 3 {
                            self.data[reg][row] = [0; ROW_BYTES];
                            self.data[reg][row][..len]
                                .copy_from_slice(std::slice::from_raw_parts(at as *const u8, len));
                        } else {
                            (at as *mut u8).copy_from_nonoverlapping(self.data[reg][row].as_ptr(), len);
                        }
                    }
                }
                Some(())
            }
            (0x5e, 2, &Operand::Register(rm)) => self.multiply(reg, rm, vvvv),
            _ => None,
        }
    }

    fn configure(&mut self, config: &[u8; 64]) -> Option<()> {
        let reserved = config[2..16].iter().chain(&config[32..48]).chain(&config[56..]);
        if config[0] != 1 || config[1] != 0 || reserved.copied().any(|byte| byte != 0) {
            return None;
        }
        *self = Self { is_configured: true, ..Self::RELEASED };
        for tile in 0..8 {
            self.row_bytes[tile] = usize::from(u16::from_le_bytes([config[16 + 2 * tile], config[17 + 2 * tile]]));
            self.n_rows[tile] = usize::from(config[48 + tile]);
        }
        let fits = |tile: usize| self.row_bytes[tile] <= ROW_BYTES && self.n_rows[tile] <= ROWS;
        (0..8).all(fits).then_some(())
    }

    /// `tdpbsud`: adds products of signed bytes of `left` and unsigned bytes of `right`.
    fn multiply(&mut self, sum: usize, left: usize, right: usize) -> Option<()> {
        let agrees = self.n_rows[sum] == self.n_rows[left]
            && self.row_bytes[sum] == self.row_bytes[right]
            && self.row_bytes[left] == 4 * self.n_rows[right];
        if !agrees || sum == left || sum == right || left == right {
            return None;
        }
        for row in 0..self.n_rows[sum] {
            for column in 0..self.row_bytes[sum] / 4 {
                let at = 4 * column..4 * column + 4;
                let mut total = i32::from_le_bytes(self.data[sum][row][at.clone()].try_into().ok()?);
                for k in 0..self.n_rows[right] {
                    for j in 0..4 {
                        let x = i32::from(self.data[left][row][4 * k + j] as i8);
                        total += x * i32::from(self.data[right][k][4 * column + j]);
                    }
                }
                self.data[sum][row][at].copy_from_slice(&total.to_le_bytes());
            }
        }
        Some(())
    }
}

extern "C" fn on_illegal_instruction(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the system hands over a context; code goes on for 15 bytes at least, for what is emulated is inside a function.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize];
        let code = std::slice::from_raw_parts(at as *const u8, 15);
        let value = |number: usize| registers[REGISTERS[number] as usize] as u64;
        let done = Instruction::decode(code, value).and_then(|instruction| {
            let mut tiles = TILES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            tiles.run(&instruction).map(|()| instruction.len)
        });
        match done {
            Some(len) => registers[libc::REG_RIP as usize] += len as i64,
            // Not ours: it ends the process when it is run again.
            None => drop(libc::signal(libc::SIGILL, libc::SIG_DFL)),
        }
    }
}

#[test]
fn amx_code_computes_the_bits_of_the_reference_where_instructions_are_emulated() {
    if Isa::Amx.is_available() || !Isa::Avx512Vnni.is_available() {
        println!("this CPU has AMX, whose code other tests run, or lacks AVX-512, without which there is none");
        return;
    }
    // SAFETY: the handler changes nothing but the context and memory that the instruction names.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_illegal_instruction as *const () as usize;
        // On the stack of the thread: others are too small.
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
    }
    let mut random = Random(22);
    for kind in 0..N_KINDS {
        for (n_rows, n_out, n_in) in [(16, 16, 32), (39, 33, 160)] {
            let mut matrix = Matrix::random(&mut random, kind, n_out, n_in);
            matrix.activations = if kind % 2 == 0 { ActivationLevels::Two } else { ActivationLevels::One };
            let x = random.wild(n_rows * n_in);
            let slices = Matrix { slice_width: Some(32), ..matrix.clone() };
            // One thread, the test's own.
            let ops = &mut CpuOps::new(CpuConfig::new(Precision::Auto)).expect("a CPU");
            ops.table = table::table(Isa::Amx);
            let what = format!("kind {kind} {n_rows}x{n_out}x{n_in}");
            let want = reference::linear(&x, n_rows, &matrix.source(), Precision::Auto);
            assert_same(&linear(ops, &x, n_rows, &matrix), &want, &what);
            let want = reference::linear_exact(&x, n_rows, &slices.source(), Precision::Auto);
            assert_eq!(linear_exact(ops, &x, n_rows, &slices), want, "{what}, exact");
        }
    }
    assert!(!TILES.lock().expect("a lock").is_configured, "what was started is stopped");
}
