//! What an instruction's handler works on: the warp's registers, its block's memory, the launch.

use std::cell::Cell;

use super::copies::Copies;
use super::program::{Inst, Slot, Step};
use super::row::{Row, Word};
use crate::memory;

/// Top byte of generic addresses of shared memory; the low 32 bits are the shared address.
pub(super) const SHARED_WINDOW: u64 = 0x7e;
/// Top byte of generic addresses of local memory.
pub(super) const LOCAL_WINDOW: u64 = 0x7d;
/// Shared addresses of other blocks of the cluster have the block's rank plus 1 from this bit on.
pub(super) const RANK_SHIFT: u32 = 24;

/// A block's shared memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct SharedMemory {
    /// Its first byte.
    pub start: *mut u8,
    /// Its length.
    pub num_bytes: u32,
    /// Whether the block still runs.
    pub is_alive: bool,
}

/// What all warps of a launch share.
#[derive(Debug)]
pub(super) struct LaunchState {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks of a cluster.
    pub cluster: [u32; 3],
    /// Copy of the parameters.
    pub params: *const u8,
    /// Their bytes.
    pub num_param_bytes: usize,
    /// The allocation that was accessed last, and earlier ones.
    pub recent: Cell<(u64, u64)>,
    earlier: Cell<[(u64, u64); 8]>,
    turn: Cell<usize>,
    /// Instructions so far.
    pub clock: Cell<u64>,
}

impl LaunchState {
    /// Begins a launch whose parameters are at `params`.
    pub(super) fn new(grid: [u32; 3], block: [u32; 3], cluster: [u32; 3], params: &[u8]) -> Self {
        Self {
            grid,
            block,
            cluster,
            params: params.as_ptr(),
            num_param_bytes: params.len(),
            recent: Cell::new((0, 0)),
            earlier: Cell::new([(0, 0); 8]),
            turn: Cell::new(0),
            clock: Cell::new(0),
        }
    }

    /// Returns whether `num_bytes` at `address` are allocated.
    #[inline(always)]
    pub(super) fn is_allocated(&self, address: u64, num_bytes: u64) -> bool {
        let (start, length) = self.recent.get();
        let offset = address.wrapping_sub(start);
        (offset < length && length - offset >= num_bytes) || self.look_up(address, num_bytes)
    }

    /// The same for another allocation than the last one.
    #[cold]
    #[inline(never)]
    fn look_up(&self, address: u64, num_bytes: u64) -> bool {
        let contains = |(start, length): (u64, u64)| {
            address
                .checked_sub(start)
                .is_some_and(|offset| offset < length && length - offset >= num_bytes)
        };
        let mut earlier = self.earlier.get();
        if let Some(&found) = earlier.iter().find(|&&allocation| contains(allocation)) {
            self.recent.set(found);
            return true;
        }
        let params = (self.params as u64, self.num_param_bytes as u64);
        let found = memory::find(address)
            .map(|(start, length)| (start, length as u64))
            .unwrap_or(params);
        if !contains(found) {
            return false;
        }
        let turn = self.turn.get();
        earlier[turn] = found;
        self.earlier.set(earlier);
        self.turn.set((turn + 1) % earlier.len());
        self.recent.set(found);
        true
    }
}

/// What ended a launch.
#[derive(Debug)]
pub(super) struct Fault {
    /// The lane, if it is one's.
    pub lane: Option<usize>,
    /// What is wrong.
    pub text: String,
}

/// What a warp asks of its block or cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Request {
    /// Nothing.
    #[default]
    None,
    /// Waits at barrier `index` for `num_threads`, 0 for all.
    Wait {
        /// Which barrier.
        index: u32,
        /// How many threads.
        num_threads: u32,
    },
    /// Arrives there and goes on.
    Arrive {
        /// Which barrier.
        index: u32,
        /// How many threads.
        num_threads: u32,
    },
    /// Arrives at the cluster's barrier.
    ArriveAtCluster,
    /// Waits for the cluster's barrier.
    WaitForCluster,
}

/// A block's place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// `%ctaid`.
    pub block: [u32; 3],
    /// Its number in its cluster.
    pub rank: u32,
}

/// What a warp has besides registers and control flow.
#[derive(Debug)]
pub(super) struct WarpMemory {
    /// Number of its first thread in the block.
    pub first_thread: u32,
    /// Local memory, lane after lane.
    pub local: Vec<u64>,
    /// Copies to shared memory that have not been waited for.
    pub copies: Copies,
    /// Place for products of warpgroups, once there was one.
    pub scratch: Option<Box<super::products::Scratch>>,
}

/// What handlers work on.
pub(super) struct Context<'a> {
    /// Registers and constants.
    pub rows: [*mut Row; 2],
    /// Masks of predicates.
    pub predicates: *mut u32,
    /// Operands of instructions that have many.
    pub lists: &'a [Slot],
    /// The launch.
    pub launch: &'a LaunchState,
    /// The block.
    pub place: Place,
    /// Shared memory of the cluster's blocks, by rank.
    pub cluster: &'a [SharedMemory],
    /// The block's own.
    pub shared: SharedMemory,
    /// Local memory of a lane, bytes.
    pub local_bytes: usize,
    /// The warp's.
    pub warp: &'a mut WarpMemory,
    /// Copies of tiles that have been started; the block's scheduler finishes them.
    pub tiles: &'a mut Vec<super::tiles::Tile>,
    /// What the warp asks for, after `Step::Request`.
    pub request: Request,
    /// What is wrong, after `Step::Fault`.
    pub fault: Option<Fault>,
}

impl Context<'_> {
    /// Returns a register's or constant's lanes.
    #[inline(always)]
    pub(super) fn row<W: Word>(&self, slot: Slot) -> *mut W {
        // SAFETY: slots come from the program, whose registers and constants these rows are.
        unsafe {
            self.rows
                .get_unchecked(slot.pool())
                .add(slot.index())
                .cast()
        }
    }

    /// Returns a lane of a register or constant.
    #[inline(always)]
    pub(super) fn lane<W: Word>(&self, slot: Slot, lane: usize) -> W {
        debug_assert!(lane < super::row::LANES, "a lane of the warp");
        // SAFETY: as in `row`; there are 32 lanes.
        unsafe { self.row::<W>(slot).add(lane).read() }
    }

    /// Sets a lane of a register.
    #[inline(always)]
    pub(super) fn set_lane<W: Word>(&mut self, slot: Slot, lane: usize, value: W) {
        debug_assert!(lane < super::row::LANES, "a lane of the warp");
        // SAFETY: as in `lane`.
        unsafe { self.row::<W>(slot).add(lane).write(value) }
    }

    /// Returns a predicate's mask.
    #[inline(always)]
    pub(super) fn predicate(&self, slot: Slot) -> u32 {
        // SAFETY: slots of predicates come from the program, whose masks these are.
        unsafe { self.predicates.add(slot.0 as usize).read() }
    }

    /// Sets the bits of `mask` of a predicate.
    #[inline(always)]
    pub(super) fn set_predicate(&mut self, slot: Slot, value: u32, mask: u32) {
        // SAFETY: as in `predicate`.
        unsafe {
            let place = self.predicates.add(slot.0 as usize);
            place.write(place.read() & !mask | value & mask);
        }
    }

    /// Returns the operands in the instruction's list.
    #[inline(always)]
    pub(super) fn list(&self, inst: &Inst) -> *const Slot {
        // SAFETY: lists begin within the program's.
        unsafe { self.lists.as_ptr().add(inst.list as usize) }
    }

    /// Ends the launch.
    #[cold]
    #[inline(never)]
    pub(super) fn fail(&mut self, lane: impl Into<Option<usize>>, text: String) -> Step {
        self.fault = Some(Fault {
            lane: lane.into(),
            text,
        });
        Step::Fault
    }

    /// Returns where `num_bytes` (a power of 2) of global memory are.
    #[inline(always)]
    pub(super) fn global(&mut self, lane: usize, address: u64, num_bytes: u64) -> Option<*mut u8> {
        if address & (num_bytes - 1) == 0 && self.launch.is_allocated(address, num_bytes) {
            return Some(address as *mut u8);
        }
        self.fail_access(lane, "global", address, num_bytes);
        None
    }

    /// Returns where bytes of the block's shared memory are.
    #[inline(always)]
    pub(super) fn shared(&mut self, lane: usize, address: u32, num_bytes: u64) -> Option<*mut u8> {
        let end = u64::from(address) + num_bytes;
        if u64::from(address) & (num_bytes - 1) == 0 && end <= u64::from(self.shared.num_bytes) {
            // SAFETY: within the block's shared memory.
            return Some(unsafe { self.shared.start.add(address as usize) });
        }
        self.fail_access(lane, "shared", u64::from(address), num_bytes);
        None
    }

    /// Returns where bytes of a block's shared memory are.
    #[inline(always)]
    pub(super) fn cluster_shared(
        &mut self,
        lane: usize,
        address: u32,
        num_bytes: u64,
    ) -> Option<*mut u8> {
        let offset = address & ((1 << RANK_SHIFT) - 1);
        let Some(rank) = (address >> RANK_SHIFT).checked_sub(1) else {
            return self.shared(lane, offset, num_bytes);
        };
        let memory = self.cluster.get(rank as usize).copied();
        let end = u64::from(offset) + num_bytes;
        match memory {
            Some(memory) if !memory.is_alive => {
                self.fail(
                    lane,
                    format!(
                        "access to shared memory of block {rank} of the cluster, which has ended"
                    ),
                );
                None
            }
            Some(memory)
                if offset & (num_bytes as u32 - 1) == 0 && end <= u64::from(memory.num_bytes) =>
            {
                // SAFETY: within that block's shared memory.
                Some(unsafe { memory.start.add(offset as usize) })
            }
            _ => {
                self.fail_access(lane, "the cluster's shared", u64::from(address), num_bytes);
                None
            }
        }
    }

    /// Returns where bytes of the lane's local memory are.
    #[inline(always)]
    pub(super) fn local(&mut self, lane: usize, address: u64, num_bytes: u64) -> Option<*mut u8> {
        let address = address & 0xffff_ffff;
        if address & (num_bytes - 1) == 0 && address + num_bytes <= self.local_bytes as u64 {
            let offset = lane * self.local_bytes + address as usize;
            // SAFETY: within the lane's part.
            return Some(unsafe { self.warp.local.as_mut_ptr().cast::<u8>().add(offset) });
        }
        self.fail_access(lane, "local", address, num_bytes);
        None
    }

    /// Returns where bytes at a generic address are.
    #[inline(always)]
    pub(super) fn generic(&mut self, lane: usize, address: u64, num_bytes: u64) -> Option<*mut u8> {
        match address >> 56 {
            SHARED_WINDOW => self.cluster_shared(lane, address as u32, num_bytes),
            LOCAL_WINDOW => self.local(lane, address, num_bytes),
            _ => self.global(lane, address, num_bytes),
        }
    }

    /// Returns where bytes of the parameters are.
    #[inline(always)]
    pub(super) fn param(&mut self, lane: usize, address: u64, num_bytes: u64) -> Option<*mut u8> {
        let end = address.checked_add(num_bytes);
        if address & (num_bytes - 1) == 0
            && end.is_some_and(|end| end <= self.launch.num_param_bytes as u64)
        {
            // SAFETY: within the parameters, which are only read.
            return Some(unsafe { self.launch.params.add(address as usize).cast_mut() });
        }
        self.fail_access(lane, "parameter", address, num_bytes);
        None
    }

    /// Reports an access that is misaligned or outside of all memory.
    #[cold]
    #[inline(never)]
    fn fail_access(&mut self, lane: usize, space: &str, address: u64, num_bytes: u64) {
        let text = if address & (num_bytes - 1) != 0 {
            format!(
                "access of {num_bytes} bytes at {space} address {address:#x}, which is not aligned to them"
            )
        } else {
            let limit = match space {
                "shared" => format!("the block has {} bytes", self.shared.num_bytes),
                "local" => format!("a thread has {} bytes", self.local_bytes),
                "parameter" => format!("the parameters have {} bytes", self.launch.num_param_bytes),
                _ => match memory::find(address)
                    .or_else(|| memory::find(address.wrapping_sub(num_bytes)))
                {
                    Some((start, length)) => {
                        format!("the allocation there has {length} bytes from {start:#x}")
                    }
                    None => "nothing is allocated there".to_owned(),
                },
            };
            format!("access of {num_bytes} bytes at {space} address {address:#x}: {limit}")
        };
        self.fail(lane, text);
    }
}
