//! Arithmetic on two f16 in one register, as far as our kernels have it.

use half::f16;

use super::convert::{from_f16, to_f16};
use super::elementwise::{Entry, operation};
use super::float;

/// The NaN that instructions return.
const NAN: u16 = 0x7fff;

/// Returns the halves of a register.
#[inline(always)]
fn halves(pair: u32) -> [f16; 2] {
    [pair as u16, (pair >> 16) as u16].map(f16::from_bits)
}

/// Puts two halves into one register.
#[inline(always)]
fn pair([low, high]: [u16; 2]) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// Applies an operation to both halves, where a NaN makes a NaN: `.NaN`.
#[inline(always)]
fn of_numbers(x: u32, y: u32, operation: impl Fn(f32, f32) -> f32) -> u32 {
    let ([a, b], [c, d]) = (halves(x), halves(y));
    let half = |x: f16, y: f16| match x.is_nan() || y.is_nan() {
        true => NAN,
        false => to_f16(operation(from_f16(x), from_f16(y))).to_bits(),
    };
    pair([half(a, c), half(b, d)])
}

/// Returns the handler of an instruction of type `f16x2`.
pub(super) fn find(base: &str, modifiers: &str) -> Option<Entry> {
    Some(match (base, modifiers) {
        // The product of two f16 fits an f32: one rounding.
        ("mul", "" | "rn") => operation!(u32, u32 => u32, |x, y| {
            let ([a, b], [c, d]) = (halves(x), halves(y));
            let product = |x, y| to_f16(from_f16(x) * from_f16(y)).to_bits();
            pair([product(a, c), product(b, d)])
        }),
        ("abs", "") => operation!(u32 => u32, |x| x & 0x7fff_7fff),
        ("min", "NaN") => operation!(u32, u32 => u32, |x, y| of_numbers(x, y, float::min)),
        ("max", "NaN") => operation!(u32, u32 => u32, |x, y| of_numbers(x, y, float::max)),
        // A mask for each half.
        ("set", "eq.u32") => operation!(u32, u32 => u32, |x, y| {
            let ([a, b], [c, d]) = (halves(x), halves(y));
            let equal = |x, y| if from_f16(x) == from_f16(y) { 0xffff } else { 0 };
            pair([equal(a, c), equal(b, d)])
        }),
        _ => return None,
    })
}
