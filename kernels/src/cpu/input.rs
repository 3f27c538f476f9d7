//! Rows that a product takes, computed where they are needed: a row that is normed or gated goes from the first-level cache
//! to where it is quantized.
#![allow(unsafe_code)]

use super::{
    buffers::{Buffers, check_distinct, product},
    shape_error,
    table::Table,
};
use crate::{
    error::KernelError,
    ops::{Buf, Input},
};

/// [`Input`], with pointers to rows of `n_in` elements.
#[derive(Clone, Copy)]
pub(super) enum InputRows {
    Plain(*const f32),
    Normed { x: *const f32, weight: *const f32, eps: f32 },
    Gated { gate: *const f32, up: *const f32 },
}

impl InputRows {
    /// Pointers to buffers that hold `n_rows` rows of `n_in` elements and are none of `outputs`.
    pub fn new(
        op: &'static str,
        buffers: &mut Buffers,
        input: Input,
        [n_rows, n_in]: [usize; 2],
        outputs: impl Iterator<Item = Buf> + Clone,
    ) -> Result<Self, KernelError> {
        let len = product(op, &[n_rows, n_in])?;
        match input {
            Input::Rows(x) => {
                check_distinct(op, &[x], outputs)?;
                Ok(Self::Plain(buffers.pointer(op, x, len)?))
            }
            Input::Normed { x, weight, eps } => {
                check_distinct(op, &[x, weight], outputs)?;
                let n_weights = buffers.len(op, weight)?;
                if n_weights != n_in {
                    return Err(shape_error(op, format!("a norm of {n_in} weights"), n_weights.to_string()));
                }
                Ok(Self::Normed { x: buffers.pointer(op, x, len)?, weight: buffers.pointer(op, weight, n_in)?, eps })
            }
            Input::Gated { gate, up } => {
                check_distinct(op, &[gate, up], outputs)?;
                Ok(Self::Gated { gate: buffers.pointer(op, gate, len)?, up: buffers.pointer(op, up, len)? })
            }
        }
    }

    /// Row number `row`: where it lies, or in `room`.
    ///
    /// # Safety
    /// The CPU has the table; there is such a row of `n_in` elements, and `room` has as many, which nobody else uses.
    #[inline]
    pub unsafe fn row(self, table: &Table, row: usize, n_in: usize, room: *mut f32) -> *const f32 {
        // SAFETY: the contract above.
        unsafe {
            let at = row * n_in;
            match self {
                Self::Plain(x) => x.add(at),
                Self::Normed { x, weight, eps } => {
                    (table.rms_norm)(x.add(at), weight, eps, room, n_in);
                    room
                }
                Self::Gated { gate, up } => {
                    (table.silu_mul)(gate.add(at), up.add(at), room, n_in);
                    room
                }
            }
        }
    }
}
