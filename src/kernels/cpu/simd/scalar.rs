//! The portable level: arrays of 16 lanes in plain Rust.
//!
//! The oracle that the other levels are tested against, and what architectures other than x86-64
//! run; the loops over lanes are shaped so that the compiler can vectorise them.

use super::super::e4m3;
use super::Simd;
use half::{bf16, f16};

/// The portable instruction set.
#[derive(Clone, Copy)]
pub(super) struct Scalar(());

impl Scalar {
    pub(super) fn new() -> Self {
        Self(())
    }
}

#[inline(always)]
fn map2<T: Copy, U: Copy + Default>(a: [T; 16], b: [T; 16], f: impl Fn(T, T) -> U) -> [U; 16] {
    let mut out = [U::default(); 16];
    for lane in 0..16 {
        out[lane] = f(a[lane], b[lane]);
    }
    out
}

/// Reads `len` elements; lanes from `len` on are zero.
///
/// # Safety
///
/// `from` must be readable for `len <= 16` elements; no alignment is needed.
#[inline(always)]
unsafe fn read<T: Copy>(from: *const T, len: usize, to_f32: impl Fn(T) -> f32) -> [f32; 16] {
    let mut out = [0.0; 16];
    for (lane, value) in out.iter_mut().enumerate().take(len) {
        // SAFETY: `lane < len`, readable by the caller's promise.
        *value = to_f32(unsafe { from.add(lane).read_unaligned() });
    }
    out
}

#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32_const()
}

#[inline(always)]
fn bf16_to_f32(bits: u16) -> f32 {
    bf16::from_bits(bits).to_f32()
}

impl Simd for Scalar {
    type F = [f32; 16];
    type I = [i32; 16];
    type B = [u8; 64];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; 16]
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn scale_exp2(self, a: Self::F, exponent: Self::F) -> Self::F {
        map2(a, exponent, |a, n| {
            a * f32::from_bits((n as i32 + 127).cast_unsigned() << 23)
        })
    }
    #[inline(always)]
    fn select_less(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
        let mut out = no;
        for lane in 0..16 {
            if a[lane] < b[lane] {
                out[lane] = yes[lane];
            }
        }
        out
    }
    #[inline(always)]
    fn keep_first(self, a: Self::F, len: usize, other: Self::F) -> Self::F {
        let (mut out, len) = (a, len.min(16));
        out[len..].copy_from_slice(&other[len..]);
        out
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        a.iter()
            .fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
    }
    #[inline(always)]
    fn first(self, a: Self::F) -> f32 {
        a[0]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: the caller promises 16 elements.
        unsafe { read(from, 16, |x| x) }
    }
    #[inline(always)]
    unsafe fn load_part(self, from: *const f32, len: usize) -> Self::F {
        // SAFETY: the caller promises `len` elements.
        unsafe { read(from, len, |x| x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        // SAFETY: the caller promises 16 elements.
        unsafe { read(from, 16, f16_to_f32) }
    }
    #[inline(always)]
    unsafe fn load_f16_part(self, from: *const u16, len: usize) -> Self::F {
        // SAFETY: the caller promises `len` elements.
        unsafe { read(from, len, f16_to_f32) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        // SAFETY: the caller promises 16 elements.
        unsafe { read(from, 16, bf16_to_f32) }
    }
    #[inline(always)]
    unsafe fn load_bf16_part(self, from: *const u16, len: usize) -> Self::F {
        // SAFETY: the caller promises `len` elements.
        unsafe { read(from, len, bf16_to_f32) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> Self::F {
        // SAFETY: the caller promises 16 elements.
        unsafe { read(from, 16, e4m3::to_f32) }
    }
    #[inline(always)]
    unsafe fn load_e4m3_part(self, from: *const u8, len: usize) -> Self::F {
        // SAFETY: the caller promises `len` elements.
        unsafe { read(from, len, e4m3::to_f32) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> Self::F {
        // SAFETY: the caller promises 16 elements.
        unsafe { read(from, 16, f32::from) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::F {
        // SAFETY: the caller promises 16 elements.
        unsafe { read(from, 16, f32::from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, a: Self::F) {
        // SAFETY: the caller promises 16 writable elements.
        unsafe { self.store_part(to, 16, a) };
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, len: usize, a: Self::F) {
        for (lane, value) in a.into_iter().enumerate().take(len) {
            // SAFETY: `lane < len`, writable by the caller's promise.
            unsafe { to.add(lane).write_unaligned(value) };
        }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I {
        [value; 16]
    }
    #[inline(always)]
    fn to_i32(self, a: Self::F) -> Self::I {
        a.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        a.map(|x| x as f32)
    }
    #[inline(always)]
    fn shift_left<const BITS: u32>(self, a: Self::I) -> Self::I {
        a.map(|x| x << BITS)
    }
    #[inline(always)]
    fn reduce_add_i32(self, a: Self::I) -> i32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, a: Self::I) {
        // SAFETY: the caller promises 16 writable bytes.
        unsafe { to.cast::<[i8; 16]>().write_unaligned(a.map(|x| x as i8)) };
    }

    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> Self::B {
        // SAFETY: the caller promises 64 readable bytes.
        unsafe { from.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    fn low_nibbles(self, a: Self::B) -> Self::B {
        a.map(|x| x & 15)
    }
    #[inline(always)]
    fn high_nibbles(self, a: Self::B) -> Self::B {
        a.map(|x| x >> 4)
    }
    #[inline(always)]
    unsafe fn add_where(self, a: Self::B, bits: *const u8, value: u8) -> Self::B {
        // SAFETY: the caller promises 8 readable bytes.
        let bits = unsafe { bits.cast::<[u8; 8]>().read_unaligned() };
        let mut out = a;
        for (byte, value_out) in out.iter_mut().enumerate() {
            *value_out += value * (bits[byte / 8] >> (byte % 8) & 1);
        }
        out
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(
        self,
        acc: Self::I,
        weights: Self::B,
        activations: *const i8,
    ) -> Self::I {
        // SAFETY: the caller promises 4 readable bytes.
        let activations = unsafe { activations.cast::<[i8; 4]>().read_unaligned() };
        let mut out = acc;
        for (lane, sum) in out.iter_mut().enumerate() {
            for (j, &activation) in activations.iter().enumerate() {
                *sum += i32::from(weights[4 * lane + j]) * i32::from(activation);
            }
        }
        out
    }
}
