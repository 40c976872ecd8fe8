//! Weights to the GPU through pinned buffers that several threads fill.
//!
//! Given a mapped file, the driver reads it in the calling thread, a page fault at a time. Here each
//! thread takes the next piece of a matrix, reads it into one of its two pinned buffers and lets the GPU
//! fetch it while it reads on into the other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use candle_core::{Result, bail};

use super::driver::{Address, Driver};
use super::turns::Turns;

/// Bytes that a thread reads at a time.
const PIECE_BYTES: usize = 4 << 20;
/// Threads of one GPU at most. A guess: not measured yet.
const MAX_THREADS: usize = 8;

/// The threads' buffers, from the first large matrix to [`Self::free`].
pub(super) struct Uploader {
    num_threads: usize,
    lanes: Mutex<Vec<Turns<u8>>>,
}

impl Uploader {
    /// Plans for a GPU that loads at the same time as others, `world_size` in all.
    pub(super) fn new(world_size: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            num_threads: (cores / world_size).clamp(1, MAX_THREADS),
            lanes: Mutex::new(Vec::new()),
        }
    }

    /// Copies `data` to `target` in stream order. When it returns, `data` is no longer needed.
    ///
    /// # Safety
    /// `target` must have room for `data`.
    ///
    /// # Errors
    /// When pinned memory is out, or the GPU has faulted.
    pub(super) unsafe fn upload(
        &self,
        driver: &Driver,
        target: Address,
        data: &[u8],
    ) -> Result<()> {
        if data.len() <= PIECE_BYTES {
            // SAFETY: passed on; ordinary memory is read before the call returns.
            return unsafe { driver.upload(target, data) };
        }
        let pieces: Vec<&[u8]> = data.chunks(PIECE_BYTES).collect();
        let next = AtomicUsize::new(0);
        let work = |lane: &mut Turns<u8>| -> Result<()> {
            driver.bind()?;
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(piece) = pieces.get(index) else {
                    return Ok(());
                };
                let (buffer, uploaded) = lane.take(driver)?;
                buffer.get_mut()[..piece.len()].copy_from_slice(piece);
                let target = target + (index * PIECE_BYTES) as Address;
                // SAFETY: a piece of what the caller promises; the buffer is written to again, or
                // freed, only after the event behind this copy.
                unsafe { driver.upload(target, &buffer.get()[..piece.len()])? };
                uploaded.record(driver)?;
            }
        };
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        while lanes.len() < self.num_threads {
            lanes.push(Turns::new(driver, PIECE_BYTES)?);
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = lanes
                .iter_mut()
                .take(pieces.len())
                .map(|lane| scope.spawn(|| work(lane)))
                .collect();
            // All are waited for, whatever the first one says.
            let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            results.into_iter().try_for_each(|result| match result {
                Ok(result) => result,
                Err(_) => bail!("a thread that uploads weights panicked"),
            })
        })
    }

    /// Frees the buffers.
    ///
    /// # Errors
    /// When the GPU has faulted.
    pub(super) fn free(&self, driver: &Driver) -> Result<()> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        // What is in flight reads them.
        driver.synchronize()?;
        lanes.clear();
        Ok(())
    }
}
