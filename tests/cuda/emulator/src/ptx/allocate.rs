//! Gives registers their rows: PTX has a register for each value, so that those which are not needed at the same
//! time share rows, and a warp's registers fit the processor's caches.
//!
//! A register is live from where a lane may read it back to where it is surely written. Lanes that diverge have
//! elements of their own in each row, and each follows the program's control flow. A register's interval spans
//! all instructions at which it is live; intervals are placed in the order of their starts (linear scan, Poletto
//! and Sarkar 1999).

use super::builder::{Access, Builder, Width};
use super::program::{Kind, Slot};

/// Instructions without branches in or out between them.
struct BasicBlock {
    start: usize,
    end: usize,
    successors: Vec<usize>,
}

/// Gives all registers places and writes them into the code; returns the rows and predicate masks of a warp.
pub(super) fn allocate(builder: &mut Builder) -> (usize, usize) {
    let blocks = basic_blocks(builder);
    let live_in = liveness(builder, &blocks);
    let intervals = intervals(builder, &blocks, &live_in);
    let (places, num_rows, num_predicates) = place(builder, &intervals);
    let resolve = |slot: &mut Slot| {
        if *slot != Slot::NONE && slot.pool() == 0 {
            *slot = Slot::register(places[slot.index()]);
        }
    };
    for inst in &mut builder.code {
        for slot in [
            &mut inst.d,
            &mut inst.a,
            &mut inst.b,
            &mut inst.c,
            &mut inst.e,
        ] {
            resolve(slot);
        }
        let mut guard = Slot(inst.guard >> 1);
        resolve(&mut guard);
        inst.guard = guard.0 << 1 | inst.guard & 1;
    }
    builder.lists.iter_mut().for_each(resolve);
    (num_rows, num_predicates)
}

/// Returns the accesses of instruction `index`.
fn accesses(builder: &Builder, index: usize) -> &[Access] {
    let start = if index == 0 {
        0
    } else {
        builder.access_ends[index - 1]
    };
    &builder.accesses[start..builder.access_ends[index]]
}

/// Splits the code at branches and their targets.
fn basic_blocks(builder: &Builder) -> Vec<BasicBlock> {
    let code = &builder.code;
    let mut is_start = vec![false; code.len() + 1];
    is_start[0] = true;
    for (index, inst) in code.iter().enumerate() {
        if matches!(inst.kind, Kind::Branch | Kind::Exit) {
            is_start[index + 1] = true;
        }
        if inst.kind == Kind::Branch {
            is_start[inst.imm as usize] = true;
        }
    }
    let starts: Vec<usize> = (0..code.len()).filter(|&index| is_start[index]).collect();
    let block_of = |index: usize| starts.partition_point(|&start| start <= index) - 1;
    let mut blocks = Vec::with_capacity(starts.len());
    for (number, &start) in starts.iter().enumerate() {
        let end = starts.get(number + 1).copied().unwrap_or(code.len());
        let last = &code[end - 1];
        let is_guarded = last.guard != Slot::TRUE.0 << 1;
        let mut successors = Vec::with_capacity(2);
        if last.kind == Kind::Branch {
            successors.push(block_of(last.imm as usize));
        }
        let falls_through = !matches!(last.kind, Kind::Branch | Kind::Exit) || is_guarded;
        if falls_through && number + 1 < starts.len() {
            successors.push(number + 1);
        }
        blocks.push(BasicBlock {
            start,
            end,
            successors,
        });
    }
    blocks
}

/// Returns for each block a bit for each register that is live where it begins.
fn liveness(builder: &Builder, blocks: &[BasicBlock]) -> Vec<Vec<u64>> {
    let num_words = builder.registers.len().div_ceil(64);
    let mut live_in = vec![vec![0_u64; num_words]; blocks.len()];
    let mut written = vec![vec![0_u64; num_words]; blocks.len()];
    for (number, block) in blocks.iter().enumerate() {
        for index in block.start..block.end {
            let all = accesses(builder, index);
            for access in all.iter().filter(|access| !access.is_write) {
                let (word, bit) = (access.register as usize / 64, 1 << (access.register % 64));
                live_in[number][word] |= bit & !written[number][word];
            }
            if builder.code[index].guard == Slot::TRUE.0 << 1 {
                for access in all.iter().filter(|access| access.is_write) {
                    written[number][access.register as usize / 64] |= 1 << (access.register % 64);
                }
            }
        }
    }
    loop {
        let mut changes = false;
        for number in (0..blocks.len()).rev() {
            for &successor in &blocks[number].successors {
                for word in 0..num_words {
                    let new =
                        live_in[successor][word] & !written[number][word] & !live_in[number][word];
                    if new != 0 {
                        live_in[number][word] |= new;
                        changes = true;
                    }
                }
            }
        }
        if !changes {
            return live_in;
        }
    }
}

/// Returns for each register the first and the last instruction at which it is live; `None` if it is not used.
fn intervals(
    builder: &Builder,
    blocks: &[BasicBlock],
    live_in: &[Vec<u64>],
) -> Vec<Option<(usize, usize)>> {
    let mut intervals: Vec<Option<(usize, usize)>> = vec![None; builder.registers.len()];
    let mut extend = |register: usize, index: usize| {
        let (start, end) = intervals[register].unwrap_or((index, index));
        intervals[register] = Some((start.min(index), end.max(index)));
    };
    for (number, block) in blocks.iter().enumerate() {
        for index in block.start..block.end {
            for access in accesses(builder, index) {
                extend(access.register as usize, index);
            }
        }
        let mut extend_all = |live: &[u64], index: usize| {
            for (word, &bits) in live.iter().enumerate() {
                let mut rest = bits;
                while rest != 0 {
                    extend(word * 64 + rest.trailing_zeros() as usize, index);
                    rest &= rest - 1;
                }
            }
        };
        extend_all(&live_in[number], block.start);
        for &successor in &block.successors {
            extend_all(&live_in[successor], block.end - 1);
        }
    }
    for &register in &builder.pinned {
        extend(register as usize, 0);
        extend(register as usize, builder.code.len());
    }
    intervals
}

/// Free and new places of registers of one kind.
#[derive(Default)]
struct Pool {
    free: Vec<u32>,
    /// End and place of those in use, latest end first.
    used: std::collections::BinaryHeap<std::cmp::Reverse<(usize, u32)>>,
}

impl Pool {
    /// Returns a place from `start` to `end`; a new one is at `next`, which then grows by `size`.
    fn take(&mut self, (start, end): (usize, usize), next: &mut u32, size: u32) -> u32 {
        while let Some(&std::cmp::Reverse((last, place))) = self.used.peek() {
            if last >= start {
                break;
            }
            self.used.pop();
            self.free.push(place);
        }
        let place = self.free.pop().unwrap_or_else(|| {
            *next += size;
            *next - size
        });
        self.used.push(std::cmp::Reverse((end, place)));
        place
    }
}

/// Places all registers; returns their places, and the number of rows and of masks.
fn place(builder: &Builder, intervals: &[Option<(usize, usize)>]) -> (Vec<u32>, usize, usize) {
    let mut order: Vec<(usize, usize, usize)> = intervals
        .iter()
        .enumerate()
        .filter_map(|(register, interval)| interval.map(|(start, end)| (start, end, register)))
        .collect();
    order.sort_unstable();
    let (mut narrow, mut wide, mut predicates) =
        (Pool::default(), Pool::default(), Pool::default());
    let (mut num_rows, mut num_predicates) = (0, 0);
    let mut places = vec![0; intervals.len()];
    for (start, end, register) in order {
        places[register] = match builder.registers[register] {
            Width::Narrow(_) => narrow.take((start, end), &mut num_rows, 1),
            Width::Wide => wide.take((start, end), &mut num_rows, 2),
            Width::Predicate => predicates.take((start, end), &mut num_predicates, 1),
        };
    }
    // Masks have even numbers; the constant ones are among the odd numbers up to 3.
    (
        places,
        num_rows as usize,
        (2 * num_predicates as usize).max(4),
    )
}
