//! Matrix products on the CPU: 16-bit or f32 operands, sums in f32.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A matrix's element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// `CUDA_R_32F`.
    F32,
    /// `CUDA_R_16F`.
    F16,
    /// `CUDA_R_16BF`.
    Bf16,
}

impl Type {
    /// Returns the type of a `cudaDataType`.
    pub fn of(number: i32) -> Option<Self> {
        match number {
            0 => Some(Self::F32),
            2 => Some(Self::F16),
            14 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Returns the bytes of an element.
    pub fn num_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A column-major matrix in memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// Where it begins.
    pub address: u64,
    /// Of its elements.
    pub dtype: Type,
    /// Elements of a column.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one column to the next.
    pub leading: usize,
}

impl Matrix {
    /// Returns the bytes from its first to its last element.
    pub fn num_bytes(&self) -> usize {
        match (self.rows, self.cols) {
            (0, _) | (_, 0) => 0,
            (rows, cols) => (self.leading * (cols - 1) + rows) * self.dtype.num_bytes(),
        }
    }

    /// Reads a column into `values`.
    ///
    /// # Safety
    /// The matrix must be there.
    unsafe fn read_column(&self, col: usize, values: &mut [f32]) {
        let start = self.address as usize + col * self.leading * self.dtype.num_bytes();
        let len = values.len().min(self.rows);
        // SAFETY: a column of the matrix; all types take any bits. Addresses are checked for
        // alignment before.
        unsafe {
            match self.dtype {
                Type::F32 => values[..len]
                    .copy_from_slice(std::slice::from_raw_parts(start as *const f32, len)),
                Type::F16 => std::slice::from_raw_parts(start as *const f16, len)
                    .convert_to_f32_slice(&mut values[..len]),
                Type::Bf16 => std::slice::from_raw_parts(start as *const bf16, len)
                    .convert_to_f32_slice(&mut values[..len]),
            }
        }
    }

    /// Reads an element.
    ///
    /// # Safety
    /// The matrix must be there and have it.
    unsafe fn read(&self, row: usize, col: usize) -> f32 {
        let start = self.address as usize + (col * self.leading + row) * self.dtype.num_bytes();
        // SAFETY: the caller's.
        unsafe {
            match self.dtype {
                Type::F32 => *(start as *const f32),
                Type::F16 => (*(start as *const f16)).to_f32(),
                Type::Bf16 => (*(start as *const bf16)).to_f32(),
            }
        }
    }

    /// Writes an element, rounded to the type.
    ///
    /// # Safety
    /// As [`Self::read`], and nobody else may use it.
    unsafe fn write(&self, row: usize, col: usize, value: f32) {
        let start = self.address as usize + (col * self.leading + row) * self.dtype.num_bytes();
        // SAFETY: the caller's.
        unsafe {
            match self.dtype {
                Type::F32 => (start as *mut f32).write(value),
                Type::F16 => (start as *mut f16).write(f16::from_f32(value)),
                Type::Bf16 => (start as *mut bf16).write(bf16::from_f32(value)),
            }
        }
    }

    /// Reads vector `index` of those that a product takes along its inner dimension: columns, or
    /// rows.
    ///
    /// # Safety
    /// The matrix must be there.
    unsafe fn read_inner(&self, index: usize, is_column: bool, values: &mut [f32]) {
        if is_column {
            // SAFETY: the caller's.
            return unsafe { self.read_column(index, values) };
        }
        for (col, value) in values.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *value = unsafe { self.read(index, col) };
        }
    }
}

/// `D = alpha · op(A) op(B) + beta · C + bias`, the bias added to each column.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// A, and whether it is transposed.
    pub a: (Matrix, bool),
    /// B, and whether it is transposed.
    pub b: (Matrix, bool),
    /// C; may be D.
    pub c: Matrix,
    /// The result.
    pub d: Matrix,
    /// As many elements as D has rows.
    pub bias: Option<Matrix>,
    /// A factor of the product.
    pub alpha: f32,
    /// A factor of C, which is not read when this is 0.
    pub beta: f32,
    /// Parts that the inner dimension is summed in.
    pub num_parts: usize,
}

impl Product {
    /// Returns the inner dimension; none when the sizes do not fit.
    pub fn inner(&self) -> Option<usize> {
        let ((a, transpose_a), (b, transpose_b)) = (self.a, self.b);
        let (m, k) = if transpose_a {
            (a.cols, a.rows)
        } else {
            (a.rows, a.cols)
        };
        let (b_k, n) = if transpose_b {
            (b.cols, b.rows)
        } else {
            (b.rows, b.cols)
        };
        let fits = (m, n) == (self.d.rows, self.d.cols)
            && (m, n) == (self.c.rows, self.c.cols)
            && k == b_k;
        fits.then_some(k)
    }

    /// Computes it.
    ///
    /// # Safety
    /// All matrices must be there, aligned to their elements, and nobody may use D meanwhile.
    ///
    /// # Panics
    /// When the sizes do not fit ([`Self::inner`]).
    pub unsafe fn compute(&self) {
        let k = self.inner().expect("sizes that fit");
        let (m, n) = (self.d.rows, self.d.cols);
        let mut columns = vec![0f32; n * k];
        for (col, values) in columns.chunks_exact_mut(k.max(1)).enumerate() {
            // SAFETY: the caller's.
            unsafe { self.b.0.read_inner(col, !self.b.1, values) };
        }
        let num_rows = m.next_multiple_of(BLOCK_ROWS);
        let mut rows = vec![0f32; num_rows * k];
        for (row, values) in (0..m).zip(rows.chunks_exact_mut(k.max(1))) {
            // SAFETY: the caller's.
            unsafe { self.a.0.read_inner(row, self.a.1, values) };
        }
        // Columns of a panel stay in the CPU's cache while all rows pass.
        for panel in (0..n).step_by(PANEL_COLS) {
            let end = (panel + PANEL_COLS).min(n);
            for first_row in (0..m).step_by(BLOCK_ROWS) {
                let of_rows = &rows[first_row * k..][..BLOCK_ROWS * k];
                for first_col in (panel..end).step_by(BLOCK_COLS) {
                    let num_cols = BLOCK_COLS.min(end - first_col);
                    let sums = self.block(of_rows, &columns[first_col * k..][..num_cols * k], k);
                    for (row, sums) in (first_row..m).zip(&sums) {
                        for (col, &sum) in (first_col..end).zip(sums) {
                            // SAFETY: the caller's.
                            unsafe { self.finish(row, col, sum) };
                        }
                    }
                }
            }
        }
    }

    /// Returns the sums of a block of D.
    fn block(&self, rows: &[f32], columns: &[f32], k: usize) -> [[f32; BLOCK_COLS]; BLOCK_ROWS] {
        let part = k.div_ceil(self.num_parts).max(1);
        let mut sums = [[0f32; BLOCK_COLS]; BLOCK_ROWS];
        for start in (0..k).step_by(part) {
            let end = (start + part).min(k);
            let of_rows = std::array::from_fn(|i| &rows[i * k..][start..end]);
            // Those past the last one are the last one again, and nobody reads their sums.
            let last = columns.len() / k - 1;
            let of_columns = std::array::from_fn(|i| &columns[i.min(last) * k..][start..end]);
            let added = block_sums(of_rows, of_columns);
            for (sum, added) in sums.iter_mut().flatten().zip(added.iter().flatten()) {
                *sum += added;
            }
        }
        sums
    }

    /// Writes an element of D, given its sum.
    ///
    /// # Safety
    /// As [`Self::compute`].
    unsafe fn finish(&self, row: usize, col: usize, sum: f32) {
        // SAFETY: the caller's.
        unsafe {
            let mut value = self.alpha * sum + self.bias.map_or(0.0, |bias| bias.read(row, 0));
            if self.beta != 0.0 {
                value += self.beta * self.c.read(row, col);
            }
            self.d.write(row, col, value);
        }
    }
}

/// Rows of A and columns of B that are multiplied at a time: their sums fit the CPU's vector
/// registers.
const BLOCK_ROWS: usize = 2;
const BLOCK_COLS: usize = 4;
const LANES: usize = 8;
const PANEL_COLS: usize = 32;

fn block_sums(
    rows: [&[f32]; BLOCK_ROWS],
    columns: [&[f32]; BLOCK_COLS],
) -> [[f32; BLOCK_COLS]; BLOCK_ROWS] {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        // SAFETY: the CPU has both.
        return unsafe { block_sums_fma(rows, columns) };
    }
    rows.map(|row| columns.map(|column| dot(row, column)))
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let ((a_vectors, a_rest), (b_vectors, b_rest)) =
        (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a_vectors.iter().zip(b_vectors) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    sums.iter().sum::<f32>() + rest.sum::<f32>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn block_sums_fma(
    rows: [&[f32]; BLOCK_ROWS],
    columns: [&[f32]; BLOCK_COLS],
) -> [[f32; BLOCK_COLS]; BLOCK_ROWS] {
    use std::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    // SAFETY: eight elements.
    let load = |values: &[f32; LANES]| -> __m256 { unsafe { _mm256_loadu_ps(values.as_ptr()) } };
    let rows = rows.map(<[f32]>::as_chunks::<LANES>);
    let columns = columns.map(<[f32]>::as_chunks::<LANES>);
    let len = rows[0].0.len();
    let row_vectors = rows.map(|(vectors, _)| &vectors[..len]);
    let column_vectors = columns.map(|(vectors, _)| &vectors[..len]);
    let mut sums = [[_mm256_setzero_ps(); BLOCK_COLS]; BLOCK_ROWS];
    for at in 0..len {
        let of_rows = [load(&row_vectors[0][at]), load(&row_vectors[1][at])];
        for col in 0..BLOCK_COLS {
            let of_column = load(&column_vectors[col][at]);
            for row in 0..BLOCK_ROWS {
                sums[row][col] = _mm256_fmadd_ps(of_rows[row], of_column, sums[row][col]);
            }
        }
    }
    let mut totals = [[0f32; BLOCK_COLS]; BLOCK_ROWS];
    for row in 0..BLOCK_ROWS {
        for col in 0..BLOCK_COLS {
            let mut lanes = [0f32; LANES];
            // SAFETY: eight elements.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums[row][col]) };
            let rest = rows[row].1.iter().zip(columns[col].1).map(|(a, b)| a * b);
            totals[row][col] = lanes.iter().sum::<f32>() + rest.sum::<f32>();
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix<T>(values: &[T], dtype: Type, rows: usize, leading: usize) -> Matrix {
        let cols = values.len().div_ceil(leading);
        Matrix {
            address: values.as_ptr() as u64,
            dtype,
            rows,
            cols,
            leading,
        }
    }

    #[test]
    fn blocks_and_their_ends_are_summed() {
        let (m, n, k) = (5, 7, 43);
        let a: Vec<f16> = (0..m * k)
            .map(|i| f16::from_f32((i % 7) as f32 - 3.0))
            .collect();
        let b: Vec<f16> = (0..n * k)
            .map(|i| f16::from_f32((i % 5) as f32 - 2.0))
            .collect();
        let mut out = vec![0f32; m * n];
        let address = out.as_mut_ptr() as u64;
        let d = Matrix {
            address,
            dtype: Type::F32,
            rows: m,
            cols: n,
            leading: m,
        };
        let (a_matrix, b_matrix) = (matrix(&a, Type::F16, k, k), matrix(&b, Type::F16, k, k));
        let (alpha, beta) = (1.0, 0.0);
        let product = Product {
            a: (a_matrix, true),
            b: (b_matrix, false),
            c: d,
            d,
            bias: None,
            alpha,
            beta,
            num_parts: 2,
        };
        // SAFETY: matrices of this test.
        unsafe { product.compute() };
        for (i, got) in out.iter().enumerate() {
            let (row, col) = (i % m, i / m);
            let values = (0..k).map(|at| a[row * k + at].to_f32() * b[col * k + at].to_f32());
            assert_eq!(*got, values.sum::<f32>(), "{row} {col}");
        }
    }

    /// A is `[2, 3]`, B `[3, 2]`, given as both ways round.
    #[test]
    fn all_four_ways_round_give_the_same() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].map(f16::from_f32);
        let a_transposed = [1.0, 3.0, 5.0, 0.0, 2.0, 4.0, 6.0].map(f16::from_f32);
        let b = [1.0, -1.0, 2.0, 0.5, 1.0, 1.0].map(bf16::from_f32);
        let b_transposed = [1.0, 0.5, -1.0, 1.0, 2.0, 1.0].map(bf16::from_f32);
        let bias = [10.0f32, 20.0];
        for num_parts in [1, 2] {
            for (a, transpose_a) in [
                (matrix(&a, Type::F16, 2, 2), false),
                (matrix(&a_transposed, Type::F16, 3, 4), true),
            ] {
                for (b, transpose_b) in [
                    (matrix(&b, Type::Bf16, 3, 3), false),
                    (matrix(&b_transposed, Type::Bf16, 2, 2), true),
                ] {
                    let mut out = [100f32; 4];
                    let address = out.as_mut_ptr() as u64;
                    let d = Matrix {
                        address,
                        dtype: Type::F32,
                        rows: 2,
                        cols: 2,
                        leading: 2,
                    };
                    let product = Product {
                        a: (a, transpose_a),
                        b: (b, transpose_b),
                        c: d,
                        d,
                        bias: Some(matrix(&bias, Type::F32, 2, 2)),
                        alpha: 2.0,
                        beta: 0.5,
                        num_parts,
                    };
                    assert_eq!(product.inner(), Some(3));
                    // SAFETY: matrices of this test, which ends after the product.
                    unsafe { product.compute() };
                    // [[8, 8.5], [10, 11]]: 2 · product + bias + 50.
                    assert_eq!(out, [76.0, 90.0, 77.0, 92.0]);
                }
            }
        }
    }
}
