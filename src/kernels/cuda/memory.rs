//! Memory with an owner: the GPU's, and pages of the host that the GPU reads directly.

use candle_core::Result;
use cudarc::driver::result;

use super::driver::{Address, Driver, told};

/// Memory of the GPU that belongs to one owner.
pub(super) struct Buffer {
    address: Address,
    num_bytes: usize,
}

impl Buffer {
    /// Takes over `num_bytes` bytes that `malloc_sync` allocated at `address`.
    pub(super) fn new(address: Address, num_bytes: usize) -> Self {
        Self { address, num_bytes }
    }

    /// Returns where it begins.
    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// Returns its length.
    pub(super) fn num_bytes(&self) -> usize {
        self.num_bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Waits for the GPU, so nothing reads it any more. An error has been reported before.
        // SAFETY: allocated by `Driver::allocate` and freed once.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Host memory that the GPU reads and writes directly, `T` of it.
pub(super) struct Pinned<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: owned memory, nothing else.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T: Copy + Default> Pinned<T> {
    /// Allocates `len` values.
    pub(super) fn new(driver: &Driver, len: usize) -> Result<Self> {
        driver.bind()?;
        let num_bytes = len.max(1) * size_of::<T>();
        // SAFETY: filled below before anything reads it.
        let start = told("allocate pinned memory", unsafe {
            result::malloc_host(num_bytes, 0)
        })?;
        let start: *mut T = start.cast();
        for i in 0..len {
            // SAFETY: inside the allocation.
            unsafe { start.add(i).write(T::default()) };
        }
        Ok(Self { start, len })
    }

    /// Returns where the values begin, for those that the GPU may write at any time.
    pub(super) fn as_ptr(&self) -> *mut T {
        self.start
    }

    /// Returns the values.
    pub(super) fn get(&self) -> &[T] {
        // SAFETY: initialised by `new`, owned by `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// Returns the values for writing.
    pub(super) fn get_mut(&mut self) -> &mut [T] {
        // SAFETY: as `get`, borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, freed once.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}
