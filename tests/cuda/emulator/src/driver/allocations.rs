//! Where memory of the GPUs and pinned memory come from: pages of this process with a gap after
//! each allocation, so that what runs past an end is found and not a neighbour.

use std::collections::HashMap;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::memory;

use super::device::config;
use super::status::{Outcome, Status};

const PAGE: usize = 4096;
/// Small allocations are filled with bytes that make no number, as other programs' leavings may be
/// on a GPU.
const POISON: u8 = 0xff;
const MAX_POISONED_BYTES: usize = 1 << 20;

/// Whose an allocation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A GPU's.
    Device(usize),
    /// Pinned memory of the host.
    Host,
}

struct Allocation {
    owner: Owner,
    num_bytes: usize,
    mapped_bytes: usize,
}

static ALLOCATIONS: Mutex<Option<HashMap<u64, Allocation>>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<HashMap<u64, Allocation>>> {
    ALLOCATIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Allocates; what is inside is undefined.
///
/// # Errors
/// When nothing is wanted or more than there is.
pub fn allocate(owner: Owner, num_bytes: usize) -> Outcome<u64> {
    if num_bytes == 0 {
        return Err(Status::INVALID_VALUE);
    }
    if let Owner::Device(ordinal) = owner
        && num_bytes > free_bytes(ordinal)
    {
        return Err(Status::OUT_OF_MEMORY);
    }
    let mapped_bytes = num_bytes
        .checked_next_multiple_of(PAGE)
        .ok_or(Status::OUT_OF_MEMORY)?
        + PAGE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: new pages anywhere, which nobody else has.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            mapped_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(Status::OUT_OF_MEMORY);
    }
    if num_bytes <= MAX_POISONED_BYTES {
        // SAFETY: inside the new pages.
        unsafe { start.cast::<u8>().write_bytes(POISON, num_bytes) };
    }
    let address = start as u64;
    lock().get_or_insert_default().insert(
        address,
        Allocation {
            owner,
            num_bytes,
            mapped_bytes,
        },
    );
    memory::enter(address, num_bytes);
    Ok(address)
}

/// Frees what [`allocate`] returned.
///
/// # Errors
/// When it did not, for that kind of owner.
pub fn free(address: u64, is_owner: impl Fn(Owner) -> bool) -> Outcome {
    let mut allocations = lock();
    let allocations = allocations.get_or_insert_default();
    let allocation = allocations
        .get(&address)
        .filter(|allocation| is_owner(allocation.owner));
    let mapped_bytes = allocation.ok_or(Status::INVALID_VALUE)?.mapped_bytes;
    allocations.remove(&address);
    memory::forget(address);
    // SAFETY: mapped by `allocate`, and forgotten just now; the caller waits for the GPU before.
    unsafe { libc::munmap(address as *mut libc::c_void, mapped_bytes) };
    Ok(())
}

/// Returns whose memory an address is; none is the host's, not pinned.
pub fn owner_of(address: u64) -> Option<Owner> {
    let (start, _) = memory::find(address)?;
    lock()
        .as_ref()?
        .get(&start)
        .map(|allocation| allocation.owner)
}

/// Returns whether `num_bytes` bytes from an address on lie inside one allocation.
pub fn holds(address: u64, num_bytes: usize) -> bool {
    let inside = |(start, len): (u64, usize)| num_bytes as u64 <= start + len as u64 - address;
    num_bytes == 0 || memory::find(address).is_some_and(inside)
}

/// Returns the bytes of a GPU that are free.
pub fn free_bytes(ordinal: usize) -> usize {
    let allocations = lock();
    let own = allocations
        .iter()
        .flat_map(HashMap::values)
        .filter(|one| one.owner == Owner::Device(ordinal));
    config()
        .memory_bytes
        .saturating_sub(own.map(|one| one.num_bytes).sum())
}

/// Sets bytes of an allocation to `value`. Many zeros are new pages.
///
/// # Safety
/// The bytes must lie inside an allocation, and nobody may use them meanwhile.
pub unsafe fn fill(address: u64, value: u8, num_bytes: usize) {
    let write = |start: u64, end: u64| {
        // SAFETY: the caller's.
        unsafe { (start as *mut u8).write_bytes(value, (end - start) as usize) };
    };
    let end = address + num_bytes as u64;
    let page = PAGE as u64;
    let (first, last) = (address.next_multiple_of(page), end / page * page);
    if value != 0 || num_bytes < 64 * PAGE {
        return write(address, end);
    }
    write(address, first);
    write(last, end);
    // SAFETY: whole pages inside a mapping of `allocate`, private and of no file: zeros afterwards.
    let dropped = unsafe {
        libc::madvise(
            first as *mut libc::c_void,
            (last - first) as usize,
            libc::MADV_DONTNEED,
        )
    };
    if dropped != 0 {
        write(first, last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allocation_is_held_to_its_end_and_no_further() {
        let address = allocate(Owner::Host, 5000).expect("memory");
        assert!(holds(address, 5000) && holds(address + 4999, 1));
        assert!(!holds(address, 5001) && !holds(address + 5000, 1));
        assert_eq!(owner_of(address + 77), Some(Owner::Host));
        assert_eq!(
            free(address, |owner| owner != Owner::Host),
            Err(Status::INVALID_VALUE)
        );
        assert_eq!(free(address, |owner| owner == Owner::Host), Ok(()));
        assert!(!holds(address, 1));
    }

    #[test]
    fn many_zeros_are_zeros_to_their_ends() {
        let num_bytes = 80 * PAGE;
        let address = allocate(Owner::Host, num_bytes).expect("memory");
        // SAFETY: inside the allocation, which only this thread has.
        let bytes = unsafe {
            fill(address, 7, num_bytes);
            fill(address + 5, 0, num_bytes - 12);
            std::slice::from_raw_parts(address as *const u8, num_bytes)
        };
        assert!(
            bytes[..5]
                .iter()
                .chain(&bytes[num_bytes - 7..])
                .all(|&byte| byte == 7)
        );
        assert!(bytes[5..num_bytes - 7].iter().all(|&byte| byte == 0));
        free(address, |_| true).expect("allocated above");
    }
}
