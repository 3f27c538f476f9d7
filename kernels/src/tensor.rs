//! Memory for tensors: zeroed, and aligned to 64 bytes so that a vector of 16 f32 never crosses a cache line.

use std::marker::PhantomData;

use bytemuck::Pod;

use crate::error::KernelError;

/// Bytes of a cache line, the unit of allocation.
pub(crate) const CACHE_LINE: usize = 64;

/// What memory is asked for in. Its alignment is one that the allocator gives anyway: for larger ones Rust clears the
/// memory by writing to it, which touches gigabytes of pages that may never be used.
type Unit = u128;

/// A fixed number of plain elements, zeroed at first, on a 64-byte boundary.
#[derive(Debug, Default)]
pub(crate) struct Aligned<T> {
    units: Vec<Unit>,
    /// Whole lines, from a 64-byte boundary on.
    used: std::ops::Range<usize>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    /// `len` zeros. Large ones come as untouched zero pages of the system. `what` names it in the error.
    pub fn zeroed(what: &'static str, len: usize) -> Result<Self, KernelError> {
        let out_of_memory = |bytes: usize| KernelError::OutOfMemory { what, bytes: bytes as u64, device: "cpu".into() };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| out_of_memory(usize::MAX))?;
        let n_units = bytes.div_ceil(CACHE_LINE) * (CACHE_LINE / size_of::<Unit>());
        let spare = if n_units > 0 { CACHE_LINE / size_of::<Unit>() - 1 } else { 0 };
        let units: Vec<Unit> = bytemuck::try_zeroed_vec(n_units + spare).map_err(|()| out_of_memory(bytes))?;
        let start = units.as_ptr().align_offset(CACHE_LINE).min(spare);
        Ok(Self { units, used: start..start + n_units, len, element: PhantomData })
    }

    /// A copy of `values`.
    pub fn from_slice(what: &'static str, values: &[T]) -> Result<Self, KernelError> {
        let mut new = Self::zeroed(what, values.len())?;
        new.as_mut_slice().copy_from_slice(values);
        Ok(new)
    }

    /// Room for at least `len` elements; contents are lost when it grows. Never shrinks, so a steady load allocates once.
    pub fn reserve(&mut self, what: &'static str, len: usize) -> Result<(), KernelError> {
        if self.len < len {
            *self = Self::default_empty();
            *self = Self::zeroed(what, len.next_power_of_two())?;
        }
        Ok(())
    }

    fn default_empty() -> Self {
        Self { units: Vec::new(), used: 0..0, len: 0, element: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory taken.
    pub fn bytes(&self) -> u64 {
        size_of_val(&self.units[self.used.clone()]) as u64
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        &bytemuck::cast_slice(&self.units[self.used.clone()])[..self.len]
    }

    /// The elements.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.units[self.used.clone()])[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zeroed_and_keeps_its_length() {
        let mut a = Aligned::<f32>::zeroed("test", 17).expect("small");
        assert_eq!(a.as_slice(), [0.0; 17]);
        assert_eq!(a.as_slice().as_ptr() as usize % 64, 0);
        assert_eq!(a.bytes(), 128);
        a.reserve("test", 5).expect("no growth");
        assert_eq!(a.len(), 17);
        a.reserve("test", 40).expect("small");
        assert_eq!(a.len(), 64);
        assert_eq!(Aligned::<i64>::zeroed("test", 0).expect("empty").as_slice(), [0i64; 0]);
    }

    #[test]
    fn too_much_is_an_error() {
        for len in [usize::MAX, 1 << 60] {
            assert!(matches!(Aligned::<f32>::zeroed("test", len), Err(KernelError::OutOfMemory { what: "test", .. })));
        }
    }
}
