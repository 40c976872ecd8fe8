//! Instructions of a warp's lanes together: shuffles, votes, reductions, elections.

use super::builder::{Builder, Statement};
use super::context::Context;
use super::operand::Operand;
use super::program::{Handler, Inst, Kind, Slot, Step};
use super::row::{LANES, for_each_lane};

/// `shfl`: `MODE` 0 is up, 1 down, 2 butterfly, 3 index.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
unsafe fn shuffle<const MODE: u32>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    // SAFETY: registers of the program; copied, since the result may be one of them.
    let (values, selectors, clamps) = unsafe {
        let row = |slot| context.row::<u32>(slot).cast::<[u32; LANES]>().read();
        (row(inst.a), row(inst.b), row(inst.c))
    };
    let mut in_range = 0;
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros();
        rest &= rest - 1;
        let (selector, clamp) = (selectors[lane as usize] & 31, clamps[lane as usize]);
        let (limit, segment) = (clamp & 31, clamp >> 8 & 31);
        let last = lane & segment | limit & !segment;
        let first = lane & segment;
        let (source, holds) = match MODE {
            0 => {
                let source = lane.wrapping_sub(selector);
                (source, source as i32 >= last as i32)
            }
            1 => (lane + selector, lane + selector <= last),
            2 => (lane ^ selector, lane ^ selector <= last),
            _ => {
                let source = first | selector & !segment;
                (source, source <= last)
            }
        };
        in_range |= u32::from(holds) << lane;
        let source = if holds { source } else { lane };
        context.set_lane(inst.d, lane as usize, values[source as usize & 31]);
    }
    if inst.count == 1 {
        // SAFETY: the list has the predicate.
        let holds = unsafe { *context.list(inst) };
        context.set_predicate(holds, in_range, mask);
    }
    Step::Next
}

/// The predicate of lanes, of a vote.
fn votes(context: &Context<'_>, inst: &Inst, mask: u32) -> u32 {
    (context.predicate(inst.a) ^ u32::from(inst.extra & 1).wrapping_neg()) & mask
}

/// `vote.ballot`.
unsafe fn ballot(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let result = votes(context, inst, mask);
    for_each_lane(mask, |lane| context.set_lane(inst.d, lane, result));
    Step::Next
}

/// `vote.any` (`MODE` 0), `vote.all` (1), `vote.uni` (2).
unsafe fn vote<const MODE: u32>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let result = votes(context, inst, mask);
    let holds = match MODE {
        0 => result != 0,
        1 => result == mask,
        _ => result == 0 || result == mask,
    };
    context.set_predicate(inst.d, u32::from(holds).wrapping_neg(), mask);
    Step::Next
}

/// `activemask`.
unsafe fn active_mask(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    for_each_lane(mask, |lane| context.set_lane(inst.d, lane, mask));
    Step::Next
}

/// `elect`: the lowest lane.
unsafe fn elect(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let leader = mask.trailing_zeros();
    if inst.d != Slot::NONE {
        for_each_lane(mask, |lane| context.set_lane(inst.d, lane, leader));
    }
    context.set_predicate(inst.a, 1 << leader, mask);
    Step::Next
}

/// How two values become one.
trait Reduction {
    /// Makes one of them.
    fn apply(x: u32, y: u32) -> u32;
}

/// `redux`.
unsafe fn reduce<R: Reduction>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let mut result = context.lane::<u32>(inst.a, mask.trailing_zeros() as usize);
    for_each_lane(mask & (mask - 1), |lane| {
        result = R::apply(result, context.lane(inst.a, lane))
    });
    for_each_lane(mask, |lane| context.set_lane(inst.d, lane, result));
    Step::Next
}

/// Returns the handler of `redux`.
fn reduction(name: &str, kind: &str) -> Option<Handler> {
    macro_rules! reduction {
        (|$x:ident, $y:ident| $body:expr) => {{
            struct This;
            impl Reduction for This {
                fn apply($x: u32, $y: u32) -> u32 {
                    $body
                }
            }
            reduce::<This> as Handler
        }};
    }
    Some(match (name, kind) {
        ("add", "s32" | "u32") => reduction!(|x, y| x.wrapping_add(y)),
        ("max", "s32") => reduction!(|x, y| (x as i32).max(y as i32) as u32),
        ("min", "s32") => reduction!(|x, y| (x as i32).min(y as i32) as u32),
        ("max", "u32") => reduction!(|x, y| x.max(y)),
        ("min", "u32") => reduction!(|x, y| x.min(y)),
        ("and", "b32") => reduction!(|x, y| x & y),
        ("or", "b32") => reduction!(|x, y| x | y),
        ("xor", "b32") => reduction!(|x, y| x ^ y),
        _ => return None,
    })
}

/// Decodes `shfl.sync`.
fn decode_shuffle(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let run: Handler = match statement.parts {
        ["shfl", "sync", "up", "b32"] => shuffle::<0>,
        ["shfl", "sync", "down", "b32"] => shuffle::<1>,
        ["shfl", "sync", "bfly", "b32"] => shuffle::<2>,
        ["shfl", "sync", "idx", "b32"] => shuffle::<3>,
        _ => return Err("this shuffle is not known".to_owned()),
    };
    let [target, a, b, c, members] = statement.operands else {
        return Err("wanted five operands".to_owned());
    };
    let mut inst = builder.instruction(run);
    (inst.a, inst.b) = (builder.source::<u32>(a)?, builder.source::<u32>(b)?);
    (inst.c, inst.e) = (builder.source::<u32>(c)?, builder.source::<u32>(members)?);
    inst.kind = Kind::Members;
    match target {
        Operand::Pair(target, holds) => {
            inst.d = builder.target::<u32>(target)?;
            if **holds != Operand::Sink {
                let slot = builder.predicate_target(holds)?;
                inst.list = builder.list(&[slot]);
                inst.count = 1;
            }
        }
        target => inst.d = builder.target::<u32>(target)?,
    }
    Ok(inst)
}

/// Decodes `shfl`, `vote`, `redux`, `elect` and `activemask`.
///
/// # Errors
/// What is not known.
pub(super) fn decode(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let run: Handler = match statement.parts {
        ["shfl", ..] => return decode_shuffle(builder, statement),
        ["vote", "sync", "ballot", "b32"] => ballot,
        ["vote", "sync", "any", "pred"] => vote::<0>,
        ["vote", "sync", "all", "pred"] => vote::<1>,
        ["vote", "sync", "uni", "pred"] => vote::<2>,
        ["redux", "sync", name, kind] => {
            reduction(name, kind).ok_or("this reduction is not known")?
        }
        ["activemask", "b32"] => active_mask,
        ["elect", "sync"] => elect,
        _ => return Err("this instruction is not known".to_owned()),
    };
    let mut inst = builder.instruction(run);
    inst.kind = Kind::Members;
    match (statement.parts[0], statement.operands) {
        ("activemask", [target]) => {
            inst.d = builder.target::<u32>(target)?;
            inst.kind = Kind::Plain;
        }
        ("elect", [Operand::Pair(target, holds), members]) => {
            if **target != Operand::Sink {
                inst.d = builder.target::<u32>(target)?;
            }
            inst.a = builder.predicate_target(holds)?;
            inst.e = builder.source::<u32>(members)?;
        }
        ("redux", [target, a, members]) => {
            (inst.a, inst.e) = (builder.source::<u32>(a)?, builder.source::<u32>(members)?);
            inst.d = builder.target::<u32>(target)?;
        }
        ("vote", [target, a, members]) => {
            let (a, negation) = match a {
                Operand::Not(register) => (&Operand::Register(*register), 1),
                a => (a, 0),
            };
            (inst.a, inst.e, inst.extra) = (
                builder.predicate(a)?,
                builder.source::<u32>(members)?,
                negation,
            );
            inst.d = match statement.parts[2] {
                "ballot" => builder.target::<u32>(target)?,
                _ => builder.predicate_target(target)?,
            };
        }
        _ => return Err("these operands are not known".to_owned()),
    }
    Ok(inst)
}
