//! The collectives of ranks on several GPUs of one process: kernels that write into each other's
//! workspaces (`peers.cuh`), and what connects them.
//!
//! All ranks launch the same collectives with the same sizes in the same order. Nothing is
//! allocated or freed while another rank may still have to launch one, since that may wait for
//! kernels that wait for it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use candle_core::{DType, Result, Tensor, bail};
use cudarc::driver::{result, sys};

use super::super::check;
use super::driver::{Address, Arg, Driver, Geometry, told};
use super::memory::{Buffer, Pinned};
use super::norm::norm_geometry;
use super::{Gpu, nccl};

const MAX_RANKS: usize = 8;
/// Group sizes that the kernels are made for.
const WORLD_SIZES: [usize; 5] = [2, 3, 4, 6, 8];
/// Where a workspace's slots begin.
const SLOTS: usize = 32768;
const SLOT_BYTES: usize = 80 << 20;
/// Bytes that one launch reduces at most: two shots need twice that and a row a rank.
const MAX_BYTES: usize = 32 << 20;
/// A rank that misses another for this long gives up and says so.
const TIMEOUT_NS: u64 = 4_000_000_000;
/// What the error word holds when the host has told kernels to stop waiting.
const INTERRUPTED: u32 = u32::MAX;
/// Blocks of a collective at most: all of them must be on the GPU at once.
const MAX_BLOCKS: usize = 128;
/// Threads of a block of a reduction, at most.
const MAX_THREADS: usize = 512;
/// Columns of a norm after a sum, at most: four vectors of eight a thread.
const MAX_NORM_WIDTH: usize = 32 * MAX_THREADS;

/// The parameter of that name in `peers.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PeersArg {
    workspaces: [Address; MAX_RANKS],
    error: Address,
    timeout_ns: u64,
    slot_bytes: i64,
    rank: i32,
    world_size: i32,
}

/// The parameter of that name in `all_gather.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct OutputsArg {
    rows: [Address; MAX_RANKS],
}

/// One rank's side of a group.
pub(super) struct Peers {
    rank: usize,
    world_size: usize,
    workspace: Buffer,
    /// Set by a kernel that gave up: 1 + the rank that it missed; or [`INTERRUPTED`].
    error: Arc<Pinned<u32>>,
    /// Where rank 0 joins the logits of all.
    gathered: Option<Tensor>,
    gathered_address: Address,
    connected: OnceLock<(PeersArg, OutputsArg)>,
}

/// Ends the waiting of one GPU's collectives.
#[derive(Clone)]
pub(in crate::kernels) struct Interrupt(Way);

#[derive(Clone)]
enum Way {
    /// Through the word that its kernels look at.
    Word(Arc<Pinned<u32>>),
    /// Through NCCL.
    Nccl(nccl::Interrupt),
}

impl Interrupt {
    /// Lets kernels that wait give up, as they do when one of them has missed a rank.
    pub(in crate::kernels) fn raise(self) {
        let word = match self.0 {
            Way::Nccl(interrupt) => return interrupt.raise(),
            Way::Word(word) => word,
        };
        // SAFETY: a valid word, read and written as a whole by kernels and host alike.
        unsafe {
            if word.as_ptr().read_volatile() == 0 {
                word.as_ptr().write_volatile(INTERRUPTED);
            }
        }
    }
}

impl Gpu {
    /// Prepares this rank of a group: its workspace, and its GPU's access to the others'.
    pub(super) fn new_peers(
        &self,
        [rank, world_size]: [usize; 2],
        first_gpu: usize,
        logits_shape: [usize; 2],
    ) -> Result<Peers> {
        for other in (0..world_size).filter(|&other| other != rank) {
            allow_access(&self.driver, first_gpu + rank, first_gpu + other)?;
        }
        let num_bytes = SLOTS + 2 * SLOT_BYTES;
        let workspace = self.driver.allocate(num_bytes)?;
        // SAFETY: just allocated.
        unsafe { self.driver.fill(workspace.address(), 0xff, num_bytes)? };
        let (gathered, gathered_address) = match rank {
            0 => {
                let (tensor, address) = self.new_lasting(logits_shape, DType::F32)?;
                (Some(tensor), address)
            }
            _ => (None, 0),
        };
        self.driver.synchronize_all()?;
        Ok(Peers {
            rank,
            world_size,
            workspace,
            error: Arc::new(Pinned::new(&self.driver, 1)?),
            gathered,
            gathered_address,
            connected: OnceLock::new(),
        })
    }

    fn peers(&self) -> Result<&Peers> {
        match &self.peers {
            Some(peers) => Ok(peers),
            None => bail!("this GPU belongs to no group"),
        }
    }

    /// Returns whether this GPU computes together with others.
    pub(in crate::kernels) fn has_group(&self) -> bool {
        self.peers.is_some() || self.nccl.get().is_some()
    }

    /// Returns what the other ranks must know: the workspace, and rank 0's logits.
    /// NCCL needs nothing.
    pub(in crate::kernels) fn peer_addresses(&self) -> Result<[u64; 2]> {
        if self.nccl.get().is_some() {
            return Ok([0; 2]);
        }
        let peers = self.peers()?;
        Ok([peers.workspace.address(), peers.gathered_address])
    }

    /// Connects this rank to the group; before, its collectives return what they were given.
    pub(in crate::kernels) fn connect_peers(&self, all: &[[u64; 2]]) -> Result<()> {
        if let Some(nccl) = self.nccl.get() {
            nccl.connect();
            return Ok(());
        }
        let peers = self.peers()?;
        check::has_len("the group", all.len(), peers.world_size)?;
        let mut workspaces = [0; MAX_RANKS];
        for (target, [workspace, _]) in workspaces.iter_mut().zip(all) {
            *target = *workspace;
        }
        let mut rows = [0; MAX_RANKS];
        rows[0] = all[0][1];
        let arguments = PeersArg {
            workspaces,
            error: peers.error.as_ptr() as Address,
            timeout_ns: TIMEOUT_NS,
            slot_bytes: SLOT_BYTES as i64,
            rank: peers.rank as i32,
            world_size: peers.world_size as i32,
        };
        let _ = peers.connected.set((arguments, OutputsArg { rows }));
        Ok(())
    }

    /// Checks that no collective gave up.
    pub(in crate::kernels) fn check_collectives(&self) -> Result<()> {
        if let Some(nccl) = self.nccl.get() {
            return nccl.check();
        }
        let Some(peers) = &self.peers else {
            return Ok(());
        };
        // SAFETY: a valid word, which the GPU may write at any time.
        match unsafe { peers.error.as_ptr().read_volatile() } {
            0 => Ok(()),
            INTERRUPTED => bail!("the collectives were interrupted"),
            missing => bail!(
                "rank {} did not come to a collective within {:?}",
                missing - 1,
                Duration::from_nanos(TIMEOUT_NS)
            ),
        }
    }

    /// Returns what lets this GPU's collectives stop waiting.
    pub(in crate::kernels) fn interrupt(&self) -> Option<Interrupt> {
        if let Some(nccl) = self.nccl.get() {
            return Some(Interrupt(Way::Nccl(nccl.interrupt())));
        }
        let peers = self.peers.as_ref()?;
        Some(Interrupt(Way::Word(Arc::clone(&peers.error))))
    }

    /// Returns the sum over ranks of `x`, in its place.
    pub(in crate::kernels) fn all_reduce(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(nccl) = self.nccl.get() {
            nccl.all_reduce(&self.driver, x, self.address("x", x, self.dtype)?)?;
            return Ok(x.clone());
        }
        let peers = self.peers()?;
        let Some((arguments, _)) = peers.connected.get() else {
            return Ok(x.clone());
        };
        let start = self.address("x", x, self.dtype)?;
        let num_vectors = x.elem_count() / 8;
        let most = MAX_BYTES / 16;
        for first in (0..num_vectors).step_by(most) {
            let num_vectors = most.min(num_vectors - first);
            let part = start + (16 * first) as Address;
            let block = match num_vectors {
                ..=16_384 => 128,
                16_385..=32_768 => 256,
                _ => MAX_THREADS,
            };
            let shots = self.shots(16 * num_vectors, num_vectors, false);
            let name = format!("all_reduce{shots}_{}_r{}", self.type_name, peers.world_size);
            let grid = [num_vectors.div_ceil(block).min(MAX_BLOCKS), 1, 1];
            let args = [
                Arg::Pointer(part),
                Arg::Pointer(part),
                Arg::I32(num_vectors as i32),
                Arg::Structure(std::ptr::from_ref(arguments).cast()),
            ];
            self.driver
                .launch(&name, Geometry::new(grid, block), &args)?;
        }
        Ok(x.clone())
    }

    /// Returns the norm of `residual` + the sum over ranks of `x`, and that sum.
    pub(in crate::kernels) fn all_reduce_add_rms_norm(
        &self,
        x: &Tensor,
        residual: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        if self.nccl.get().is_some() {
            let sum = self.all_reduce(x)?;
            return self.add_rms_norm(&sum, residual, weight, eps);
        }
        let peers = self.peers()?;
        let width = weight.elem_count();
        let Some((arguments, _)) = peers.connected.get() else {
            return self.add_rms_norm(x, residual, weight, eps);
        };
        let num_rows = check::rows_of("x", x, width)?;
        check::rows_of("residual", residual, width)?;
        let (tensor, out) = self.new_tensor([num_rows, width])?;
        let (sum_tensor, sum) = self.new_tensor([num_rows, width])?;
        let x = self.address("x", x, self.dtype)?;
        let residual = self.address("residual", residual, self.dtype)?;
        let weight = self.address("the norm's weight", weight, self.dtype)?;
        if width > MAX_NORM_WIDTH {
            bail!("a norm of {width} elements after a sum over ranks; at most {MAX_NORM_WIDTH}");
        }
        let block = norm_geometry(1, width).block.min(MAX_THREADS);
        let most = MAX_BYTES / (2 * width);
        for first in (0..num_rows).step_by(most) {
            let rows = most.min(num_rows - first);
            let offset = (2 * width * first) as Address;
            let args = [
                Arg::Pointer(out + offset),
                Arg::Pointer(sum + offset),
                Arg::Pointer(x + offset),
                Arg::Pointer(residual + offset),
                Arg::Pointer(weight),
                Arg::F32(eps),
                Arg::I32(rows as i32),
                Arg::I32(width as i32),
                Arg::Structure(std::ptr::from_ref(arguments).cast()),
            ];
            let shots = self.shots(2 * width * rows, rows, true);
            let name = format!(
                "all_reduce{shots}_add_rms_norm_{}_r{}",
                self.type_name, peers.world_size
            );
            let geometry = Geometry::new([rows.min(MAX_BLOCKS), 1, 1], block);
            self.driver.launch(&name, geometry, &args)?;
        }
        Ok((tensor, sum_tensor))
    }

    /// Returns the part of a reduction's name that says how it sends: two shots from where they
    /// were faster (2 ranks: measured on H200s; more: estimated; docs/gpu_log.md).
    fn shots(&self, num_bytes: usize, num_items: usize, has_norm: bool) -> &'static str {
        let world_size = self.peers.as_ref().map_or(1, |peers| peers.world_size);
        let kib = match (world_size, has_norm) {
            (2, false) => 7 << 10,
            (2, true) => 2 << 10,
            (3, false) => 768,
            (3, true) => 640,
            (4, false) => 352,
            (4, true) => 288,
            (6, false) => 176,
            (6, true) => 144,
            (_, false) => 112,
            (_, true) => 96,
        };
        // One shot needs a slot of that many bytes for each rank.
        let fits_one = num_bytes * world_size <= SLOT_BYTES;
        match num_items >= world_size && (num_bytes >= kib << 10 || !fits_one) {
            true => "_two_shot",
            false => "",
        }
    }

    /// Gives all ranks the ids of the `num_rows` tokens that rank 0 drew last.
    pub(in crate::kernels) fn share_drawn_ids(&self, num_rows: usize) -> Result<()> {
        if let Some(nccl) = self.nccl.get() {
            return nccl.broadcast(&self.driver, self.sampler.drawn_ids(), num_rows);
        }
        let Some((arguments, _)) = self.peers.as_ref().and_then(|peers| peers.connected.get())
        else {
            return Ok(());
        };
        let num_vectors = num_rows.div_ceil(4);
        let args = [
            Arg::Pointer(self.sampler.drawn_ids()),
            Arg::I32(num_vectors as i32),
            Arg::Structure(std::ptr::from_ref(arguments).cast()),
        ];
        let block = num_vectors.next_multiple_of(32).clamp(32, 1024);
        self.driver
            .launch("broadcast_ids", Geometry::new([1, 1, 1], block), &args)
    }

    /// Joins the columns of f32 `x [rows, width]` of all ranks on rank 0; others get theirs back.
    pub(in crate::kernels) fn all_gather_columns(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(nccl) = self.nccl.get() {
            let start = self.address("x", x, DType::F32)?;
            return nccl.all_gather_columns(&self.driver, x, start);
        }
        let peers = self.peers()?;
        let (rows, width) = x.dims2()?;
        let joined = || match &peers.gathered {
            Some(gathered) => gathered.narrow(0, 0, rows),
            None => Ok(x.clone()),
        };
        let Some((arguments, outputs)) = peers.connected.get() else {
            return joined();
        };
        let num_vectors = rows * width / 4;
        let args = [
            Arg::Pointer(self.address("x", x, DType::F32)?),
            Arg::I32(rows as i32),
            Arg::I32(width as i32),
            Arg::Structure(std::ptr::from_ref(outputs).cast()),
            Arg::Structure(std::ptr::from_ref(arguments).cast()),
        ];
        let grid = [num_vectors.div_ceil(512).clamp(1, MAX_BLOCKS), 1, 1];
        self.driver
            .launch("all_gather_columns", Geometry::new(grid, 512), &args)?;
        joined()
    }
}

/// Returns why ranks on the `world_size` GPUs from `first` on cannot use our own collectives, if
/// they cannot.
pub(super) fn obstacle(first: usize, world_size: usize) -> Result<Option<String>> {
    if !WORLD_SIZES.contains(&world_size) {
        return Ok(Some(format!(
            "groups of {WORLD_SIZES:?} GPUs have kernels of their own, not one of {world_size}"
        )));
    }
    for own in first..first + world_size {
        for other in (first..first + world_size).filter(|&other| other != own) {
            if !can_access(own, other)? {
                return Ok(Some(format!(
                    "GPU {own} cannot reach the memory of GPU {other}"
                )));
            }
        }
    }
    Ok(None)
}

fn can_access(own: usize, other: usize) -> Result<bool> {
    let what = "find out which GPUs reach each other";
    told(what, result::init())?;
    let device = |ordinal: usize| told(what, result::device::get(ordinal as i32));
    let (own, other) = (device(own)?, device(other)?);
    let mut can_access = 0;
    // SAFETY: both are devices.
    let asked = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can_access, own, other) };
    told(what, asked.result())?;
    Ok(can_access != 0)
}

/// Lets GPU `own`, whose context is current, use plain allocations and tensors of GPU `other`.
fn allow_access(driver: &Driver, own: usize, other: usize) -> Result<()> {
    driver.bind()?;
    let what = format!("let GPU {own} use the memory of GPU {other} (peer access)");
    let device = |ordinal: usize| told(&what, result::device::get(ordinal as i32));
    let (own, other) = (device(own)?, device(other)?);
    // SAFETY: both are devices; the contexts are the primary ones, which live as long as the
    // process; the pool is the device's own.
    unsafe {
        let context = told(&what, result::primary_ctx::retain(other))?;
        match sys::cuCtxEnablePeerAccess(context, 0) {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {}
            enabled => told(&what, enabled.result())?,
        }
        // Tensors come from a pool of their own, of which the other GPU is told.
        let pool = told(&what, result::device::get_default_mem_pool(own))?;
        let access = sys::CUmemAccessDesc {
            location: sys::CUmemLocation {
                type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                id: other,
            },
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        told(
            &what,
            sys::cuMemPoolSetAccess(pool, &raw const access, 1).result(),
        )
    }
}
