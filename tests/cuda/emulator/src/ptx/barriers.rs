//! Barriers: of a block's threads, of a cluster, and those in shared memory (`mbarrier`).
//!
//! An `mbarrier`'s 64 bits, which the ISA leaves open: from bit 0 the arrivals that its phase still waits for
//! (20), from bit 20 the arrivals of each phase (20), from bit 40 the bytes that have been announced less those
//! that have come (23, signed), and the phase's parity in bit 63.

use super::access::{address, set_address};
use super::builder::{Builder, Statement};
use super::context::{Context, RANK_SHIFT, Request};
use super::operand::Operand;
use super::program::{Handler, Inst, Kind, Slot, Step};
use super::row::for_each_lane;

/// Bits of a count of arrivals.
const COUNT_BITS: u32 = 20;
/// The largest count.
const MAX_COUNT: u32 = (1 << COUNT_BITS) - 1;
/// Bits of the count of bytes.
const BYTES_BITS: u32 = 23;

/// A barrier in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MemoryBarrier {
    pending: u32,
    expected: u32,
    num_bytes: i32,
    parity: u32,
}

impl MemoryBarrier {
    /// Returns a barrier whose phases wait for `count` arrivals.
    fn new(count: u32) -> Self {
        Self {
            pending: count,
            expected: count,
            num_bytes: 0,
            parity: 0,
        }
    }
    /// Reads a barrier; `None` if it is not one that was initialised.
    fn from_bits(bits: u64) -> Option<Self> {
        let pending = bits as u32 & MAX_COUNT;
        let expected = (bits >> COUNT_BITS) as u32 & MAX_COUNT;
        let shift = 64 - 2 * COUNT_BITS - BYTES_BITS;
        let num_bytes = ((bits << shift) as i64 >> (64 - BYTES_BITS)) as i32;
        let is_valid = bits != u64::MAX && expected > 0 && pending <= expected;
        is_valid.then_some(Self {
            pending,
            expected,
            num_bytes,
            parity: (bits >> 63) as u32,
        })
    }
    /// Returns its bits.
    fn into_bits(self) -> u64 {
        let bytes = u64::from(self.num_bytes as u32 & ((1 << BYTES_BITS) - 1));
        u64::from(self.pending)
            | u64::from(self.expected) << COUNT_BITS
            | bytes << (2 * COUNT_BITS)
            | u64::from(self.parity) << 63
    }
    /// Begins the next phase if all have arrived and all bytes have come.
    fn check(&mut self) {
        if self.pending == 0 && self.num_bytes == 0 {
            self.pending = self.expected;
            self.parity ^= 1;
        }
    }
    /// Announces `expected` bytes, which may be none, and arrives `count` times.
    fn arrive(&mut self, count: u32, expected: u32) -> Result<(), String> {
        if count > self.pending {
            return Err(format!(
                "{count} arrivals at a barrier whose phase waits for {} more",
                self.pending
            ));
        }
        self.num_bytes += expected as i32;
        self.pending -= count;
        self.check();
        Ok(())
    }
}

/// Changes the barrier at `place`.
///
/// # Safety
/// `place` has 8 bytes of shared memory.
unsafe fn update(
    place: *mut u8,
    change: impl FnOnce(&mut MemoryBarrier) -> Result<(), String>,
) -> Result<(), String> {
    let place = place.cast::<u64>();
    // SAFETY: the caller's; one thread runs all blocks of a cluster.
    let bits = unsafe { place.read_unaligned() };
    let mut barrier = MemoryBarrier::from_bits(bits)
        .ok_or_else(|| format!("the barrier was not initialised: its bits are {bits:#018x}"))?;
    change(&mut barrier)?;
    // SAFETY: as above.
    unsafe { place.write_unaligned(barrier.into_bits()) };
    Ok(())
}

/// Counts bytes that have come at the barrier at `place`.
///
/// # Errors
/// It is no barrier.
///
/// # Safety
/// `place` has 8 bytes of shared memory.
pub(super) unsafe fn complete_bytes(place: *mut u8, num_bytes: u32) -> Result<(), String> {
    // SAFETY: the caller's.
    unsafe {
        update(place, |barrier| {
            barrier.num_bytes -= num_bytes as i32;
            barrier.check();
            Ok(())
        })
    }
}

/// `mbarrier.init`.
unsafe fn init(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let mut is_fault = false;
    for_each_lane(mask, |lane| {
        let count = context.lane::<u32>(inst.b, lane);
        let place = address(context, inst, lane) as u32;
        let Some(place) = context.shared(lane, place, 8) else {
            is_fault = true;
            return;
        };
        if count == 0 || count > MAX_COUNT {
            context.fail(lane, format!("a barrier of {count} arrivals"));
            is_fault = true;
            return;
        }
        // SAFETY: resolved.
        unsafe {
            place
                .cast::<u64>()
                .write_unaligned(MemoryBarrier::new(count).into_bits())
        };
    });
    if is_fault { Step::Fault } else { Step::Next }
}

/// `mbarrier.arrive` and `.expect_tx`: `extra`'s bit 8 says that the cluster's memory is meant; `b` has the bytes,
/// `c` the arrivals.
unsafe fn arrive(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        let num_bytes = if inst.b == Slot::NONE {
            0
        } else {
            context.lane::<u32>(inst.b, lane)
        };
        let count = if inst.c == Slot::NONE {
            1
        } else {
            context.lane::<u32>(inst.c, lane)
        };
        let place = address(context, inst, lane) as u32;
        let place = if inst.extra & 256 != 0 {
            context.cluster_shared(lane, place, 8)
        } else {
            context.shared(lane, place, 8)
        };
        let Some(place) = place else {
            return Step::Fault;
        };
        // SAFETY: resolved.
        if let Err(error) = unsafe { update(place, |barrier| barrier.arrive(count, num_bytes)) } {
            return context.fail(lane, error);
        }
    }
    Step::Next
}

/// `mbarrier.try_wait.parity` and `test_wait`.
unsafe fn wait(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let (mut passed, mut rest) = (0, mask);
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        let parity = context.lane::<u32>(inst.b, lane) & 1;
        let place = address(context, inst, lane) as u32;
        let Some(place) = context.shared(lane, place, 8) else {
            return Step::Fault;
        };
        let mut holds = false;
        // SAFETY: resolved.
        let result = unsafe {
            update(place, |barrier| {
                holds = barrier.parity != parity;
                Ok(())
            })
        };
        if let Err(error) = result {
            return context.fail(lane, error);
        }
        passed |= u32::from(holds) << lane;
    }
    context.set_predicate(inst.d, passed, mask);
    if passed == mask {
        Step::Next
    } else {
        Step::Poll
    }
}

/// Decodes `mbarrier`.
///
/// # Errors
/// What is not known.
pub(super) fn decode_memory(
    builder: &mut Builder,
    statement: &Statement<'_, '_>,
) -> Result<Inst, String> {
    let parts = &statement.parts[1..];
    let is_cluster = parts.contains(&"shared::cluster");
    let known = [
        "shared",
        "shared::cta",
        "shared::cluster",
        "b64",
        "parity",
        "expect_tx",
        "release",
        "acquire",
        "cta",
    ];
    if let Some(part) = parts[1..]
        .iter()
        .find(|part| !known.contains(part) && **part != "cluster")
    {
        return Err(format!("modifier `{part}` is not known"));
    }
    match (parts[0], statement.operands) {
        ("init", [place, count]) => {
            let mut inst = builder.instruction(init);
            set_address(builder, &mut inst, place)?;
            inst.b = builder.source::<u32>(count)?;
            Ok(inst)
        }
        ("inval", [_]) => Ok(builder.no_operation()),
        ("arrive" | "expect_tx", operands) => {
            let is_announcement = parts.contains(&"expect_tx");
            let operands = match operands {
                [Operand::Sink, rest @ ..] => rest,
                all => all,
            };
            let mut inst = builder.instruction(arrive);
            match (operands, is_announcement) {
                ([place], false) => set_address(builder, &mut inst, place)?,
                ([place, number], _) => {
                    set_address(builder, &mut inst, place)?;
                    let number = builder.source::<u32>(number)?;
                    *(if is_announcement {
                        &mut inst.b
                    } else {
                        &mut inst.c
                    }) = number;
                }
                _ => return Err("states of barriers are not known".to_owned()),
            }
            if parts[0] == "expect_tx" {
                inst.c = builder.constant(32, 0);
            }
            inst.extra |= if is_cluster { 256 } else { 0 };
            Ok(inst)
        }
        ("try_wait" | "test_wait", [holds, place, parity, ..])
            if parts.contains(&"parity") && !is_cluster =>
        {
            let mut inst = builder.instruction(wait);
            set_address(builder, &mut inst, place)?;
            inst.b = builder.source::<u32>(parity)?;
            inst.d = builder.predicate_target(holds)?;
            Ok(inst)
        }
        _ => Err("this barrier's instruction is not known".to_owned()),
    }
}

/// Asks the block for what `extra` says: 0 waits at a barrier, 1 arrives, 2 and 3 the same for the cluster's.
unsafe fn request(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let lane = mask.trailing_zeros() as usize;
    let (index, num_threads) = match inst.extra {
        0 | 1 => (
            context.lane::<u32>(inst.a, lane),
            context.lane::<u32>(inst.b, lane),
        ),
        _ => (0, 0),
    };
    if num_threads % 32 != 0 {
        return context.fail(
            lane,
            format!("a barrier of {num_threads} threads, not a multiple of 32"),
        );
    }
    context.request = match inst.extra {
        0 => Request::Wait { index, num_threads },
        1 => Request::Arrive { index, num_threads },
        2 => Request::WaitForCluster,
        _ => Request::ArriveAtCluster,
    };
    Step::Request
}

/// Decodes `bar`, `barrier`, `barrier.cluster`.
///
/// # Errors
/// What is not known.
pub(super) fn decode(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let mut inst = builder.instruction(request);
    inst.kind = Kind::WholeWarp;
    inst.extra = match statement.parts {
        ["bar", "warp", "sync"] => {
            let [members] = statement.operands else {
                return Err("wanted a mask".to_owned());
            };
            let mut inst = builder.no_operation();
            inst.kind = Kind::WarpBarrier;
            inst.e = builder.source::<u32>(members)?;
            return Ok(inst);
        }
        ["bar" | "barrier", "sync"]
        | ["bar" | "barrier", "cta", "sync"]
        | ["barrier", .., "sync", "aligned"] => 0,
        ["bar" | "barrier", "arrive"]
        | ["bar" | "barrier", "cta", "arrive"]
        | ["barrier", "arrive", "aligned"] => 1,
        ["barrier", "cluster", "wait", ..] => 2,
        ["barrier", "cluster", "arrive", ..] => 3,
        _ => return Err("this barrier is not known".to_owned()),
    };
    let zero = Operand::Immediate(0);
    if inst.extra < 2 {
        let index = statement.operands.first().ok_or("wanted a barrier")?;
        let num_threads = statement.operands.get(1).unwrap_or(&zero);
        inst.a = builder.source::<u32>(index)?;
        inst.b = builder.source::<u32>(num_threads)?;
    }
    Ok(inst)
}

/// `mapa.shared::cluster.u32`: the address of the same place of another block of the cluster.
unsafe fn map_address(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        let (address, rank) = (
            context.lane::<u32>(inst.a, lane),
            context.lane::<u32>(inst.b, lane),
        );
        if rank as usize >= context.cluster.len() {
            let length = context.cluster.len();
            return context.fail(lane, format!("block {rank} of a cluster of {length}"));
        }
        let offset = address & ((1 << RANK_SHIFT) - 1);
        context.set_lane(inst.d, lane, offset | (rank + 1) << RANK_SHIFT);
    }
    Step::Next
}

/// Decodes `mapa`.
///
/// # Errors
/// What is not known.
pub(super) fn decode_map_address(
    builder: &mut Builder,
    statement: &Statement<'_, '_>,
) -> Result<Inst, String> {
    let (["mapa", "shared::cluster", "u32"], [target, address, rank]) =
        (statement.parts, statement.operands)
    else {
        return Err("this mapa is not known".to_owned());
    };
    let run: Handler = map_address;
    let mut inst = builder.instruction(run);
    (inst.a, inst.b) = (
        builder.source::<u32>(address)?,
        builder.source::<u32>(rank)?,
    );
    inst.d = builder.target::<u32>(target)?;
    Ok(inst)
}

#[cfg(test)]
mod tests {
    use super::MemoryBarrier;

    #[test]
    fn a_phase_ends_with_all_arrivals_and_bytes() {
        let mut barrier = MemoryBarrier::new(2);
        barrier.arrive(1, 4096).expect("one of two");
        barrier = MemoryBarrier::from_bits(barrier.into_bits()).expect("valid");
        barrier.arrive(1, 0).expect("two of two");
        assert_eq!(barrier.parity, 0);
        assert!(barrier.arrive(1, 0).is_err());
        barrier.num_bytes -= 4096;
        barrier.check();
        assert_eq!(
            barrier,
            MemoryBarrier {
                parity: 1,
                ..MemoryBarrier::new(2)
            }
        );
    }

    #[test]
    fn bytes_may_come_before_they_are_announced() {
        let barrier = MemoryBarrier {
            num_bytes: -512,
            ..MemoryBarrier::new(MAX)
        };
        const MAX: u32 = 7;
        assert_eq!(MemoryBarrier::from_bits(barrier.into_bits()), Some(barrier));
        assert_eq!(MemoryBarrier::from_bits(u64::MAX), None);
        assert_eq!(MemoryBarrier::from_bits(0), None);
    }
}
