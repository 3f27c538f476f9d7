//! Memory that steps are about to write, written to before they do.
//!
//! A system gives a program its pages when they are first written. It clears them then; and where the system is a virtual
//! machine whose host took free memory back, the host has to find memory first: 2 MiB took 0.2 ms, and 5 ms there. A step
//! that comes to new KV pages comes to them in every layer.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering};

/// What is touched at once: a large page of most systems.
pub(super) const STRETCH: usize = 2 << 20;

/// The smallest page of most systems; smaller ones would be touched only in part.
const PAGE: usize = 4 << 10;

/// Writes to each page of `bytes` what it holds.
///
/// In one instruction: a page that is read first is one that all zeros share, and to give it up for another takes a second
/// fault, and an interrupt of all processors on which the program runs.
pub(super) fn touch(bytes: &mut [u8]) {
    let write_back = |byte: &mut u8| {
        // SAFETY: a valid byte that nobody else has.
        let byte = unsafe { AtomicU8::from_ptr(byte) };
        // Equal or not, it is written.
        let _is_zero = byte.compare_exchange(0, 0, Ordering::Relaxed, Ordering::Relaxed);
    };
    bytes.iter_mut().step_by(PAGE).for_each(write_back);
    bytes.last_mut().into_iter().for_each(write_back);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_changes_nothing() {
        for len in [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 17] {
            let before: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let mut bytes = before.clone();
            touch(&mut bytes);
            assert_eq!(bytes, before);
        }
    }
}
