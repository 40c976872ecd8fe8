//! `cuTensorMapEncodeTiled`: the checks that a driver makes, and our own packing.

use std::ffi::c_int;

use crate::tensor_map::{MAX_RANK, NUM_BYTES, Swizzle, TensorMap};

use super::status::{Out, Outcome, Status, answer, put};

/// Bytes of each `CUtensorMapDataType`.
const ELEMENT_BYTES: [u32; 13] = [1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4];

/// # Safety
/// `sizes`, `box_sizes` and `element_strides` must have `rank` elements, `stride_bytes` one fewer.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: Out<'_, [u8; NUM_BYTES]>,
    data_type: c_int,
    rank: u32,
    address: u64,
    sizes: *const u64,
    stride_bytes: *const u64,
    box_sizes: *const u32,
    element_strides: *const u32,
    interleave: c_int,
    swizzle: c_int,
    _promotion: c_int,
    fill: c_int,
) -> Status {
    let rank = rank as usize;
    if !(1..=MAX_RANK).contains(&rank) {
        return Status::INVALID_VALUE;
    }
    // SAFETY: the arrays' lengths are the caller's duty.
    let (sizes, box_sizes, element_strides) = unsafe {
        (
            std::slice::from_raw_parts(sizes, rank),
            std::slice::from_raw_parts(box_sizes, rank),
            std::slice::from_raw_parts(element_strides, rank),
        )
    };
    let stride_bytes = match rank {
        1 => &[],
        // SAFETY: as above.
        _ => unsafe { std::slice::from_raw_parts(stride_bytes, rank - 1) },
    };
    // Interleaved layouts, steps over elements and NaNs outside are not made.
    if interleave != 0 || fill != 0 || element_strides.iter().any(|&stride| stride != 1) {
        return Status::NOT_SUPPORTED;
    }
    answer(
        encode(data_type, address, sizes, stride_bytes, box_sizes, swizzle)
            .and_then(|bytes| put(map, bytes)),
    )
}

fn encode(
    data_type: c_int,
    address: u64,
    sizes: &[u64],
    stride_bytes: &[u64],
    box_sizes: &[u32],
    swizzle: c_int,
) -> Outcome<[u8; NUM_BYTES]> {
    let element_bytes = usize::try_from(data_type)
        .ok()
        .and_then(|index| ELEMENT_BYTES.get(index));
    let &element_bytes = element_bytes.ok_or(Status::INVALID_VALUE)?;
    let swizzle = match swizzle {
        0 => Swizzle::None,
        1 => Swizzle::Bytes32,
        2 => Swizzle::Bytes64,
        3 => Swizzle::Bytes128,
        _ => return Err(Status::NOT_SUPPORTED),
    };
    let row_bytes = u64::from(box_sizes[0]) * u64::from(element_bytes);
    let is_valid = address.is_multiple_of(16)
        && sizes.iter().all(|&size| (1..=1 << 32).contains(&size))
        && stride_bytes
            .iter()
            .all(|&stride| stride.is_multiple_of(16) && stride < 1 << 40)
        && box_sizes.iter().all(|&size| (1..=256).contains(&size))
        && row_bytes.is_multiple_of(16)
        && swizzle.max_row_bytes().is_none_or(|most| row_bytes <= most);
    if !is_valid {
        return Err(Status::INVALID_VALUE);
    }
    let mut map = TensorMap {
        rank: sizes.len(),
        element_bytes,
        address,
        sizes: [1; MAX_RANK],
        stride_bytes: [0; MAX_RANK],
        box_sizes: [1; MAX_RANK],
        swizzle,
    };
    for (target, &size) in map.sizes.iter_mut().zip(sizes) {
        // 2^32 itself is one too many for the field, and for every kernel.
        *target = u32::try_from(size).map_err(|_| Status::NOT_SUPPORTED)?;
    }
    for (target, &size) in map.box_sizes.iter_mut().zip(box_sizes) {
        *target = size as u16;
    }
    map.stride_bytes[0] = u64::from(element_bytes);
    map.stride_bytes[1..=stride_bytes.len()].copy_from_slice(stride_bytes);
    Ok(map.to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_driver_refuses_is_refused() {
        let encode = |address, sizes: &[u64; 2], stride, boxes: &[u32; 2]| {
            encode(1, address, sizes, &[stride], boxes, 3)
        };
        let map = encode(4096, &[200, 7], 400, &[64, 8]).expect("valid");
        let map = TensorMap::from_bytes(&map).expect("a map");
        assert_eq!(
            (map.rank, map.sizes[..3].to_vec(), map.stride_bytes[1]),
            (2, vec![200, 7, 1], 400)
        );
        assert!(encode(4104, &[200, 7], 400, &[64, 8]).is_err(), "address");
        assert!(encode(4096, &[200, 7], 408, &[64, 8]).is_err(), "stride");
        assert!(
            encode(4096, &[200, 7], 400, &[72, 8]).is_err(),
            "wider than the swizzle"
        );
        assert!(encode(4096, &[200, 7], 400, &[64, 257]).is_err(), "box");
        assert!(encode(4096, &[200, 0], 400, &[64, 8]).is_err(), "size");
    }
}
