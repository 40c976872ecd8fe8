//! Runs a launch: as many clusters of blocks at a time as the GPU would hold, in turns.
//!
//! A cluster is only begun when those before it have ended, wait or poll, so that most launches have few in
//! memory at once; kernels whose blocks wait for each other get all that fit. A launch that takes longer than a
//! moment is shared by as many threads as there are processors.

use std::num::NonZero;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::block::{Block, BlockFault, ClusterBarrier, Progress, Surroundings};
use super::context::{LaunchState, Place, SharedMemory};
use super::{Kernel, Launch};

/// Shared memory of a multiprocessor, bytes.
const SHARED_BYTES: u32 = 228 << 10;
/// Shared memory that each block has for the system, bytes.
const RESERVED_BYTES: u32 = 1 << 10;
/// Threads of a multiprocessor.
const MAX_THREADS: u32 = 2048;
/// Blocks of a multiprocessor at most.
const MAX_BLOCKS: u32 = 4;
/// Rounds without progress after which the thread sleeps between rounds.
const IDLE_ROUNDS: u32 = 16;
/// How long it sleeps.
const NAP: Duration = Duration::from_micros(20);
/// How long a launch runs on one thread before all processors take part: starting threads takes time.
const ALONE: Duration = Duration::from_millis(1);

/// Blocks that share a barrier and their shared memory.
struct Cluster {
    blocks: Vec<Option<Block>>,
    memories: Vec<SharedMemory>,
    barrier: ClusterBarrier,
}

/// A launch as its threads share it.
struct Work<'a> {
    kernel: &'a Kernel,
    launch: &'a Launch<'a>,
    /// Blocks of a cluster.
    dims: [u32; 3],
    params: &'a [u8],
    num_clusters: u64,
    /// Clusters that all threads together hold.
    max_resident: usize,
    /// The cluster that is begun next.
    next: AtomicU64,
    /// Instructions of all threads.
    count: AtomicU64,
    /// The first fault.
    failure: OnceLock<String>,
}

/// Runs a launch; returns the lane-instructions.
///
/// # Errors
/// The first fault.
pub(super) fn run(kernel: &Kernel, launch: &Launch<'_>) -> Result<u64, String> {
    let dims = kernel.cluster.unwrap_or([1; 3]);
    check(kernel, launch, dims)?;
    let params = AlignedParams::new(launch.params);
    let work = Work {
        kernel,
        launch,
        dims,
        params: params.bytes(),
        num_clusters: (0..3)
            .map(|axis| u64::from(launch.grid[axis] / dims[axis]))
            .product(),
        max_resident: max_resident_clusters(kernel, launch, dims),
        next: AtomicU64::new(0),
        count: AtomicU64::new(0),
        failure: OnceLock::new(),
    };
    std::thread::scope(|scope| {
        let work = &work;
        let num_threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        work.run(work.max_resident, |has_begun: Duration| {
            if num_threads == 1 || has_begun < ALONE {
                return None;
            }
            let share = work.max_resident.div_ceil(num_threads);
            for _ in 1..num_threads {
                scope.spawn(move || work.run(share, |_| None));
            }
            Some(share)
        });
    });
    match work.failure.into_inner() {
        Some(error) => Err(error),
        None => Ok(work.count.into_inner()),
    }
}

impl Work<'_> {
    /// Runs clusters, up to `max_resident` at a time, until there are no more. While there are, `share` is asked
    /// with the time that has passed, until it has found other threads, and says how many this one may hold.
    fn run(&self, mut max_resident: usize, share: impl Fn(Duration) -> Option<usize>) {
        let start = Instant::now();
        let mut is_shared = false;
        let state = LaunchState::new(self.launch.grid, self.launch.block, self.dims, self.params);
        let (mut idle, mut count) = (0, 0);
        let mut resident: Vec<Cluster> = Vec::new();
        while self.failure.get().is_none() {
            let mut has_all = self.next.load(Ordering::Relaxed) >= self.num_clusters;
            if !has_all && resident.len() < max_resident {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                has_all = index >= self.num_clusters;
                if !has_all {
                    resident.push(begin(self.kernel, self.launch, self.dims, index));
                }
            }
            if has_all && resident.is_empty() {
                break;
            }
            if let (false, false, Some(limit)) = (has_all, is_shared, share(start.elapsed())) {
                (is_shared, max_resident) = (true, limit);
            }
            let (before, length) = (count, resident.len());
            let waits = self.run_round(&state, &mut resident, &mut count);
            let is_full = has_all || resident.len() >= max_resident;
            if waits && is_full && !resident.is_empty() && self.failure.get().is_none() {
                // The first fault is kept.
                let _ = self.failure.set(describe_deadlock(self.kernel, &resident));
            }
            // What is polled may be written by a kernel of another thread.
            let is_idle = resident.len() == length && is_full && count - before < 1 << 20;
            idle = if is_idle { idle + 1 } else { 0 };
            if idle > IDLE_ROUNDS {
                std::thread::sleep(NAP);
            } else if idle > 0 {
                std::thread::yield_now();
            }
        }
        self.count.fetch_add(count, Ordering::Relaxed);
    }

    /// Gives all clusters a turn and drops those that have ended; returns whether all others wait at barriers.
    fn run_round(&self, state: &LaunchState, resident: &mut Vec<Cluster>, count: &mut u64) -> bool {
        let mut waits = true;
        resident.retain_mut(|cluster| {
            if self.failure.get().is_some() {
                return true;
            }
            match run_cluster(self.kernel, state, cluster, count) {
                Ok(Progress::Waits) => true,
                Ok(progress) => {
                    waits = false;
                    progress != Progress::Done
                }
                Err(error) => {
                    // The first fault is kept.
                    let _ = self.failure.set(error);
                    true
                }
            }
        });
        waits
    }
}

/// A copy of the parameters that is as aligned as they ask for.
struct AlignedParams {
    words: Vec<Line>,
    num_bytes: usize,
}

/// As much as parameters are ever aligned to.
#[repr(align(128))]
#[derive(Clone, Copy)]
struct Line([u8; 128]);

impl AlignedParams {
    fn new(params: &[u8]) -> Self {
        let words = params
            .chunks(128)
            .map(|chunk| {
                let mut line = Line([0; 128]);
                line.0[..chunk.len()].copy_from_slice(chunk);
                line
            })
            .collect();
        Self {
            words,
            num_bytes: params.len(),
        }
    }
    fn bytes(&self) -> &[u8] {
        // SAFETY: the lines have that many bytes, one after another.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.num_bytes) }
    }
}

/// Checks sizes.
fn check(kernel: &Kernel, launch: &Launch<'_>, cluster: [u32; 3]) -> Result<(), String> {
    let Launch {
        grid,
        block,
        shared_bytes,
        params,
        ..
    } = launch;
    let name = &kernel.name;
    let num_threads = block.iter().map(|&dim| u64::from(dim)).product::<u64>();
    if num_threads == 0 || num_threads > 1024 || grid.contains(&0) {
        return Err(format!(
            "kernel {name}: grid {grid:?} of blocks {block:?}; wanted 1 to 1024 threads"
        ));
    }
    if (0..3).any(|axis| grid[axis] % cluster[axis] != 0) {
        return Err(format!(
            "kernel {name}: grid {grid:?} is not a multiple of clusters {cluster:?}"
        ));
    }
    let total = kernel.program.dynamic_shared_start + shared_bytes + RESERVED_BYTES;
    if total > SHARED_BYTES {
        return Err(format!(
            "kernel {name}: {total} bytes of shared memory; there are {SHARED_BYTES}"
        ));
    }
    let wanted = kernel
        .params
        .last()
        .map_or(0, |param| param.offset + param.num_bytes);
    if params.len() < wanted {
        return Err(format!(
            "kernel {name}: {} bytes of parameters; wanted {wanted}",
            params.len()
        ));
    }
    Ok(())
}

/// Returns how many clusters the GPU holds.
fn max_resident_clusters(kernel: &Kernel, launch: &Launch<'_>, cluster: [u32; 3]) -> usize {
    let shared = kernel.program.dynamic_shared_start + launch.shared_bytes + RESERVED_BYTES;
    let num_threads: u32 = launch.block.iter().product();
    let per_multiprocessor = MAX_BLOCKS
        .min(SHARED_BYTES / shared)
        .min(MAX_THREADS / num_threads)
        .max(1);
    let num_blocks = launch.num_multiprocessors.max(1) * per_multiprocessor;
    (num_blocks / cluster.iter().product::<u32>()).max(1) as usize
}

/// Begins a cluster.
fn begin(kernel: &Kernel, launch: &Launch<'_>, dims: [u32; 3], index: u64) -> Cluster {
    let num_threads = launch.block.iter().product();
    let shared_bytes = (kernel.program.dynamic_shared_start + launch.shared_bytes) as usize;
    let per_axis = [0, 1, 2].map(|axis| u64::from(launch.grid[axis] / dims[axis]));
    let first = [
        (index % per_axis[0]) as u32 * dims[0],
        (index / per_axis[0] % per_axis[1]) as u32 * dims[1],
        (index / per_axis[0] / per_axis[1]) as u32 * dims[2],
    ];
    let num_blocks: u32 = dims.iter().product();
    let mut cluster = Cluster {
        blocks: Vec::new(),
        memories: Vec::new(),
        barrier: ClusterBarrier::default(),
    };
    for rank in 0..num_blocks {
        let offset = [
            rank % dims[0],
            rank / dims[0] % dims[1],
            rank / dims[0] / dims[1],
        ];
        let place = Place {
            block: [0, 1, 2].map(|axis| first[axis] + offset[axis]),
            rank,
        };
        let mut block = Block::new(&kernel.program, num_threads, place, shared_bytes);
        let start = block.memory.as_mut_ptr().cast();
        cluster.memories.push(SharedMemory {
            start,
            num_bytes: shared_bytes as u32,
            is_alive: true,
        });
        cluster.barrier.live += block.num_warps();
        cluster.blocks.push(Some(block));
    }
    cluster
}

/// Gives all blocks of a cluster a turn.
fn run_cluster(
    kernel: &Kernel,
    launch: &LaunchState,
    cluster: &mut Cluster,
    count: &mut u64,
) -> Result<Progress, String> {
    let mut progress = Progress::Waits;
    for (rank, slot) in cluster.blocks.iter_mut().enumerate() {
        let Some(block) = slot else { continue };
        let mut around = Surroundings {
            program: &kernel.program,
            launch,
            cluster: &cluster.memories,
            barrier: &mut cluster.barrier,
        };
        match block.run(&mut around, count) {
            Ok(Progress::Done) => {
                *slot = None;
                cluster.memories[rank].is_alive = false;
                progress = Progress::Runs;
            }
            Ok(Progress::Runs) => progress = Progress::Runs,
            Ok(Progress::Waits) => {}
            Err(fault) => return Err(describe_fault(kernel, launch, block, &fault)),
        }
    }
    Ok(if cluster.blocks.iter().all(Option::is_none) {
        Progress::Done
    } else {
        progress
    })
}

/// Says where a fault is and what.
fn describe_fault(
    kernel: &Kernel,
    launch: &LaunchState,
    block: &Block,
    fault: &BlockFault,
) -> String {
    let source = &kernel.program.source;
    let text = source
        .lines()
        .nth((fault.line as usize).saturating_sub(1))
        .unwrap_or("")
        .trim();
    let index = fault.first_thread + fault.fault.lane.unwrap_or(0) as u32;
    let [x, y, _] = launch.block;
    let thread = [index % x, index / x % y, index / x / y];
    let who = if fault.fault.lane.is_some() {
        "thread"
    } else {
        "the warp of thread"
    };
    format!(
        "kernel {}, block {:?}, {who} {thread:?}, line {} (`{text}`): {}",
        kernel.name, block.place.block, fault.line, fault.fault.text
    )
}

/// Says which blocks wait for what.
fn describe_deadlock(kernel: &Kernel, resident: &[Cluster]) -> String {
    let waits = resident
        .iter()
        .flat_map(|cluster| cluster.blocks.iter().flatten())
        .map(|block| format!("block {:?}: {}", block.place.block, block.describe_waits()))
        .next()
        .unwrap_or_default();
    format!("kernel {}: no warp can go on: {waits}", kernel.name)
}
