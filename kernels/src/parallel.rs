//! Work that is dealt to threads of the moment: what happens once, such as loading.
//!
//! Threads inherit priority and scheduling policy of the caller, so work in the background stays there; a pool's threads,
//! which serve steps, would not.

use std::sync::{Mutex, PoisonError};

/// Calls `work` once for each item, on the calling thread and up to `n_threads - 1` others, in no particular order.
/// A panic is passed on.
pub fn for_each<T: Send>(n_threads: usize, items: impl Iterator<Item = T> + Send, work: impl Fn(T) + Sync) {
    if n_threads <= 1 {
        return items.for_each(work);
    }
    let items = Mutex::new(items);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let serve = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    std::thread::scope(|scope| {
        for thread in 1..n_threads {
            let spawned = std::thread::Builder::new().name(format!("load-{thread}")).spawn_scoped(scope, serve);
            if let Err(error) = spawned {
                tracing::warn!("no thread to load with: {error}");
                break;
            }
        }
        serve();
    });
}

/// Parts that so many items are best dealt in: a few for each thread, so that none waits long for the last, but no part
/// smaller than `least`. Returns the size of a part, at least 1.
pub fn part_size(n_items: usize, n_threads: usize, least: usize) -> usize {
    if n_threads <= 1 { n_items.max(1) } else { n_items.div_ceil(4 * n_threads).max(least).max(1) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_item_is_worked_on_once() {
        for n_threads in [0, 1, 2, 5] {
            for n_items in [0, 1, 100] {
                let mut counts = vec![0; n_items];
                for_each(n_threads, counts.iter_mut(), |count| *count += 1);
                assert!(counts.iter().all(|count| *count == 1));
            }
        }
    }

    #[test]
    fn a_panic_is_passed_on() {
        let done = AtomicUsize::new(0);
        let result = std::panic::catch_unwind(|| {
            for_each(3, 0..50, |item| {
                assert_ne!(item, 20, "on purpose");
                done.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert!(result.is_err());
    }

    #[test]
    fn parts_are_few_and_not_too_small() {
        assert_eq!(part_size(1000, 1, 1), 1000);
        assert_eq!(part_size(1000, 2, 1), 125);
        assert_eq!(part_size(1000, 2, 300), 300);
        assert_eq!(part_size(0, 4, 0), 1);
    }
}
