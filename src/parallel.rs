//! Running independent pieces of work on several threads: the only file that names rayon, the serial form beside it.
//! Kernels never come here; only entry points that own a whole job do.
#![forbid(unsafe_code)]

use rayon::prelude::*;

use crate::error::Result;

/// Threads that [`for_each`] can use.
pub fn n_threads() -> usize {
    rayon::current_num_threads()
}

/// Hands every item to `work`, on at most `n_threads` threads at a time. Items must not depend on each other's order.
/// Fails with one of the errors of `work`; the remaining items may then be left out.
pub fn for_each<T: Send>(n_threads: usize, items: Vec<T>, work: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let n_bins = n_threads.min(items.len());
    if n_bins <= 1 {
        return items.into_iter().try_for_each(work);
    }
    let mut bins: Vec<Vec<T>> = (0..n_bins).map(|_| Vec::new()).collect();
    for (index, item) in items.into_iter().enumerate() {
        bins[index % n_bins].push(item);
    }
    bins.into_par_iter().try_for_each(|bin| bin.into_iter().try_for_each(&work))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn serial_and_parallel_see_every_item_once() {
        for n_threads in [0, 1, 2, 7, 64] {
            let sum = AtomicUsize::new(0);
            for_each(n_threads, (1..=10).collect(), |item: usize| {
                sum.fetch_add(item, Ordering::Relaxed);
                Ok(())
            })
            .unwrap();
            assert_eq!(sum.into_inner(), 55);
        }
    }

    #[test]
    fn an_error_comes_back() {
        for n_threads in [1, 3] {
            let work = |item: usize| if item == 4 { Err(Error::invalid("four")) } else { Ok(()) };
            assert_eq!(for_each(n_threads, (0..8).collect(), work).unwrap_err().message(), "four");
        }
    }
}
