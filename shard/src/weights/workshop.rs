//! Memory and threads for decoding one matrix after another.

use super::{Numbers, OwnedWeight};

/// What decoding works with. Matrices are decoded into memory that those before them had: fresh memory costs the kernel
/// more time than decoding costs.
#[derive(Debug, Default)]
pub struct Workshop {
    pub(super) n_threads: usize,
    pub(super) unsigned: Vec<u8>,
    pub(super) signed: Vec<i8>,
    pub(super) scales: Vec<f32>,
    pub(super) mins: Vec<f32>,
}

impl Workshop {
    /// With so many threads, the caller's among them.
    pub fn new(n_threads: usize) -> Self {
        Self { n_threads, ..Self::default() }
    }

    /// Keeps a matrix's memory for the next one.
    pub fn take_back(&mut self, weight: OwnedWeight) {
        match weight.numbers {
            Numbers::Q4 { quants, scales, mins } => (self.unsigned, self.scales, self.mins) = (quants, scales, mins),
            Numbers::Q8 { quants, scales, mins, .. } => {
                (self.signed, self.scales) = (quants, scales);
                self.mins = mins.unwrap_or_else(|| std::mem::take(&mut self.mins));
            }
            Numbers::F32(_) | Numbers::F16(_) | Numbers::Bf16(_) => {}
        }
    }
}

/// Memory for `len` numbers; what they are is not said.
pub(super) fn room<T: Copy + Default>(memory: &mut Vec<T>, len: usize) -> Vec<T> {
    let mut memory = std::mem::take(memory);
    memory.resize(len, T::default());
    memory
}
