//! Groups of ranks: their operations meet, and the last to come computes.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};

use crate::driver::allocations::holds;
use crate::driver::status::Status;
use crate::driver::stream::Fault;

/// An `ncclDataType_t` that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    U32,
    F16,
    F32,
    Bf16,
}

impl Type {
    /// Returns the type of a number.
    pub(super) fn of(number: i32) -> Option<Self> {
        match number {
            3 => Some(Self::U32),
            6 => Some(Self::F16),
            7 => Some(Self::F32),
            9 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Returns the bytes of an element.
    pub(super) fn num_bytes(self) -> usize {
        match self {
            Self::U32 | Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// What all ranks do together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Collective {
    Sum,
    Broadcast { root: usize },
}

/// One rank's side of a collective.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) rank: usize,
    pub(super) collective: Collective,
    pub(super) source: u64,
    pub(super) target: u64,
    pub(super) count: usize,
    pub(super) dtype: Type,
}

impl Part {
    fn num_bytes(&self) -> usize {
        self.count * self.dtype.num_bytes()
    }
}

#[derive(Default)]
struct Meeting {
    parts: Vec<Part>,
    outcome: Option<Result<(), String>>,
    num_left: usize,
}

#[derive(Default)]
struct GroupState {
    num_joined: usize,
    /// By their number in each rank's order.
    meetings: HashMap<u64, Meeting>,
    /// From a rank to another one.
    messages: HashMap<[usize; 2], VecDeque<Vec<u8>>>,
}

/// A group of ranks.
pub(super) struct Group {
    pub(super) num_ranks: usize,
    state: Mutex<GroupState>,
    changed: Condvar,
}

/// A rank's communicator.
pub(super) struct Comm {
    pub(super) group: Arc<Group>,
    pub(super) rank: usize,
    num_collectives: AtomicU64,
    is_aborted: AtomicBool,
}

impl Group {
    /// Makes a group that ranks join.
    pub(super) fn new(num_ranks: usize) -> Self {
        Self {
            num_ranks,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GroupState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` returns something, or the communicator is aborted.
    fn wait<T>(
        &self,
        comm: &Comm,
        mut done: impl FnMut(&mut GroupState) -> Option<T>,
    ) -> Option<T> {
        let mut state = self.lock();
        loop {
            if comm.is_aborted.load(Ordering::Acquire) {
                return None;
            }
            if let Some(value) = done(&mut state) {
                return Some(value);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Comm {
    /// Joins a group; returns when all ranks have.
    pub(super) fn join(group: Arc<Group>, rank: usize) -> Self {
        let comm = Self {
            group,
            rank,
            num_collectives: AtomicU64::new(0),
            is_aborted: AtomicBool::new(false),
        };
        let group = &comm.group;
        group.lock().num_joined += 1;
        group.changed.notify_all();
        group.wait(&comm, |state| {
            (state.num_joined >= group.num_ranks).then_some(())
        });
        comm
    }

    /// Lets everything that waits for other ranks end.
    pub(super) fn abort(&self) {
        // Under the lock, so that nobody begins to wait between the flag and the word of it.
        let state = self.group.lock();
        self.is_aborted.store(true, Ordering::Release);
        self.group.changed.notify_all();
        drop(state);
    }

    /// Meets the other ranks' parts; the last one to come computes.
    pub(super) fn meet(&self, part: Part) -> Result<(), Fault> {
        let number = self.num_collectives.fetch_add(1, Ordering::Relaxed);
        let group = &self.group;
        let mut state = group.lock();
        let meeting = state.meetings.entry(number).or_default();
        meeting.parts.push(part);
        if meeting.parts.len() == group.num_ranks {
            meeting.parts.sort_by_key(|part| part.rank);
            meeting.outcome = Some(compute(&meeting.parts));
            group.changed.notify_all();
        }
        drop(state);
        let outcome = group.wait(self, |state| {
            let meeting = state.meetings.get_mut(&number)?;
            let outcome = meeting.outcome.clone()?;
            meeting.num_left += 1;
            if meeting.num_left == group.num_ranks {
                state.meetings.remove(&number);
            }
            Some(outcome)
        });
        outcome.unwrap_or(Ok(())).map_err(|text| Fault {
            status: Status::ILLEGAL_ADDRESS,
            text,
        })
    }

    /// Sends bytes, which are copied, to another rank.
    pub(super) fn send(&self, source: u64, num_bytes: usize, to: usize) -> Result<(), Fault> {
        check_memory("sent", source, num_bytes)?;
        // SAFETY: just checked; what else works on it is ordered by streams.
        let message =
            unsafe { std::slice::from_raw_parts(source as *const u8, num_bytes) }.to_vec();
        self.group
            .lock()
            .messages
            .entry([self.rank, to])
            .or_default()
            .push_back(message);
        self.group.changed.notify_all();
        Ok(())
    }

    /// Receives bytes from another rank.
    pub(super) fn receive(&self, target: u64, num_bytes: usize, from: usize) -> Result<(), Fault> {
        check_memory("received", target, num_bytes)?;
        let route = [from, self.rank];
        let message = self
            .group
            .wait(self, |state| state.messages.get_mut(&route)?.pop_front());
        let Some(message) = message else {
            return Ok(());
        };
        if message.len() != num_bytes {
            let text = format!(
                "NCCL: {num_bytes} bytes are received of {} sent",
                message.len()
            );
            return Err(Fault {
                status: Status::LAUNCH_FAILED,
                text,
            });
        }
        // SAFETY: as in `send`.
        unsafe { (target as *mut u8).copy_from_nonoverlapping(message.as_ptr(), num_bytes) };
        Ok(())
    }
}

fn check_memory(what: &str, address: u64, num_bytes: usize) -> Result<(), Fault> {
    if holds(address, num_bytes) {
        return Ok(());
    }
    let text = format!(
        "NCCL: {num_bytes} bytes at {address:#x} are {what}, which are outside of all allocations"
    );
    Err(Fault {
        status: Status::ILLEGAL_ADDRESS,
        text,
    })
}

/// Computes what all parts together want; they are in the ranks' order.
fn compute(parts: &[Part]) -> Result<(), String> {
    let first = parts[0];
    for part in parts {
        let is_same = (part.collective, part.count, part.dtype)
            == (first.collective, first.count, first.dtype);
        if !is_same {
            return Err(format!(
                "NCCL: rank {} calls {part:x?}, rank {} {first:x?}",
                part.rank, first.rank
            ));
        }
        let num_bytes = part.num_bytes();
        if !holds(part.source, num_bytes) || !holds(part.target, num_bytes) {
            return Err(format!("NCCL: {part:x?} is outside of all allocations"));
        }
    }
    let num_bytes = first.num_bytes();
    let read = |address: u64| {
        // SAFETY: checked above; all ranks' streams wait here, and order what else works on the
        // memory.
        let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, num_bytes) };
        bytes.to_vec()
    };
    let result = match first.collective {
        Collective::Broadcast { root } => read(parts[root].source),
        Collective::Sum => sum(first.dtype, parts.iter().map(|part| read(part.source))),
    };
    for part in parts {
        // SAFETY: as above.
        unsafe { (part.target as *mut u8).copy_from_nonoverlapping(result.as_ptr(), num_bytes) };
    }
    Ok(())
}

/// Adds elementwise, in f32 but for integers.
fn sum(dtype: Type, all: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    match dtype {
        Type::U32 => {
            let words = all.map(|bytes| {
                bytes
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|&word| u32::from_le_bytes(word))
                    .collect()
            });
            let total = words.reduce(|total: Vec<u32>, words| {
                total
                    .iter()
                    .zip(words)
                    .map(|(a, b)| a.wrapping_add(b))
                    .collect()
            });
            total
                .unwrap_or_default()
                .into_iter()
                .flat_map(u32::to_le_bytes)
                .collect()
        }
        Type::F32 => total(all, f32::from_le_bytes, f32::to_le_bytes),
        Type::F16 => total(
            all,
            |bytes| f16::from_le_bytes(bytes).to_f32(),
            |sum| f16::from_f32(sum).to_le_bytes(),
        ),
        Type::Bf16 => total(
            all,
            |bytes| bf16::from_le_bytes(bytes).to_f32(),
            |sum| bf16::from_f32(sum).to_le_bytes(),
        ),
    }
}

fn total<const N: usize>(
    all: impl Iterator<Item = Vec<u8>>,
    read: impl Fn([u8; N]) -> f32,
    write: impl Fn(f32) -> [u8; N],
) -> Vec<u8> {
    let values = all.map(|bytes| {
        bytes
            .as_chunks::<N>()
            .0
            .iter()
            .map(|&bytes| read(bytes))
            .collect()
    });
    let total = values
        .reduce(|total: Vec<f32>, values| total.iter().zip(values).map(|(a, b)| a + b).collect());
    total
        .unwrap_or_default()
        .into_iter()
        .flat_map(write)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_elementwise_and_rounded_once() {
        let halves = |values: [f32; 3]| {
            values
                .iter()
                .flat_map(|&value| f16::from_f32(value).to_le_bytes())
                .collect::<Vec<u8>>()
        };
        // 2048 + 1 is no f16, 2048 + 1 + 1 is one.
        let all = [
            halves([1.0, -2.0, 2048.0]),
            halves([0.5, 2.0, 1.0]),
            halves([0.25, 0.0, 1.0]),
        ];
        assert_eq!(sum(Type::F16, all.into_iter()), halves([1.75, 0.0, 2050.0]));
        let words = [[1u32.to_le_bytes()], [u32::MAX.to_le_bytes()]].map(|words| words.concat());
        assert_eq!(sum(Type::U32, words.into_iter()), [0; 4]);
    }
}
