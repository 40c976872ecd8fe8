//! Memory that the tasks of one job write together.
//!
//! A kernel's output is written in disjoint pieces by several threads, and zeroing it first
//! would cost a pass over memory. [`Output`] hands out a raw pointer for that; [`Lines`] is the
//! cache-line aligned home of repacked weights.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A vector under construction, written through [`Output::at`].
pub(super) struct Output<T> {
    data: Vec<MaybeUninit<T>>,
    base: AtomicPtr<T>,
}

impl<T: Copy> Output<T> {
    /// Allocates room for `len` elements. Tests fill it with 0xff bytes (not a number for
    /// floats), so that an element that no task writes shows.
    pub(super) fn new(len: usize) -> Self {
        let mut data = Vec::<MaybeUninit<T>>::with_capacity(len);
        // SAFETY: the capacity is `len`, and uninitialised elements are valid `MaybeUninit`s.
        unsafe { data.set_len(len) };
        if cfg!(test) {
            // SAFETY: the bytes written are those of the vector's elements.
            unsafe { data.as_mut_ptr().write_bytes(0xff, len) };
        }
        let base = AtomicPtr::new(data.as_mut_ptr().cast());
        Self { data, base }
    }

    /// Returns the address of element `index`. Tasks must write disjoint elements.
    #[inline(always)]
    pub(super) fn at(&self, index: usize) -> *mut T {
        assert!(
            index <= self.data.len(),
            "element {index} of {}",
            self.data.len()
        );
        self.base.load(Ordering::Relaxed).wrapping_add(index)
    }

    /// Returns the finished vector.
    ///
    /// # Safety
    ///
    /// Every element must have been written.
    pub(super) unsafe fn finish(self) -> Vec<T> {
        let mut data = std::mem::ManuallyDrop::new(self.data);
        // SAFETY: the parts are those of a vector of the same layout, whose elements are all
        // initialised by the caller's promise; the old vector is not dropped.
        unsafe { Vec::from_raw_parts(data.as_mut_ptr().cast(), data.len(), data.capacity()) }
    }
}

/// One cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Line([u8; 64]);

/// Bytes at cache-line alignment.
pub(super) struct Lines {
    lines: Vec<Line>,
}

impl Lines {
    /// Allocates `num_lines` zeroed lines.
    pub(super) fn zeroed(num_lines: usize) -> Self {
        let lines = vec![Line([0; 64]); num_lines];
        Self { lines }
    }

    /// Returns all bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: a line is 64 plain bytes without padding.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * 64) }
    }

    /// Returns all bytes, writable.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.lines.len() * 64;
        // SAFETY: a line is 64 plain bytes without padding.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}

/// Floats that are read as the bytes of a file are.
pub(super) struct FloatBytes(pub(super) std::sync::Arc<Vec<f32>>);

impl AsRef<[u8]> for FloatBytes {
    fn as_ref(&self) -> &[u8] {
        let values = &*self.0;
        // SAFETY: a float is four bytes without padding, and bytes have no alignment to keep.
        unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast(), std::mem::size_of_val(&values[..]))
        }
    }
}

/// Splits `data` into pieces of `piece_len` (the last may be shorter) and gives each to `f` on
/// the pool's threads.
pub(super) fn for_each_piece<T: Send>(
    pool: &super::pool::Pool,
    data: &mut [T],
    piece_len: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    let len = data.len();
    let base = AtomicPtr::new(data.as_mut_ptr());
    pool.run(len.div_ceil(piece_len), |piece| {
        let start = piece * piece_len;
        let piece_len = piece_len.min(len - start);
        // SAFETY: pieces are disjoint parts of `data`, which is borrowed until `run` returns.
        let part = unsafe {
            std::slice::from_raw_parts_mut(base.load(Ordering::Relaxed).add(start), piece_len)
        };
        f(piece, part);
    });
}
