//! How the ranks of a group of GPUs meet: through own kernels or NCCL, and what they do together.
//!
//! The CPU needs none of it: its ranks meet through their `Comm`.

use candle_core::{Result, Tensor, bail};

use super::cuda;
use super::{DeviceOptions, Kernels};

/// How the GPUs of a group meet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Collectives {
    /// Own kernels write into the other GPUs' memory.
    Peers,
    /// NCCL carries the data.
    Nccl(NcclGroup),
}

/// A group that meets through NCCL.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NcclGroup(pub(super) cuda::UniqueId);

/// What the user wants of [`Collectives`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CollectiveChoice {
    /// Own kernels where all GPUs reach each other, else NCCL.
    #[default]
    Fastest,
    /// NCCL (`--disable-custom-all-reduce`).
    Nccl,
}

/// Ends the waiting of a GPU's collectives for other ranks, from any thread.
#[derive(Clone)]
pub struct Interrupt(cuda::Interrupt);

impl Interrupt {
    /// Lets the collectives that wait end at once, with wrong results: to be called when a rank
    /// has failed. [`Kernels::check_collectives`] is an error from then on.
    pub fn raise(self) {
        self.0.raise();
    }
}

impl Kernels {
    /// Chooses how ranks on `world_size` GPUs from `first` on meet. To be called once for a group,
    /// before its ranks have threads.
    ///
    /// # Errors
    /// When NCCL is needed and cannot be loaded, with why and what was tried.
    pub fn choose_collectives(
        first: usize,
        world_size: usize,
        choice: CollectiveChoice,
    ) -> Result<Collectives> {
        let group = cuda::choose_collectives(first, world_size, choice)?;
        Ok(group.map_or(Collectives::Peers, |id| Collectives::Nccl(NcclGroup(id))))
    }

    /// Joins the group of `options`, those that these kernels were opened with, where it meets
    /// through NCCL. Returns when all ranks have come, and does not if one never comes.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn join_group(&self, options: &DeviceOptions) -> Result<()> {
        self.gpu
            .as_ref()
            .map_or(Ok(()), |gpu| gpu.join_group(options))
    }

    /// Leaves the group that [`Kernels::join_group`] joined; all recorded graphs must be gone.
    pub fn leave_group(&self) {
        if let Some(gpu) = &self.gpu {
            gpu.leave_group();
        }
    }

    /// Returns whether these kernels have the collectives of a group of GPUs.
    pub fn has_group(&self) -> bool {
        self.gpu.as_ref().is_some_and(|gpu| gpu.has_group())
    }

    /// Returns what the other ranks' [`Kernels::connect_peers`] must be given of this one.
    ///
    /// # Errors
    /// When it belongs to no group of GPUs.
    pub fn peer_addresses(&self) -> Result<[u64; 2]> {
        match &self.gpu {
            Some(gpu) => gpu.peer_addresses(),
            None => bail!("CPU ranks have no addresses"),
        }
    }

    /// Connects the ranks of a group, given all their addresses in order; before, collectives
    /// return what they are given. All ranks must have loaded their weights.
    ///
    /// # Errors
    /// When the group has another size.
    pub fn connect_peers(&self, all: &[[u64; 2]]) -> Result<()> {
        self.gpu
            .as_ref()
            .map_or(Ok(()), |gpu| gpu.connect_peers(all))
    }

    /// Checks that the collectives which have run found all ranks.
    ///
    /// # Errors
    /// Naming the rank that one gave up waiting for. The group is of no use any more.
    pub fn check_collectives(&self) -> Result<()> {
        self.gpu
            .as_ref()
            .map_or(Ok(()), |gpu| gpu.check_collectives())
    }

    /// Returns what ends this GPU's waiting for other ranks.
    pub fn interrupt(&self) -> Option<Interrupt> {
        self.gpu.as_ref()?.interrupt().map(Interrupt)
    }

    /// Returns the sum of `x` over the GPUs of the group, in its place.
    ///
    /// # Errors
    /// When there is no group.
    pub fn all_reduce(&self, x: &Tensor) -> Result<Tensor> {
        match &self.gpu {
            Some(gpu) => gpu.all_reduce(x),
            None => bail!("CPU ranks reduce through their Comm"),
        }
    }

    /// Returns what [`Kernels::add_rms_norm`] makes of the sum of `x` over the group's GPUs, bit
    /// for bit, in one kernel.
    ///
    /// # Errors
    /// When shapes disagree or there is no group.
    pub fn all_reduce_add_rms_norm(
        &self,
        x: &Tensor,
        residual: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        match &self.gpu {
            Some(gpu) => gpu.all_reduce_add_rms_norm(x, residual, weight, eps),
            None => bail!("CPU ranks reduce through their Comm"),
        }
    }

    /// Joins columns of f32 `x` over the group on rank 0; other ranks get theirs back.
    ///
    /// # Errors
    /// When there is no group.
    pub fn all_gather_columns(&self, x: &Tensor) -> Result<Tensor> {
        match &self.gpu {
            Some(gpu) => gpu.all_gather_columns(x),
            None => bail!("CPU ranks gather through their Comm"),
        }
    }
}
