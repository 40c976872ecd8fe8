//! Copies of boxes of tensors to shared memory (`cp.async.bulk.tensor`), which take effect after the warp's turn.

use super::barriers::complete_bytes;
use super::builder::{Builder, Statement};
use super::context::{Context, LaunchState, RANK_SHIFT, SharedMemory};
use super::operand::Operand;
use super::program::{Inst, Slot, Step};
use crate::tensor_map::{NUM_BYTES, TensorMap};

/// Units that a swizzle moves, bytes.
const UNIT: u64 = 16;

/// A copy under way.
#[derive(Debug)]
pub(super) struct Tile {
    map: TensorMap,
    coordinates: [i32; 5],
    /// Address in shared memory.
    target: u32,
    /// Address of the barrier that counts its bytes.
    barrier: u32,
    /// Blocks of the cluster that get it, by rank; `None` for the one that the address has.
    ranks: Option<u32>,
    /// Line of the PTX.
    pub line: u32,
    /// Thread that began it.
    pub thread: u32,
}

impl Tile {
    /// Copies, zeros where the tensor has nothing, and counts the bytes; `own` is the block's rank.
    ///
    /// # Errors
    /// Places outside of memory, blocks that have ended, no barrier.
    pub(super) fn finish(
        &self,
        launch: &LaunchState,
        cluster: &[SharedMemory],
        own: u32,
    ) -> Result<(), String> {
        let num_bytes = self.map.box_bytes();
        let Some(ranks) = self.ranks else {
            let rank = (self.target >> RANK_SHIFT).checked_sub(1).unwrap_or(own);
            let barrier_rank = (self.barrier >> RANK_SHIFT).checked_sub(1).unwrap_or(own);
            self.copy(launch, memory(cluster, rank)?)?;
            return self.count(memory(cluster, barrier_rank)?, num_bytes as u32);
        };
        for rank in (0..16).filter(|rank| ranks >> rank & 1 != 0) {
            let memory = memory(cluster, rank)?;
            self.copy(launch, memory)?;
            self.count(memory, num_bytes as u32)?;
        }
        Ok(())
    }

    /// Counts the bytes at the barrier in `memory`.
    fn count(&self, memory: SharedMemory, num_bytes: u32) -> Result<(), String> {
        let offset = self.barrier & ((1 << RANK_SHIFT) - 1);
        if !offset.is_multiple_of(8) || offset + 8 > memory.num_bytes {
            return Err(format!(
                "the barrier of a tile at shared address {offset:#x} of {}",
                memory.num_bytes
            ));
        }
        // SAFETY: within the block's memory.
        unsafe { complete_bytes(memory.start.add(offset as usize), num_bytes) }
    }

    /// Copies the box to `memory`.
    fn copy(&self, launch: &LaunchState, memory: SharedMemory) -> Result<(), String> {
        let map = &self.map;
        let offset = u64::from(self.target & ((1 << RANK_SHIFT) - 1));
        if !offset.is_multiple_of(128) || offset + map.box_bytes() > u64::from(memory.num_bytes) {
            let (bytes, all) = (map.box_bytes(), memory.num_bytes);
            return Err(format!(
                "a tile of {bytes} bytes at shared address {offset:#x}; the block has {all} bytes"
            ));
        }
        let row_bytes = u64::from(map.box_sizes[0]) * u64::from(map.element_bytes);
        let num_rows: u64 = map.box_sizes[1..]
            .iter()
            .map(|&size| u64::from(size))
            .product();
        let mut row = vec![0_u8; row_bytes as usize];
        for index in 0..num_rows {
            self.read_row(launch, index, &mut row)?;
            let start = offset + index * row_bytes;
            for (unit, bytes) in row.chunks(UNIT as usize).enumerate() {
                let place = map.swizzle.place(start + unit as u64 * UNIT);
                // SAFETY: swizzles stay within 1,024 bytes, of which boxes have multiples, or within the box.
                unsafe {
                    let target = memory.start.add(place as usize);
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
                }
            }
        }
        Ok(())
    }

    /// Reads row `index` of the box.
    fn read_row(&self, launch: &LaunchState, index: u64, row: &mut [u8]) -> Result<(), String> {
        let map = &self.map;
        row.fill(0);
        let (mut rest, mut address) = (index, map.address);
        for axis in 1..5 {
            let size = u64::from(map.box_sizes[axis]);
            let place = i64::from(self.coordinates[axis]) + (rest % size) as i64;
            rest /= size;
            if place < 0 || place >= i64::from(map.sizes[axis]) {
                return Ok(());
            }
            address += place as u64 * map.stride_bytes[axis];
        }
        let first = i64::from(self.coordinates[0]);
        let start = first.max(0);
        let end = (first + i64::from(map.box_sizes[0])).min(map.sizes[0].into());
        if start >= end {
            return Ok(());
        }
        let element = i64::from(map.element_bytes);
        let source = address + (start * element) as u64;
        let (skipped, length) = (
            ((start - first) * element) as usize,
            ((end - start) * element) as usize,
        );
        if !launch.is_allocated(source, length as u64) {
            return Err(format!(
                "a tile's row of {length} bytes at global address {source:#x} is not allocated"
            ));
        }
        // SAFETY: allocated, and the row has place for the whole box.
        unsafe {
            std::ptr::copy_nonoverlapping(source as *const u8, row[skipped..].as_mut_ptr(), length)
        };
        Ok(())
    }
}

/// Returns the shared memory of a block of the cluster.
fn memory(cluster: &[SharedMemory], rank: u32) -> Result<SharedMemory, String> {
    match cluster.get(rank as usize) {
        Some(memory) if memory.is_alive => Ok(*memory),
        Some(_) => Err(format!(
            "a tile for block {rank} of the cluster, which has ended"
        )),
        None => Err(format!(
            "a tile for block {rank} of a cluster of {}",
            cluster.len()
        )),
    }
}

/// `cp.async.bulk.tensor`: its list has the map's address, the target, the barrier, and the coordinates.
unsafe fn begin(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        let address = context
            .lane::<u64>(inst.a, lane)
            .wrapping_add(inst.imm as u64);
        if !address.is_multiple_of(64) || !context.launch.is_allocated(address, NUM_BYTES as u64) {
            return context.fail(lane, format!("no tensor map at address {address:#x}"));
        }
        // SAFETY: allocated or a parameter.
        let bytes = unsafe { (address as *const [u8; NUM_BYTES]).read() };
        let Some(map) = TensorMap::from_bytes(&bytes) else {
            return context.fail(
                lane,
                format!("what is at address {address:#x} is not a tensor map"),
            );
        };
        let rank = inst.count as usize;
        if map.rank != rank {
            return context.fail(
                lane,
                format!("a map of {} dimensions; wanted {rank}", map.rank),
            );
        }
        let mut coordinates = [0; 5];
        for (axis, coordinate) in coordinates.iter_mut().enumerate().take(rank) {
            // SAFETY: the list has that many.
            let slot = unsafe { *context.list(inst).add(axis) };
            *coordinate = context.lane::<u32>(slot, lane) as i32;
        }
        let ranks = (inst.e != Slot::NONE).then(|| context.lane::<u32>(inst.e, lane) & 0xffff);
        let tile = Tile {
            map,
            coordinates,
            target: context.lane::<u32>(inst.b, lane),
            barrier: context.lane::<u32>(inst.c, lane),
            ranks,
            line: inst.line,
            thread: context.warp.first_thread + lane as u32,
        };
        context.tiles.push(tile);
    }
    Step::Next
}

/// Decodes `cp.async.bulk.tensor` from global to shared memory.
///
/// # Errors
/// What is not known.
pub(super) fn decode(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let [
        "cp",
        "async",
        "bulk",
        "tensor",
        dims,
        target_space,
        "global",
        rest @ ..,
    ] = statement.parts
    else {
        return Err("this copy is not known".to_owned());
    };
    let rank = dims
        .strip_suffix('d')
        .and_then(|digits| digits.parse::<u16>().ok())
        .unwrap_or(0);
    if !(1..=5).contains(&rank) || !matches!(*target_space, "shared::cluster" | "shared::cta") {
        return Err("this copy is not known".to_owned());
    }
    let (mut has_ranks, mut has_hint) = (false, false);
    for part in rest {
        match *part {
            "tile" | "mbarrier::complete_tx::bytes" => {}
            "multicast::cluster" => has_ranks = true,
            "L2::cache_hint" => has_hint = true,
            other => return Err(format!("modifier `{other}` is not known")),
        }
    }
    let [
        Operand::Address {
            base: target,
            offset: 0,
            ..
        },
        Operand::Address {
            base: map,
            offset,
            coordinates,
        },
        Operand::Address {
            base: barrier,
            offset: 0,
            ..
        },
        more @ ..,
    ] = statement.operands
    else {
        return Err("wanted a target, a map with coordinates, a barrier".to_owned());
    };
    if coordinates.len() != rank as usize
        || more.len() != usize::from(has_ranks) + usize::from(has_hint)
    {
        return Err("this number of operands or coordinates is not known".to_owned());
    }
    let mut inst = builder.instruction(begin);
    (inst.a, inst.imm, inst.count) = (builder.source::<u64>(map)?, *offset, rank);
    (inst.b, inst.c) = (
        builder.source::<u32>(target)?,
        builder.source::<u32>(barrier)?,
    );
    if has_ranks {
        inst.e = builder.source::<u32>(&more[0])?;
    }
    let mut slots = Vec::new();
    for coordinate in coordinates {
        slots.push(builder.source::<u32>(coordinate)?);
    }
    inst.list = builder.list(&slots);
    Ok(inst)
}
