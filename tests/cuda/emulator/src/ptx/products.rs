//! Products of warpgroups (`wgmma`).
//!
//! Each warp of the group computes its 16 rows when it comes to the instruction, adding in the order of the inner
//! dimension with one rounding each (fused multiply-add in f32); waits have nothing to wait for. The hardware
//! cuts off bits of partial sums, above all of e4m3 products.

use half::{bf16, f16};

use super::builder::{Builder, Statement};
use super::context::Context;
use super::e4m3;
use super::fragments::{Half, read_a, read_floats, write_floats};
use super::operand::Operand;
use super::program::{Handler, Inst, Kind, Slot, Step};
use super::row::{LANES, Row};

/// Columns at most.
const MAX_COLUMNS: usize = 256;
/// Inner dimension at most.
const MAX_INNER: usize = 32;
/// Rows of a warp.
const ROWS: usize = 16;
/// Bits of `Inst::extra`: A is in registers.
const REGISTERS: u16 = 1;
/// A's rows are the inner dimension.
const TRANSPOSED_A: u16 = 2;
/// B's rows are the inner dimension.
const TRANSPOSED_B: u16 = 4;
/// A is negated.
const NEGATED: u16 = 8;

/// Columns that are computed together.
const PANEL: usize = 16;
/// An operand in f32: panels of 16 columns, of each its rows, which are the inner dimension.
type Operands = [[[f32; PANEL]; MAX_INNER]; MAX_COLUMNS / PANEL];

/// Accumulators: panels of 16 columns, of each its rows.
type Sums = [[[f32; PANEL]; ROWS]; MAX_COLUMNS / PANEL];

/// A type of operands.
trait Factor {
    /// Bytes.
    const NUM_BYTES: usize;
    /// Inner dimension.
    const INNER: usize = 32 / Self::NUM_BYTES;
    /// Reads 16 bytes.
    unsafe fn read_unit(place: *const u8, values: &mut [f32]);
    /// Reads A's fragments.
    fn fragments(registers: &[Row; 4]) -> [[f32; MAX_INNER]; ROWS];
}

/// Widens rows of fragments.
#[inline(always)]
fn widen(a: [[f32; 16]; ROWS]) -> [[f32; MAX_INNER]; ROWS] {
    let mut wide = [[0.0; MAX_INNER]; ROWS];
    for (wide, row) in wide.iter_mut().zip(&a) {
        wide[..16].copy_from_slice(row);
    }
    wide
}

macro_rules! half_factor {
    ($type:ty) => {
        impl Factor for $type {
            const NUM_BYTES: usize = 2;
            #[inline(always)]
            unsafe fn read_unit(place: *const u8, values: &mut [f32]) {
                // SAFETY: the caller's.
                let halves = unsafe { place.cast::<[u16; 8]>().read_unaligned() };
                for (value, &half) in values.iter_mut().zip(&halves) {
                    *value = <$type as Half>::value(half);
                }
            }
            #[inline(always)]
            fn fragments(registers: &[Row; 4]) -> [[f32; MAX_INNER]; ROWS] {
                widen(read_a::<$type>(registers))
            }
        }
    };
}
half_factor!(f16);
half_factor!(bf16);

/// Floats of 8 bits.
struct E4m3;
impl Factor for E4m3 {
    const NUM_BYTES: usize = 1;
    #[inline(always)]
    unsafe fn read_unit(place: *const u8, values: &mut [f32]) {
        // SAFETY: the caller's.
        let bytes = unsafe { place.cast::<[u8; 16]>().read() };
        for (value, &byte) in values.iter_mut().zip(&bytes) {
            *value = e4m3::to_f32(byte);
        }
    }
    fn fragments(registers: &[Row; 4]) -> [[f32; MAX_INNER]; ROWS] {
        let mut a = [[0.0; MAX_INNER]; ROWS];
        for (index, register) in registers.iter().enumerate() {
            for (lane, &bits) in register.0.iter().enumerate() {
                let (row, column) = (
                    lane / 4 + 8 * (index % 2),
                    4 * (lane % 4) + 16 * (index / 2),
                );
                for (offset, byte) in bits.to_le_bytes().into_iter().enumerate() {
                    a[row][column + offset] = e4m3::to_f32(byte);
                }
            }
        }
        a
    }
}

/// A matrix in shared memory.
#[derive(Clone, Copy)]
struct Matrix {
    start: u32,
    leading: u32,
    stride: u32,
    swizzle: u32,
}

impl Matrix {
    /// Reads a descriptor.
    fn new(bits: u64) -> Self {
        let field = |shift: u32| ((bits >> shift) as u32 & 0x3fff) << 4;
        // Rows of 128, 64 and 32 bytes are numbers 1, 2, 3: addresses' bits from 4 on are xored with those from
        // 7 on, three, two or one of them.
        let swizzle = [0, 7, 3, 1][(bits >> 62) as usize];
        Self {
            start: field(0),
            leading: field(16),
            stride: field(32),
            swizzle,
        }
    }
    /// Returns the address of 16 bytes: of row `row` those from byte `column` on, where rows have the inner
    /// dimension side by side.
    #[inline(always)]
    fn by_row(&self, row: u32, column: u32) -> u32 {
        self.swizzled(
            self.start + row / 8 * self.stride + row % 8 * self.row_bytes() + self.across(column),
        )
    }
    /// The same where `row` is the inner dimension and rows have the outer one side by side.
    #[inline(always)]
    fn by_column(&self, row: u32, column: u32) -> u32 {
        let row_bytes = self.row_bytes();
        let panel = column / row_bytes * self.leading + column % row_bytes;
        self.swizzled(self.start + panel + row / 8 * self.stride + row % 8 * row_bytes)
    }
    /// Without a swizzle the inner dimension's 16 bytes are `leading` apart.
    #[inline(always)]
    fn across(&self, column: u32) -> u32 {
        if self.swizzle == 0 {
            column / 16 * self.leading + column % 16
        } else {
            column
        }
    }
    #[inline(always)]
    fn row_bytes(&self) -> u32 {
        16 * (self.swizzle + 1)
    }
    #[inline(always)]
    fn swizzled(&self, address: u32) -> u32 {
        address ^ (address >> 7 & self.swizzle) << 4
    }
}

/// Reads `num_outer` rows (columns for B) from `first` on; the result's first index is the inner dimension.
#[inline(always)]
fn read_matrix<F: Factor>(
    context: &mut Context<'_>,
    bits: u64,
    (first, num_outer): (usize, usize),
    is_transposed: bool,
    result: &mut Operands,
) -> bool {
    let matrix = Matrix::new(bits);
    let per_unit = 16 / F::NUM_BYTES;
    if is_transposed {
        #[expect(clippy::needless_range_loop, reason = "it is a row of each panel")]
        for inner in 0..F::INNER {
            for outer in (0..num_outer).step_by(per_unit) {
                let column = ((first + outer) * F::NUM_BYTES) as u32;
                let place = matrix.by_column(inner as u32, column);
                let Some(place) = context.shared(0, place, 16) else {
                    return false;
                };
                let row = &mut result[outer / PANEL][inner];
                // SAFETY: resolved.
                unsafe { F::read_unit(place, &mut row[outer % PANEL..][..per_unit]) };
            }
        }
        return true;
    }
    for block in (0..num_outer).step_by(8) {
        for unit in 0..F::INNER / per_unit {
            // Eight rows at a time, so that they are written side by side.
            let mut values = [[0.0_f32; 16]; 8];
            for (index, values) in values.iter_mut().enumerate() {
                let place = matrix.by_row((first + block + index) as u32, 16 * unit as u32);
                let Some(place) = context.shared(0, place, 16) else {
                    return false;
                };
                // SAFETY: resolved.
                unsafe { F::read_unit(place, &mut values[..per_unit]) };
            }
            for offset in 0..per_unit {
                let row = &mut result[block / PANEL][unit * per_unit + offset];
                let target = &mut row[block % PANEL..][..8];
                for (index, target) in target.iter_mut().enumerate() {
                    *target = values[index][offset];
                }
            }
        }
    }
    true
}

/// Adds A·B to sums of 4 rows and 16 columns at a time, which stay in the processor's registers.
#[inline(always)]
fn multiply_add(
    sums: &mut Sums,
    a: &[[f32; MAX_INNER]; ROWS],
    b: &Operands,
    inner: usize,
    num_columns: usize,
) {
    for (sums, b) in sums.iter_mut().zip(b).take(num_columns / PANEL) {
        for (sums, a) in sums
            .as_chunks_mut::<4>()
            .0
            .iter_mut()
            .zip(a.as_chunks::<4>().0)
        {
            let [mut first, mut second, mut third, mut fourth] = *sums;
            for k in 0..inner {
                let factors = b[k];
                for column in 0..PANEL {
                    first[column] = a[0][k].mul_add(factors[column], first[column]);
                    second[column] = a[1][k].mul_add(factors[column], second[column]);
                    third[column] = a[2][k].mul_add(factors[column], third[column]);
                    fourth[column] = a[3][k].mul_add(factors[column], fourth[column]);
                }
            }
            *sums = [first, second, third, fourth];
        }
    }
}

/// `wgmma.mma_async`: its list has the accumulators and, if A is in registers, those; `a` and `b` are
/// descriptors, `c` the predicate that says whether the accumulators are added to.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
unsafe fn multiply<F: Factor>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    if mask != u32::MAX {
        return context.fail(None, "wgmma of a part of the warp".to_owned());
    }
    let num_columns = inst.count as usize;
    // SAFETY: the list has those operands.
    let slots = unsafe { std::slice::from_raw_parts(context.list(inst), num_columns / 2 + 4) };
    let mut scratch = context.warp.scratch.take().unwrap_or_default();
    let is_done = multiply_in::<F>(context, inst, slots, &mut scratch);
    context.warp.scratch = Some(scratch);
    if is_done { Step::Next } else { Step::Fault }
}

/// What a product needs besides registers.
#[derive(Debug)]
pub(super) struct Scratch {
    sums: Sums,
    operands: Operands,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            sums: [[[0.0; PANEL]; ROWS]; MAX_COLUMNS / PANEL],
            operands: [[[0.0; PANEL]; MAX_INNER]; MAX_COLUMNS / PANEL],
        }
    }
}

/// The same; false if shared memory has no such place.
#[inline(always)]
fn multiply_in<F: Factor>(
    context: &mut Context<'_>,
    inst: &Inst,
    slots: &[Slot],
    scratch: &mut Scratch,
) -> bool {
    let num_columns = inst.count as usize;
    let Scratch { sums, operands } = scratch;
    let row = |context: &Context<'_>, index: usize| context.row::<u32>(slots[index]).cast::<Row>();
    let adds = context.predicate(inst.c) & 1 != 0;
    for block in 0..num_columns / 4 {
        let (panel, top, left) = (block / 4, 8 * (block % 2), 8 * (block / 2 % 2));
        let values = if adds {
            // SAFETY: registers of the program.
            unsafe { read_floats(&*row(context, 2 * block), &*row(context, 2 * block + 1)) }
        } else {
            [[0.0; 8]; 8]
        };
        for (index, values) in values.iter().enumerate() {
            sums[panel][top + index][left..left + 8].copy_from_slice(values);
        }
    }
    let mut a = if inst.extra & REGISTERS != 0 {
        // SAFETY: registers of the program.
        let register = |index| unsafe { row(context, num_columns / 2 + index).read() };
        F::fragments(&[register(0), register(1), register(2), register(3)])
    } else {
        let first = (context.warp.first_thread as usize / LANES % 4) * ROWS;
        let bits = context.lane::<u64>(inst.a, 0);
        let is_transposed = inst.extra & TRANSPOSED_A != 0;
        if !read_matrix::<F>(context, bits, (first, ROWS), is_transposed, operands) {
            return false;
        }
        let mut a = [[0.0; MAX_INNER]; ROWS];
        for (k, column) in operands[0].iter().enumerate().take(F::INNER) {
            for (row, value) in column[..ROWS].iter().enumerate() {
                a[row][k] = *value;
            }
        }
        a
    };
    if inst.extra & NEGATED != 0 {
        a.iter_mut().flatten().for_each(|value| *value = -*value);
    }
    let bits = context.lane::<u64>(inst.b, 0);
    let is_transposed = inst.extra & TRANSPOSED_B != 0;
    if !read_matrix::<F>(context, bits, (0, num_columns), is_transposed, operands) {
        return false;
    }
    multiply_add(sums, &a, operands, F::INNER, num_columns);
    for block in 0..num_columns / 4 {
        let (panel, top, left) = (block / 4, 8 * (block % 2), 8 * (block / 2 % 2));
        let mut values = [[0.0; 8]; 8];
        for (index, values) in values.iter_mut().enumerate() {
            values.copy_from_slice(&sums[panel][top + index][left..left + 8]);
        }
        // SAFETY: registers of the program, of which no two are the same.
        unsafe {
            let (even, odd) = (row(context, 2 * block), row(context, 2 * block + 1));
            write_floats(&values, &mut *even, &mut *odd);
        }
    }
    true
}

/// Decodes `wgmma`.
///
/// # Errors
/// What is not known.
pub(super) fn decode(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let shape = match statement.parts {
        [
            "wgmma",
            "fence" | "commit_group" | "wait_group",
            "sync",
            "aligned",
        ] => {
            let mut inst = builder.no_operation();
            inst.kind = Kind::WholeWarp;
            return Ok(inst);
        }
        ["wgmma", "mma_async", "sync", "aligned", shape, "f32", a, b] if a == b => *shape,
        _ => return Err("this wgmma is not known".to_owned()),
    };
    let (run, inner): (Handler, _) = match statement.parts[6] {
        "f16" => (multiply::<f16>, "k16"),
        "bf16" => (multiply::<bf16>, "k16"),
        "e4m3" => (multiply::<E4m3>, "k32"),
        other => return Err(format!("wgmma of `{other}`")),
    };
    let num_columns = shape
        .strip_prefix("m64n")
        .and_then(|rest| rest.strip_suffix(inner));
    let num_columns: usize = num_columns
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0);
    if num_columns == 0 || !num_columns.is_multiple_of(PANEL) || num_columns > MAX_COLUMNS {
        return Err(format!("wgmma of shape {shape}"));
    }
    let [Operand::Vector(sums), a, b, adds, signs @ ..] = statement.operands else {
        return Err("wanted accumulators, A, B, a predicate".to_owned());
    };
    if sums.len() != num_columns / 2 {
        return Err(format!(
            "wanted {} accumulators, found {}",
            num_columns / 2,
            sums.len()
        ));
    }
    let mut inst = builder.instruction(run);
    let mut slots = Vec::with_capacity(sums.len() + 4);
    for sum in sums {
        builder.source::<u32>(sum)?;
        slots.push(builder.target::<u32>(sum)?);
    }
    if let Operand::Vector(fragments) = a {
        if fragments.len() != 4 {
            return Err(format!(
                "wanted 4 registers of A, found {}",
                fragments.len()
            ));
        }
        for fragment in fragments {
            slots.push(builder.source::<u32>(fragment)?);
        }
        inst.extra |= REGISTERS;
    } else {
        inst.a = builder.source::<u64>(a)?;
        slots.extend([Slot::NONE; 4]);
    }
    inst.b = builder.source::<u64>(b)?;
    inst.c = builder.predicate(adds)?;
    inst.extra |= decode_flags(signs, inst.extra & REGISTERS != 0)?;
    inst.list = builder.list(&slots);
    inst.count = num_columns as u16;
    inst.kind = Kind::WholeWarp;
    Ok(inst)
}

/// Reads the signs of A and B and which of them are transposed.
fn decode_flags(operands: &[Operand<'_>], is_in_registers: bool) -> Result<u16, String> {
    let mut numbers = Vec::new();
    for operand in operands {
        match operand {
            Operand::Immediate(number) => numbers.push(*number as i64),
            other => return Err(format!("wanted a number, found {other:?}")),
        }
    }
    let (signs, majors) = numbers.split_at(2.min(numbers.len()));
    let is_negated = signs.iter().filter(|&&sign| sign < 0).count() % 2 == 1;
    let mut flags = if is_negated { NEGATED } else { 0 };
    let majors = match (majors, is_in_registers) {
        ([], _) => [0, 0],
        ([b], true) => [0, *b],
        ([a, b], false) => [*a, *b],
        // Compilers' headers and ours give A's number for registers as well.
        ([_, b], true) => [0, *b],
        _ => return Err("these flags are not known".to_owned()),
    };
    flags |= if majors[0] != 0 { TRANSPOSED_A } else { 0 };
    flags |= if majors[1] != 0 { TRANSPOSED_B } else { 0 };
    Ok(flags)
}
