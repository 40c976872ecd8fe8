//! Runs a warp: one instruction at a time for the lanes that are at it.
//!
//! Lanes that diverge have program counters of their own; the group with the smallest one runs until it reaches
//! the next group's, where they are one again. When a quantum ends with several groups the one that is farthest
//! has a turn, so that lanes which wait for others of their warp do not keep them from running.

use super::context::{Context, Fault, WarpMemory};
use super::program::{Inst, Kind, Slot, Step};
use super::row::{FULL, LANES, Row, for_each_lane};

/// Where no other group of lanes is.
const NOWHERE: u32 = u32::MAX;
/// Accesses that may be waits for others' writes, after which a turn ends.
const MAX_POLLS: u32 = 64;

/// A warp.
#[derive(Debug)]
pub(super) struct Warp {
    /// Registers.
    pub rows: Vec<Row>,
    /// Predicates.
    pub predicates: Vec<u32>,
    /// Memory and asynchronous work.
    pub memory: WarpMemory,
    /// Control flow.
    pub flow: Flow,
}

/// Where a warp's lanes are.
#[derive(Debug)]
pub(super) struct Flow {
    /// Program counters of the lanes that are not active.
    pcs: [u32; LANES],
    /// Program counter of the active lanes.
    pc: u32,
    /// Lanes that run.
    active: u32,
    /// Smallest program counter of other lanes that can run.
    other: u32,
    /// Lanes that wait for others of the warp.
    blocked: u32,
    /// Lanes that have ended or never were.
    exited: u32,
    /// Whether the last group shall have the next turn.
    is_reversed: bool,
}

/// How a turn ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The quantum is used up.
    Quantum,
    /// What was polled has not come.
    Poll,
    /// `Context::request` has what the warp asks for.
    Request,
    /// All lanes have ended.
    Done,
    /// `Context::fault` has what is wrong, at the line.
    Fault(u32),
}

impl Flow {
    /// Begins with `num_lanes` lanes.
    pub(super) fn new(num_lanes: u32) -> Self {
        let active = if num_lanes >= 32 {
            FULL
        } else {
            (1 << num_lanes) - 1
        };
        Self {
            pcs: [0; LANES],
            pc: 0,
            active,
            other: NOWHERE,
            blocked: 0,
            exited: !active,
            is_reversed: false,
        }
    }

    /// Keeps the active lanes' program counter.
    fn park(&mut self) {
        let pc = self.pc;
        for_each_lane(self.active, |lane| self.pcs[lane] = pc);
    }

    /// Chooses the group that runs next; false if no lane can run.
    fn regroup(&mut self) -> bool {
        self.park();
        self.choose()
    }

    /// The same when all lanes' program counters are kept.
    fn choose(&mut self) -> bool {
        let ready = !(self.exited | self.blocked);
        let (mut least, mut active, mut other) = (NOWHERE, 0, NOWHERE);
        for_each_lane(ready, |lane| {
            let pc = self.pcs[lane];
            if pc < least {
                (other, least, active) = (least, pc, 1 << lane);
            } else if pc == least {
                active |= 1 << lane;
            } else {
                other = other.min(pc);
            }
        });
        (self.pc, self.active, self.other) = (least, active, other);
        active != 0
    }

    /// Gives the group that is farthest a turn.
    fn reverse(&mut self) {
        self.park();
        let ready = !(self.exited | self.blocked);
        let (mut most, mut active) = (0, 0);
        for_each_lane(ready, |lane| {
            let pc = self.pcs[lane];
            if pc > most || active == 0 {
                (most, active) = (pc, 1 << lane);
            } else if pc == most {
                active |= 1 << lane;
            }
        });
        (self.pc, self.active, self.other) = (most, active, NOWHERE);
    }

    /// Lets lanes of `mask` go to `target` and the other active ones to the next instruction.
    fn branch(&mut self, mask: u32, target: u32) {
        if mask == self.active {
            self.pc = target;
            return;
        }
        let (pc, stay) = (self.pc + 1, self.active & !mask);
        for_each_lane(mask, |lane| self.pcs[lane] = target);
        for_each_lane(stay, |lane| self.pcs[lane] = pc);
        let (nearer, lanes, farther) = if pc <= target {
            (pc, stay, target)
        } else {
            (target, mask, pc)
        };
        (self.pc, self.active, self.other) = (nearer, lanes, self.other.min(farther));
    }

    /// Ends lanes; false if no lane can run.
    fn exit(&mut self, mask: u32) -> bool {
        for_each_lane(self.active & !mask, |lane| self.pcs[lane] = self.pc + 1);
        self.exited |= mask;
        self.active = 0;
        // Those that wait may have waited for these.
        self.blocked = 0;
        self.choose()
    }

    /// Brings the lanes together that a collective instruction is for; false if some are missing, and then
    /// another group is chosen, if there is one.
    fn converge(&mut self, code: &[Inst], inst: &Inst, mask: u32, members: u32) -> bool {
        if mask != self.active {
            // Lanes without the guard go on.
            for_each_lane(self.active & !mask, |lane| self.pcs[lane] = self.pc + 1);
            self.other = self.other.min(self.pc + 1);
            self.active = mask;
        }
        let needed = members & !self.exited;
        let mut here = mask;
        if inst.kind == Kind::WarpBarrier {
            for_each_lane(self.blocked, |lane| {
                here |= u32::from(code[self.pcs[lane] as usize].kind == Kind::WarpBarrier) << lane;
            });
        } else {
            for_each_lane(self.blocked, |lane| {
                here |= u32::from(self.pcs[lane] == self.pc) << lane
            });
        }
        if needed & !here != 0 {
            self.park();
            self.blocked |= mask;
            self.active = 0;
            self.choose();
            return false;
        }
        if here == mask {
            return true;
        }
        let joined = self.blocked & here;
        self.blocked &= !here;
        if inst.kind == Kind::WarpBarrier {
            for_each_lane(joined, |lane| self.pcs[lane] += 1);
            self.pc += 1;
            self.regroup();
            return false;
        }
        self.active |= joined;
        true
    }
}

/// Runs the warp until its quantum of instructions is used up, or less; adds the lane-instructions to `count`.
///
/// # Safety
/// The context is of the program whose code this is, and `super::check_processor` has been called.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")
)]
pub(super) unsafe fn run_turn(
    flow: &mut Flow,
    context: &mut Context<'_>,
    code: &[Inst],
    quantum: u32,
    count: &mut u64,
) -> Turn {
    let mut polls = 0;
    if flow.is_reversed {
        flow.is_reversed = false;
        flow.reverse();
    } else if flow.active == 0 && !flow.choose() {
        return finish(flow, context, code);
    }
    for _ in 0..quantum {
        if flow.pc >= flow.other && !flow.regroup() || flow.active == 0 {
            return finish(flow, context, code);
        }
        let inst = &code[flow.pc as usize];
        let negation = (inst.guard & 1).wrapping_neg();
        let mask = flow.active & (context.predicate(Slot(inst.guard >> 1)) ^ negation);
        *count += u64::from(mask.count_ones());
        if mask == 0 {
            flow.pc += 1;
            continue;
        }
        let mask = match inst.kind {
            Kind::Plain => mask,
            Kind::Polling => {
                polls += 1;
                mask
            }
            Kind::Branch => {
                flow.branch(mask, inst.imm as u32);
                continue;
            }
            Kind::Exit => {
                if !flow.exit(mask) {
                    return finish(flow, context, code);
                }
                continue;
            }
            Kind::WholeWarp | Kind::Members | Kind::WarpBarrier => {
                let members = match inst.kind {
                    Kind::WholeWarp => FULL,
                    _ => context.lane::<u32>(inst.e, mask.trailing_zeros() as usize),
                };
                if !flow.converge(code, inst, mask, members) {
                    continue;
                }
                flow.active
            }
        };
        // SAFETY: the instruction belongs to the program whose registers the context has.
        match unsafe { (inst.run)(context, inst, mask) } {
            Step::Next if polls < MAX_POLLS => flow.pc += 1,
            Step::Next | Step::Poll => {
                flow.pc += 1;
                flow.is_reversed = flow.other != NOWHERE;
                return Turn::Poll;
            }
            Step::Request => {
                flow.pc += 1;
                return Turn::Request;
            }
            Step::Fault => return Turn::Fault(inst.line),
        }
    }
    flow.is_reversed = !(flow.active | flow.exited | flow.blocked) != 0;
    Turn::Quantum
}

/// Ends a warp without lanes that can run: done, or a fault if lanes wait for ever.
fn finish(flow: &Flow, context: &mut Context<'_>, code: &[Inst]) -> Turn {
    if flow.exited == FULL {
        return Turn::Done;
    }
    let lane = (!flow.exited).trailing_zeros() as usize;
    let text = format!(
        "lanes of mask {:#010x} wait for others of their warp that never come; lanes of mask {:#010x} have ended",
        flow.blocked, flow.exited
    );
    context.fault = Some(Fault {
        lane: Some(lane),
        text,
    });
    Turn::Fault(code[flow.pcs[lane] as usize].line)
}
