//! Products of `f32` activations with matrices of any dense type, packed as in BLIS.
//!
//! Training multiplies thousands of rows at once, in three forms (`x Wᵀ`, `dy W`, `dyᵀ x`), adds
//! to what is there, and reads parts of wider rows. Both operands are copied into panels that a
//! register tile walks through (Van Zee and van de Geijn, "BLIS", TOMS 2015, section 4), so one
//! kernel serves every form and weights of 16 bits are widened as they are packed.
//!
//! Sums run along k in blocks whose borders depend on k alone: a row of the result has the same
//! bits in any batch and on any number of threads.

use super::buffer::Output;
use super::gemm_pack::{Joined, Pack};
use super::matmul::Cpu;
use super::simd::{Simd, SimdLevel, Task};
use std::ops::Range;

pub(super) use super::gemm_pack::{Elements, Operand};

/// Most steps along k between two visits of an output tile: a hidden size of 576 and the rank of
/// an adapter make one.
const MAX_BLOCK_K: usize = 640;
/// Floats of packed columns that are held at once: they stay in a shared cache of 16 MiB.
const PACKED_FLOATS: usize = 2 * 1024 * 1024;
/// Most steps along k that are packed at once.
const MAX_PACKED_K: usize = 2048;
/// Rows that a task packs at once: with `MAX_BLOCK_K` steps, a fifth of an L2 cache of 1 MiB.
const BLOCK_ROWS: usize = 96;

/// `out = scale * (a * b + low-rank term) + bias`, or the same added to `out`.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    /// `[m, k]`.
    pub(super) a: Operand<'a>,
    /// `[k, n]`.
    pub(super) b: Operand<'a>,
    /// Two factors `[m, rank]` and `[rank, n]` whose product is added.
    pub(super) low_rank: Option<(Operand<'a>, Operand<'a>)>,
    pub(super) scale: f32,
    /// One value for each column; only where the product does not add.
    pub(super) bias: Option<&'a [f32]>,
    pub(super) mode: Mode,
}

impl<'a> Product<'a> {
    /// Returns the left factor with that of the low-rank term behind it.
    fn left(&self) -> Joined<'a> {
        Joined {
            main: self.a,
            tail: self.low_rank.map(|(left, _)| left),
        }
    }

    /// Returns the transpose of the right factor, in the same way.
    fn right(&self) -> Joined<'a> {
        Joined {
            main: self.b.transposed(),
            tail: self.low_rank.map(|(_, right)| right.transposed()),
        }
    }

    /// Returns the rows and columns of the result.
    pub(super) fn output(&self) -> [usize; 2] {
        let [m, n, _] = self.sizes();
        [m, n]
    }

    /// Returns `[m, n, k]`, where k counts the columns of the low-rank term too.
    fn sizes(&self) -> [usize; 3] {
        let (a, b) = (self.left(), self.right());
        assert_eq!(a.num_cols(), b.num_cols(), "inner sizes of a product");
        [a.num_rows(), b.num_rows(), a.num_cols()]
    }
}

/// What happens to the numbers that are in the output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// They are not read.
    Overwrite,
    /// The product is added.
    Add,
}

/// Where a product goes: row-major, rows `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) base: *mut f32,
    pub(super) stride: usize,
}

// SAFETY: a plain address; those who write through it promise disjoint parts.
unsafe impl Sync for Target {}
// SAFETY: as above.
unsafe impl Send for Target {}

impl Target {
    #[inline(always)]
    fn at(self, row: usize, col: usize) -> *mut f32 {
        self.base.wrapping_add(row * self.stride + col)
    }
}

/// Computes a product on all threads of `cpu`.
///
/// # Safety
///
/// `target` must be writable for `a.rows` rows of `b.cols` elements, initialised where the
/// product adds, and overlap neither operand.
pub(super) unsafe fn gemm(cpu: Cpu<'_>, product: &Product<'_>, target: Target) {
    let [m, n, _] = product.sizes();
    if let Some(bias) = product.bias {
        assert_eq!(bias.len(), n, "a bias has one value a column");
    }
    if m == 0 || n == 0 {
        return;
    }
    let is_narrow = n <= 16;
    // SAFETY: the caller's promise.
    unsafe {
        match cpu.level {
            SimdLevel::Avx512 if is_narrow => gemm_tiled::<8, 1>(cpu, product, target),
            SimdLevel::Avx512 => gemm_tiled::<8, 3>(cpu, product, target),
            SimdLevel::Avx2 => gemm_tiled::<6, 1>(cpu, product, target),
            SimdLevel::Scalar => gemm_tiled::<4, 1>(cpu, product, target),
        }
    }
}

/// Returns `product` as a new vector `[a.rows, b.cols]`.
pub(super) fn product(cpu: Cpu<'_>, product: &Product<'_>) -> Vec<f32> {
    let [m, n, _] = product.sizes();
    let out = Output::new(m * n);
    let target = Target {
        base: out.at(0),
        stride: n,
    };
    assert!(
        product.mode == Mode::Overwrite,
        "a new vector holds nothing"
    );
    // SAFETY: the vector has room for the result and all of it is written.
    unsafe {
        gemm(cpu, product, target);
        out.finish()
    }
}

/// The register tile is `MR` rows by `NV` vectors of 16 columns.
///
/// # Safety
///
/// As [`gemm`].
unsafe fn gemm_tiled<const MR: usize, const NV: usize>(
    cpu: Cpu<'_>,
    product: &Product<'_>,
    target: Target,
) {
    let [m, n, k] = product.sizes();
    let width = NV * 16;
    let chunk = (PACKED_FLOATS / k.clamp(1, MAX_PACKED_K) / width).max(4) * width;
    let chunks = (0..n).step_by(chunk);
    let steps = (0..k.max(1)).step_by(MAX_PACKED_K);
    for (first_col, first_step) in chunks.flat_map(|col| steps.clone().map(move |step| (col, step)))
    {
        let cols = first_col..n.min(first_col + chunk);
        let steps = first_step..k.min(first_step + MAX_PACKED_K);
        let packed = pack_columns(cpu, product.right(), cols.clone(), steps.clone(), width);
        let num_panels = cols.len().div_ceil(width);
        let (rows_per_task, panels_per_task) = task_shape::<MR>(cpu, m, num_panels);
        let num_col_tasks = num_panels.div_ceil(panels_per_task);
        let num_tasks = m.div_ceil(rows_per_task) * num_col_tasks;
        cpu.pool.run(num_tasks, |task| {
            let row = task / num_col_tasks * rows_per_task;
            let panel = task % num_col_tasks * panels_per_task;
            let tiles = Tiles::<MR, NV> {
                product,
                rows: row..m.min(row + rows_per_task),
                packed: &packed,
                panels: panel..num_panels.min(panel + panels_per_task),
                cols: cols.clone(),
                steps: steps.clone(),
                target,
            };
            // SAFETY: the level is supported, and the tasks write disjoint tiles of the target.
            unsafe { cpu.level.run(tiles) };
        });
    }
}

/// Returns the rows and the column panels of a task: blocks of rows for all panels, cut along
/// the columns too when that gives the threads too little.
fn task_shape<const MR: usize>(cpu: Cpu<'_>, m: usize, num_panels: usize) -> (usize, usize) {
    let num_threads = cpu.pool.num_threads();
    let num_blocks = m.div_ceil(BLOCK_ROWS).next_multiple_of(num_threads);
    let rows = m.div_ceil(num_blocks).next_multiple_of(MR).max(MR);
    if m >= BLOCK_ROWS * num_threads / 2 || num_threads == 1 {
        return (rows, num_panels);
    }
    (
        m.next_multiple_of(MR).min(BLOCK_ROWS),
        num_panels.div_ceil(2 * num_threads),
    )
}

/// Cuts steps along k into blocks of about equal size; one empty block when there are none.
fn k_blocks(steps: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let k = steps.len();
    let len = k.div_ceil(k.div_ceil(MAX_BLOCK_K).max(1)).max(1);
    (steps.start..steps.end.max(steps.start + 1))
        .step_by(len)
        .map(move |start| start..steps.end.min(start + len))
}

/// Packs rows `cols` and columns `steps` of the right factor's transpose as `[panel][k][width]`,
/// zeros beyond the last row.
fn pack_columns(
    cpu: Cpu<'_>,
    right: Joined<'_>,
    cols: Range<usize>,
    steps: Range<usize>,
    width: usize,
) -> Vec<f32> {
    let k = steps.len();
    let num_panels = cols.len().div_ceil(width);
    let out = Output::new(num_panels * k * width);
    let panels_per_task = (16 * 1024usize).div_ceil((k * width).max(1));
    cpu.pool.run(num_panels.div_ceil(panels_per_task), |task| {
        let first = task * panels_per_task;
        for panel in first..num_panels.min(first + panels_per_task) {
            let start = cols.start + panel * width;
            let pack = Pack {
                from: right,
                rows: start..cols.end.min(start + width),
                steps: steps.clone(),
                width,
                to: out.at(panel * k * width),
            };
            // SAFETY: the level is supported, and each panel has its own room.
            unsafe { cpu.level.run(pack) };
        }
    });
    // SAFETY: the tasks fill every panel.
    unsafe { out.finish() }
}

/// The output tiles of one task.
struct Tiles<'a, const MR: usize, const NV: usize> {
    product: &'a Product<'a>,
    rows: Range<usize>,
    /// `[panel][k][NV * 16]`.
    packed: &'a [f32],
    panels: Range<usize>,
    /// Columns of the product that the panels hold.
    cols: Range<usize>,
    /// Steps along k that the panels hold.
    steps: Range<usize>,
    target: Target,
}

impl<const MR: usize, const NV: usize> Task for Tiles<'_, MR, NV> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (k, width) = (self.steps.len(), NV * 16);
        let mut block = Vec::new();
        for steps in k_blocks(self.steps.clone()) {
            block.resize(BLOCK_ROWS.next_multiple_of(MR) * steps.len(), 0.0);
            let mut first_row = self.rows.start;
            while first_row < self.rows.end {
                let rows = first_row
                    ..self
                        .rows
                        .end
                        .min(first_row + BLOCK_ROWS.next_multiple_of(MR));
                for (index, row) in rows.clone().step_by(MR).enumerate() {
                    let pack = Pack {
                        from: self.product.left(),
                        rows: row..rows.end.min(row + MR),
                        steps: steps.clone(),
                        width: MR,
                        to: block[index * MR * steps.len()..].as_mut_ptr(),
                    };
                    pack.run(simd);
                }
                for panel in self.panels.clone() {
                    let col = self.cols.start + panel * width;
                    let num_cols = (self.cols.end - col).min(width);
                    let packed =
                        &self.packed[(panel * k + steps.start - self.steps.start) * width..];
                    for (index, row) in rows.clone().step_by(MR).enumerate() {
                        let tile = Tile {
                            a: block[index * MR * steps.len()..].as_ptr(),
                            b: packed.as_ptr(),
                            num_steps: steps.len(),
                            num_rows: (rows.end - row).min(MR),
                            num_cols,
                        };
                        let is_first = steps.start == 0;
                        // SAFETY: both panels hold `num_steps` steps, and the tile lies in the
                        // target, in this task's part.
                        unsafe {
                            let acc = tile.multiply::<S, MR, NV>(simd);
                            let out = self.target.at(row, col);
                            self.store(simd, &tile, &acc, (out, col), is_first);
                        }
                    }
                }
                first_row = rows.end;
            }
        }
    }
}

impl<const MR: usize, const NV: usize> Tiles<'_, MR, NV> {
    /// # Safety
    ///
    /// `out` must be writable for the tile.
    #[inline(always)]
    unsafe fn store<S: Simd>(
        &self,
        simd: S,
        tile: &Tile,
        acc: &[[S::F; NV]; MR],
        (out, col): (*mut f32, usize),
        is_first: bool,
    ) {
        let scale = simd.splat(self.product.scale);
        let adds = !is_first || self.product.mode == Mode::Add;
        // SAFETY: the caller's promise.
        unsafe {
            for (i, acc) in acc.iter().enumerate().take(tile.num_rows) {
                for (v, &acc) in acc.iter().enumerate() {
                    if v * 16 >= tile.num_cols {
                        break;
                    }
                    let len = (tile.num_cols - v * 16).min(16);
                    let out = out.add(i * self.target.stride + v * 16);
                    let mut value = simd.mul(acc, scale);
                    if adds {
                        value = simd.add(value, simd.load_part(out, len));
                    } else if let Some(bias) = self.product.bias {
                        let bias = bias.as_ptr().add(col + v * 16);
                        value = simd.add(value, simd.load_part(bias, len));
                    }
                    simd.store_part(out, len, value);
                }
            }
        }
    }
}

/// One register tile over one block of k.
struct Tile {
    /// `[num_steps][MR]`.
    a: *const f32,
    /// `[num_steps][NV * 16]`.
    b: *const f32,
    num_steps: usize,
    num_rows: usize,
    num_cols: usize,
}

impl Tile {
    /// # Safety
    ///
    /// Both panels must be readable.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const MR: usize, const NV: usize>(
        &self,
        simd: S,
    ) -> [[S::F; NV]; MR] {
        let mut acc = [[simd.splat(0.0); NV]; MR];
        let (mut a, mut b) = (self.a, self.b);
        // SAFETY: the caller's promise.
        unsafe {
            for _ in 0..self.num_steps {
                let mut columns = [simd.splat(0.0); NV];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = simd.load(b.add(v * 16));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let row = simd.splat(*a.add(i));
                    for (acc, &column) in acc.iter_mut().zip(&columns) {
                        *acc = simd.fma(row, column, *acc);
                    }
                }
                a = a.add(MR);
                b = b.add(NV * 16);
            }
        }
        acc
    }
}

#[cfg(test)]
mod tests {
    use super::super::pool::Pool;
    use super::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn levels() -> impl Iterator<Item = SimdLevel> {
        [SimdLevel::Scalar, SimdLevel::Avx2, SimdLevel::Avx512]
            .into_iter()
            .filter(|level| level.is_supported())
    }

    /// `a: [m, k]`, `b: [n, k]` both by rows: the product in f64.
    fn reference(a: &[f32], b: &[f32], [m, n, k]: [usize; 3]) -> Vec<f64> {
        let mut out = Vec::with_capacity(m * n);
        for i in 0..m {
            for j in 0..n {
                let terms = a[i * k..][..k].iter().zip(&b[j * k..][..k]);
                out.push(terms.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum());
            }
        }
        out
    }

    fn transpose(data: &[f32], cols: usize) -> Vec<f32> {
        let rows = data.len() / cols;
        (0..data.len())
            .map(|i| data[i % rows * cols + i / rows])
            .collect()
    }

    #[test]
    fn every_form_and_size_agrees_with_f64_on_every_level() {
        let pool = Pool::new(2).unwrap();
        for level in levels() {
            let cpu = Cpu { level, pool: &pool };
            for [m, n, k] in [
                [1, 1, 1],
                [7, 50, 33],
                [200, 16, 1100],
                [97, 130, 8],
                [3, 7, 0],
            ] {
                let (a, b) = (values(m * k, 1), values(n * k, 2));
                let (at, bt) = match k {
                    0 => (Vec::new(), Vec::new()),
                    _ => (transpose(&a, k), transpose(&b, k)),
                };
                let want = reference(&a, &b, [m, n, k]);
                let forms_a = [
                    Operand::dense(&a, [m, k]),
                    Operand::dense(&at, [k, m]).transposed(),
                ];
                let forms_b = [
                    Operand::dense(&b, [n, k]).transposed(),
                    Operand::dense(&bt, [k, n]),
                ];
                for a in forms_a {
                    for b in forms_b {
                        let got = product(
                            cpu,
                            &Product {
                                a,
                                b,
                                low_rank: None,
                                scale: 1.0,
                                bias: None,
                                mode: Mode::Overwrite,
                            },
                        );
                        for (got, want) in got.iter().zip(&want) {
                            assert!(
                                (f64::from(*got) - want).abs() < 1e-4,
                                "{level:?} {m} {n} {k}: {got} {want}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_low_rank_term_is_part_of_the_sum() {
        let pool = Pool::new(2).unwrap();
        let [m, n, k, rank] = [37, 70, 650, 5];
        let (a, b) = (values(m * k, 1), values(n * k, 2));
        let (x, w) = (values(m * rank, 3), values(n * rank, 4));
        let mut want = reference(&a, &b, [m, n, k]);
        for (sum, term) in want.iter_mut().zip(reference(&x, &w, [m, n, rank])) {
            *sum += term;
        }
        for level in levels() {
            let sum = Product {
                a: Operand::dense(&a, [m, k]),
                b: Operand::dense(&b, [n, k]).transposed(),
                low_rank: Some((
                    Operand::dense(&x, [m, rank]),
                    Operand::dense(&w, [n, rank]).transposed(),
                )),
                scale: 1.0,
                bias: None,
                mode: Mode::Overwrite,
            };
            let got = product(Cpu { level, pool: &pool }, &sum);
            for (got, want) in got.iter().zip(&want) {
                assert!(
                    (f64::from(*got) - want).abs() < 1e-4,
                    "{level:?} {got} {want}"
                );
            }
        }
    }
}
