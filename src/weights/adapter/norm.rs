//! The lengths that DoRA divides by, rounded as PyTorch rounds them.
//!
//! `torch.linalg.norm` sums squares in f32, and in which order depends on the processor: its
//! builds for AVX2 and AVX-512 keep 8 and 16 sums and fuse products with additions, its build for
//! older processors keeps 8 and does not fuse. Each gives other last bits, so PEFT itself merges
//! DoRA to three results (`scripts/check_merge_with_peft.py` shows them). Here it is the order of
//! AVX2, in which the goldens were made and which Debian's PyTorch takes on any newer processor;
//! the same bits come out on every machine. Ported from PyTorch 1.13,
//! `aten/src/ATen/native/cpu/ReduceOpsKernel.cpp`, `norm_kernel_tensor_iterator_impl`.

/// Sums that are kept apart, one a lane of an AVX2 register.
const LANES: usize = 8;

/// Values at the end of a row that the compiler of PyTorch squares before it adds them.
const ROUNDED_SQUARES: usize = 4;

/// Returns the length of a row: lanes added in order, then the values that fill no register.
#[inline(always)]
pub(super) fn row_norm(row: &[f32]) -> f32 {
    let (registers, rest) = row.as_chunks::<LANES>();
    let mut lanes = [0.0_f32; LANES];
    for values in registers {
        add_squares(&mut lanes, values);
    }
    let sum = lanes.into_iter().reduce(|sum, lane| sum + lane);
    let mut sum = sum.unwrap_or_default();
    let (rounded, fused) = match rest.split_at_checked(ROUNDED_SQUARES) {
        Some(parts) => parts,
        None => (&[][..], rest),
    };
    for value in rounded {
        sum += value * value;
    }
    for value in fused {
        sum = value.mul_add(*value, sum);
    }
    sum.sqrt()
}

/// Adds the squares of a row to the sums of its columns, as a length down a matrix is summed.
#[inline(always)]
pub(super) fn add_squares(sums: &mut [f32], row: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(row) {
        *sum = value.mul_add(*value, *sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize) -> Vec<f32> {
        let mut state = 1_u32;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn digest(norms: impl Iterator<Item = f32>) -> u32 {
        norms.fold(0, |digest: u32, norm| {
            digest.rotate_left(5) ^ norm.to_bits()
        })
    }

    /// Digests of `torch.linalg.norm(x, dim=1)` of PyTorch 1.13 with `ATEN_CPU_CAPABILITY=avx2`,
    /// `x` `[64, length]`, contiguous and as a transposed view. With `default` or `avx512` none of
    /// the five pairs is the same.
    #[test]
    fn norms_have_the_bits_of_pytorch() {
        for (length, rows, columns) in [
            (5, 0x9e1f_6d16, 0xb822_97d0),
            (12, 0xb8ee_a840, 0x3a04_1438),
            (23, 0xfac6_df45, 0xcd71_9542),
            (100, 0x583b_8ec4, 0x70e5_ae47),
            (1541, 0x8c2e_e59c, 0x427d_8767),
        ] {
            let values = values(64 * length);
            let found = digest(values.chunks_exact(length).map(row_norm));
            assert_eq!(found, rows, "rows of {length}");
            let mut squares = vec![0.0; 64];
            for row in values.chunks_exact(64) {
                add_squares(&mut squares, row);
            }
            let found = digest(squares.into_iter().map(f32::sqrt));
            assert_eq!(found, columns, "columns of {length}");
        }
    }
}
