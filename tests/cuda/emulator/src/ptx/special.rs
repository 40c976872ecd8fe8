//! Special registers: what the hardware knows of a thread.

use std::time::{SystemTime, UNIX_EPOCH};

use super::builder::{Builder, Width};
use super::context::Context;
use super::operand::Operand;
use super::program::{Inst, Step};
use super::row::for_each_lane;

/// A special register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Special {
    ThreadIndex,
    BlockDim,
    BlockIndex,
    GridDim,
    Lane,
    Warp,
    NumWarps,
    LanesBelow,
    LanesUpTo,
    LanesFrom,
    LanesAbove,
    OwnLane,
    Clock,
    Time,
    Rank,
    ClusterSize,
    ClusterDim,
    IndexInCluster,
    ClusterIndex,
    NumClusters,
    Multiprocessor,
}

/// All special registers, in the order of their numbers.
const ALL: [(&str, Special); 23] = [
    ("%tid", Special::ThreadIndex),
    ("%ntid", Special::BlockDim),
    ("%ctaid", Special::BlockIndex),
    ("%nctaid", Special::GridDim),
    ("%laneid", Special::Lane),
    ("%warpid", Special::Warp),
    ("%nwarpid", Special::NumWarps),
    ("%lanemask_lt", Special::LanesBelow),
    ("%lanemask_le", Special::LanesUpTo),
    ("%lanemask_ge", Special::LanesFrom),
    ("%lanemask_gt", Special::LanesAbove),
    ("%lanemask_eq", Special::OwnLane),
    ("%clock", Special::Clock),
    ("%clock64", Special::Clock),
    ("%globaltimer", Special::Time),
    ("%globaltimer_lo", Special::Time),
    ("%cluster_ctarank", Special::Rank),
    ("%cluster_nctarank", Special::ClusterSize),
    ("%cluster_nctaid", Special::ClusterDim),
    ("%cluster_ctaid", Special::IndexInCluster),
    ("%clusterid", Special::ClusterIndex),
    ("%nclusterid", Special::NumClusters),
    ("%smid", Special::Multiprocessor),
];

/// Decodes `mov` from a special register.
///
/// # Errors
/// A name that is not known.
pub(super) fn decode(
    builder: &mut Builder,
    target: &Operand<'_>,
    name: &str,
) -> Result<Inst, String> {
    let (stem, axis) = match name.split_once('.') {
        Some((stem, "x")) => (stem, 0),
        Some((stem, "y")) => (stem, 1),
        Some((stem, "z")) => (stem, 2),
        Some(_) => return Err(format!("special register {name} is not known")),
        None => (name, 0),
    };
    let index = ALL.iter().position(|(name, _)| *name == stem);
    let index = index.ok_or_else(|| format!("special register {name} is not known"))?;
    let (slot, width) = builder.target_of_any_width(target)?;
    let mut inst = builder.instruction(if width == Width::Wide {
        read::<true>
    } else {
        read::<false>
    });
    inst.d = slot;
    inst.extra = index as u16;
    inst.imm = axis;
    Ok(inst)
}

/// Reads a special register.
unsafe fn read<const IS_WIDE: bool>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let (special, axis) = (ALL[inst.extra as usize].1, inst.imm as usize);
    let now = if special == Special::Time {
        nanoseconds()
    } else {
        0
    };
    for_each_lane(mask, |lane| {
        let value = if special == Special::Time {
            now
        } else {
            value(context, special, axis, lane)
        };
        if IS_WIDE {
            context.set_lane(inst.d, lane, value);
        } else {
            context.set_lane(inst.d, lane, value as u32);
        }
    });
    Step::Next
}

/// Returns the time.
fn nanoseconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |duration| duration.as_nanos() as u64)
}

/// Returns a lane's value.
fn value(context: &Context<'_>, special: Special, axis: usize, lane: usize) -> u64 {
    let (launch, place) = (context.launch, context.place);
    let thread = context.warp.first_thread + lane as u32;
    let [x, y, _] = launch.block;
    let num_threads: u32 = launch.block.iter().product();
    let dims = launch.cluster;
    let bit = 1_u32 << lane;
    match special {
        Special::ThreadIndex => [thread % x, thread / x % y, thread / x / y][axis].into(),
        Special::BlockDim => launch.block[axis].into(),
        Special::BlockIndex => place.block[axis].into(),
        Special::GridDim => launch.grid[axis].into(),
        Special::Lane => lane as u64,
        Special::Warp => (thread / 32).into(),
        Special::NumWarps => num_threads.div_ceil(32).into(),
        Special::LanesBelow => (bit - 1).into(),
        Special::LanesUpTo => (bit | (bit - 1)).into(),
        Special::LanesFrom => (!(bit - 1)).into(),
        Special::LanesAbove => (!(bit | (bit - 1))).into(),
        Special::OwnLane => bit.into(),
        // A turn is long; what counts is that the clock goes on.
        Special::Clock => {
            let clock = launch.clock.get() + 1;
            launch.clock.set(clock);
            clock << 8
        }
        Special::Time => nanoseconds(),
        Special::Rank => place.rank.into(),
        Special::ClusterSize => dims.iter().product::<u32>().into(),
        Special::ClusterDim => dims[axis].into(),
        Special::IndexInCluster => (place.block[axis] % dims[axis]).into(),
        Special::ClusterIndex => (place.block[axis] / dims[axis]).into(),
        Special::NumClusters => (launch.grid[axis] / dims[axis]).into(),
        Special::Multiprocessor => place.block[0].into(),
    }
}
