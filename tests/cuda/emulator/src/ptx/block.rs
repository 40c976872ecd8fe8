//! A block: its warps, shared memory and barriers.

use super::context::{Context, Fault, LaunchState, Place, Request, SharedMemory, WarpMemory};
use super::copies::Copies;
use super::program::Program;
use super::row::{LANES, Row};
use super::tiles::Tile;
use super::warp::{Flow, Turn, Warp, run_turn};

/// Instructions of a warp's turn.
const QUANTUM: u32 = 8192;
/// Turns of all warps in a block's turn, as long as one of them gets on.
const MAX_ROUNDS: u32 = 64;
/// Barriers of a block.
const NUM_BARRIERS: usize = 16;
/// What memory and registers have before they are written: NaN in every float format.
const POISON: u8 = 0xff;
/// Bits of a word of memory that has not been written.
const POISON_WORD: u64 = u64::from_ne_bytes([POISON; 8]);

/// What a warp waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    AtBarrier(usize),
    /// For the end of this phase of the cluster's barrier.
    AtCluster(u64),
    Done,
}

/// A block's barrier.
#[derive(Debug, Clone, Copy, Default)]
struct Barrier {
    /// Threads that have arrived.
    arrived: u32,
    /// Threads that it waits for; 0 for all.
    wanted: u32,
}

/// The barrier of a cluster.
#[derive(Debug, Default)]
pub(super) struct ClusterBarrier {
    /// Phases that have ended.
    phase: u64,
    /// Warps that have arrived.
    arrived: u32,
    /// Warps of the cluster that have not ended.
    pub live: u32,
}

impl ClusterBarrier {
    /// Ends the phase if all have arrived.
    fn check(&mut self) {
        if self.arrived >= self.live && self.arrived > 0 {
            self.arrived = 0;
            self.phase += 1;
        }
    }
}

/// What remains of a block's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// It has ended.
    Done,
    /// Its warps are polling or have used up their turns.
    Runs,
    /// All warps wait at barriers.
    Waits,
}

/// A block.
#[derive(Debug)]
pub(super) struct Block {
    /// Its place in grid and cluster.
    pub place: Place,
    /// Shared memory, which `SharedMemory` points to.
    pub memory: Vec<u128>,
    warps: Vec<Warp>,
    states: Vec<State>,
    /// The phase at which each warp has arrived last.
    cluster_phases: Vec<u64>,
    barriers: [Barrier; NUM_BARRIERS],
    /// Copies of tiles under way.
    tiles: Vec<Tile>,
}

/// What a block's turn needs besides it.
pub(super) struct Surroundings<'a> {
    /// The code.
    pub program: &'a Program,
    /// The launch.
    pub launch: &'a LaunchState,
    /// Shared memory of the cluster's blocks.
    pub cluster: &'a [SharedMemory],
    /// Its barrier.
    pub barrier: &'a mut ClusterBarrier,
}

/// A fault and where it is.
#[derive(Debug)]
pub(super) struct BlockFault {
    /// What is wrong.
    pub fault: Fault,
    /// The first thread of the warp.
    pub first_thread: u32,
    /// Line of the PTX.
    pub line: u32,
}

impl Block {
    /// Makes a block with `shared_bytes` of shared memory.
    pub(super) fn new(
        program: &Program,
        num_threads: u32,
        place: Place,
        shared_bytes: usize,
    ) -> Self {
        let num_warps = num_threads.div_ceil(LANES as u32);
        let warps: Vec<Warp> = (0..num_warps)
            .map(|index| {
                let first_thread = index * LANES as u32;
                let mut predicates = vec![0; program.num_predicates];
                predicates[super::program::Slot::TRUE.0 as usize] = u32::MAX;
                Warp {
                    rows: vec![Row([POISON_WORD as u32; LANES]); program.num_rows],
                    predicates,
                    memory: WarpMemory {
                        first_thread,
                        local: vec![POISON_WORD; LANES * program.local_bytes / 8],
                        copies: Copies::default(),
                        scratch: None,
                    },
                    flow: Flow::new(num_threads - first_thread),
                }
            })
            .collect();
        Self {
            place,
            // Bulk copies and swizzles want memory that begins at a multiple of 1,024 in the shared address
            // space, which says nothing of the process's.
            memory: vec![u128::from_ne_bytes([POISON; 16]); shared_bytes.div_ceil(16)],
            states: vec![State::Ready; warps.len()],
            cluster_phases: vec![0; warps.len()],
            warps,
            barriers: [Barrier::default(); NUM_BARRIERS],
            tiles: Vec::new(),
        }
    }

    /// Returns the warps.
    pub(super) fn num_warps(&self) -> u32 {
        self.warps.len() as u32
    }

    /// Gives all warps turns until each of them waits, polls or has ended.
    ///
    /// # Errors
    /// What a warp did wrong.
    pub(super) fn run(
        &mut self,
        around: &mut Surroundings<'_>,
        count: &mut u64,
    ) -> Result<Progress, BlockFault> {
        for round in 0..MAX_ROUNDS {
            let (mut num_polls, mut waits) = (0, true);
            for index in 0..self.warps.len() {
                self.wake(index, around.barrier);
                if self.states[index] == State::Ready {
                    waits = false;
                    num_polls += usize::from(self.run_warp(index, around, count)? == Turn::Poll);
                }
            }
            let brings_tiles = !self.tiles.is_empty();
            self.finish_tiles(around)?;
            if self.states.iter().all(|&state| state == State::Done) {
                return Ok(Progress::Done);
            }
            if waits && !brings_tiles {
                return Ok(if round == 0 {
                    Progress::Waits
                } else {
                    Progress::Runs
                });
            }
            (0..self.warps.len()).for_each(|index| self.wake(index, around.barrier));
            let num_ready = self
                .states
                .iter()
                .filter(|&&state| state == State::Ready)
                .count();
            if num_ready <= num_polls && !brings_tiles {
                break;
            }
        }
        Ok(Progress::Runs)
    }

    /// Lets a warp go on whose phase of the cluster's barrier has ended.
    fn wake(&mut self, index: usize, barrier: &ClusterBarrier) {
        if matches!(self.states[index], State::AtCluster(phase) if barrier.phase > phase) {
            self.states[index] = State::Ready;
        }
    }

    /// Finishes copies of tiles.
    fn finish_tiles(&mut self, around: &Surroundings<'_>) -> Result<(), BlockFault> {
        for tile in std::mem::take(&mut self.tiles) {
            let (line, first_thread) = (tile.line, tile.thread);
            tile.finish(around.launch, around.cluster, self.place.rank)
                .map_err(|text| BlockFault {
                    fault: Fault {
                        lane: Some(0),
                        text,
                    },
                    first_thread,
                    line,
                })?;
        }
        Ok(())
    }

    /// Gives a warp a turn and does what it asks for, until it waits, polls, ends or has used up its quantum.
    fn run_warp(
        &mut self,
        index: usize,
        around: &mut Surroundings<'_>,
        count: &mut u64,
    ) -> Result<Turn, BlockFault> {
        loop {
            let warp = &mut self.warps[index];
            let mut context = Context {
                rows: [
                    warp.rows.as_mut_ptr(),
                    around.program.constants.as_ptr().cast_mut(),
                ],
                predicates: warp.predicates.as_mut_ptr(),
                lists: &around.program.lists,
                launch: around.launch,
                place: self.place,
                cluster: around.cluster,
                shared: around.cluster[self.place.rank as usize],
                local_bytes: around.program.local_bytes,
                warp: &mut warp.memory,
                tiles: &mut self.tiles,
                request: Request::None,
                fault: None,
            };
            // SAFETY: the context is of this program; `run` has checked the processor.
            let turn = unsafe {
                run_turn(
                    &mut warp.flow,
                    &mut context,
                    &around.program.code,
                    QUANTUM,
                    count,
                )
            };
            let (request, fault) = (context.request, context.fault.take());
            let first_thread = warp.memory.first_thread;
            around.launch.clock.set(around.launch.clock.get() + 1);
            match turn {
                Turn::Request => {
                    self.serve(index, request, around.barrier)
                        .map_err(|(text, line)| BlockFault {
                            fault: Fault { lane: None, text },
                            first_thread,
                            line,
                        })?;
                    if self.states[index] != State::Ready {
                        return Ok(turn);
                    }
                }
                Turn::Done => {
                    self.states[index] = State::Done;
                    around.barrier.live -= 1;
                    around.barrier.check();
                    self.check_all_barriers();
                    return Ok(turn);
                }
                Turn::Fault(line) => {
                    let fault = fault.unwrap_or(Fault {
                        lane: None,
                        text: "unknown".to_owned(),
                    });
                    return Err(BlockFault {
                        fault,
                        first_thread,
                        line,
                    });
                }
                Turn::Quantum | Turn::Poll => return Ok(turn),
            }
        }
    }

    /// Does what a warp asks for.
    fn serve(
        &mut self,
        index: usize,
        request: Request,
        cluster: &mut ClusterBarrier,
    ) -> Result<(), (String, u32)> {
        match request {
            Request::None => {}
            Request::Wait {
                index: barrier,
                num_threads,
            } => {
                self.states[index] = State::AtBarrier(barrier as usize);
                self.arrive(barrier as usize, num_threads)?;
            }
            Request::Arrive {
                index: barrier,
                num_threads,
            } => self.arrive(barrier as usize, num_threads)?,
            Request::ArriveAtCluster => {
                self.cluster_phases[index] = cluster.phase;
                cluster.arrived += 1;
                cluster.check();
            }
            Request::WaitForCluster => {
                self.states[index] = State::AtCluster(self.cluster_phases[index]);
                self.wake(index, cluster);
            }
        }
        Ok(())
    }

    /// Counts a warp's threads at a barrier.
    fn arrive(&mut self, index: usize, num_threads: u32) -> Result<(), (String, u32)> {
        let barrier = self
            .barriers
            .get_mut(index)
            .ok_or_else(|| (format!("barrier {index}; a block has {NUM_BARRIERS}"), 0))?;
        if barrier.arrived > 0 && barrier.wanted != num_threads {
            let wanted = barrier.wanted;
            return Err((
                format!(
                    "barrier {index} for {num_threads} threads, at which others wait for {wanted}"
                ),
                0,
            ));
        }
        barrier.wanted = num_threads;
        barrier.arrived += LANES as u32;
        self.check_barrier(index);
        Ok(())
    }

    /// Lets the warps at a barrier go on if all have come.
    fn check_barrier(&mut self, index: usize) {
        let live = self
            .states
            .iter()
            .filter(|&&state| state != State::Done)
            .count() as u32;
        let barrier = &mut self.barriers[index];
        let wanted = if barrier.wanted == 0 {
            live * LANES as u32
        } else {
            barrier.wanted
        };
        if barrier.arrived == 0 || barrier.arrived < wanted {
            return;
        }
        *barrier = Barrier::default();
        for state in &mut self.states {
            if *state == State::AtBarrier(index) {
                *state = State::Ready;
            }
        }
    }

    /// The same for all barriers, once a warp has ended.
    fn check_all_barriers(&mut self) {
        for index in 0..NUM_BARRIERS {
            self.check_barrier(index);
        }
    }

    /// Says what the warps that wait are waiting for.
    pub(super) fn describe_waits(&self) -> String {
        let waits: Vec<String> = self
            .states
            .iter()
            .enumerate()
            .filter_map(|(warp, state)| match state {
                State::AtBarrier(index) => {
                    let Barrier { arrived, wanted } = self.barriers[*index];
                    Some(format!(
                        "warp {warp} at barrier {index} ({arrived} threads of {wanted})"
                    ))
                }
                State::AtCluster(_) => Some(format!("warp {warp} at the cluster's barrier")),
                State::Ready | State::Done => None,
            })
            .collect();
        waits.join(", ")
    }
}
