//! Handlers of instructions that work on each lane for itself: one generic function for each shape of operands.
//!
//! All lanes are computed, eight at a time, and those outside of the mask keep their values; without division
//! traps that costs nothing, and the processor's vector instructions do most of the work.

use super::builder::{Builder, Statement};
use super::context::Context;
use super::program::{Handler, Inst, Step};
use super::row::{CHUNKS, Element, LANES, Word, read_chunk, write_chunk};

/// Bits of a type's register.
pub(super) type Bits<T> = <T as Element>::Bits;

/// An operation on up to three values.
pub(super) trait Operation {
    /// First value.
    type A: Element;
    /// Second value.
    type B: Element;
    /// Third value.
    type C: Element;
    /// Result.
    type D: Element;
    /// How many values it has.
    const COUNT: usize;
    /// Computes it.
    fn apply(a: Self::A, b: Self::B, c: Self::C) -> Self::D;
}

/// A comparison.
pub(super) trait Comparison {
    /// What is compared.
    type A: Element;
    /// Compares.
    fn apply(a: Self::A, b: Self::A) -> bool;
}

/// A handler and the operands that it wants.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    run: Handler,
    sources: [u32; 3],
    count: usize,
    target: u32,
}

/// Returns an operation's handler and operands.
pub(super) fn entry<O: Operation>() -> Entry {
    Entry {
        run: run::<O>,
        sources: [Bits::<O::A>::BITS, Bits::<O::B>::BITS, Bits::<O::C>::BITS],
        count: O::COUNT,
        target: Bits::<O::D>::BITS,
    }
}

/// Makes the entry of an operation from its types and an expression.
macro_rules! operation {
    ($a:ty => $d:ty, |$x:ident| $body:expr) => {{
        operation!(@ 1, $a, u32, u32, $d, |$x, _y, _z| $body)
    }};
    ($a:ty, $b:ty => $d:ty, |$x:ident, $y:ident| $body:expr) => {{
        operation!(@ 2, $a, $b, u32, $d, |$x, $y, _z| $body)
    }};
    ($a:ty, $b:ty, $c:ty => $d:ty, |$x:ident, $y:ident, $z:ident| $body:expr) => {{
        operation!(@ 3, $a, $b, $c, $d, |$x, $y, $z| $body)
    }};
    (@ $count:literal, $a:ty, $b:ty, $c:ty, $d:ty, |$x:ident, $y:ident, $z:ident| $body:expr) => {{
        struct This;
        impl crate::ptx::elementwise::Operation for This {
            type A = $a;
            type B = $b;
            type C = $c;
            type D = $d;
            const COUNT: usize = $count;
            #[inline(always)]
            fn apply($x: $a, $y: $b, $z: $c) -> $d {
                $body
            }
        }
        crate::ptx::elementwise::entry::<This>()
    }};
}
pub(super) use operation;

/// Runs an operation.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
unsafe fn run<O: Operation>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let a = context.row::<Bits<O::A>>(inst.a);
    let b = if O::COUNT > 1 {
        context.row::<Bits<O::B>>(inst.b)
    } else {
        std::ptr::null_mut()
    };
    let c = if O::COUNT > 2 {
        context.row::<Bits<O::C>>(inst.c)
    } else {
        std::ptr::null_mut()
    };
    let d = context.row::<Bits<O::D>>(inst.d);
    for chunk in 0..CHUNKS {
        let mut result = [Bits::<O::D>::default(); LANES / CHUNKS];
        // SAFETY: the rows that the operation has.
        unsafe {
            let a = read_chunk(a, chunk);
            let b = if O::COUNT > 1 {
                read_chunk(b, chunk)
            } else {
                [Bits::<O::B>::default(); LANES / CHUNKS]
            };
            let c = if O::COUNT > 2 {
                read_chunk(c, chunk)
            } else {
                [Bits::<O::C>::default(); LANES / CHUNKS]
            };
            for lane in 0..LANES / CHUNKS {
                let (x, y, z) = (a[lane], b[lane], c[lane]);
                let value = O::apply(O::A::from_bits(x), O::B::from_bits(y), O::C::from_bits(z));
                result[lane] = value.into_bits();
            }
            write_chunk(d, chunk, result, mask);
        }
    }
    Step::Next
}

/// Compares, and sets a predicate; `extra` says how another predicate takes part.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
pub(super) unsafe fn compare<O: Comparison>(
    context: &mut Context<'_>,
    inst: &Inst,
    mask: u32,
) -> Step {
    let a = context.row::<Bits<O::A>>(inst.a);
    let b = context.row::<Bits<O::A>>(inst.b);
    let mut result = 0;
    for chunk in 0..CHUNKS {
        // SAFETY: rows of the program.
        let (a, b) = unsafe { (read_chunk(a, chunk), read_chunk(b, chunk)) };
        for lane in 0..LANES / CHUNKS {
            let holds = O::apply(O::A::from_bits(a[lane]), O::A::from_bits(b[lane]));
            result |= u32::from(holds) << (chunk * (LANES / CHUNKS) + lane);
        }
    }
    if inst.extra == 0 {
        context.set_predicate(inst.d, result, mask);
        return Step::Next;
    }
    let other = context.predicate(inst.c) ^ ((inst.extra as u32 >> 4) & 1).wrapping_neg();
    let combine = |first: u32| match inst.extra & 3 {
        1 => first & other,
        2 => first | other,
        3 => first ^ other,
        _ => first,
    };
    context.set_predicate(inst.d, combine(result), mask);
    if inst.count == 1 {
        context.set_predicate(inst.e, combine(!result), mask);
    }
    Step::Next
}

/// `selp`: one of two values by a predicate.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
pub(super) unsafe fn select<W: Word>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    let (a, b, d) = (
        context.row::<W>(inst.a),
        context.row::<W>(inst.b),
        context.row::<W>(inst.d),
    );
    let choice = context.predicate(inst.c);
    for chunk in 0..CHUNKS {
        let bits = choice >> (chunk * (LANES / CHUNKS));
        // SAFETY: rows of the program.
        unsafe {
            let (a, b) = (read_chunk(a, chunk), read_chunk(b, chunk));
            let mut result = b;
            for lane in 0..LANES / CHUNKS {
                result[lane] = if bits >> lane & 1 != 0 {
                    a[lane]
                } else {
                    b[lane]
                };
            }
            write_chunk(d, chunk, result, mask);
        }
    }
    Step::Next
}

/// Decodes an instruction whose handler and operands are known.
///
/// # Errors
/// Operands that do not fit.
pub(super) fn decode(
    builder: &mut Builder,
    statement: &Statement<'_, '_>,
    entry: Entry,
) -> Result<Inst, String> {
    let operands = statement.operands;
    if operands.len() != entry.count + 1 {
        return Err(format!(
            "wanted {} operands, found {}",
            entry.count + 1,
            operands.len()
        ));
    }
    let mut inst = builder.instruction(entry.run);
    let slots = [&mut inst.a, &mut inst.b, &mut inst.c];
    for (index, slot) in slots.into_iter().enumerate().take(entry.count) {
        let operand = &operands[index + 1];
        *slot = if entry.sources[index] == 64 {
            builder.source::<u64>(operand)?
        } else {
            builder.source::<u32>(operand)?
        };
    }
    inst.d = if entry.target == 64 {
        builder.target::<u64>(&operands[0])?
    } else {
        builder.target::<u32>(&operands[0])?
    };
    Ok(inst)
}
