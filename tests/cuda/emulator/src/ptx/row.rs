//! Registers of a warp: rows of 32 lanes, and how values lie in them.
//!
//! A register of at most 32 bits is one row of `u32`; one of 64 bits is two rows that hold 32 `u64`. Values of
//! 8 and 16 bits are zero-extended. Predicates are not rows but masks with a bit for each lane.

use half::{bf16, f16};

/// Lanes of a warp.
pub(super) const LANES: usize = 32;
/// All lanes.
pub(super) const FULL: u32 = u32::MAX;
/// Lanes that one step of a vector loop handles.
const CHUNK: usize = 8;

/// 32 bits of each lane.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Row(pub [u32; LANES]);

/// Bits of a register's lane: `u32` or `u64`.
pub(super) trait Word: Copy + Default + PartialEq {
    /// Bits.
    const BITS: u32;
}
impl Word for u32 {
    const BITS: u32 = 32;
}
impl Word for u64 {
    const BITS: u32 = 64;
}

/// A type of values in registers.
pub(super) trait Element: Copy {
    /// What holds it.
    type Bits: Word;
    /// Reads it from its register.
    fn from_bits(bits: Self::Bits) -> Self;
    /// Returns its register's bits.
    fn into_bits(self) -> Self::Bits;
}

macro_rules! element {
    ($type:ty, $bits:ty, $from:expr, $into:expr) => {
        impl Element for $type {
            type Bits = $bits;
            #[inline(always)]
            fn from_bits(bits: $bits) -> Self {
                ($from)(bits)
            }
            #[inline(always)]
            fn into_bits(self) -> $bits {
                ($into)(self)
            }
        }
    };
}

element!(u8, u32, |bits| bits as u8, u32::from);
element!(u16, u32, |bits| bits as u16, u32::from);
element!(i8, u32, |bits| bits as i8, |value: i8| u32::from(
    value as u8
));
element!(i16, u32, |bits| bits as i16, |value: i16| u32::from(
    value as u16
));
element!(u32, u32, |bits| bits, |value| value);
element!(i32, u32, |bits| bits as i32, |value| value as u32);
element!(u64, u64, |bits| bits, |value| value);
element!(i64, u64, |bits| bits as i64, |value| value as u64);
element!(f32, u32, f32::from_bits, f32::to_bits);
element!(f64, u64, f64::from_bits, f64::to_bits);
element!(
    f16,
    u32,
    |bits| f16::from_bits(bits as u16),
    |value: f16| u32::from(value.to_bits())
);
element!(
    bf16,
    u32,
    |bits| bf16::from_bits(bits as u16),
    |value: bf16| u32::from(value.to_bits())
);

/// Lanes of a chunk.
pub(super) type Chunk<W> = [W; CHUNK];

/// Reads lanes `8 * index ..` of a register.
///
/// # Safety
/// `row` is a register of 32 lanes of `W`.
#[inline(always)]
pub(super) unsafe fn read_chunk<W: Word>(row: *const W, index: usize) -> Chunk<W> {
    // SAFETY: the caller's.
    unsafe { row.add(index * CHUNK).cast::<Chunk<W>>().read() }
}

/// Writes the lanes of chunk `index` that `mask`, the whole warp's, has bits for.
///
/// # Safety
/// `row` is a register of 32 lanes of `W`.
#[inline(always)]
pub(super) unsafe fn write_chunk<W: Word>(
    row: *mut W,
    index: usize,
    mut values: Chunk<W>,
    mask: u32,
) {
    // SAFETY: the caller's.
    let place = unsafe { row.add(index * CHUNK).cast::<Chunk<W>>() };
    if mask != FULL {
        let bits = mask >> (index * CHUNK);
        // SAFETY: the caller's.
        let old = unsafe { place.read() };
        for lane in 0..CHUNK {
            values[lane] = if bits >> lane & 1 != 0 {
                values[lane]
            } else {
                old[lane]
            };
        }
    }
    // SAFETY: the caller's.
    unsafe { place.write(values) };
}

/// Chunks of a register.
pub(super) const CHUNKS: usize = LANES / CHUNK;

/// Calls `body` with each lane that `mask` has.
#[inline(always)]
pub(super) fn for_each_lane(mask: u32, mut body: impl FnMut(usize)) {
    let mut rest = mask;
    while rest != 0 {
        body(rest.trailing_zeros() as usize);
        rest &= rest - 1;
    }
}
