//! Builds a kernel's program out of decoded instructions.

use std::collections::HashMap;

use super::operand::Operand;
use super::program::{Handler, Inst, Kind, Slot, Step};
use super::row::{LANES, Row, Word};

/// Kind of a register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Width {
    /// A mask.
    Predicate,
    /// Up to 32 bits, and how many.
    Narrow(u8),
    /// 64 bits.
    Wide,
}

impl Width {
    /// Returns the bits of a register.
    pub(super) fn bits(self) -> u32 {
        match self {
            Self::Predicate => 1,
            Self::Narrow(bits) => u32::from(bits),
            Self::Wide => 64,
        }
    }
}

/// Registers that an instruction reads and writes, by number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Access {
    /// The register.
    pub register: u32,
    /// Whether it is written.
    pub is_write: bool,
}

/// What an instruction is made from.
#[derive(Debug)]
pub(super) struct Statement<'a, 'b> {
    /// Name with all modifiers.
    pub opcode: &'a str,
    /// Its parts.
    pub parts: &'b [&'a str],
    /// Operands.
    pub operands: &'b [Operand<'a>],
    /// Line.
    pub line: u32,
}

/// The program so far.
#[derive(Debug, Default)]
pub(super) struct Builder {
    /// Widths of all registers.
    pub registers: Vec<Width>,
    /// Instructions; slots of registers have their numbers.
    pub code: Vec<Inst>,
    /// For each instruction where its accesses end.
    pub access_ends: Vec<usize>,
    /// Accesses of registers.
    pub accesses: Vec<Access>,
    /// Registers that keep their place to the end.
    pub pinned: Vec<u32>,
    /// Operands of instructions that have many.
    pub lists: Vec<Slot>,
    /// Constants.
    pub constants: Vec<Row>,
    constant_places: HashMap<(u32, u64), u32>,
}

/// Does nothing.
unsafe fn nothing(_: &mut super::context::Context<'_>, _: &Inst, _: u32) -> Step {
    Step::Next
}

impl Builder {
    /// Returns an instruction without operands.
    pub(super) fn instruction(&self, run: Handler) -> Inst {
        let none = Slot::NONE;
        Inst {
            run,
            imm: 0,
            d: none,
            a: none,
            b: none,
            c: none,
            e: none,
            list: 0,
            count: 0,
            extra: 0,
            guard: Slot::TRUE.0 << 1,
            line: 0,
            kind: Kind::Plain,
        }
    }

    /// Returns an instruction that does nothing.
    pub(super) fn no_operation(&self) -> Inst {
        self.instruction(nothing)
    }

    /// Returns a constant of `bits` 32 or 64.
    pub(super) fn constant(&mut self, bits: u32, value: u64) -> Slot {
        let value = if bits == 32 {
            u64::from(value as u32)
        } else {
            value
        };
        let constants = &mut self.constants;
        let place = *self
            .constant_places
            .entry((bits, value))
            .or_insert_with(|| {
                let place = constants.len() as u32;
                if bits == 32 {
                    constants.push(Row([value as u32; LANES]));
                } else {
                    let halves = [value as u32, (value >> 32) as u32];
                    constants.extend([Row(std::array::from_fn(|index| halves[index % 2])); 2]);
                }
                place
            });
        Slot::constant(place)
    }

    /// Notes an access of a register.
    pub(super) fn access(&mut self, register: u32, is_write: bool) -> Slot {
        self.accesses.push(Access { register, is_write });
        Slot::register(register)
    }

    /// Returns the slot of a value of at most 32 (`W` is `u32`) or of 64 bits.
    ///
    /// # Errors
    /// What the operand is instead.
    pub(super) fn source<W: Word>(&mut self, operand: &Operand<'_>) -> Result<Slot, String> {
        match *operand {
            Operand::Register(register) => {
                let width = self.registers[register as usize];
                let fits = match width {
                    Width::Predicate => false,
                    Width::Narrow(_) => W::BITS == 32,
                    Width::Wide => W::BITS == 64,
                };
                if !fits {
                    return Err(format!(
                        "wanted a register of {} bits, found one of {}",
                        W::BITS,
                        width.bits()
                    ));
                }
                Ok(self.access(register, false))
            }
            Operand::Immediate(value) => Ok(self.constant(W::BITS, value)),
            Operand::Symbol { address, .. } => Ok(self.constant(W::BITS, address)),
            ref other => Err(format!("wanted a value, found {other:?}")),
        }
    }

    /// The same for a value of whichever width its register has; returns the width as well. Constants are of 64
    /// bits.
    ///
    /// # Errors
    /// What the operand is instead.
    pub(super) fn source_of_any_width(
        &mut self,
        operand: &Operand<'_>,
    ) -> Result<(Slot, Width), String> {
        match *operand {
            Operand::Register(register)
                if self.registers[register as usize] != Width::Predicate =>
            {
                Ok((
                    self.access(register, false),
                    self.registers[register as usize],
                ))
            }
            Operand::Immediate(_) | Operand::Symbol { .. } => {
                Ok((self.source::<u64>(operand)?, Width::Wide))
            }
            ref other => Err(format!("wanted a value, found {other:?}")),
        }
    }

    /// Returns the slot of a register that is written.
    ///
    /// # Errors
    /// What the operand is instead.
    pub(super) fn target<W: Word>(&mut self, operand: &Operand<'_>) -> Result<Slot, String> {
        let (slot, width) = self.target_of_any_width(operand)?;
        if (width == Width::Wide) != (W::BITS == 64) {
            return Err(format!(
                "wanted a register of {} bits, found one of {}",
                W::BITS,
                width.bits()
            ));
        }
        Ok(slot)
    }

    /// The same for whichever width.
    ///
    /// # Errors
    /// What the operand is instead.
    pub(super) fn target_of_any_width(
        &mut self,
        operand: &Operand<'_>,
    ) -> Result<(Slot, Width), String> {
        match *operand {
            Operand::Register(register)
                if self.registers[register as usize] != Width::Predicate =>
            {
                Ok((
                    self.access(register, true),
                    self.registers[register as usize],
                ))
            }
            ref other => Err(format!("wanted a register, found {other:?}")),
        }
    }

    /// Returns a predicate that is read.
    ///
    /// # Errors
    /// What the operand is instead.
    pub(super) fn predicate(&mut self, operand: &Operand<'_>) -> Result<Slot, String> {
        match *operand {
            Operand::Register(register)
                if self.registers[register as usize] == Width::Predicate =>
            {
                Ok(self.access(register, false))
            }
            Operand::Immediate(0) => Ok(Slot::FALSE),
            Operand::Immediate(_) => Ok(Slot::TRUE),
            ref other => Err(format!("wanted a predicate, found {other:?}")),
        }
    }

    /// Returns a predicate that is written.
    ///
    /// # Errors
    /// What the operand is instead.
    pub(super) fn predicate_target(&mut self, operand: &Operand<'_>) -> Result<Slot, String> {
        match *operand {
            Operand::Register(register)
                if self.registers[register as usize] == Width::Predicate =>
            {
                Ok(self.access(register, true))
            }
            ref other => Err(format!("wanted a predicate, found {other:?}")),
        }
    }

    /// Adds operands to the lists; returns where they begin.
    pub(super) fn list(&mut self, slots: &[Slot]) -> u32 {
        let start = self.lists.len() as u32;
        self.lists.extend_from_slice(slots);
        start
    }
}
