//! Functions of rows in the host's memory: what sampling needs of whole vocabularies.
#![allow(unsafe_code)]

use super::{
    isa::Isa,
    table::{Table, table},
};

/// Functions of rows, of one instruction set; the same bits with any.
#[derive(Clone, Copy)]
pub struct RowMath {
    table: Table,
}

impl RowMath {
    /// With an instruction set that this CPU has; else with the fastest that it has.
    pub fn new(isa: Isa) -> Self {
        Self { table: table(if isa.is_available() { isa } else { Isa::detect() }) }
    }

    /// The largest element and its lowest index; `None` if all are NaN or minus infinity.
    pub fn largest(&self, row: &[f32]) -> Option<(f32, usize)> {
        if row.is_empty() {
            return None;
        }
        // SAFETY: the CPU has the instruction set, and the row is not empty.
        let (value, at) = unsafe { (self.table.argmax)(row.as_ptr(), row.len()) };
        (value > f32::NEG_INFINITY).then_some((value, at as usize))
    }

    /// Puts into `odds` how probable each element of a row of logits is beside the largest one, at an inverse temperature:
    /// e^((logit - largest) * factor), every step rounded to f32; 0 for NaN.
    pub fn odds(&self, logits: &[f32], largest: f32, factor: f32, odds: &mut Vec<f32>) {
        odds.resize(logits.len(), 0.0);
        if !largest.is_finite() {
            // The difference of two infinities is none.
            let of = |logit: &f32| if *logit == largest { 1.0 } else { 0.0 };
            odds.iter_mut().zip(logits).for_each(|(odds, logit)| *odds = of(logit));
            return;
        }
        // SAFETY: the CPU has the instruction set; both are as long as said.
        unsafe { (self.table.odds)(logits.as_ptr(), largest, factor, odds.as_mut_ptr(), logits.len()) };
    }
}

impl Default for RowMath {
    /// With the fastest instruction set that this CPU has.
    fn default() -> Self {
        Self::new(Isa::detect())
    }
}

impl std::fmt::Debug for RowMath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RowMath").finish_non_exhaustive()
    }
}
