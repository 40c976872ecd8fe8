//! Loads, stores and atomic operations.
//!
//! Global memory is shared with other threads of the process, which run other streams' kernels: every access is
//! an atomic one of its element, so that the plain ones are no data races either; on common processors they are
//! the same instructions.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::builder::{Builder, Statement, Width};
use super::context::Context;
use super::operand::{Operand, Space as SymbolSpace};
use super::program::{Handler, Inst, Kind, Slot, Step};
use super::row::{Word, for_each_lane};

/// Bits of `Inst::extra`: what a load or store orders.
const ORDERED: u16 = 1;
/// The address register has 64 bits.
const WIDE_ADDRESS: u16 = 2;

/// Where an access goes.
pub(super) trait Space {
    /// Returns where the bytes are, or reports a fault.
    fn resolve(
        context: &mut Context<'_>,
        lane: usize,
        address: u64,
        num_bytes: u64,
    ) -> Option<*mut u8>;
}

macro_rules! space {
    ($($name:ident: $method:ident as $type:ty;)+) => {
        $(
            /// A state space.
            struct $name;
            impl Space for $name {
                #[inline(always)]
                fn resolve(context: &mut Context<'_>, lane: usize, address: u64, num_bytes: u64) -> Option<*mut u8> {
                    context.$method(lane, address as $type, num_bytes)
                }
            }
        )+
    };
}
space! {
    Global: global as u64;
    Shared: shared as u32;
    Cluster: cluster_shared as u32;
    Local: local as u64;
    Param: param as u64;
    Generic: generic as u64;
}

/// Elements in memory and their register.
trait Memory {
    /// The register's bits.
    type Bits: Word;
    /// Bytes in memory.
    const NUM_BYTES: u64;
    /// Reads one.
    unsafe fn read(place: *mut u8) -> Self::Bits;
    /// Writes one.
    unsafe fn write(place: *mut u8, bits: Self::Bits);
}

macro_rules! memory {
    ($($name:ident: $bits:ty, $atomic:ty, $integer:ty, $value:ty;)+) => {
        $(
            /// A type in memory.
            struct $name;
            impl Memory for $name {
                type Bits = $bits;
                const NUM_BYTES: u64 = size_of::<$integer>() as u64;
                #[inline(always)]
                unsafe fn read(place: *mut u8) -> $bits {
                    // SAFETY: the caller's: resolved and aligned.
                    let value = unsafe { <$atomic>::from_ptr(place.cast()) }.load(Ordering::Relaxed);
                    value as $value as $bits
                }
                #[inline(always)]
                unsafe fn write(place: *mut u8, bits: $bits) {
                    // SAFETY: the caller's: resolved and aligned.
                    unsafe { <$atomic>::from_ptr(place.cast()) }.store(bits as $integer, Ordering::Relaxed);
                }
            }
        )+
    };
}
memory! {
    U8: u32, AtomicU8, u8, u8;
    U16: u32, AtomicU16, u16, u16;
    U32: u32, AtomicU32, u32, u32;
    S8: u32, AtomicU8, u8, i8;
    S16: u32, AtomicU16, u16, i16;
    U8Wide: u64, AtomicU8, u8, u8;
    U16Wide: u64, AtomicU16, u16, u16;
    U32Wide: u64, AtomicU32, u32, u32;
    S8Wide: u64, AtomicU8, u8, i8;
    S16Wide: u64, AtomicU16, u16, i16;
    S32Wide: u64, AtomicU32, u32, i32;
    U64: u64, AtomicU64, u64, u64;
}

/// Returns a lane's address.
#[inline(always)]
pub(super) fn address(context: &Context<'_>, inst: &Inst, lane: usize) -> u64 {
    if inst.extra & WIDE_ADDRESS != 0 {
        context
            .lane::<u64>(inst.a, lane)
            .wrapping_add(inst.imm as u64)
    } else {
        u64::from(
            context
                .lane::<u32>(inst.a, lane)
                .wrapping_add(inst.imm as u32),
        )
    }
}

/// `ld`.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
unsafe fn load<M: Memory, S: Space>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let (targets, count) = (context.list(inst), inst.count as usize);
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        let address = address(context, inst, lane);
        let Some(place) = S::resolve(context, lane, address, M::NUM_BYTES * count as u64) else {
            return Step::Fault;
        };
        for index in 0..count {
            // SAFETY: resolved, and the list has `count` targets.
            unsafe {
                let bits = M::read(place.add(index * M::NUM_BYTES as usize));
                let target = *targets.add(index);
                if target != Slot::NONE {
                    context.set_lane(target, lane, bits);
                }
            }
        }
    }
    if inst.extra & ORDERED != 0 {
        fence(Ordering::SeqCst);
    }
    Step::Next
}

/// `st`.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
unsafe fn store<M: Memory, S: Space>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    if inst.extra & ORDERED != 0 {
        fence(Ordering::SeqCst);
    }
    let (sources, count) = (context.list(inst), inst.count as usize);
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        let address = address(context, inst, lane);
        let Some(place) = S::resolve(context, lane, address, M::NUM_BYTES * count as u64) else {
            return Step::Fault;
        };
        for index in 0..count {
            // SAFETY: resolved, and the list has `count` sources.
            unsafe {
                let bits = context.lane::<M::Bits>(*sources.add(index), lane);
                M::write(place.add(index * M::NUM_BYTES as usize), bits);
            }
        }
    }
    Step::Next
}

/// Returns the handler for a type in memory and a register of 64 or fewer bits.
fn handler<S: Space>(kind: &str, is_wide: bool, is_load: bool) -> Option<Handler> {
    macro_rules! choose {
        ($type:ty) => {
            if is_load {
                load::<$type, S> as Handler
            } else {
                store::<$type, S> as Handler
            }
        };
    }
    let kind = if is_load {
        kind
    } else {
        kind.trim_start_matches(['s', 'u', 'b', 'f'])
    };
    Some(match (kind, is_wide) {
        ("u8" | "b8" | "8", false) => choose!(U8),
        ("u16" | "b16" | "f16" | "bf16" | "16", false) => choose!(U16),
        ("u32" | "s32" | "b32" | "f32" | "32", false) => choose!(U32),
        ("s8", false) => choose!(S8),
        ("s16", false) => choose!(S16),
        ("u8" | "b8" | "8", true) => choose!(U8Wide),
        ("u16" | "b16" | "16", true) => choose!(U16Wide),
        ("u32" | "b32" | "32", true) => choose!(U32Wide),
        ("s8", true) => choose!(S8Wide),
        ("s16", true) => choose!(S16Wide),
        ("s32", true) => choose!(S32Wide),
        ("u64" | "s64" | "b64" | "f64" | "64", true) => choose!(U64),
        _ => return None,
    })
}

/// What the modifiers of a load, store or atomic operation say.
struct Modifiers<'a> {
    space: &'a str,
    kind: &'a str,
    is_ordered: bool,
    is_polling: bool,
}

/// Reads modifiers; caches' hints have no meaning here.
fn modifiers<'a>(parts: &[&'a str]) -> Result<Modifiers<'a>, String> {
    let mut found = Modifiers {
        space: "",
        kind: parts.last().copied().unwrap_or(""),
        is_ordered: false,
        is_polling: false,
    };
    for &part in &parts[..parts.len() - 1] {
        match part {
            "global" | "shared" | "shared::cta" | "shared::cluster" | "local" | "param"
            | "const" => found.space = part,
            "acquire" | "release" | "acq_rel" | "sc" => {
                (found.is_ordered, found.is_polling) = (true, true)
            }
            "relaxed" | "volatile" => found.is_polling = true,
            "v2" | "v4" | "sys" | "gpu" | "cta" | "cluster" | "weak" | "ca" | "cg" | "cs"
            | "lu" | "cv" | "nc" | "wb" | "wt" | "L2::128B" | "L2::256B" | "L2::64B"
            | "L1::no_allocate" | "L1::evict_last" | "L1::evict_first" | "L1::evict_normal" => {}
            other => return Err(format!("modifier `{other}` is not known")),
        }
    }
    Ok(found)
}

/// Sets an instruction's address.
///
/// # Errors
/// What the operand is instead.
pub(super) fn set_address(
    builder: &mut Builder,
    inst: &mut Inst,
    operand: &Operand<'_>,
) -> Result<(), String> {
    let Operand::Address {
        base,
        offset,
        coordinates,
    } = operand
    else {
        return Err(format!("wanted an address, found {operand:?}"));
    };
    if !coordinates.is_empty() {
        return Err("coordinates in an address".to_owned());
    }
    let (slot, width) = builder.source_of_any_width(base)?;
    inst.a = slot;
    inst.imm = *offset;
    inst.extra |= if width == Width::Wide {
        WIDE_ADDRESS
    } else {
        0
    };
    Ok(())
}

/// Decodes `ld` and `st`.
///
/// # Errors
/// What is not known.
pub(super) fn decode(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let is_load = statement.parts[0] == "ld";
    let found = modifiers(&statement.parts[1..])?;
    let [first, second] = statement.operands else {
        return Err("wanted two operands".to_owned());
    };
    let (values, place) = if is_load {
        (first, second)
    } else {
        (second, first)
    };
    let values = match values {
        Operand::Vector(values) => values.as_slice(),
        one => std::slice::from_ref(one),
    };
    let mut slots = Vec::with_capacity(values.len());
    // Constants have the bits of their type.
    let mut is_wide = found.kind.ends_with("64");
    for value in values {
        if *value == Operand::Sink {
            slots.push(Slot::NONE);
            continue;
        }
        if let Operand::Immediate(bits) = *value {
            slots.push(builder.constant(if is_wide { 64 } else { 32 }, bits));
            continue;
        }
        let (slot, width) = if is_load {
            builder.target_of_any_width(value)?
        } else {
            builder.source_of_any_width(value)?
        };
        slots.push(slot);
        is_wide = width == Width::Wide;
    }
    let (kind, space) = (found.kind, found.space);
    let run = match space {
        "global" | "const" => handler::<Global>(kind, is_wide, is_load),
        "shared" | "shared::cta" => handler::<Shared>(kind, is_wide, is_load),
        "shared::cluster" => handler::<Cluster>(kind, is_wide, is_load),
        "local" => handler::<Local>(kind, is_wide, is_load),
        "param" if is_load => handler::<Param>(kind, is_wide, is_load),
        "" => handler::<Generic>(kind, is_wide, is_load),
        _ => None,
    };
    let mut inst = builder
        .instruction(run.ok_or("this type, register and state space are not known together")?);
    set_address(builder, &mut inst, place)?;
    inst.list = builder.list(&slots);
    inst.count = slots.len() as u16;
    inst.extra |= if found.is_ordered { ORDERED } else { 0 };
    inst.kind = if found.is_polling && is_load {
        Kind::Polling
    } else {
        Kind::Plain
    };
    Ok(inst)
}

/// An atomic operation on 32 or 64 bits.
trait Atomic {
    /// Bits.
    type Bits: Word;
    /// Does it; returns the old value.
    unsafe fn apply(place: *mut u8, b: Self::Bits, c: Self::Bits) -> Self::Bits;
}

/// `atom` and `red`.
unsafe fn atomic<A: Atomic, S: Space>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let mut is_fault = false;
    for_each_lane(mask, |lane| {
        let address = address(context, inst, lane);
        let num_bytes = u64::from(A::Bits::BITS / 8);
        let Some(place) = (if is_fault {
            None
        } else {
            S::resolve(context, lane, address, num_bytes)
        }) else {
            is_fault = true;
            return;
        };
        let b = context.lane::<A::Bits>(inst.b, lane);
        let c = if inst.c == Slot::NONE {
            b
        } else {
            context.lane::<A::Bits>(inst.c, lane)
        };
        // SAFETY: resolved.
        let old = unsafe { A::apply(place, b, c) };
        if inst.d != Slot::NONE {
            context.set_lane(inst.d, lane, old);
        }
    });
    if is_fault { Step::Fault } else { Step::Next }
}

/// Returns the handler of an atomic operation and its operands' bits.
fn atomic_handler<S: Space>(name: &str, kind: &str) -> Option<(Handler, u32)> {
    macro_rules! operation {
        ($bits:ty, $atomic:ty, |$place:ident, $b:ident, $c:ident| $body:expr) => {{
            struct This;
            impl Atomic for This {
                type Bits = $bits;
                #[inline(always)]
                unsafe fn apply(place: *mut u8, $b: $bits, $c: $bits) -> $bits {
                    let _ = $c;
                    // SAFETY: the caller's: resolved and aligned.
                    let $place = unsafe { <$atomic>::from_ptr(place.cast()) };
                    $body
                }
            }
            (atomic::<This, S> as Handler, <$bits as Word>::BITS)
        }};
        ($bits:ty, $atomic:ty, $method:ident) => {
            operation!($bits, $atomic, |place, b, c| place
                .$method(b, Ordering::SeqCst))
        };
    }
    macro_rules! update {
        ($bits:ty, $atomic:ty, |$old:ident, $b:ident| $new:expr) => {
            operation!($bits, $atomic, |place, $b, c| {
                let update = |$old: $bits| -> Option<$bits> { Some($new) };
                place
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, update)
                    .unwrap_or_else(|old| old)
            })
        };
    }
    Some(match (name, kind) {
        ("add", "u32" | "s32") => operation!(u32, AtomicU32, fetch_add),
        ("add", "u64" | "s64") => operation!(u64, AtomicU64, fetch_add),
        ("add", "f32") => update!(u32, AtomicU32, |old, b| (f32::from_bits(old)
            + f32::from_bits(b))
        .to_bits()),
        ("add", "f64") => update!(u64, AtomicU64, |old, b| (f64::from_bits(old)
            + f64::from_bits(b))
        .to_bits()),
        ("or", "b32") => operation!(u32, AtomicU32, fetch_or),
        ("and", "b32") => operation!(u32, AtomicU32, fetch_and),
        ("xor", "b32") => operation!(u32, AtomicU32, fetch_xor),
        ("or", "b64") => operation!(u64, AtomicU64, fetch_or),
        ("and", "b64") => operation!(u64, AtomicU64, fetch_and),
        ("xor", "b64") => operation!(u64, AtomicU64, fetch_xor),
        ("min", "u32") => operation!(u32, AtomicU32, fetch_min),
        ("max", "u32") => operation!(u32, AtomicU32, fetch_max),
        ("min", "u64") => operation!(u64, AtomicU64, fetch_min),
        ("max", "u64") => operation!(u64, AtomicU64, fetch_max),
        ("min", "s32") => update!(u32, AtomicU32, |old, b| (old as i32).min(b as i32) as u32),
        ("max", "s32") => update!(u32, AtomicU32, |old, b| (old as i32).max(b as i32) as u32),
        ("exch", "b32" | "u32") => operation!(u32, AtomicU32, swap),
        ("exch", "b64" | "u64") => operation!(u64, AtomicU64, swap),
        ("inc", "u32") => update!(u32, AtomicU32, |old, b| if old >= b { 0 } else { old + 1 }),
        ("dec", "u32") => update!(u32, AtomicU32, |old, b| if old == 0 || old > b {
            b
        } else {
            old - 1
        }),
        ("cas", "b32" | "u32") => operation!(u32, AtomicU32, |place, b, c| {
            place
                .compare_exchange(b, c, Ordering::SeqCst, Ordering::SeqCst)
                .unwrap_or_else(|old| old)
        }),
        ("cas", "b64" | "u64") => operation!(u64, AtomicU64, |place, b, c| {
            place
                .compare_exchange(b, c, Ordering::SeqCst, Ordering::SeqCst)
                .unwrap_or_else(|old| old)
        }),
        _ => return None,
    })
}

/// Decodes `atom` and `red`.
///
/// # Errors
/// What is not known.
pub(super) fn decode_atomic(
    builder: &mut Builder,
    statement: &Statement<'_, '_>,
) -> Result<Inst, String> {
    let names = [
        "add", "or", "and", "xor", "min", "max", "exch", "inc", "dec", "cas",
    ];
    let (mut rest, mut name) = (Vec::new(), "");
    for &part in &statement.parts[1..] {
        if names.contains(&part) {
            name = part;
        } else {
            rest.push(part);
        }
    }
    let found = modifiers(&rest)?;
    let entry = match found.space {
        "global" => atomic_handler::<Global>(name, found.kind),
        "shared" | "shared::cta" => atomic_handler::<Shared>(name, found.kind),
        "shared::cluster" => atomic_handler::<Cluster>(name, found.kind),
        "" => atomic_handler::<Generic>(name, found.kind),
        _ => None,
    };
    let (run, bits) = entry.ok_or("this operation, type and state space are not known together")?;
    let mut inst = builder.instruction(run);
    let has_result = statement.parts[0] == "atom";
    let operands = &statement.operands[usize::from(has_result)..];
    let [place, values @ ..] = operands else {
        return Err("wanted an address".to_owned());
    };
    set_address(builder, &mut inst, place)?;
    let mut source = |operand: &Operand<'_>| {
        if bits == 64 {
            builder.source::<u64>(operand)
        } else {
            builder.source::<u32>(operand)
        }
    };
    let [first, more @ ..] = values else {
        return Err("wanted a value".to_owned());
    };
    inst.b = source(first)?;
    if let [second] = more {
        inst.c = source(second)?;
    }
    if has_result && statement.operands[0] != Operand::Sink {
        inst.d = builder.target_of_any_width(&statement.operands[0])?.0;
    }
    inst.kind = Kind::Polling;
    Ok(inst)
}

/// `membar` and `fence`.
pub(super) unsafe fn memory_fence(_: &mut Context<'_>, _: &Inst, _: u32) -> Step {
    fence(Ordering::SeqCst);
    Step::Next
}

/// Adds the top byte of generic addresses: `cvta` from `imm`'s window; parameters are memory of the process.
pub(super) unsafe fn to_generic(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let start = if inst.extra == 1 {
        context.launch.params as u64
    } else {
        (inst.imm as u64) << 56
    };
    for_each_lane(mask, |lane| {
        let address = context.lane::<u64>(inst.a, lane).wrapping_add(start);
        context.set_lane(inst.d, lane, address);
    });
    Step::Next
}

/// Takes it away: `cvta.to`.
pub(super) unsafe fn from_generic(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    for_each_lane(mask, |lane| {
        let address = context.lane::<u64>(inst.a, lane);
        context.set_lane(inst.d, lane, address & 0xffff_ffff);
    });
    Step::Next
}

/// Returns the generic window of a symbol's space.
pub(super) fn window(space: SymbolSpace) -> Option<u64> {
    match space {
        SymbolSpace::Shared => Some(super::context::SHARED_WINDOW),
        SymbolSpace::Local => Some(super::context::LOCAL_WINDOW),
        SymbolSpace::Global | SymbolSpace::Param => None,
    }
}
