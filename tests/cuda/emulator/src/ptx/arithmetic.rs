//! Arithmetic, logic and comparisons: which operation an instruction's name stands for.

use super::elementwise::{Comparison, Entry, compare, operation};
use super::float::{self, flush, flush64};
use super::pairs;
use super::program::Handler;

/// Entries for all integer types of an operation.
macro_rules! integers {
    ($type:expr, |$x:ident, $y:ident| $body:expr) => {
        match $type {
            "s16" => operation!(i16, i16 => i16, |$x, $y| $body),
            "u16" => operation!(u16, u16 => u16, |$x, $y| $body),
            "s32" => operation!(i32, i32 => i32, |$x, $y| $body),
            "u32" => operation!(u32, u32 => u32, |$x, $y| $body),
            "s64" => operation!(i64, i64 => i64, |$x, $y| $body),
            "u64" => operation!(u64, u64 => u64, |$x, $y| $body),
            _ => return None,
        }
    };
}

/// Entries for bits of all lengths.
macro_rules! bits {
    ($type:expr, |$x:ident, $y:ident| $body:expr) => {
        match $type {
            "b16" => operation!(u16, u16 => u16, |$x, $y| $body),
            "b32" => operation!(u32, u32 => u32, |$x, $y| $body),
            "b64" => operation!(u64, u64 => u64, |$x, $y| $body),
            _ => return None,
        }
    };
}

/// Entries for `f32`, with denormals as zeros after `.ftz`, and `f64`.
macro_rules! floats {
    ($modifiers:expr, $type:expr, |$($x:ident),+| $body:expr) => {
        match ($type, $modifiers) {
            ("f32", "" | "rn") => operation!($(floats!(@ $x f32)),+ => f32, |$($x),+| $body),
            ("f32", "ftz" | "rn.ftz") => operation!($(floats!(@ $x f32)),+ => f32, |$($x),+| {
                $(let $x = flush($x);)+
                flush($body)
            }),
            ("f32", "sat" | "rn.sat") => operation!($(floats!(@ $x f32)),+ => f32, |$($x),+| {
                float::saturate($body)
            }),
            ("f64", "" | "rn") => operation!($(floats!(@ $x f64)),+ => f64, |$($x),+| $body),
            _ => return None,
        }
    };
    (@ $x:ident $type:ty) => { $type };
}

/// Returns the handler of an instruction of arithmetic or logic: `add.rn.ftz.f32` is `add`, `rn.ftz`, `f32`.
pub(super) fn find(base: &str, modifiers: &str, kind: &str) -> Option<Entry> {
    if kind == "f16x2" {
        return pairs::find(base, modifiers);
    }
    let is_float = kind.starts_with('f');
    Some(match base {
        "add" if is_float => floats!(modifiers, kind, |x, y| x + y),
        "sub" if is_float => floats!(modifiers, kind, |x, y| x - y),
        "mul" if is_float => floats!(modifiers, kind, |x, y| x * y),
        "fma" if is_float => floats!(modifiers, kind, |x, y, z| x.mul_add(y, z)),
        "mad" if is_float => floats!(modifiers, kind, |x, y, z| x.mul_add(y, z)),
        "neg" if is_float => floats!(modifiers, kind, |x| -x),
        "abs" if is_float => floats!(modifiers, kind, |x| x.abs()),
        "min" | "max" if is_float => return find_extreme(base, modifiers, kind),
        "div" | "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" if is_float => {
            return find_function(base, modifiers, kind);
        }
        "add" if modifiers.is_empty() => integers!(kind, |x, y| x.wrapping_add(y)),
        "sub" if modifiers.is_empty() => integers!(kind, |x, y| x.wrapping_sub(y)),
        "min" if modifiers.is_empty() => integers!(kind, |x, y| x.min(y)),
        "max" if modifiers.is_empty() => integers!(kind, |x, y| x.max(y)),
        // What division by zero gives is not said; no hardware traps.
        "div" if modifiers.is_empty() => {
            integers!(kind, |x, y| if y == 0 { !0 } else { x.wrapping_div(y) })
        }
        "rem" if modifiers.is_empty() => {
            integers!(kind, |x, y| if y == 0 { x } else { x.wrapping_rem(y) })
        }
        "mul" | "mad" => return find_product(base, modifiers, kind),
        "and" => bits!(kind, |x, y| x & y),
        "or" => bits!(kind, |x, y| x | y),
        "xor" => bits!(kind, |x, y| x ^ y),
        _ => return find_bits(base, modifiers, kind),
    })
}

/// Integer products.
fn find_product(base: &str, modifiers: &str, kind: &str) -> Option<Entry> {
    macro_rules! product {
        ($($name:literal: $narrow:ty, $wide:ty, $bits:literal;)+) => {
            match (base, modifiers, kind) {
                $(
                    ("mul", "lo", $name) => operation!($narrow, $narrow => $narrow, |x, y| x.wrapping_mul(y)),
                    ("mul", "hi", $name) => operation!($narrow, $narrow => $narrow, |x, y| {
                        ((x as $wide * y as $wide) >> $bits) as $narrow
                    }),
                    ("mad", "lo", $name) => operation!($narrow, $narrow, $narrow => $narrow, |x, y, z| {
                        x.wrapping_mul(y).wrapping_add(z)
                    }),
                    ("mad", "hi", $name) => operation!($narrow, $narrow, $narrow => $narrow, |x, y, z| {
                        (((x as $wide * y as $wide) >> $bits) as $narrow).wrapping_add(z)
                    }),
                )+
                ("mul", "wide", "s16") => operation!(i16, i16 => i32, |x, y| i32::from(x) * i32::from(y)),
                ("mul", "wide", "u16") => operation!(u16, u16 => u32, |x, y| u32::from(x) * u32::from(y)),
                ("mul", "wide", "s32") => operation!(i32, i32 => i64, |x, y| i64::from(x) * i64::from(y)),
                ("mul", "wide", "u32") => operation!(u32, u32 => u64, |x, y| u64::from(x) * u64::from(y)),
                ("mad", "wide", "s32") => operation!(i32, i32, i64 => i64, |x, y, z| {
                    (i64::from(x) * i64::from(y)).wrapping_add(z)
                }),
                ("mad", "wide", "u32") => operation!(u32, u32, u64 => u64, |x, y, z| {
                    (u64::from(x) * u64::from(y)).wrapping_add(z)
                }),
                _ => return None,
            }
        };
    }
    Some(product! {
        "s16": i16, i32, 16;
        "u16": u16, u32, 16;
        "s32": i32, i64, 32;
        "u32": u32, u64, 32;
        "s64": i64, i128, 64;
        "u64": u64, u128, 64;
    })
}

/// Instructions on bits. Shifts by more than the length give zeros or signs.
fn find_bits(base: &str, modifiers: &str, kind: &str) -> Option<Entry> {
    if !matches!(modifiers, "" | "shiftamt") {
        return None;
    }
    Some(match (base, kind) {
        ("not", "b16") => operation!(u16 => u16, |x| !x),
        ("not", "b32") => operation!(u32 => u32, |x| !x),
        ("not", "b64") => operation!(u64 => u64, |x| !x),
        ("cnot", "b32") => operation!(u32 => u32, |x| u32::from(x == 0)),
        ("neg", "s16") => operation!(i16 => i16, |x| x.wrapping_neg()),
        ("neg", "s32") => operation!(i32 => i32, |x| x.wrapping_neg()),
        ("neg", "s64") => operation!(i64 => i64, |x| x.wrapping_neg()),
        ("abs", "s32") => operation!(i32 => i32, |x| x.wrapping_abs()),
        ("abs", "s64") => operation!(i64 => i64, |x| x.wrapping_abs()),
        ("shl", "b16") => operation!(u16, u32 => u16, |x, y| if y < 16 { x << y } else { 0 }),
        ("shl", "b32") => {
            operation!(u32, u32 => u32, |x, y| if y < 32 { x << (y & 31) } else { 0 })
        }
        ("shl", "b64") => {
            operation!(u64, u32 => u64, |x, y| if y < 64 { x << (y & 63) } else { 0 })
        }
        ("shr", "b16" | "u16") => {
            operation!(u16, u32 => u16, |x, y| if y < 16 { x >> y } else { 0 })
        }
        ("shr", "b32" | "u32") => {
            operation!(u32, u32 => u32, |x, y| if y < 32 { x >> (y & 31) } else { 0 })
        }
        ("shr", "b64" | "u64") => {
            operation!(u64, u32 => u64, |x, y| if y < 64 { x >> (y & 63) } else { 0 })
        }
        ("shr", "s16") => operation!(i16, u32 => i16, |x, y| x >> y.min(15)),
        ("shr", "s32") => operation!(i32, u32 => i32, |x, y| x >> y.min(31)),
        ("shr", "s64") => operation!(i64, u32 => i64, |x, y| x >> y.min(63)),
        ("popc", "b32") => operation!(u32 => u32, |x| x.count_ones()),
        ("popc", "b64") => operation!(u64 => u32, |x| x.count_ones()),
        ("clz", "b32") => operation!(u32 => u32, |x| x.leading_zeros()),
        ("clz", "b64") => operation!(u64 => u32, |x| x.leading_zeros()),
        ("brev", "b32") => operation!(u32 => u32, |x| x.reverse_bits()),
        ("brev", "b64") => operation!(u64 => u64, |x| x.reverse_bits()),
        ("bfind", _) => return find_highest_bit(modifiers, kind),
        ("bfe", "u32") => operation!(u32, u32, u32 => u32, |x, start, length| {
            let (start, length) = (start & 255, length & 255);
            let shifted = if start < 32 { x >> start } else { 0 };
            if length < 32 { shifted & ((1 << length) - 1) } else { shifted }
        }),
        ("sad", "s32") => operation!(i32, i32, u32 => u32, |x, y, z| z.wrapping_add(x.abs_diff(y))),
        ("sad", "u32") => operation!(u32, u32, u32 => u32, |x, y, z| z.wrapping_add(x.abs_diff(y))),
        _ => return None,
    })
}

/// `bfind`: the highest bit that differs from the sign; `.shiftamt` counts from the top.
fn find_highest_bit(modifiers: &str, kind: &str) -> Option<Entry> {
    Some(match (modifiers, kind) {
        ("", "u32") => operation!(u32 => u32, |x| if x == 0 { !0 } else { 31 - x.leading_zeros() }),
        ("shiftamt", "u32") => {
            operation!(u32 => u32, |x| if x == 0 { !0 } else { x.leading_zeros() })
        }
        ("", "u64") => operation!(u64 => u32, |x| if x == 0 { !0 } else { 63 - x.leading_zeros() }),
        ("shiftamt", "u64") => {
            operation!(u64 => u32, |x| if x == 0 { !0 } else { x.leading_zeros() })
        }
        ("", "s32") => operation!(i32 => u32, |x| {
            let bits = (if x < 0 { !x } else { x }) as u32;
            if bits == 0 { !0 } else { 31 - bits.leading_zeros() }
        }),
        _ => return None,
    })
}

/// `min` and `max` of floats: a number rather than NaN, +0 above -0.
fn find_extreme(base: &str, modifiers: &str, kind: &str) -> Option<Entry> {
    Some(match (base, modifiers, kind) {
        ("min", "", "f32") => operation!(f32, f32 => f32, |x, y| float::min(x, y)),
        ("max", "", "f32") => operation!(f32, f32 => f32, |x, y| float::max(x, y)),
        ("min", "ftz", "f32") => operation!(f32, f32 => f32, |x, y| float::min(flush(x), flush(y))),
        ("max", "ftz", "f32") => operation!(f32, f32 => f32, |x, y| float::max(flush(x), flush(y))),
        ("min", "NaN", "f32") => operation!(f32, f32 => f32, |x, y| {
            if x.is_nan() || y.is_nan() { float::NAN } else { float::min(x, y) }
        }),
        ("max", "NaN", "f32") => operation!(f32, f32 => f32, |x, y| {
            if x.is_nan() || y.is_nan() { float::NAN } else { float::max(x, y) }
        }),
        ("min", "", "f64") => operation!(f64, f64 => f64, |x, y| float::min64(x, y)),
        ("max", "", "f64") => operation!(f64, f64 => f64, |x, y| float::max64(x, y)),
        _ => return None,
    })
}

/// Division, roots and transcendental functions; approximate ones are rounded from `f64`, which is within the
/// ISA's bounds.
fn find_function(base: &str, modifiers: &str, kind: &str) -> Option<Entry> {
    Some(match (base, modifiers, kind) {
        ("div", "rn" | "approx" | "full", "f32") => operation!(f32, f32 => f32, |x, y| x / y),
        ("div", "rn.ftz" | "approx.ftz" | "full.ftz", "f32") => {
            operation!(f32, f32 => f32, |x, y| {
                flush(flush(x) / flush(y))
            })
        }
        ("div", "rn", "f64") => operation!(f64, f64 => f64, |x, y| x / y),
        ("rcp", "rn" | "approx", "f32") => operation!(f32 => f32, |x| 1.0 / x),
        ("rcp", "rn.ftz" | "approx.ftz", "f32") => {
            operation!(f32 => f32, |x| flush(1.0 / flush(x)))
        }
        ("rcp", "rn", "f64") => operation!(f64 => f64, |x| 1.0 / x),
        // Has 20 bits of the result: the start of a division.
        ("rcp", "approx.ftz", "f64") => operation!(f64 => f64, |x| {
            f64::from_bits((1.0 / flush64(x)).to_bits() & !0xffff_ffff)
        }),
        ("sqrt", "rn" | "approx", "f32") => operation!(f32 => f32, |x| x.sqrt()),
        ("sqrt", "rn.ftz" | "approx.ftz", "f32") => operation!(f32 => f32, |x| flush(x).sqrt()),
        ("sqrt", "rn", "f64") => operation!(f64 => f64, |x| x.sqrt()),
        ("rsqrt", "approx", "f32") => operation!(f32 => f32, |x| float::reciprocal_root(x)),
        ("rsqrt", "approx.ftz", "f32") => {
            operation!(f32 => f32, |x| float::reciprocal_root(flush(x)))
        }
        ("ex2", "approx", "f32") => operation!(f32 => f32, |x| float::exp2(x)),
        ("ex2", "approx.ftz", "f32") => operation!(f32 => f32, |x| flush(float::exp2(flush(x)))),
        ("lg2", "approx", "f32") => operation!(f32 => f32, |x| f64::from(x).log2() as f32),
        ("lg2", "approx.ftz", "f32") => {
            operation!(f32 => f32, |x| f64::from(flush(x)).log2() as f32)
        }
        ("sin", "approx" | "approx.ftz", "f32") => {
            operation!(f32 => f32, |x| f64::from(x).sin() as f32)
        }
        ("cos", "approx" | "approx.ftz", "f32") => {
            operation!(f32 => f32, |x| f64::from(x).cos() as f32)
        }
        ("tanh", "approx", "f32") => operation!(f32 => f32, |x| f64::from(x).tanh() as f32),
        _ => return None,
    })
}

/// Returns the handler of a comparison and the bits of what is compared.
pub(super) fn find_comparison(relation: &str, kind: &str) -> Option<(Handler, u32)> {
    macro_rules! comparison {
        ($type:ty, $bits:literal, |$x:ident, $y:ident| $body:expr) => {{
            struct This;
            impl Comparison for This {
                type A = $type;
                #[inline(always)]
                fn apply($x: $type, $y: $type) -> bool {
                    $body
                }
            }
            Some((compare::<This> as Handler, $bits))
        }};
    }
    macro_rules! order {
        ($type:ty, $bits:literal) => {
            match relation {
                "eq" => comparison!($type, $bits, |x, y| x == y),
                "ne" => comparison!($type, $bits, |x, y| x != y),
                "lt" | "lo" => comparison!($type, $bits, |x, y| x < y),
                "le" | "ls" => comparison!($type, $bits, |x, y| x <= y),
                "gt" | "hi" => comparison!($type, $bits, |x, y| x > y),
                "ge" | "hs" => comparison!($type, $bits, |x, y| x >= y),
                _ => None,
            }
        };
    }
    macro_rules! float_order {
        ($type:ty, $bits:literal) => {
            match relation {
                "eq" => comparison!($type, $bits, |x, y| x == y),
                "ne" => comparison!($type, $bits, |x, y| x != y && !x.is_nan() && !y.is_nan()),
                "lt" => comparison!($type, $bits, |x, y| x < y),
                "le" => comparison!($type, $bits, |x, y| x <= y),
                "gt" => comparison!($type, $bits, |x, y| x > y),
                "ge" => comparison!($type, $bits, |x, y| x >= y),
                "equ" => comparison!($type, $bits, |x, y| x == y || x.is_nan() || y.is_nan()),
                "neu" => comparison!($type, $bits, |x, y| x != y),
                "ltu" => comparison!($type, $bits, |x, y| x < y || x.is_nan() || y.is_nan()),
                "leu" => comparison!($type, $bits, |x, y| x <= y || x.is_nan() || y.is_nan()),
                "gtu" => comparison!($type, $bits, |x, y| x > y || x.is_nan() || y.is_nan()),
                "geu" => comparison!($type, $bits, |x, y| x >= y || x.is_nan() || y.is_nan()),
                "num" => comparison!($type, $bits, |x, y| !x.is_nan() && !y.is_nan()),
                "nan" => comparison!($type, $bits, |x, y| x.is_nan() || y.is_nan()),
                _ => None,
            }
        };
    }
    match kind {
        "b16" | "u16" => order!(u16, 32),
        "s16" => order!(i16, 32),
        "b32" | "u32" => order!(u32, 32),
        "s32" => order!(i32, 32),
        "b64" | "u64" => order!(u64, 64),
        "s64" => order!(i64, 64),
        "f32" => float_order!(f32, 32),
        "f64" => float_order!(f64, 64),
        _ => None,
    }
}
