//! The AVX2 level: two 256-bit registers a vector.
//!
//! Byte dot products go through `vpmaddubsw`, whose 16-bit pair sums hold 2 * 63 * 127 but not
//! 2 * 255 * 127; wider weights are widened to 16 bits first.

use super::Simd;
use std::arch::x86_64::*;

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// # Safety
    ///
    /// The machine must have AVX2, FMA and F16C.
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
            // SAFETY: `self` proves that the machine has the instructions; no memory is touched
            // but local arrays.
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

type F = [__m256; 2];
type I = [__m256i; 2];

/// Copies `len <= 16` elements into an array whose other elements are zero.
///
/// # Safety
///
/// `from` must be readable for `len` elements.
#[inline(always)]
unsafe fn padded<T: Copy + Default>(from: *const T, len: usize) -> [T; 16] {
    let mut out = [T::default(); 16];
    // As bytes, because mapped weights need not be aligned.
    let (to, num_bytes) = (out.as_mut_ptr().cast::<u8>(), len * size_of::<T>());
    // SAFETY: `len` elements are readable by the caller's promise and 16 are writable.
    unsafe { std::ptr::copy_nonoverlapping(from.cast(), to, num_bytes) };
    out
}

/// # Safety
///
/// AVX2 must be available and `from` readable for 16 elements.
#[inline(always)]
unsafe fn load(from: *const f32) -> F {
    // SAFETY: the caller's promise.
    unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
}

/// # Safety
///
/// AVX2 and F16C must be available and `from` readable for 16 elements.
#[inline(always)]
unsafe fn load_f16(from: *const u16) -> F {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
        ]
    }
}

/// # Safety
///
/// AVX2 must be available and `from` readable for 16 elements.
#[inline(always)]
unsafe fn load_bf16(from: *const u16) -> F {
    // SAFETY: the caller's promise.
    unsafe {
        [
            bf16_to_f32(_mm_loadu_si128(from.cast())),
            bf16_to_f32(_mm_loadu_si128(from.add(8).cast())),
        ]
    }
}

/// Returns E4M3 as `f16` of a 256th of the value: the exponents' biases, 15 and 7, differ by 8.
///
/// # Safety
///
/// AVX2 must be available.
#[inline(always)]
pub(super) unsafe fn e4m3_to_f16(codes: __m128i) -> __m256i {
    // SAFETY: the caller promises AVX2.
    unsafe {
        // The sign, a bit that is its copy and goes, 4 of exponent, 3 of mantissa, 7 zeros.
        let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(codes));
        let words = _mm256_and_si256(words, _mm256_set1_epi16(0xbf80_u16.cast_signed()));
        let nan = _mm256_set1_epi16(0x3f80);
        _mm256_or_si256(words, _mm256_cmpeq_epi16(_mm256_and_si256(words, nan), nan))
    }
}

/// # Safety
///
/// AVX2 and F16C must be available and `from` readable for 16 elements.
#[inline(always)]
unsafe fn load_e4m3(from: *const u8) -> F {
    // SAFETY: the caller's promise.
    unsafe {
        let words = e4m3_to_f16(_mm_loadu_si128(from.cast()));
        let (low, scale) = (_mm256_castsi256_si128(words), _mm256_set1_ps(256.0));
        [
            _mm256_mul_ps(_mm256_cvtph_ps(low), scale),
            _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(words)), scale),
        ]
    }
}

/// # Safety
///
/// AVX2 must be available and `to` writable for 16 elements.
#[inline(always)]
unsafe fn store(to: *mut f32, a: F) {
    // SAFETY: the caller's promise.
    unsafe {
        _mm256_storeu_ps(to, a[0]);
        _mm256_storeu_ps(to.add(8), a[1]);
    }
}

/// # Safety
///
/// AVX2 must be available.
#[inline(always)]
unsafe fn bf16_to_f32(bits: __m128i) -> __m256 {
    // SAFETY: the caller promises AVX2.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))) }
}

/// 2^n for integral n in -126..=127, by its exponent bits.
///
/// # Safety
///
/// AVX2 must be available.
#[inline(always)]
unsafe fn exp2(n: __m256) -> __m256 {
    // SAFETY: the caller promises AVX2.
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

/// # Safety
///
/// AVX2 must be available.
#[inline(always)]
unsafe fn sum_i32(a: __m256i) -> i32 {
    // SAFETY: the caller promises AVX2; the array is local.
    unsafe {
        let mut lanes = [0i32; 8];
        _mm256_storeu_si256(lanes.as_mut_ptr().cast(), a);
        lanes.iter().sum()
    }
}

/// Folds 16 lanes pairwise, as a fixed tree.
#[inline(always)]
fn tree(mut lanes: [f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] = f(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

/// Four products of each lane, summed: `weights` unsigned, `activations` signed bytes.
///
/// # Safety
///
/// AVX2 must be available.
#[inline(always)]
unsafe fn dot_half<const WIDE: bool>(acc: __m256i, weights: __m256i, a: __m256i) -> __m256i {
    // SAFETY: the caller promises AVX2.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        if !WIDE {
            let pairs = _mm256_maddubs_epi16(weights, a);
            return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, ones));
        }
        // Even bytes and odd bytes as 16-bit numbers: products fit 32 bits without saturation.
        let even = _mm256_madd_epi16(
            _mm256_and_si256(weights, _mm256_set1_epi16(255)),
            _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(a)),
        );
        let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(weights), _mm256_srai_epi16::<8>(a));
        _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
    }
}

/// 0xff in each byte whose bit is set in `bits`.
///
/// # Safety
///
/// AVX2 must be available.
#[inline(always)]
unsafe fn byte_mask(bits: i32) -> __m256i {
    // SAFETY: the caller promises AVX2.
    unsafe {
        let spread = _mm256_shuffle_epi8(
            _mm256_set1_epi32(bits),
            _mm256_setr_epi64x(
                0,
                0x0101_0101_0101_0101,
                0x0202_0202_0202_0202,
                0x0303_0303_0303_0303,
            ),
        );
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
        _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit)
    }
}

impl Simd for Avx2 {
    type F = F;
    type I = I;
    type B = I;

    arithmetic! {
        fn splat(value: f32) -> F = [_mm256_set1_ps(value); 2];
        fn add(a: F, b: F) -> F = [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])];
        fn sub(a: F, b: F) -> F = [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])];
        fn mul(a: F, b: F) -> F = [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])];
        fn div(a: F, b: F) -> F = [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])];
        fn fma(a: F, b: F, c: F) -> F =
            [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])];
        fn max(a: F, b: F) -> F = [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])];
        fn min(a: F, b: F) -> F = [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])];
        fn abs(a: F) -> F = [
            _mm256_andnot_ps(_mm256_set1_ps(-0.0), a[0]),
            _mm256_andnot_ps(_mm256_set1_ps(-0.0), a[1]),
        ];
        fn round(a: F) -> F = [
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a[0]),
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a[1]),
        ];
        fn scale_exp2(a: F, exponent: F) -> F = [
            _mm256_mul_ps(a[0], exp2(exponent[0])),
            _mm256_mul_ps(a[1], exp2(exponent[1])),
        ];
        fn select_less(a: F, b: F, yes: F, no: F) -> F = [
            _mm256_blendv_ps(no[0], yes[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(no[1], yes[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
        ];
        fn keep_first(a: F, len: usize, other: F) -> F = {
            let len = _mm256_set1_epi32(len.min(16) as i32);
            let low = _mm256_cmpgt_epi32(len, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let high = _mm256_cmpgt_epi32(len, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            [
                _mm256_blendv_ps(other[0], a[0], _mm256_castsi256_ps(low)),
                _mm256_blendv_ps(other[1], a[1], _mm256_castsi256_ps(high)),
            ]
        };
        fn reduce_add(a: F) -> f32 = {
            let mut lanes = [0.0; 16];
            store(lanes.as_mut_ptr(), a);
            tree(lanes, |a, b| a + b)
        };
        fn reduce_max(a: F) -> f32 = {
            let mut lanes = [0.0; 16];
            store(lanes.as_mut_ptr(), a);
            tree(lanes, |a, b| if a > b { a } else { b })
        };
        fn first(a: F) -> f32 = _mm256_cvtss_f32(a[0]);

        fn splat_i32(value: i32) -> I = [_mm256_set1_epi32(value); 2];
        fn to_i32(a: F) -> I = [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])];
        fn to_f32(a: I) -> F = [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])];
        fn reduce_add_i32(a: I) -> i32 = sum_i32(_mm256_add_epi32(a[0], a[1]));
        fn low_nibbles(a: I) -> I = [
            _mm256_and_si256(a[0], _mm256_set1_epi8(15)),
            _mm256_and_si256(a[1], _mm256_set1_epi8(15)),
        ];
        fn high_nibbles(a: I) -> I = [
            _mm256_and_si256(_mm256_srli_epi16::<4>(a[0]), _mm256_set1_epi8(15)),
            _mm256_and_si256(_mm256_srli_epi16::<4>(a[1]), _mm256_set1_epi8(15)),
        ];
    }

    memory! {
        fn load(from: *const f32) -> F = load(from);
        fn load_part(from: *const f32, len: usize) -> F = load(padded(from, len).as_ptr());
        fn load_f16(from: *const u16) -> F = load_f16(from);
        fn load_f16_part(from: *const u16, len: usize) -> F =
            load_f16(padded(from, len).as_ptr());
        fn load_bf16(from: *const u16) -> F = load_bf16(from);
        fn load_bf16_part(from: *const u16, len: usize) -> F =
            load_bf16(padded(from, len).as_ptr());
        fn load_e4m3(from: *const u8) -> F = load_e4m3(from);
        fn load_e4m3_part(from: *const u8, len: usize) -> F =
            load_e4m3(padded(from, len).as_ptr());
        fn load_u8(from: *const u8) -> F = {
            let bytes = _mm_loadu_si128(from.cast());
            [
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))),
            ]
        };
        fn load_i8(from: *const i8) -> F = {
            let bytes = _mm_loadu_si128(from.cast());
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            ]
        };
        fn store(to: *mut f32, a: F) = store(to, a);
        fn store_part(to: *mut f32, len: usize, a: F) = {
            let mut lanes = [0.0f32; 16];
            store(lanes.as_mut_ptr(), a);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, len);
        };
        fn store_i8(to: *mut i8, a: I) = {
            // The packs work within 128-bit halves; the permutation puts the lanes in order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a[0], a[1]));
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(to.cast(), bytes);
        };
        fn load_bytes(from: *const u8) -> I = [
            _mm256_loadu_si256(from.cast()),
            _mm256_loadu_si256(from.add(32).cast()),
        ];
        fn add_where(a: I, bits: *const u8, value: u8) -> I = {
            let bits = bits.cast::<[i32; 2]>().read_unaligned();
            let value = _mm256_set1_epi8(value.cast_signed());
            [
                _mm256_add_epi8(a[0], _mm256_and_si256(byte_mask(bits[0]), value)),
                _mm256_add_epi8(a[1], _mm256_and_si256(byte_mask(bits[1]), value)),
            ]
        };
    }

    #[inline(always)]
    fn shift_left<const BITS: u32>(self, a: I) -> I {
        // SAFETY: `self` proves that the machine has the instructions; no memory is touched.
        unsafe {
            let bits = _mm_cvtsi32_si128(BITS.cast_signed());
            [_mm256_sll_epi32(a[0], bits), _mm256_sll_epi32(a[1], bits)]
        }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(self, acc: I, weights: I, activations: *const i8) -> I {
        // SAFETY: `self` proves AVX2; the caller promises 4 readable bytes.
        unsafe {
            let a = _mm256_set1_epi32(activations.cast::<i32>().read_unaligned());
            [
                dot_half::<WIDE>(acc[0], weights[0], a),
                dot_half::<WIDE>(acc[1], weights[1], a),
            ]
        }
    }
}
