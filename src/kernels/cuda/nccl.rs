//! The collectives of ranks through NCCL: where GPUs cannot map each other's memory, or where the
//! user wants it (`--disable-custom-all-reduce`).
//!
//! One communicator a rank, made and used by its thread; operations go into the rank's stream and
//! so into recorded graphs. A rank that does not come keeps the others waiting without end, so the
//! engine's watchdog ends them through [`Interrupt`].

mod library;

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Result, Tensor, bail};

use super::Gpu;
use super::driver::{Address, Driver};
use super::memory::Buffer;
use library::{DataType, Library, RawComm};

pub(in crate::kernels) use library::UniqueId;

/// One rank's end of a group.
pub(super) struct Nccl {
    library: &'static Library,
    world_size: usize,
    comm: Arc<Comm>,
    /// Set once all ranks are ready; before, collectives return what they are given.
    connected: AtomicBool,
    /// On rank 0: the joined logits, and where those of the other ranks arrive.
    gathered: Option<(Tensor, Address, Buffer)>,
}

/// A communicator, until it is aborted.
struct Comm {
    library: &'static Library,
    raw: Mutex<Option<RawComm>>,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time, which the lock sees to.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

impl Comm {
    fn lock(&self) -> MutexGuard<'_, Option<RawComm>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the waiting of one rank's operations.
#[derive(Clone)]
pub(super) struct Interrupt(Arc<Comm>);

impl Interrupt {
    /// Aborts the communicator, unless its thread is in a call of NCCL right now: then only the
    /// end of the process helps.
    pub(super) fn raise(self) {
        // Not held while it is aborted, which waits for the graphs that its thread drops when it
        // finds the communicator gone.
        let raw = self.0.raw.try_lock().ok().and_then(|mut raw| raw.take());
        if let Some(raw) = raw {
            // SAFETY: taken out, so nobody uses it afterwards.
            unsafe { self.0.library.abort(raw) };
        }
    }
}

/// Makes a new group to be joined by all ranks; returns its id and which NCCL it is.
pub(in crate::kernels) fn new_group() -> Result<(UniqueId, String)> {
    let library = Library::get()?;
    Ok((library.unique_id()?, library.describe()?))
}

impl Nccl {
    /// Joins the group; returns when all ranks have.
    pub(super) fn join(
        gpu: &Gpu,
        id: UniqueId,
        [rank, world_size]: [usize; 2],
        logits_shape: [usize; 2],
    ) -> Result<Self> {
        let gathered = match rank {
            0 => {
                let (tensor, address) = gpu.new_lasting(logits_shape, DType::F32)?;
                let arriving = tensor.elem_count() / world_size * (world_size - 1);
                Some((tensor, address, gpu.driver.allocate(4 * arriving)?))
            }
            _ => None,
        };
        gpu.driver.synchronize_all()?;
        let library = Library::get()?;
        let raw = library.join(id, rank, world_size)?;
        let comm = Comm {
            library,
            raw: Mutex::new(Some(raw)),
        };
        Ok(Self {
            library,
            world_size,
            comm: Arc::new(comm),
            connected: AtomicBool::new(false),
            gathered,
        })
    }

    /// Lets collectives meet the other ranks from now on.
    pub(super) fn connect(&self) {
        self.connected.store(true, Ordering::Relaxed);
    }

    fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Returns what ends the waiting of this rank's operations.
    pub(super) fn interrupt(&self) -> Interrupt {
        Interrupt(Arc::clone(&self.comm))
    }

    /// Leaves the group. Graphs that hold its operations must be gone, or this waits for them.
    pub(super) fn leave(&self) {
        let raw = self.comm.lock().take();
        if let Some(raw) = raw {
            // SAFETY: taken out, so nobody uses it afterwards.
            unsafe { self.library.destroy(raw) };
        }
    }

    /// Checks that no operation has failed.
    pub(super) fn check(&self) -> Result<()> {
        match *self.comm.lock() {
            // SAFETY: it lives while the lock is held.
            Some(raw) => unsafe { self.library.check_comm(raw) },
            None => bail!("the collectives were interrupted"),
        }
    }

    /// Calls `work` with the communicator.
    fn with_comm(&self, work: impl FnOnce(RawComm) -> Result<()>) -> Result<()> {
        match *self.comm.lock() {
            Some(raw) => work(raw),
            None => bail!("the collectives were interrupted"),
        }
    }

    /// Adds the numbers of `values`, which lie at `start`, over all ranks, in their place.
    pub(super) fn all_reduce(
        &self,
        driver: &Driver,
        values: &Tensor,
        start: Address,
    ) -> Result<()> {
        if !self.is_connected() {
            return Ok(());
        }
        let dtype = match values.dtype() {
            DType::F16 => DataType::Float16,
            DType::BF16 => DataType::Bfloat16,
            DType::F32 => DataType::Float32,
            other => bail!("no sum over ranks of {other:?}"),
        };
        driver.bind()?;
        self.with_comm(|comm| {
            let (start, count) = (start as *mut c_void, values.elem_count());
            // SAFETY: the tensor's own memory.
            unsafe {
                self.library
                    .all_reduce(start, count, dtype, (comm, driver.stream()))
            }
        })
    }

    /// Gives rank 0's `count` words at `start` to all ranks, at the same place of theirs.
    pub(super) fn broadcast(&self, driver: &Driver, start: Address, count: usize) -> Result<()> {
        if !self.is_connected() {
            return Ok(());
        }
        driver.bind()?;
        self.with_comm(|comm| {
            let values = (start as *mut c_void, count);
            let way = (comm, driver.stream());
            // SAFETY: the sampler's ids, of which every rank has as many.
            unsafe { self.library.broadcast(values, DataType::Uint32, 0, way) }
        })
    }

    /// Joins the columns of f32 `x [rows, width]`, which lie at `start`, of all ranks on rank 0;
    /// others get theirs back.
    pub(super) fn all_gather_columns(
        &self,
        driver: &Driver,
        x: &Tensor,
        start: Address,
    ) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let count = rows * width;
        let Some((joined, target, arriving)) = &self.gathered else {
            if self.is_connected() {
                driver.bind()?;
                self.with_comm(|comm| {
                    let values = (start as *const c_void, count);
                    let way = (comm, driver.stream());
                    // SAFETY: the tensor's own memory.
                    unsafe { self.library.send(values, DataType::Float32, 0, way) }
                })?;
            }
            return Ok(x.clone());
        };
        let joined = joined.narrow(0, 0, rows)?;
        if !self.is_connected() {
            return Ok(joined);
        }
        let part_bytes = 4 * count;
        if part_bytes * (self.world_size - 1) > arriving.num_bytes() {
            bail!("{rows} rows of logits do not fit where they arrive");
        }
        let place = |rank: usize| arriving.address() + (part_bytes * (rank - 1)) as Address;
        driver.bind()?;
        self.with_comm(|comm| {
            let way = (comm, driver.stream());
            self.library.together(|| {
                (1..self.world_size).try_for_each(|rank| {
                    let values = (place(rank) as *mut c_void, count);
                    // SAFETY: inside the buffer, as checked above.
                    unsafe { self.library.receive(values, DataType::Float32, rank, way) }
                })
            })
        })?;
        let (row_bytes, joined_bytes) = (4 * width, 4 * width * self.world_size);
        for rank in 0..self.world_size {
            let source = match rank {
                0 => start,
                _ => place(rank),
            };
            let target = target + (row_bytes * rank) as Address;
            driver.copy_rows([target, source], [joined_bytes, row_bytes], row_bytes, rows)?;
        }
        Ok(joined)
    }
}
