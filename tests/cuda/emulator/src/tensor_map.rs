//! Tensors as the tensor memory accelerator (TMA) copies boxes of them: what
//! `cuTensorMapEncodeTiled` packs into the 128 bytes of a `CUtensorMap`, and what the interpreter
//! reads back from there.
//!
//! The layout is our own: a real driver's is secret, and nobody but the two ends looks inside.

/// Dimensions that a map may have.
pub const MAX_RANK: usize = 5;
/// Bytes of a `CUtensorMap`.
pub const NUM_BYTES: usize = 128;
/// What the first bytes hold, so that other memory is not taken for a map.
const MAGIC: u32 = 0x4d54_4e49;

/// How a box's rows lie in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swizzle {
    /// One after another.
    None,
    /// Units of 16 bytes of each 32 bytes change places: bit 4 of the address is xored with bit 7.
    Bytes32,
    /// Likewise of 64: bits 4 and 5 with 7 and 8.
    Bytes64,
    /// Likewise of 128: bits 4 to 6 with 7 to 9.
    Bytes128,
}

impl Swizzle {
    /// Returns where in shared memory the byte lies that would be at `address` without the swizzle.
    pub fn place(self, address: u64) -> u64 {
        let mask = match self {
            Self::None => 0,
            Self::Bytes32 => 1,
            Self::Bytes64 => 3,
            Self::Bytes128 => 7,
        };
        address ^ (((address >> 7) & mask) << 4)
    }

    /// Returns the most bytes that a box's innermost dimension may have; none is any number.
    pub fn max_row_bytes(self) -> Option<u64> {
        match self {
            Self::None => None,
            Self::Bytes32 => Some(32),
            Self::Bytes64 => Some(64),
            Self::Bytes128 => Some(128),
        }
    }
}

/// A tensor and its boxes, innermost dimension first. Kernels read zeros outside of the sizes, and
/// what they write there is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap {
    /// Dimensions, 1 to 5; entries of the arrays from there on are 1 (strides: 0).
    pub rank: usize,
    /// Bytes of an element.
    pub element_bytes: u32,
    /// Where the tensor begins.
    pub address: u64,
    /// Elements of each dimension.
    pub sizes: [u32; MAX_RANK],
    /// Bytes from one index to the next of each dimension; the innermost's are `element_bytes`.
    pub stride_bytes: [u64; MAX_RANK],
    /// Elements of a box in each dimension.
    pub box_sizes: [u16; MAX_RANK],
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
}

impl TensorMap {
    /// Packs the map.
    pub fn to_bytes(&self) -> [u8; NUM_BYTES] {
        let mut bytes = [0; NUM_BYTES];
        let mut end = 0;
        let mut put = |value: &[u8]| {
            bytes[end..end + value.len()].copy_from_slice(value);
            end += value.len();
        };
        put(&MAGIC.to_le_bytes());
        put(&[
            self.rank as u8,
            self.element_bytes as u8,
            self.swizzle as u8,
            0,
        ]);
        put(&self.address.to_le_bytes());
        self.stride_bytes
            .iter()
            .for_each(|stride| put(&stride.to_le_bytes()));
        self.sizes.iter().for_each(|size| put(&size.to_le_bytes()));
        self.box_sizes
            .iter()
            .for_each(|size| put(&size.to_le_bytes()));
        bytes
    }

    /// Unpacks a map; none where the bytes are not one.
    pub fn from_bytes(bytes: &[u8; NUM_BYTES]) -> Option<Self> {
        let (magic, mut rest) = bytes.split_at(4);
        let mut take = |len: usize| {
            let mut value = [0; 8];
            let (head, tail) = rest.split_at(len);
            value[..len].copy_from_slice(head);
            rest = tail;
            u64::from_le_bytes(value)
        };
        if magic != MAGIC.to_le_bytes() {
            return None;
        }
        let (rank, element_bytes) = (take(1) as usize, take(1) as u32);
        let swizzle = match take(2) {
            0 => Swizzle::None,
            1 => Swizzle::Bytes32,
            2 => Swizzle::Bytes64,
            _ => Swizzle::Bytes128,
        };
        Some(Self {
            rank,
            element_bytes,
            swizzle,
            address: take(8),
            stride_bytes: std::array::from_fn(|_| take(8)),
            sizes: std::array::from_fn(|_| take(4) as u32),
            box_sizes: std::array::from_fn(|_| take(2) as u16),
        })
    }

    /// Returns the bytes of a box.
    pub fn box_bytes(&self) -> u64 {
        let num_elements: u64 = self.box_sizes.iter().map(|&size| u64::from(size)).product();
        num_elements * u64::from(self.element_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_comes_back_from_its_bytes() {
        let map = TensorMap {
            rank: 4,
            element_bytes: 2,
            address: 0x7f12_3456_7890,
            sizes: [4096, 8, 2, 900, 1],
            stride_bytes: [2, 8192, 1 << 40, 65_536, 0],
            box_sizes: [64, 8, 2, 256, 1],
            swizzle: Swizzle::Bytes128,
        };
        assert_eq!(TensorMap::from_bytes(&map.to_bytes()), Some(map));
        assert_eq!(map.box_bytes(), 64 * 8 * 2 * 256 * 2);
        assert_eq!(TensorMap::from_bytes(&[0; NUM_BYTES]), None);
    }

    #[test]
    fn a_swizzle_moves_units_of_16_bytes_by_the_row() {
        assert_eq!(Swizzle::Bytes128.place(0x0080), 0x0090);
        assert_eq!(Swizzle::Bytes128.place(0x03f5), 0x0385);
        assert_eq!(Swizzle::Bytes32.place(0x0180), 0x0190);
        assert_eq!(Swizzle::None.place(0x0380), 0x0380);
    }
}
