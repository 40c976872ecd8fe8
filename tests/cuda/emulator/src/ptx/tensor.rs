//! Matrices in a warp's registers: `ldmatrix`, `movmatrix`, `mma`.
//!
//! `mma` adds products to its accumulator one after another in the order of the inner dimension, each with one
//! rounding (fused multiply-add in f32). The hardware adds groups of products with some bits cut off; results
//! differ by a few units in the last place.

use half::{bf16, f16};

use super::access::{address, set_address};
use super::builder::{Builder, Statement};
use super::context::Context;
use super::fragments::{
    Half, read_a, read_floats, read_halves, transpose as transpose_block, write_floats,
};
use super::operand::Operand;
use super::program::{Handler, Inst, Kind, Slot, Step};
use super::row::{LANES, Row};

/// `ldmatrix`: lane `8 j + i` has the address of row `i` of matrix `j`.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
unsafe fn load_matrices<const IS_TRANSPOSED: bool>(
    context: &mut Context<'_>,
    inst: &Inst,
    mask: u32,
) -> Step {
    if mask != u32::MAX {
        return context.fail(None, "ldmatrix of a part of the warp".to_owned());
    }
    for matrix in 0..inst.count as usize {
        let mut rows = [[0_u16; 8]; 8];
        for (index, row) in rows.iter_mut().enumerate() {
            let lane = 8 * matrix + index;
            let place = address(context, inst, lane) as u32;
            let Some(place) = context.shared(lane, place, 16) else {
                return Step::Fault;
            };
            // SAFETY: resolved.
            *row = unsafe { place.cast::<[u16; 8]>().read() };
        }
        // SAFETY: the list has `count` targets.
        let target = unsafe { *context.list(inst).add(matrix) };
        for lane in 0..LANES {
            let (row, pair) = (lane / 4, 2 * (lane % 4));
            let [low, high] = if IS_TRANSPOSED {
                [rows[pair][row], rows[pair + 1][row]]
            } else {
                [rows[row][pair], rows[row][pair + 1]]
            };
            context.set_lane(target, lane, u32::from(low) | u32::from(high) << 16);
        }
    }
    Step::Next
}

/// `movmatrix`: the transposed matrix of 8 × 8 elements.
unsafe fn transpose(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    if mask != u32::MAX {
        return context.fail(None, "movmatrix of a part of the warp".to_owned());
    }
    // SAFETY: a register of the program.
    let values = unsafe { context.row::<u32>(inst.a).cast::<[u32; LANES]>().read() };
    let element =
        |row: usize, column: usize| values[4 * row + column / 2] >> (16 * (column % 2)) & 0xffff;
    for lane in 0..LANES {
        let (row, column) = (lane / 4, 2 * (lane % 4));
        context.set_lane(
            inst.d,
            lane,
            element(column, row) | element(column + 1, row) << 16,
        );
    }
    Step::Next
}

/// Returns a copy of a register.
#[inline(always)]
fn copy_row(context: &Context<'_>, slot: Slot) -> Row {
    // SAFETY: a register of the program.
    unsafe { context.row::<u32>(slot).cast::<Row>().read() }
}

/// `mma.m16n8k16` with f32 accumulators: its list has D (4), A (4), B (2), C (4).
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
unsafe fn multiply<T: Half>(context: &mut Context<'_>, inst: &Inst, mask: u32) -> Step {
    if mask != u32::MAX {
        return context.fail(None, "mma of a part of the warp".to_owned());
    }
    // SAFETY: the list has 14 operands.
    let slots = unsafe { context.list(inst).cast::<[Slot; 14]>().read() };
    let row = |index: usize| copy_row(context, slots[index]);
    let a = read_a::<T>(&[row(4), row(5), row(6), row(7)]);
    let b = [8, 9].map(|index| transpose_block(&read_halves::<T>(&row(index))));
    let mut sums = [
        read_floats(&row(10), &row(11)),
        read_floats(&row(12), &row(13)),
    ];
    for (sums, a) in sums.iter_mut().flatten().zip(&a) {
        let mut sum = *sums;
        for (&a, b) in a.iter().zip(b.as_flattened()) {
            for column in 0..8 {
                sum[column] = a.mul_add(b[column], sum[column]);
            }
        }
        *sums = sum;
    }
    for (half, sums) in sums.iter().enumerate() {
        let (mut even, mut odd) = (Row([0; LANES]), Row([0; LANES]));
        write_floats(sums, &mut even, &mut odd);
        // SAFETY: registers of the program.
        unsafe {
            context
                .row::<u32>(slots[2 * half])
                .cast::<Row>()
                .write(even);
            context
                .row::<u32>(slots[2 * half + 1])
                .cast::<Row>()
                .write(odd);
        }
    }
    Step::Next
}

/// Returns the operands of a vector, or one operand.
fn elements<'a, 'b>(operand: &'b Operand<'a>) -> &'b [Operand<'a>] {
    match operand {
        Operand::Vector(operands) => operands,
        one => std::slice::from_ref(one),
    }
}

/// Decodes `ldmatrix`, `movmatrix`, `mma`.
///
/// # Errors
/// What is not known.
pub(super) fn decode(builder: &mut Builder, statement: &Statement<'_, '_>) -> Result<Inst, String> {
    let mut slots = Vec::new();
    let mut inst = match (statement.parts, statement.operands) {
        (["ldmatrix", "sync", "aligned", "m8n8", count, rest @ ..], [targets, place]) => {
            let count = match *count {
                "x1" => 1,
                "x2" => 2,
                "x4" => 4,
                other => return Err(format!("`{other}` matrices")),
            };
            let run: Handler = match rest {
                ["trans", "shared" | "shared::cta", "b16"] => load_matrices::<true>,
                ["shared" | "shared::cta", "b16"] => load_matrices::<false>,
                _ => return Err("this ldmatrix is not known".to_owned()),
            };
            for target in elements(targets) {
                slots.push(builder.target::<u32>(target)?);
            }
            if slots.len() != count {
                return Err(format!("wanted {count} registers, found {}", slots.len()));
            }
            let mut inst = builder.instruction(run);
            set_address(builder, &mut inst, place)?;
            inst
        }
        (["movmatrix", "sync", "aligned", "m8n8", "trans", "b16"], [target, source]) => {
            let mut inst = builder.instruction(transpose);
            inst.a = builder.source::<u32>(source)?;
            inst.d = builder.target::<u32>(target)?;
            inst
        }
        (
            [
                "mma",
                "sync",
                "aligned",
                "m16n8k16",
                "row",
                "col",
                "f32",
                kind,
                other,
                "f32",
            ],
            [d, a, b, c],
        ) => {
            let run: Handler = match (*kind, *other) {
                ("f16", "f16") => multiply::<f16>,
                ("bf16", "bf16") => multiply::<bf16>,
                _ => return Err("these types of mma are not known".to_owned()),
            };
            for target in elements(d) {
                slots.push(builder.target::<u32>(target)?);
            }
            for source in [a, b, c].into_iter().flat_map(elements) {
                slots.push(builder.source::<u32>(source)?);
            }
            if slots.len() != 14
                || elements(d).len() != 4
                || elements(a).len() != 4
                || elements(b).len() != 2
            {
                return Err("wanted 4, 4, 2 and 4 registers".to_owned());
            }
            builder.instruction(run)
        }
        _ => return Err("this instruction is not known".to_owned()),
    };
    inst.list = builder.list(&slots);
    inst.count = slots.len() as u16;
    inst.kind = Kind::WholeWarp;
    Ok(inst)
}
