//! Which handler an instruction has: by its name.

use super::builder::{Builder, Statement, Width};
use super::context::Context;
use super::elementwise::{self, operation, select};
use super::operand::{Operand, Space};
use super::program::{Handler, Inst, Kind, Slot, Step};
use super::row::for_each_lane;
use super::{
    access, arithmetic, barriers, collective, convert, copies, products, special, tensor, tiles,
};

/// Decodes a statement, all but branches.
///
/// # Errors
/// What is not known of it.
pub(super) fn decode(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    match statement.parts {
        ["mov", kind] => decode_move(builder, statement, kind),
        ["and" | "or" | "xor" | "not", "pred"] => decode_predicates(builder, statement),
        ["selp", kind] => decode_select(builder, statement, kind),
        ["setp", ..] => decode_comparison(builder, statement),
        ["cvt", ..] => decode_conversion(builder, statement),
        ["cvta", ..] => decode_address(builder, statement),
        ["ld" | "st", ..] => access::decode(builder, statement),
        ["ldu", ..] => Err("this load is not known".to_owned()),
        ["atom" | "red", ..] => access::decode_atomic(builder, statement),
        ["cp", "async", "bulk", ..] => tiles::decode(builder, statement),
        ["cp", "async", ..] => copies::decode(builder, statement),
        ["ldmatrix" | "movmatrix" | "mma", ..] => tensor::decode(builder, statement),
        ["wgmma", ..] => products::decode(builder, statement),
        ["shfl" | "vote" | "redux" | "elect" | "activemask", ..] => {
            collective::decode(builder, statement)
        }
        ["bar" | "barrier", ..] => barriers::decode(builder, statement),
        ["mbarrier", ..] => barriers::decode_memory(builder, statement),
        ["mapa", ..] => barriers::decode_map_address(builder, statement),
        ["membar" | "fence", ..] => Ok(builder.instruction(access::memory_fence)),
        ["griddepcontrol", ..] | ["setmaxnreg", ..] | ["prefetch" | "prefetchu", ..] => {
            Ok(builder.no_operation())
        }
        ["nanosleep", "u32"] => Ok(builder.instruction(poll)),
        ["ret" | "exit", ..] => {
            let mut inst = builder.no_operation();
            inst.kind = Kind::Exit;
            Ok(inst)
        }
        ["trap"] => Ok(builder.instruction(trap)),
        ["bfi", "b32"] => decode_insertion(builder, statement),
        ["prmt", "b32"] => decode_permutation(builder, statement),
        ["lop3", "b32"] => decode_logic(builder, statement),
        [base, .., kind] => {
            let modifiers = &statement.opcode[base.len()..statement.opcode.len() - kind.len()];
            let entry = arithmetic::find(base, modifiers.trim_matches('.'), kind);
            elementwise::decode(
                builder,
                statement,
                entry.ok_or("this instruction is not known")?,
            )
        }
        _ => Err("this instruction is not known".to_owned()),
    }
}

/// Lets others have their turn.
unsafe fn poll(_: &mut Context<'_>, _: &Inst, _: u32) -> Step {
    Step::Poll
}

/// `trap`.
unsafe fn trap(context: &mut Context<'_>, _: &Inst, mask: u32) -> Step {
    context.fail(mask.trailing_zeros() as usize, "trap".to_owned())
}

/// Reads one register's parts into several; those of `extra` bits.
unsafe fn unpack(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let bits = u32::from(inst.extra);
    for index in 0..u32::from(inst.count) {
        // SAFETY: the list has `count` targets.
        let target = unsafe { *context.list(inst).add(index as usize) };
        if target == Slot::NONE {
            continue;
        }
        for_each_lane(mask, |lane| {
            let value = if bits * u32::from(inst.count) == 64 {
                context.lane::<u64>(inst.a, lane)
            } else {
                u64::from(context.lane::<u32>(inst.a, lane))
            };
            context.set_lane(
                target,
                lane,
                (value >> (index * bits)) as u32 & (u32::MAX >> (32 - bits)),
            );
        });
    }
    Step::Next
}

/// Makes one register of several.
unsafe fn pack(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let bits = u32::from(inst.extra);
    for_each_lane(mask, |lane| {
        let mut value = 0;
        for index in 0..u32::from(inst.count) {
            // SAFETY: the list has `count` sources.
            let source = unsafe { *context.list(inst).add(index as usize) };
            let part = context.lane::<u32>(source, lane) & (u32::MAX >> (32 - bits));
            value |= u64::from(part) << (index * bits);
        }
        if bits * u32::from(inst.count) == 64 {
            context.set_lane(inst.d, lane, value);
        } else {
            context.set_lane(inst.d, lane, value as u32);
        }
    });
    Step::Next
}

/// Copies a predicate.
unsafe fn move_predicate(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let value = context.predicate(inst.a);
    context.set_predicate(inst.d, value, mask);
    Step::Next
}

/// Decodes `mov`.
fn decode_move(
    builder: &mut Builder,
    statement: &Statement<'_, '_>,
    kind: &str,
) -> Result<Inst, String> {
    let [target, source] = statement.operands else {
        return Err("wanted two operands".to_owned());
    };
    let bits: u32 = kind
        .trim_start_matches(char::is_alphabetic)
        .parse()
        .unwrap_or(0);
    match (target, source) {
        (_, Operand::Special(name)) => special::decode(builder, target, name),
        _ if kind == "pred" => {
            let mut inst = builder.instruction(move_predicate);
            inst.a = builder.predicate(source)?;
            inst.d = builder.predicate_target(target)?;
            Ok(inst)
        }
        (Operand::Vector(targets), _) => {
            let mut inst = builder.instruction(unpack);
            inst.a = if bits == 64 {
                builder.source::<u64>(source)?
            } else {
                builder.source::<u32>(source)?
            };
            let mut slots = Vec::new();
            for target in targets {
                slots.push(if *target == Operand::Sink {
                    Slot::NONE
                } else {
                    builder.target::<u32>(target)?
                });
            }
            inst.extra = (bits as usize / slots.len().max(1)) as u16;
            (inst.list, inst.count) = (builder.list(&slots), slots.len() as u16);
            Ok(inst)
        }
        (_, Operand::Vector(sources)) => {
            let mut inst = builder.instruction(pack);
            let mut slots = Vec::new();
            for source in sources {
                slots.push(builder.source::<u32>(source)?);
            }
            inst.d = if bits == 64 {
                builder.target::<u64>(target)?
            } else {
                builder.target::<u32>(target)?
            };
            inst.extra = (bits as usize / slots.len().max(1)) as u16;
            (inst.list, inst.count) = (builder.list(&slots), slots.len() as u16);
            Ok(inst)
        }
        _ if bits == 64 => elementwise::decode(builder, statement, operation!(u64 => u64, |x| x)),
        _ if matches!(bits, 16 | 32) => {
            elementwise::decode(builder, statement, operation!(u32 => u32, |x| x))
        }
        _ => Err("this mov is not known".to_owned()),
    }
}

/// `and`, `or`, `xor`, `not` of predicates: `extra` 0 to 3.
unsafe fn combine_predicates(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let (a, b) = (context.predicate(inst.a), context.predicate(inst.b));
    let value = match inst.extra {
        0 => a & b,
        1 => a | b,
        2 => a ^ b,
        _ => !a,
    };
    context.set_predicate(inst.d, value, mask);
    Step::Next
}

/// Decodes logic on predicates.
fn decode_predicates(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let mut inst = builder.instruction(combine_predicates);
    inst.extra = ["and", "or", "xor", "not"]
        .iter()
        .position(|name| *name == statement.parts[0])
        .unwrap_or(3) as u16;
    match (statement.operands, inst.extra) {
        ([target, a], 3) => {
            inst.a = builder.predicate(a)?;
            inst.b = Slot::FALSE;
            inst.d = builder.predicate_target(target)?;
        }
        ([target, a, b], 0..=2) => {
            (inst.a, inst.b) = (builder.predicate(a)?, builder.predicate(b)?);
            inst.d = builder.predicate_target(target)?;
        }
        _ => return Err("this number of operands is not known".to_owned()),
    }
    Ok(inst)
}

/// Decodes `selp`.
fn decode_select(
    builder: &mut Builder,
    statement: &Statement<'_, '_>,
    kind: &str,
) -> Result<Inst, String> {
    let [target, a, b, choice] = statement.operands else {
        return Err("wanted four operands".to_owned());
    };
    let is_wide = kind.ends_with("64");
    let mut inst = builder.instruction(if is_wide {
        select::<u64>
    } else {
        select::<u32>
    });
    inst.c = builder.predicate(choice)?;
    (inst.a, inst.b, inst.d) = if is_wide {
        (
            builder.source::<u64>(a)?,
            builder.source::<u64>(b)?,
            builder.target::<u64>(target)?,
        )
    } else {
        (
            builder.source::<u32>(a)?,
            builder.source::<u32>(b)?,
            builder.target::<u32>(target)?,
        )
    };
    Ok(inst)
}

/// Decodes `setp`: `setp.lt.and.f32 %p1|%p2, %f1, %f2, !%p3`.
fn decode_comparison(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let (relation, combination, kind) = match *statement.parts {
        ["setp", relation, kind] => (relation, 0, kind),
        ["setp", relation, "and", kind] => (relation, 1, kind),
        ["setp", relation, "or", kind] => (relation, 2, kind),
        ["setp", relation, "xor", kind] => (relation, 3, kind),
        _ => return Err("this comparison is not known".to_owned()),
    };
    let (run, bits) =
        arithmetic::find_comparison(relation, kind).ok_or("this comparison is not known")?;
    let [targets, a, b, more @ ..] = statement.operands else {
        return Err("wanted three operands".to_owned());
    };
    let mut inst = builder.instruction(run);
    (inst.a, inst.b) = if bits == 64 {
        (builder.source::<u64>(a)?, builder.source::<u64>(b)?)
    } else {
        (builder.source::<u32>(a)?, builder.source::<u32>(b)?)
    };
    inst.extra = combination;
    match (more, combination) {
        ([], 0) => {}
        ([Operand::Not(register)], 1..) => {
            inst.c = builder.predicate(&Operand::Register(*register))?;
            inst.extra |= 16;
        }
        ([other], 1..) => inst.c = builder.predicate(other)?,
        _ => return Err("this number of operands is not known".to_owned()),
    }
    match targets {
        Operand::Pair(first, second) => {
            inst.d = builder.predicate_target(first)?;
            inst.e = builder.predicate_target(second)?;
            inst.count = 1;
            if combination == 0 {
                // Combined with what is always so: the comparison itself and its opposite.
                (inst.extra, inst.c) = (1, Slot::TRUE);
            }
        }
        target => inst.d = builder.predicate_target(target)?,
    }
    Ok(inst)
}

/// Decodes `cvt`.
fn decode_conversion(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let ["cvt", modifiers @ .., target, source] = statement.parts else {
        return Err("this conversion is not known".to_owned());
    };
    let joined = modifiers.join(".");
    let is_pair = target.ends_with("x2") || source.ends_with("x2");
    let entry = if is_pair {
        convert::find_pair(&joined, target, source)
    } else {
        convert::find(&joined, target, source)
    };
    let is_wide = matches!(statement.operands, [_, Operand::Register(register)]
        if builder.registers[*register as usize] == Width::Wide);
    let entry = if is_wide && !source.ends_with("64") {
        convert::find_truncating(target, source)
    } else {
        entry
    };
    elementwise::decode(
        builder,
        statement,
        entry.ok_or("this conversion is not known")?,
    )
}

/// Decodes `cvta`.
fn decode_address(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let space = |name: &str| match name {
        "global" | "const" => Some(Space::Global),
        "shared" | "shared::cta" | "shared::cluster" => Some(Space::Shared),
        "local" => Some(Space::Local),
        "param" => Some(Space::Param),
        _ => None,
    };
    let (space, is_back) = match statement.parts {
        ["cvta", "to", name, "u64"] => (space(name), true),
        ["cvta", name, "u64"] => (space(name), false),
        _ => (None, false),
    };
    let space = space.ok_or("this state space is not known")?;
    if space == Space::Global {
        return elementwise::decode(builder, statement, operation!(u64 => u64, |x| x));
    }
    let run: Handler = if is_back {
        access::from_generic
    } else {
        access::to_generic
    };
    let [target, source] = statement.operands else {
        return Err("wanted two operands".to_owned());
    };
    let mut inst = builder.instruction(run);
    inst.a = builder.source::<u64>(source)?;
    inst.d = builder.target::<u64>(target)?;
    match (access::window(space), is_back) {
        (Some(window), _) => inst.imm = window as i64,
        (None, false) => inst.extra = 1,
        (None, true) => {
            return Err("addresses of parameters from generic ones are not known".to_owned());
        }
    }
    Ok(inst)
}

/// Returns registers of 32 bits as a target and sources.
fn words(
    builder: &mut Builder,
    statement: &Statement<'_, '_>,
    run: Handler,
) -> Result<Inst, String> {
    let [target, sources @ ..] = statement.operands else {
        return Err("wanted operands".to_owned());
    };
    let mut inst = builder.instruction(run);
    let mut slots = [Slot::NONE; 4];
    for (slot, source) in slots.iter_mut().zip(sources) {
        *slot = builder.source::<u32>(source)?;
    }
    if sources.len() > slots.len() || sources.len() < 3 {
        return Err(format!(
            "wanted three or four sources, found {}",
            sources.len()
        ));
    }
    [inst.a, inst.b, inst.c, inst.e] = slots;
    inst.d = builder.target::<u32>(target)?;
    Ok(inst)
}

/// `bfi`: `a`'s lowest bits put into `b` from bit `c` on, as many as `e` says.
unsafe fn insert_bits(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    for_each_lane(mask, |lane| {
        let read = |slot| context.lane::<u32>(slot, lane);
        let (a, b, start, length) = (
            read(inst.a),
            read(inst.b),
            read(inst.c) & 255,
            read(inst.e) & 255,
        );
        let bits = if length >= 32 {
            u32::MAX
        } else {
            (1 << length) - 1
        };
        let (bits, value) = if start >= 32 {
            (0, 0)
        } else {
            (bits << start, a << start)
        };
        context.set_lane(inst.d, lane, b & !bits | value & bits);
    });
    Step::Next
}

/// Decodes `bfi`.
fn decode_insertion(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    if statement.operands.len() != 5 {
        return Err("wanted five operands".to_owned());
    }
    words(builder, statement, insert_bits)
}

/// `prmt`: four bytes chosen from those of `a` and `b`.
unsafe fn permute(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    for_each_lane(mask, |lane| {
        let read = |slot| context.lane::<u32>(slot, lane);
        let (values, selector) = (
            u64::from(read(inst.b)) << 32 | u64::from(read(inst.a)),
            read(inst.c),
        );
        let byte = |index: u32| {
            let choice = selector >> (4 * index);
            let byte = (values >> (8 * (choice & 7))) as u8;
            if choice & 8 != 0 {
                (byte as i8 >> 7) as u8
            } else {
                byte
            }
        };
        let value = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
        context.set_lane(inst.d, lane, value);
    });
    Step::Next
}

/// Decodes `prmt`.
fn decode_permutation(
    builder: &mut Builder,
    statement: &Statement<'_, '_>,
) -> Result<Inst, String> {
    if statement.operands.len() != 4 {
        return Err("wanted four operands".to_owned());
    }
    words(builder, statement, permute)
}

/// `lop3`: any function of three bits, by its table.
unsafe fn look_up(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    for_each_lane(mask, |lane| {
        let read = |slot| context.lane::<u32>(slot, lane);
        let (a, b, c, table) = (read(inst.a), read(inst.b), read(inst.c), read(inst.e));
        let value = (0..8)
            .filter(|row| table >> row & 1 != 0)
            .fold(0, |value, row| {
                let pick = |word: u32, bit: u32| if row >> bit & 1 != 0 { word } else { !word };
                value | pick(a, 2) & pick(b, 1) & pick(c, 0)
            });
        context.set_lane(inst.d, lane, value);
    });
    Step::Next
}

/// Decodes `lop3`.
fn decode_logic(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    if statement.operands.len() != 5 {
        return Err("wanted five operands".to_owned());
    }
    words(builder, statement, look_up)
}
