//! Buffers behind handles, and the checks before a kernel gets a pointer.

use bytemuck::Pod;

use super::{
    pages::prefer_large,
    prefault::{STRETCH, touch},
    shape_error,
};
use crate::{
    error::KernelError,
    ops::{Buf, FixedBuf},
    tensor::Aligned,
};

/// All buffers of a device.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    floats: Vec<Aligned<f32>>,
    fixed: Vec<Aligned<i64>>,
    touched: TouchedBuffers,
}

/// How far buffers are touched.
#[derive(Debug, Default)]
struct TouchedBuffers {
    /// Whole ones, those of floats first.
    n_buffers: usize,
    /// And of the next one so much.
    bytes: usize,
}

impl Buffers {
    pub fn bytes(&self) -> u64 {
        self.floats.iter().map(Aligned::bytes).sum::<u64>() + self.fixed.iter().map(Aligned::bytes).sum::<u64>()
    }

    pub fn add(&mut self, mut buffer: Aligned<f32>) -> Buf {
        prefer_large(bytemuck::cast_slice_mut(buffer.as_mut_slice()));
        self.floats.push(buffer);
        Buf((self.floats.len() - 1) as u32)
    }

    pub fn add_fixed(&mut self, mut buffer: Aligned<i64>) -> FixedBuf {
        prefer_large(bytemuck::cast_slice_mut(buffer.as_mut_slice()));
        self.fixed.push(buffer);
        FixedBuf((self.fixed.len() - 1) as u32)
    }

    /// Touches about a stretch of what was not touched yet; `false` if all was.
    pub fn prefault(&mut self) -> bool {
        let mut left = STRETCH;
        while left > 0 {
            let n_floats = self.floats.len();
            let next = match self.touched.n_buffers.checked_sub(n_floats) {
                None => bytemuck::cast_slice_mut(self.floats[self.touched.n_buffers].as_mut_slice()),
                Some(idx) => match self.fixed.get_mut(idx) {
                    Some(buffer) => bytemuck::cast_slice_mut(buffer.as_mut_slice()),
                    None => return left < STRETCH,
                },
            };
            let rest: &mut [u8] = &mut next[self.touched.bytes..];
            let n_bytes = rest.len().min(left);
            touch(&mut rest[..n_bytes]);
            left -= n_bytes;
            self.touched = match rest.len() == n_bytes {
                true => TouchedBuffers { n_buffers: self.touched.n_buffers + 1, bytes: 0 },
                false => TouchedBuffers { bytes: self.touched.bytes + n_bytes, ..self.touched },
            };
        }
        true
    }

    /// Number of elements of a buffer.
    pub fn len(&self, op: &'static str, buf: Buf) -> Result<usize, KernelError> {
        let buffer = self.floats.get(buf.0 as usize);
        Ok(buffer.ok_or_else(|| shape_error(op, "a buffer of this device", format!("{buf:?}")))?.len())
    }

    /// The first `len` elements.
    pub fn floats(&mut self, op: &'static str, buf: Buf, len: usize) -> Result<&mut [f32], KernelError> {
        first(op, self.floats.get_mut(buf.0 as usize), &buf, len)
    }

    /// The first `len` elements.
    pub fn fixed(&mut self, op: &'static str, buf: FixedBuf, len: usize) -> Result<&mut [i64], KernelError> {
        first(op, self.fixed.get_mut(buf.0 as usize), &buf, len)
    }

    /// The first `len` elements of both.
    pub fn floats_and_fixed(
        &mut self,
        op: &'static str,
        (floats, fixed): (Buf, FixedBuf),
        len: usize,
    ) -> Result<(&mut [f32], &mut [i64]), KernelError> {
        let (all_floats, all_fixed) = (&mut self.floats, &mut self.fixed);
        Ok((
            first(op, all_floats.get_mut(floats.0 as usize), &floats, len)?,
            first(op, all_fixed.get_mut(fixed.0 as usize), &fixed, len)?,
        ))
    }

    /// A pointer to the first `len` elements.
    pub fn pointer(&mut self, op: &'static str, buf: Buf, len: usize) -> Result<*mut f32, KernelError> {
        Ok(self.floats(op, buf, len)?.as_mut_ptr())
    }

    /// A pointer to the first `len` elements.
    pub fn fixed_pointer(&mut self, op: &'static str, buf: FixedBuf, len: usize) -> Result<*mut i64, KernelError> {
        Ok(self.fixed(op, buf, len)?.as_mut_ptr())
    }
}

/// The first `len` elements of the buffer that `name` is the handle of.
fn first<'a, T: Pod>(
    op: &'static str,
    buffer: Option<&'a mut Aligned<T>>,
    name: &dyn std::fmt::Debug,
    len: usize,
) -> Result<&'a mut [T], KernelError> {
    let buffer = buffer.ok_or_else(|| shape_error(op, "a buffer of this device", format!("{name:?}")))?;
    let have = buffer.len();
    let too_short = || shape_error(op, format!("{len} elements"), format!("a buffer of {have}"));
    buffer.as_mut_slice().get_mut(..len).ok_or_else(too_short)
}

/// Checks that no buffer in `outputs` is also in `inputs` or there twice.
pub(super) fn check_distinct(
    op: &'static str,
    inputs: &[Buf],
    outputs: impl Iterator<Item = Buf> + Clone,
) -> Result<(), KernelError> {
    for (i, output) in outputs.clone().enumerate() {
        if inputs.contains(&output) || outputs.clone().skip(i + 1).any(|other| other == output) {
            return Err(shape_error(op, "different buffers for inputs and outputs", format!("{output:?} twice")));
        }
    }
    Ok(())
}

/// The product of sizes, or an error that names them.
pub(super) fn product(op: &'static str, sizes: &[usize]) -> Result<usize, KernelError> {
    let product = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    product.ok_or_else(|| shape_error(op, "sizes whose product can be counted", format!("{sizes:?}")))
}
