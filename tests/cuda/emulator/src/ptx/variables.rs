//! Variables of a module in global memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::HashMap;
use std::sync::Arc;

use super::parser::Variable;
use crate::memory;

/// Alignment of all variables, bytes.
const ALIGN: usize = 256;

/// A variable's memory.
#[derive(Debug)]
pub(super) struct Storage {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: the memory belongs to kernels, which use atomic accesses; here it is allocated and freed alone.
unsafe impl Send for Storage {}
// SAFETY: as above.
unsafe impl Sync for Storage {}

impl Drop for Storage {
    fn drop(&mut self) {
        memory::forget(self.start as u64);
        // SAFETY: allocated with this layout in `Globals::add`.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// All variables of a module.
#[derive(Debug, Default, Clone)]
pub(super) struct Globals {
    variables: HashMap<String, Arc<Storage>>,
}

impl Globals {
    /// Allocates a variable and writes its initial value.
    pub(super) fn add(&mut self, variable: &Variable<'_>) {
        let num_bytes = variable.num_bytes.unwrap_or(0).max(1);
        let layout = Layout::from_size_align(num_bytes, ALIGN).expect("variables are small");
        // SAFETY: the layout has at least one byte.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        let count = variable.content.len().min(num_bytes);
        // SAFETY: `count` bytes fit, and the memory is new.
        unsafe { std::ptr::copy_nonoverlapping(variable.content.as_ptr(), start, count) };
        memory::enter(start as u64, num_bytes);
        self.variables.insert(
            variable.name.to_owned(),
            Arc::new(Storage { start, layout }),
        );
    }

    /// Returns a variable's address.
    pub(super) fn address(&self, name: &str) -> Option<u64> {
        self.variables.get(name).map(|storage| storage.start as u64)
    }
}
