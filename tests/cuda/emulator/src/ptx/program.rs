//! A kernel's instructions as they are run: handlers with resolved registers.

use super::context::Context;
use super::row::Row;

/// Where an operand lies: a warp's register (by its first row) or a constant that all warps share; for predicates
/// the index of a mask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Slot(pub u32);

impl Slot {
    /// No operand.
    pub(super) const NONE: Self = Self(u32::MAX);
    /// The predicate that is false. Registers have even numbers among the predicates.
    pub(super) const FALSE: Self = Self(1);
    /// The predicate that is true.
    pub(super) const TRUE: Self = Self(3);

    /// The register whose first row, or before allocation whose number, is `index`.
    pub(super) fn register(index: u32) -> Self {
        Self(index << 1)
    }
    /// The constant whose first row is `index`.
    pub(super) fn constant(index: u32) -> Self {
        Self(index << 1 | 1)
    }
    /// Returns 0 for registers and 1 for constants.
    #[inline(always)]
    pub(super) fn pool(self) -> usize {
        (self.0 & 1) as usize
    }
    /// Returns the index in its pool.
    #[inline(always)]
    pub(super) fn index(self) -> usize {
        (self.0 >> 1) as usize
    }
}

/// What follows an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// The next one.
    Next,
    /// The next one, after others had their turn: what was polled has not come.
    Poll,
    /// What `Context::request` has, then the next one.
    Request,
    /// The end: `Context::fault` has the reason.
    Fault,
}

/// Runs one instruction for the lanes of the mask.
pub(super) type Handler = unsafe fn(&mut Context<'_>, &Inst, u32) -> Step;

/// How the warp's loop treats an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Runs its handler.
    Plain,
    /// The same; it may be a wait for others' writes.
    Polling,
    /// Once all lanes of the warp that have not exited are there.
    WholeWarp,
    /// Once all lanes of the mask in `e` are there.
    Members,
    /// Lanes of the mask in `e` wait for each other, not necessarily at the same instruction.
    WarpBarrier,
    /// Goes to instruction `imm`.
    Branch,
    /// Ends lanes.
    Exit,
}

/// An instruction.
#[derive(Clone, Debug)]
pub(super) struct Inst {
    /// What runs it.
    pub run: Handler,
    /// A number: offset of an address, target of a branch.
    pub imm: i64,
    /// Destination.
    pub d: Slot,
    /// Sources.
    pub a: Slot,
    /// Second source.
    pub b: Slot,
    /// Third source.
    pub c: Slot,
    /// Fourth source, and members of a collective instruction.
    pub e: Slot,
    /// Further operands begin there in the program's lists.
    pub list: u32,
    /// How many those are.
    pub count: u16,
    /// What a handler needs besides.
    pub extra: u16,
    /// Predicate (index times 2) that lanes must have, or must not have (plus 1).
    pub guard: u32,
    /// Line of the PTX.
    pub line: u32,
    /// How it is run.
    pub kind: Kind,
}

/// A kernel's code.
#[derive(Debug)]
pub(super) struct Program {
    /// Instructions.
    pub code: Vec<Inst>,
    /// Operands of instructions that have many.
    pub lists: Vec<Slot>,
    /// Constants.
    pub constants: Vec<Row>,
    /// Rows of a warp's registers.
    pub num_rows: usize,
    /// Masks of a warp's predicates.
    pub num_predicates: usize,
    /// Local memory of a thread.
    pub local_bytes: usize,
    /// Where a block's dynamic shared memory begins.
    pub dynamic_shared_start: u32,
    /// Variables whose addresses the constants have.
    #[expect(dead_code, reason = "keeps the variables' memory")]
    pub globals: super::variables::Globals,
    /// The text, from which faults are explained.
    pub source: std::sync::Arc<str>,
}
