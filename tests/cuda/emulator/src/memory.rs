//! What is allocated on the emulated GPUs: addresses of this process that kernels may touch.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

/// Start and length of each allocation, bytes.
static ALLOCATIONS: RwLock<BTreeMap<u64, usize>> = RwLock::new(BTreeMap::new());

/// Enters an allocation.
pub fn enter(start: u64, num_bytes: usize) {
    ALLOCATIONS
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(start, num_bytes);
}

/// Forgets the allocation that begins at `start`; returns its length.
pub fn forget(start: u64) -> Option<usize> {
    ALLOCATIONS
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(&start)
}

/// Returns start and length of the allocation that `address` lies in.
pub fn find(address: u64) -> Option<(u64, usize)> {
    let allocations = ALLOCATIONS.read().unwrap_or_else(PoisonError::into_inner);
    let (&start, &num_bytes) = allocations.range(..=address).next_back()?;
    (address - start < num_bytes as u64).then_some((start, num_bytes))
}
