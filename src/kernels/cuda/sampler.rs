//! Draws tokens on the GPU: packs each row's parameters, launches `sample`, reads the ids back.
//!
//! The drawn ids stay where they are until the next launch, so that the embedding of the step in
//! between may read them. What goes up and comes back passes through two sets of pinned memory
//! that take turns: one step may be prepared while the one before is not read yet.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Result, Tensor, bail};

use super::super::{
    Draw, DrawOutcome, Drawn, MAX_STEP_BIASES as MAX_BIASES, MAX_TOP_LOGPROBS as MAX_TOP,
};
use super::Gpu;
use super::driver::{Address, Arg, Driver, Geometry, OVERLAPPING};
use super::event::Event;
use super::memory::{Buffer, Pinned};

/// Words of `SamplingParams` in sampler.cu.
const PARAMS_WORDS: usize = 18;
/// A row's `top_k` that makes `sample` leave it alone.
const SKIPPED: u32 = u32::MAX;
/// Bit 15 of a count marks the prompt; the rest counts.
const COUNT_BYTES: usize = 2;
/// Tokens that one call of `mark_tokens` takes.
const MAX_MARKED: usize = 1 << 16;
/// Words of a row's result besides the top: token, status, logprob, rank.
const RESULT_WORDS: usize = 4;

/// Buffers of the sampler, for rows of one vocabulary.
pub(super) struct Sampler {
    vocab_size: usize,
    max_rows: usize,
    /// `f32 [max_rows, stride]`, made by the first call.
    logits: Mutex<Option<Tensor>>,
    inputs: Buffer,
    outputs: Buffer,
    counts: Buffer,
    marked: Buffer,
    host: Mutex<[Host; 2]>,
    scratch: Option<Buffer>,
    shared_len: usize,
    cluster: usize,
}

struct Host {
    inputs: Pinned<u32>,
    outputs: Pinned<u32>,
    /// Comes when the outputs are there.
    done: Event,
    /// From a launch until its outputs have been read.
    is_pending: bool,
}

impl Host {
    fn new(driver: &Driver, num_inputs: usize, num_outputs: usize) -> Result<Self> {
        Ok(Self {
            inputs: Pinned::new(driver, num_inputs)?,
            outputs: Pinned::new(driver, num_outputs)?,
            done: Event::new(driver)?,
            is_pending: false,
        })
    }
}

/// A launch of `sample` whose outputs have not been read.
pub(in crate::kernels) struct PendingDraws {
    /// Which of the two hosts.
    host: usize,
    /// How many top tokens each row reports; none for a row that draws nothing.
    rows: Vec<Option<usize>>,
}

impl Sampler {
    pub(super) fn new(driver: &Driver, max_rows: usize, vocab_size: usize) -> Result<Self> {
        let cluster = if driver.compiled_for >= OVERLAPPING {
            8
        } else {
            1
        };
        let share = vocab_size.div_ceil(cluster).next_multiple_of(4);
        // Two blocks a multiprocessor.
        let largest = (driver.shared_bytes_per_block / 8).saturating_sub(5 << 10) / 4 * 4;
        let fits = share <= largest;
        let shared_len = if fits { share } else { 0 };
        driver.allow_shared("sample", 4 * shared_len as u32)?;
        let num_inputs = max_rows * PARAMS_WORDS + 2 * MAX_BIASES;
        let num_outputs = max_rows * (RESULT_WORDS + 2 * MAX_TOP);
        let scratch = match fits {
            true => None,
            false => Some(driver.allocate(4 * max_rows * cluster * share)?),
        };
        Ok(Self {
            vocab_size,
            max_rows,
            logits: Mutex::new(None),
            inputs: driver.allocate(4 * num_inputs)?,
            outputs: driver.allocate_zeroed(4 * num_outputs)?,
            counts: driver.allocate_zeroed(max_rows * counts_stride(vocab_size) * COUNT_BYTES)?,
            marked: driver.allocate(4 * MAX_MARKED)?,
            host: Mutex::new([
                Host::new(driver, num_inputs, num_outputs)?,
                Host::new(driver, num_inputs, num_outputs)?,
            ]),
            scratch,
            shared_len,
            cluster,
        })
    }

    /// Returns where the ids are that the last launch draws, one a row.
    pub(super) fn drawn_ids(&self) -> Address {
        self.outputs.address()
    }

    /// Returns the first rows of the buffer of logits and their address.
    pub(super) fn logits_buffer(
        &self,
        gpu: &Gpu,
        num_rows: usize,
        stride: usize,
    ) -> Result<(Tensor, Address)> {
        if num_rows > self.max_rows {
            bail!(
                "{num_rows} rows of logits; the buffer holds {}",
                self.max_rows
            );
        }
        let mut buffer = self.logits.lock().unwrap_or_else(PoisonError::into_inner);
        let tensor = match &*buffer {
            Some(tensor) if tensor.dims()[1] == stride => tensor.clone(),
            _ => gpu.new_lasting([self.max_rows, stride], DType::F32)?.0,
        };
        *buffer = Some(tensor.clone());
        let tensor = tensor.narrow(0, 0, num_rows)?;
        let address = gpu.address("logits", &tensor, DType::F32)?;
        Ok((tensor, address))
    }
}

impl Gpu {
    /// Launches the draw of one token for each row that asks for it; `logits` is what
    /// [`Gpu::logits`] returned.
    ///
    /// # Errors
    /// When there are more rows or biases than the buffers hold, or two launches are pending.
    pub(in crate::kernels) fn launch_draws(
        &self,
        logits: &Tensor,
        draws: &[Option<Draw>],
    ) -> Result<PendingDraws> {
        let sampler = &self.sampler;
        let num_rows = draws.len();
        if num_rows > sampler.max_rows || num_rows > logits.dims()[0] {
            bail!("{num_rows} draws from {:?} logits", logits.dims());
        }
        self.launch_pending(draws, |host| {
            let num_inputs = pack(draws, host.inputs.get_mut())?;
            // SAFETY: the buffers have one length; the host's next turn is after the event that
            // comes later in the stream.
            unsafe {
                self.driver
                    .upload(sampler.inputs.address(), &host.inputs.get()[..num_inputs])?
            };
            self.launch_sample(logits, num_rows)?;
            let num_top = draws.iter().flatten().filter_map(|draw| draw.num_logprobs);
            let len = match num_top.max() {
                Some(1..) => num_rows * (RESULT_WORDS + 2 * MAX_TOP),
                _ => num_rows * RESULT_WORDS,
            };
            // SAFETY: the buffer is that long, and it is read after the event.
            unsafe {
                self.driver.download(
                    &mut host.outputs.get_mut()[..len],
                    sampler.outputs.address(),
                )
            }
        })
    }

    /// Launches nothing, to be waited for like draws.
    ///
    /// # Errors
    /// When two launches are pending.
    pub(in crate::kernels) fn launch_no_draws(&self) -> Result<PendingDraws> {
        self.launch_pending(&[], |_| Ok(()))
    }

    fn launch_pending(
        &self,
        draws: &[Option<Draw>],
        launch: impl FnOnce(&mut Host) -> Result<()>,
    ) -> Result<PendingDraws> {
        let mut hosts = self.lock_hosts();
        let free = hosts.iter().position(|host| !host.is_pending);
        let Some(index) = free else {
            bail!("a third step is launched before the first one is read");
        };
        let host = &mut hosts[index];
        // Also where the launch fails: part of it may be in the stream.
        host.is_pending = true;
        launch(host)?;
        host.done.record(&self.driver)?;
        let num_top = |draw: &Draw| draw.num_logprobs.unwrap_or(0).min(MAX_TOP);
        Ok(PendingDraws {
            host: index,
            rows: draws
                .iter()
                .map(|draw| draw.as_ref().map(num_top))
                .collect(),
        })
    }

    /// Waits for a launch and returns what its rows drew.
    ///
    /// # Errors
    /// When a kernel has faulted.
    pub(in crate::kernels) fn finish_draws(
        &self,
        draws: PendingDraws,
    ) -> Result<Vec<Option<Drawn>>> {
        let mut hosts = self.lock_hosts();
        let host = &mut hosts[draws.host];
        host.done.wait(&self.driver)?;
        host.is_pending = false;
        let (words, num_rows) = (host.outputs.get(), draws.rows.len());
        let rows = draws.rows.iter().enumerate();
        Ok(rows
            .map(|(row, num_top)| num_top.map(|num_top| unpack(words, row, num_rows, num_top)))
            .collect())
    }

    fn lock_hosts(&self) -> MutexGuard<'_, [Host; 2]> {
        let hosts = &self.sampler.host;
        hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn launch_sample(&self, logits: &Tensor, num_rows: usize) -> Result<()> {
        let sampler = &self.sampler;
        let (stride, shared_len) = (logits.stride()[0], sampler.shared_len);
        let inputs = sampler.inputs.address();
        let word = |index: usize| sampler.outputs.address() + (4 * index) as Address;
        let bias_ids = inputs + (4 * num_rows * PARAMS_WORDS) as Address;
        let top = RESULT_WORDS * num_rows;
        let mut args = [
            word(0),
            word(num_rows),
            word(2 * num_rows),
            word(3 * num_rows),
            word(top),
            word(top + MAX_TOP * num_rows),
            self.address(
                "logits",
                &logits.narrow(0, 0, 1)?.narrow(1, 0, 1)?,
                DType::F32,
            )?,
            sampler.scratch.as_ref().map_or(0, Buffer::address),
            inputs,
            bias_ids,
            bias_ids + (4 * MAX_BIASES) as Address,
            0,
            sampler.counts.address(),
        ]
        .map(Arg::Pointer)
        .to_vec();
        args.extend([
            Arg::I32(sampler.vocab_size as i32),
            Arg::I64(stride as i64),
            Arg::I64(0),
            Arg::I64(counts_stride(sampler.vocab_size) as i64),
            Arg::I32(MAX_TOP as i32),
            Arg::I32(shared_len as i32),
        ]);
        let geometry = Geometry {
            grid: [num_rows * sampler.cluster, 1, 1],
            block: 512,
            shared_bytes: 4 * shared_len as u32,
        };
        self.driver.launch("sample", geometry, &args)
    }

    /// Fills a penalty slot with what its sequence has seen.
    ///
    /// # Errors
    /// When there is no such slot.
    pub(in crate::kernels) fn mark_tokens(
        &self,
        slot: usize,
        prompt: &[u32],
        drawn: &[u32],
    ) -> Result<()> {
        let sampler = &self.sampler;
        if slot >= sampler.max_rows {
            bail!("penalty slot {slot} of {}", sampler.max_rows);
        }
        let num_bytes = counts_stride(sampler.vocab_size) * COUNT_BYTES;
        let counts = sampler.counts.address() + (slot * num_bytes) as Address;
        self.driver.bind()?;
        // SAFETY: one slot of the buffer.
        unsafe { self.driver.zero(counts, num_bytes)? };
        for (ids, is_prompt) in [(prompt, true), (drawn, false)] {
            for ids in ids.chunks(MAX_MARKED) {
                // SAFETY: at most what the buffer holds; ordinary memory is read before the call
                // returns.
                unsafe { self.driver.upload(sampler.marked.address(), ids)? };
                let args = [
                    Arg::Pointer(counts),
                    Arg::Pointer(sampler.marked.address()),
                    Arg::I32(if is_prompt { ids.len() as i32 } else { 0 }),
                    Arg::I32(ids.len() as i32),
                    Arg::I32(sampler.vocab_size as i32),
                ];
                let blocks = ids.len().div_ceil(256).clamp(1, 64);
                self.driver
                    .launch("mark_tokens", Geometry::new([blocks, 1, 1], 256), &args)?;
            }
        }
        Ok(())
    }
}

/// Elements of a slot's counts.
fn counts_stride(vocab_size: usize) -> usize {
    vocab_size.next_multiple_of(8)
}

/// Writes the rows' parameters and biases as sampler.cu reads them; returns the words in use.
fn pack(draws: &[Option<Draw>], words: &mut [u32]) -> Result<usize> {
    let (params, biases) = words.split_at_mut(draws.len() * PARAMS_WORDS);
    let (bias_ids, bias_values) = biases.split_at_mut(MAX_BIASES);
    let mut num_biases = 0;
    for (row, draw) in params.chunks_exact_mut(PARAMS_WORDS).zip(draws) {
        row.fill(0);
        let Some(draw) = draw else {
            row[1] = SKIPPED;
            continue;
        };
        let start = num_biases;
        for &(token_id, bias) in &draw.biases {
            if num_biases == MAX_BIASES {
                bail!("more than {MAX_BIASES} logit biases in one step");
            }
            bias_ids[num_biases] = token_id;
            bias_values[num_biases] = bias.to_bits();
            num_biases += 1;
        }
        let slot = draw.penalty_slot.map_or(-1, |slot| slot as i32);
        let num_logprobs = draw.num_logprobs.map_or(-1, |num| num.min(MAX_TOP) as i32);
        row.copy_from_slice(&[
            draw.temperature.to_bits(),
            draw.top_k.min(SKIPPED - 1),
            draw.top_p.to_bits(),
            draw.min_p.to_bits(),
            draw.typical_p.to_bits(),
            draw.repetition_penalty.to_bits(),
            draw.frequency_penalty.to_bits(),
            draw.presence_penalty.to_bits(),
            draw.seed as u32,
            (draw.seed >> 32) as u32,
            draw.output_index as u32,
            (draw.output_index >> 32) as u32,
            slot as u32,
            // No grammar.
            -1i32 as u32,
            num_logprobs as u32,
            start as u32,
            num_biases as u32,
            0,
        ]);
    }
    Ok(match num_biases {
        0 => draws.len() * PARAMS_WORDS,
        _ => draws.len() * PARAMS_WORDS + MAX_BIASES + num_biases,
    })
}

/// Reads one row's result and its `num_top` most likely tokens.
fn unpack(words: &[u32], row: usize, num_rows: usize, num_top: usize) -> Drawn {
    let word = |field: usize| words[field * num_rows + row];
    let outcome = match word(1) {
        0 => DrawOutcome::Drawn,
        1 => DrawOutcome::NotFinite,
        _ => DrawOutcome::NothingLeft,
    };
    let ids = RESULT_WORDS * num_rows + row * MAX_TOP;
    let logprobs = ids + num_rows * MAX_TOP;
    Drawn {
        token_id: word(0),
        outcome,
        logprob: f32::from_bits(word(2)),
        rank: word(3) as usize,
        top: (0..num_top)
            .map(|i| (words[ids + i], f32::from_bits(words[logprobs + i])))
            .collect(),
    }
}
