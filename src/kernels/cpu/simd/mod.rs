//! One vocabulary of 16-lane vectors for every instruction set.
//!
//! A kernel is written once, as a [`Task`] generic over [`Simd`], and compiled once for each
//! [`SimdLevel`]: AVX-512 with VNNI, AVX2 with FMA, and portable Rust, which is the oracle of the
//! other two and what other architectures run. [`SimdLevel::run`] is the only door into code
//! that needs CPU features; the vector types are handed out there and nowhere else.
//!
//! A level gives the same bits for the same input always; two levels may differ by rounding,
//! because the portable one does not fuse multiplications with additions.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use scalar::Scalar;

/// The instruction sets that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimdLevel {
    /// Portable Rust: the reference, and the only level off x86-64.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
}

impl SimdLevel {
    /// Returns the best level of this machine.
    pub fn detect() -> Self {
        [Self::Avx512, Self::Avx2]
            .into_iter()
            .find(|level| level.is_supported())
            .unwrap_or(Self::Scalar)
    }

    /// Says whether this machine can run the level.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
                    && Self::Avx2.is_supported()
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// Runs the task with this level's vectors.
    ///
    /// # Safety
    ///
    /// The machine must support the level ([`SimdLevel::is_supported`]).
    #[inline]
    pub(super) unsafe fn run<T: Task>(self, task: T) {
        match self {
            Self::Scalar => task.run(Scalar::new()),
            // SAFETY: the caller promises that the machine has the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { run_avx2(task) },
            // SAFETY: the caller promises that the machine has the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { run_avx512(task) },
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => task.run(Scalar::new()),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<T: Task>(task: T) {
    // SAFETY: the features are enabled in this function.
    task.run(unsafe { Avx2::new() });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn run_avx512<T: Task>(task: T) {
    // SAFETY: the features are enabled in this function.
    task.run(unsafe { Avx512::new() });
}

/// A piece of work compiled for each level. `run` and all it calls must be `#[inline(always)]`,
/// so that the body lands in the function that has the CPU features enabled.
pub(super) trait Task {
    /// Does the work with the vectors of one level.
    fn run<S: Simd>(self, simd: S);
}

/// Vectors of 16 `f32` or `i32` lanes and of 64 bytes. Holding a value of the type proves that
/// the machine has its instructions, so arithmetic is safe; memory access is not.
///
/// `_part` loads and stores touch `len` (1 to 16) elements only; the other lanes read as zero.
pub(super) trait Simd: Copy {
    /// 16 lanes of `f32`.
    type F: Copy;
    /// 16 lanes of `i32`.
    type I: Copy;
    /// 64 bytes.
    type B: Copy;

    fn splat(self, value: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger lane; `b` when either is not a number.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller lane; `b` when either is not a number.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// Rounds to the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^exponent` for integral exponents in -126..=127.
    fn scale_exp2(self, a: Self::F, exponent: Self::F) -> Self::F;
    /// `yes` where `a < b`, else `no`.
    fn select_less(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// Keeps the first `len` lanes, `other` elsewhere; `len` may exceed 16.
    fn keep_first(self, a: Self::F, len: usize, other: Self::F) -> Self::F;
    fn reduce_add(self, a: Self::F) -> f32;
    fn reduce_max(self, a: Self::F) -> f32;
    /// Returns lane 0.
    fn first(self, a: Self::F) -> f32;

    unsafe fn load(self, from: *const f32) -> Self::F;
    unsafe fn load_part(self, from: *const f32, len: usize) -> Self::F;
    unsafe fn load_f16(self, from: *const u16) -> Self::F;
    unsafe fn load_f16_part(self, from: *const u16, len: usize) -> Self::F;
    unsafe fn load_bf16(self, from: *const u16) -> Self::F;
    unsafe fn load_bf16_part(self, from: *const u16, len: usize) -> Self::F;
    unsafe fn load_e4m3(self, from: *const u8) -> Self::F;
    unsafe fn load_e4m3_part(self, from: *const u8, len: usize) -> Self::F;
    /// 16 unsigned bytes as floats.
    unsafe fn load_u8(self, from: *const u8) -> Self::F;
    /// 16 signed bytes as floats.
    unsafe fn load_i8(self, from: *const i8) -> Self::F;
    unsafe fn store(self, to: *mut f32, a: Self::F);
    unsafe fn store_part(self, to: *mut f32, len: usize, a: Self::F);

    /// Returns the transpose of a square of 16 rows.
    #[inline(always)]
    fn transpose(self, rows: [Self::F; 16]) -> [Self::F; 16] {
        let (mut values, mut columns) = ([[0f32; 16]; 16], [[0f32; 16]; 16]);
        for (values, row) in values.iter_mut().zip(rows) {
            // SAFETY: a row of the array has room for 16 elements.
            unsafe { self.store(values.as_mut_ptr(), row) };
        }
        for (row, values) in values.iter().enumerate() {
            for (column, value) in columns.iter_mut().zip(values) {
                column[row] = *value;
            }
        }
        // SAFETY: a column of the array has 16 elements.
        columns.map(|column| unsafe { self.load(column.as_ptr()) })
    }

    fn splat_i32(self, value: i32) -> Self::I;
    /// Rounds to the nearest integer, ties to even.
    fn to_i32(self, a: Self::F) -> Self::I;
    fn to_f32(self, a: Self::I) -> Self::F;
    fn shift_left<const BITS: u32>(self, a: Self::I) -> Self::I;
    fn reduce_add_i32(self, a: Self::I) -> i32;
    /// Stores the lanes, which must lie in -128..=127, as 16 bytes.
    unsafe fn store_i8(self, to: *mut i8, a: Self::I);

    unsafe fn load_bytes(self, from: *const u8) -> Self::B;
    fn low_nibbles(self, a: Self::B) -> Self::B;
    fn high_nibbles(self, a: Self::B) -> Self::B;
    /// Adds `value` to each byte whose bit is set in the 8 bytes at `bits`.
    unsafe fn add_where(self, a: Self::B, bits: *const u8, value: u8) -> Self::B;
    /// Adds to lane `i` the dot product of the unsigned bytes `4i..4i + 4` of `weights` with the
    /// four signed bytes at `activations`. `WIDE` says that weights may exceed 63.
    unsafe fn dot<const WIDE: bool>(
        self,
        acc: Self::I,
        weights: Self::B,
        activations: *const i8,
    ) -> Self::I;
}

/// Below this, `exp` is smaller than the smallest normal `f32` and gives 0.
const EXP_MIN: f32 = -87.336_54;
/// Above this, `exp` gives `exp(EXP_MAX)`, so that 2^n stays a normal number.
const EXP_MAX: f32 = 88.0;

/// Returns e to the power of each lane, within 2e-7 relative; exactly 1 at 0, 0 below -87.3 and
/// not a number for not a number.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, so exp(x) = 2^n exp(r), and exp(r) is its Taylor
/// polynomial of degree 7 (remainder r^8 / 8! < 6e-9). ln 2 is split in two so that n ln 2 is
/// exact in its leading part.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::F) -> S::F {
    let low = simd.splat(EXP_MIN);
    let clamped = simd.min(simd.splat(EXP_MAX), simd.max(low, x));
    let n = simd.round(simd.mul(clamped, simd.splat(std::f32::consts::LOG2_E)));
    let r = simd.fma(n, simd.splat(-0.693_359_4), clamped);
    let r = simd.fma(n, simd.splat(2.121_944_4e-4), r);
    let mut p = simd.splat(1.0 / 5040.0);
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = simd.fma(p, r, simd.splat(coefficient));
    }
    simd.select_less(x, low, simd.splat(0.0), simd.scale_exp2(p, n))
}
