//! The AVX-512 level: one 512-bit register a vector, `vpdpbusd` for byte dot products.

use super::Simd;
use std::arch::x86_64::*;

/// Proof that the machine has AVX-512 F, BW, VL, DQ and VNNI.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// # Safety
    ///
    /// The machine must have AVX-512 F, BW, VL, DQ and VNNI.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// Defines safe arithmetic methods by one expression of intrinsics each.
macro_rules! arithmetic {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $ret {
            // SAFETY: `self` proves that the machine has the instructions; no memory is touched.
            unsafe { $body }
        }
    )*};
}

/// Defines memory methods by one expression of intrinsics each.
macro_rules! memory {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, $($arg: $ty),*) $(-> $ret)? {
            // SAFETY: `self` proves that the machine has the instructions; the caller promises
            // that the elements named by the method can be read or written.
            unsafe { $body }
        }
    )*};
}

/// The mask of the first `len` of 16 lanes.
#[inline(always)]
fn first(len: usize) -> __mmask16 {
    if len >= 16 { u16::MAX } else { (1 << len) - 1 }
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;

    arithmetic! {
        fn splat(value: f32) -> __m512 = _mm512_set1_ps(value);
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fn abs(a: __m512) -> __m512 = _mm512_abs_ps(a);
        fn round(a: __m512) -> __m512 =
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        fn scale_exp2(a: __m512, exponent: __m512) -> __m512 = _mm512_scalef_ps(a, exponent);
        fn select_less(a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 =
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes);
        fn keep_first(a: __m512, len: usize, other: __m512) -> __m512 =
            _mm512_mask_blend_ps(first(len), other, a);
        fn reduce_add(a: __m512) -> f32 = _mm512_reduce_add_ps(a);
        fn reduce_max(a: __m512) -> f32 = _mm512_reduce_max_ps(a);
        fn first(a: __m512) -> f32 = _mm512_cvtss_f32(a);

        fn splat_i32(value: i32) -> __m512i = _mm512_set1_epi32(value);
        fn to_i32(a: __m512) -> __m512i = _mm512_cvtps_epi32(a);
        fn to_f32(a: __m512i) -> __m512 = _mm512_cvtepi32_ps(a);
        fn reduce_add_i32(a: __m512i) -> i32 = _mm512_reduce_add_epi32(a);
        fn low_nibbles(a: __m512i) -> __m512i = _mm512_and_si512(a, _mm512_set1_epi8(15));
        fn high_nibbles(a: __m512i) -> __m512i =
            _mm512_and_si512(_mm512_srli_epi16::<4>(a), _mm512_set1_epi8(15));
    }

    memory! {
        fn load(from: *const f32) -> __m512 = _mm512_loadu_ps(from);
        fn load_part(from: *const f32, len: usize) -> __m512 =
            _mm512_maskz_loadu_ps(first(len), from);
        fn load_f16(from: *const u16) -> __m512 =
            _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
        fn load_f16_part(from: *const u16, len: usize) -> __m512 =
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(len), from.cast()));
        fn load_bf16(from: *const u16) -> __m512 = _mm512_castsi512_ps(
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))
        );
        fn load_bf16_part(from: *const u16, len: usize) -> __m512 = _mm512_castsi512_ps(
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                _mm256_maskz_loadu_epi16(first(len), from.cast())
            ))
        );
        fn load_u8(from: *const u8) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())));
        fn load_i8(from: *const i8) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())));
        fn store(to: *mut f32, a: __m512) = _mm512_storeu_ps(to, a);
        fn store_part(to: *mut f32, len: usize, a: __m512) =
            _mm512_mask_storeu_ps(to, first(len), a);
        fn store_i8(to: *mut i8, a: __m512i) =
            _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(a));
        fn load_bytes(from: *const u8) -> __m512i = _mm512_loadu_si512(from.cast());
        fn add_where(a: __m512i, bits: *const u8, value: u8) -> __m512i = _mm512_mask_add_epi8(
            a,
            bits.cast::<u64>().read_unaligned(),
            a,
            _mm512_set1_epi8(value.cast_signed())
        );
    }

    #[inline(always)]
    fn shift_left<const BITS: u32>(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves that the machine has the instructions; no memory is touched.
        unsafe { _mm512_slli_epi32::<BITS>(a) }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(
        self,
        acc: __m512i,
        weights: __m512i,
        activations: *const i8,
    ) -> __m512i {
        // SAFETY: `self` proves VNNI; the caller promises 4 readable bytes.
        unsafe {
            let activations = activations.cast::<i32>().read_unaligned();
            _mm512_dpbusd_epi32(acc, weights, _mm512_set1_epi32(activations))
        }
    }
}
