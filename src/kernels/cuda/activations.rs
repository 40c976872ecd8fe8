//! Memory of activations: two halves that take turns layer by layer.
//!
//! A tensor made in one layer is read in that layer and the next at most, so a layer may write
//! over what the layer before the last one left. Addresses depend on the order of allocations
//! alone, which is what recorded graphs need, and nothing is freed while a kernel may be reading.
//! (candle frees a tensor's memory when it is dropped, to a pool that may map the pages anew
//! while kernels of another stream still wait to use them: measured as faults on large steps.)

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor, bail};

/// Elements that tensors are aligned to: 256 bytes.
const ALIGNMENT: usize = 128;
/// Elements of a chunk while sizes are not known yet.
const CHUNK_ELEMENTS: usize = 64 << 20;

/// Where a tensor is made.
#[derive(Clone, Copy)]
pub(super) enum Lifetime {
    /// Until the layer after the next begins.
    Layer,
    /// Until the next tensor of this lifetime.
    Call,
}

pub(super) struct Activations {
    dtype: DType,
    state: Mutex<State>,
}

struct State {
    halves: [Region; 2],
    current: usize,
    call: Region,
    /// Whether the regions have their final size.
    is_settled: bool,
}

/// Memory that is handed out from its beginning on.
#[derive(Default)]
struct Region {
    chunks: Vec<Tensor>,
    /// The chunk and element that come next.
    next: (usize, usize),
    used: usize,
    peak: usize,
}

impl Activations {
    pub(super) fn new(dtype: DType) -> Self {
        let state = State {
            halves: [Region::default(), Region::default()],
            current: 0,
            call: Region::default(),
            is_settled: false,
        };
        Self {
            dtype,
            state: Mutex::new(state),
        }
    }

    /// Begins a layer: what the layer before the last one made is gone.
    pub(super) fn next_layer(&self) {
        let mut state = self.lock();
        state.current = 1 - state.current;
        let current = state.current;
        state.halves[current].reset();
    }

    /// Returns a tensor whose elements are undefined.
    pub(super) fn take(&self, device: &Device, dims: &[usize], life: Lifetime) -> Result<Tensor> {
        let len = dims.iter().product::<usize>();
        let mut state = self.lock();
        let is_settled = state.is_settled;
        let current = state.current;
        let region = match life {
            Lifetime::Layer => &mut state.halves[current],
            Lifetime::Call => {
                state.call.reset();
                &mut state.call
            }
        };
        let padded = len.next_multiple_of(ALIGNMENT);
        if !region.advance_to(padded) {
            if is_settled {
                bail!(
                    "activations of {} elements after {}: the largest step took {}",
                    padded,
                    region.used,
                    region.peak
                );
            }
            region
                .chunks
                .push(new_chunk(padded.max(CHUNK_ELEMENTS), self.dtype, device)?);
        }
        let (chunk, start) = region.next;
        region.next.1 += padded;
        region.used += padded;
        region.peak = region.peak.max(region.used);
        region.chunks[chunk].narrow(0, start, len)?.reshape(dims)
    }

    /// Makes sure that [`Self::settle`] leaves room for a tensor of `len` elements by itself.
    pub(super) fn expect(&self, len: usize, life: Lifetime) {
        let mut state = self.lock();
        let State { halves, call, .. } = &mut *state;
        let region = match life {
            Lifetime::Layer => &mut halves[0],
            Lifetime::Call => call,
        };
        region.peak = region.peak.max(len.next_multiple_of(ALIGNMENT));
    }

    /// Gives each region the size that it needed at most so far, in one piece, for good. Nothing
    /// may be running or be read later.
    pub(super) fn settle(&self, device: &Device) -> Result<()> {
        let mut state = self.lock();
        let State {
            halves: [first, second],
            call,
            ..
        } = &mut *state;
        let half = first.peak.max(second.peak);
        for (region, len) in [(first, half), (second, half), (call, 0)] {
            let len = len.max(region.peak);
            *region = Region {
                peak: len,
                ..Region::default()
            };
            region
                .chunks
                .push(new_chunk(len.max(ALIGNMENT), self.dtype, device)?);
        }
        state.is_settled = true;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Region {
    fn reset(&mut self) {
        (self.next, self.used) = ((0, 0), 0);
    }

    /// Moves to a chunk with room for `len` elements; false where there is none, `next` then
    /// being the chunk to come.
    fn advance_to(&mut self, len: usize) -> bool {
        while let Some(chunk) = self.chunks.get(self.next.0) {
            if self.next.1 + len <= chunk.elem_count() {
                return true;
            }
            self.next = (self.next.0 + 1, 0);
        }
        false
    }
}

fn new_chunk(len: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every tensor cut from it is written by the kernel that it was made for.
    unsafe { Tensor::empty(len, dtype, device) }
}
