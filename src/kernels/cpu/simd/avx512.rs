//! The AVX-512 level: one 512-bit register a vector, `vpdpbusd` for byte dot products.

use super::Simd;
use super::avx2::e4m3_to_f16;
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

/// The same bits as pairs.
#[inline(always)]
fn as_pd(a: __m512) -> __m512d {
    // SAFETY: only values of an `Avx512`, which proves the instructions, come here.
    unsafe { _mm512_castps_pd(a) }
}

/// # Safety
///
/// AVX-512 F and AVX2 must be available.
#[inline(always)]
unsafe fn e4m3_to_f32(codes: __m128i) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_mul_ps(_mm512_cvtph_ps(e4m3_to_f16(codes)), _mm512_set1_ps(256.0)) }
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
        fn load_e4m3(from: *const u8) -> __m512 = e4m3_to_f32(_mm_loadu_si128(from.cast()));
        fn load_e4m3_part(from: *const u8, len: usize) -> __m512 =
            e4m3_to_f32(_mm_maskz_loadu_epi8(first(len), from.cast()));
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

    /// Transposes squares of 4 x 4 within 128-bit lanes, then the lanes.
    #[inline(always)]
    fn transpose(self, rows: [__m512; 16]) -> [__m512; 16] {
        // SAFETY: `self` proves that the machine has the instructions; no memory is touched.
        unsafe {
            let mut squares = [[_mm512_setzero_pd(); 4]; 4];
            for (square, rows) in squares.iter_mut().zip(rows.as_chunks::<4>().0) {
                let [a, b, c, d] = *rows;
                let low = [_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)].map(as_pd);
                let high = [_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)].map(as_pd);
                *square = [
                    _mm512_unpacklo_pd(low[0], low[1]),
                    _mm512_unpackhi_pd(low[0], low[1]),
                    _mm512_unpacklo_pd(high[0], high[1]),
                    _mm512_unpackhi_pd(high[0], high[1]),
                ];
            }
            let mut columns = [_mm512_setzero_ps(); 16];
            for col in 0..4 {
                let [a, b, c, d] = squares.map(|square| _mm512_castpd_ps(square[col]));
                // Lanes 0 and 2 of two squares, then lanes 1 and 3.
                let even = [
                    _mm512_shuffle_f32x4::<0x88>(a, b),
                    _mm512_shuffle_f32x4::<0x88>(c, d),
                ];
                let odd = [
                    _mm512_shuffle_f32x4::<0xdd>(a, b),
                    _mm512_shuffle_f32x4::<0xdd>(c, d),
                ];
                columns[col] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
                columns[col + 4] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
                columns[col + 8] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
                columns[col + 12] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
            }
            columns
        }
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
