//! Handles: numbers that stand for what the driver made. A wrong one is an error, not a crash.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::status::{Outcome, Status};

/// What a program holds of a stream, an event, a module and so on. 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Handle(pub usize);

impl Handle {
    /// No handle.
    pub const NULL: Self = Self(0);
}

/// All handles of one kind.
pub struct Registry<T> {
    entries: RwLock<BTreeMap<usize, Arc<T>>>,
}

/// One for all kinds, so that a stream is never taken for an event; low addresses that are no
/// memory.
static NEXT: AtomicUsize = AtomicUsize::new(0x1000);

impl<T> Registry<T> {
    /// Makes an empty one.
    pub const fn new() -> Self {
        Self {
            entries: RwLock::new(BTreeMap::new()),
        }
    }

    /// Enters something and returns its handle.
    pub fn enter(&self, value: Arc<T>) -> Handle {
        let handle = NEXT.fetch_add(8, Ordering::Relaxed);
        self.entries
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(handle, value);
        Handle(handle)
    }

    /// Returns what a handle stands for.
    ///
    /// # Errors
    /// [`Status::INVALID_HANDLE`].
    pub fn get(&self, handle: Handle) -> Outcome<Arc<T>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries
            .get(&handle.0)
            .map(Arc::clone)
            .ok_or(Status::INVALID_HANDLE)
    }

    /// Takes out what a handle stood for.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn remove(&self, handle: Handle) -> Outcome<Arc<T>> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.remove(&handle.0).ok_or(Status::INVALID_HANDLE)
    }
}

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Self::new()
    }
}
