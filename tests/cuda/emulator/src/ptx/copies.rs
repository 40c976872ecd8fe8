//! `cp.async`: copies from global to shared memory that take effect when they are waited for, as late as the
//! hardware may, so that a missing wait shows.

use std::collections::VecDeque;

use super::access::{address, set_address};
use super::builder::{Builder, Statement};
use super::context::Context;
use super::operand::Operand;
use super::program::{Inst, Slot, Step};
use super::row::LANES;

/// A lane's copy.
#[derive(Debug, Clone, Copy)]
struct Copy {
    target: *mut u8,
    source: *const u8,
    /// Bytes of shared memory.
    num_bytes: u8,
    /// Bytes that are read; the rest is zero.
    num_read: u8,
    lane: u8,
    group: u32,
}

/// A warp's copies that have not been waited for.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pending: VecDeque<Copy>,
    /// Groups that each lane has committed.
    committed: [u32; LANES],
}

impl Copies {
    /// Does a lane's copies of all but its `num_pending` last groups.
    fn wait(&mut self, mask: u32, num_pending: u32) {
        let Self { pending, committed } = self;
        let is_done = |copy: &Copy| {
            mask >> copy.lane & 1 != 0
                && copy.group.saturating_add(num_pending) < committed[copy.lane as usize]
        };
        // Lanes that commit alike have their copies in order.
        while pending.front().is_some_and(is_done) {
            pending.pop_front().inspect(Copy::finish);
        }
        if pending.iter().any(is_done) {
            pending.retain(|copy| {
                let is_done = is_done(copy);
                if is_done {
                    copy.finish();
                }
                !is_done
            });
        }
    }
}

impl Copy {
    /// Copies.
    fn finish(&self) {
        let num_read = self.num_read as usize;
        // SAFETY: both places were resolved when the copy began; allocations outlive their kernels' launches, or
        // the kernel is wrong.
        unsafe {
            std::ptr::copy_nonoverlapping(self.source, self.target, num_read);
            std::ptr::write_bytes(
                self.target.add(num_read),
                0,
                self.num_bytes as usize - num_read,
            );
        }
    }
}

/// `cp.async.ca` and `.cg`.
unsafe fn copy(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let num_bytes = inst.count as u8;
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        let source = context
            .lane::<u64>(inst.b, lane)
            .wrapping_add(u64::from(inst.list));
        let num_read = if inst.c == Slot::NONE {
            num_bytes.into()
        } else {
            context.lane::<u32>(inst.c, lane)
        };
        if num_read > num_bytes.into() {
            return context.fail(
                lane,
                format!("{num_read} bytes to read of a copy of {num_bytes}"),
            );
        }
        let place = address(context, inst, lane) as u32;
        let Some(target) = context.shared(lane, place, num_bytes.into()) else {
            return Step::Fault;
        };
        // An address that nothing is read from need not be anyone's.
        if num_read > 0 && context.global(lane, source, num_bytes.into()).is_none() {
            return Step::Fault;
        }
        let group = context.warp.copies.committed[lane];
        let (lane, num_read, source) = (lane as u8, num_read as u8, source as *const u8);
        context.warp.copies.pending.push_back(Copy {
            target,
            source,
            num_bytes,
            num_read,
            lane,
            group,
        });
    }
    Step::Next
}

/// `cp.async.commit_group`.
unsafe fn commit(context: &mut Context<'_>, _: &Inst, mask: u32) -> Step {
    for lane in 0..LANES {
        context.warp.copies.committed[lane] += mask >> lane & 1;
    }
    Step::Next
}

/// `cp.async.wait_group`.
unsafe fn wait(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    context.warp.copies.wait(mask, inst.imm as u32);
    Step::Next
}

/// `cp.async.wait_all`.
unsafe fn wait_all(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    // SAFETY: the same instructions.
    unsafe {
        commit(context, inst, mask);
        wait(context, inst, mask)
    }
}

/// Decodes `cp.async` without `.bulk`.
///
/// # Errors
/// What is not known.
pub(super) fn decode(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    match (statement.parts, statement.operands) {
        (["cp", "async", "commit_group"], []) => Ok(builder.instruction(commit)),
        (["cp", "async", "wait_all"], []) => Ok(builder.instruction(wait_all)),
        (["cp", "async", "wait_group"], [Operand::Immediate(count)]) => {
            let mut inst = builder.instruction(wait);
            inst.imm = *count as i64;
            Ok(inst)
        }
        (
            [
                "cp",
                "async",
                "ca" | "cg",
                "shared" | "shared::cta",
                "global",
                ..,
            ],
            operands,
        ) => {
            let [
                target,
                Operand::Address { base, offset, .. },
                Operand::Immediate(num_bytes),
                more @ ..,
            ] = operands
            else {
                return Err("wanted two addresses and a number".to_owned());
            };
            if !matches!(num_bytes, 4 | 8 | 16) {
                return Err("copies have 4, 8 or 16 bytes".to_owned());
            }
            let mut inst = builder.instruction(copy);
            set_address(builder, &mut inst, target)?;
            inst.b = builder.source::<u64>(base)?;
            inst.list = u32::try_from(*offset).map_err(|_| "negative offset of the source")?;
            inst.count = *num_bytes as u16;
            if let [num_read] = more {
                inst.c = builder.source::<u32>(num_read)?;
            }
            Ok(inst)
        }
        _ => Err("this copy is not known".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Copies, Copy};

    #[test]
    fn groups_end_in_order_and_by_lane() {
        let source = [7_u8; 4];
        let mut targets = [[0_u8; 4]; 4];
        let mut copies = Copies::default();
        for (index, target) in targets.iter_mut().enumerate() {
            let (lane, group) = (index as u8 % 2, index as u32 / 2);
            let (target, source) = (target.as_mut_ptr(), source.as_ptr());
            copies.pending.push_back(Copy {
                target,
                source,
                num_bytes: 4,
                num_read: 3,
                lane,
                group,
            });
        }
        copies.committed[..2].copy_from_slice(&[2, 2]);
        copies.wait(0b10, 1);
        assert_eq!(targets, [[0; 4], [7, 7, 7, 0], [0; 4], [0; 4]]);
        copies.wait(0b11, 0);
        assert_eq!(targets, [[7, 7, 7, 0]; 4]);
        assert!(copies.pending.is_empty());
    }
}
