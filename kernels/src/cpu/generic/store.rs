//! Writing one row of one KV head to its slot in a page. The page's layout: `attention.rs`.
#![allow(unsafe_code)]

use super::{
    super::simd::{LANES, Line, Simd},
    elementwise::load_part,
    tile::CacheElement,
};

/// Writes `k` and `v`, `[head_dim]`, to slot `slot`.
///
/// # Safety
/// The CPU has `S`; `keys` and `values` are the head's in the page, which has the slot; `k` and `v` are valid for
/// `head_dim` elements; nobody else touches the slot.
#[inline(always)]
pub(crate) unsafe fn store_head<S: Simd, E: CacheElement>(
    head_dim: usize,
    slot: usize,
    keys: *mut u8,
    values: *mut u8,
    k: *const f32,
    v: *const f32,
) {
    // SAFETY: the contract above; values have room for whole vectors.
    unsafe {
        let keys = keys.add((slot / LANES * head_dim * LANES + slot % LANES) * E::BYTES);
        let values = values.add(slot * head_dim.next_multiple_of(LANES) * E::BYTES);
        let mut line = Line([0u8; 4 * LANES]);
        for d in (0..head_dim).step_by(LANES) {
            let n = LANES.min(head_dim - d);
            E::store::<S>(line.0.as_mut_ptr(), load_part::<S>(k.add(d), n));
            for i in 0..n {
                let to = keys.add((d + i) * LANES * E::BYTES);
                to.copy_from_nonoverlapping(line.0.as_ptr().add(i * E::BYTES), E::BYTES);
            }
            E::store::<S>(values.add(d * E::BYTES), load_part::<S>(v.add(d), n));
        }
    }
}
