//! The engine thread: takes commands, runs steps, sends events. Owns all engine state.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::batch::{LogitsUse, StepInput};
use super::handle::{Command, Shared, Submission};
use super::model_runner::RowOutput;
use super::ranks::Ranks;
use super::request::{TokenEvent, TokenLogprobs};
use super::sampler::{SampleError, Sampled, SequenceSampler, token_logprobs};
use super::scheduler::{ScheduledBatch, Scheduler, Update};
use super::sequence::SequenceId;

/// A sequence that somebody listens to.
struct ActiveSequence {
    events: UnboundedSender<TokenEvent>,
    sampler: SequenceSampler,
    /// Where the device keeps what the sequence's penalties have seen.
    penalty_slot: Option<usize>,
    /// Number of tokens drawn so far: the index into the sampler's random stream.
    num_sampled: usize,
    /// How many alternatives each prompt token is reported with, when asked for.
    num_prompt_logprobs: Option<usize>,
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    submitted_at: Instant,
    /// When it first left the waiting queue.
    started_at: Option<Instant>,
}

/// What became of the rows of one step.
#[derive(Default)]
struct StepOutcome {
    sampled: Vec<(SequenceId, u32)>,
    logprobs: HashMap<SequenceId, TokenLogprobs>,
    failed: Vec<(SequenceId, String)>,
    /// The row being drawn from.
    row: Vec<f32>,
}

impl StepOutcome {
    fn fail(&mut self, id: SequenceId, error: &SampleError) {
        self.failed.push((id, error.to_string()));
    }
}

/// Scheduler, ranks and the sequences' channels.
pub(super) struct EngineCore {
    scheduler: Scheduler,
    ranks: Ranks,
    commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    active: HashMap<SequenceId, ActiveSequence>,
    next_id: SequenceId,
    seed: u64,
    /// Penalty slots of the device that no sequence has.
    free_penalty_slots: Vec<usize>,
}

impl EngineCore {
    /// Puts the parts together; nothing runs before [`Self::run`].
    pub(super) fn new(
        scheduler: Scheduler,
        ranks: Ranks,
        commands: mpsc::Receiver<Command>,
        shared: Arc<Shared>,
        seed: u64,
    ) -> Self {
        let num_slots = match ranks.draws_on_device() {
            true => shared.info.max_num_seqs,
            false => 0,
        };
        Self {
            free_penalty_slots: (0..num_slots).rev().collect(),
            scheduler,
            ranks,
            commands,
            shared,
            active: HashMap::new(),
            next_id: 0,
            seed,
        }
    }

    /// Serves until told to stop or until no handle is left.
    ///
    /// # Errors
    /// When a step fails: the state of the ranks is then unknown and the engine must end.
    pub(super) fn run(&mut self) -> candle_core::Result<()> {
        while self.take_commands() {
            self.drop_abandoned();
            if !self.scheduler.is_idle() {
                self.step()?;
            }
            self.publish_stats();
        }
        self.end_all("the server is shutting down");
        Ok(())
    }

    /// Tells every listener that the engine has failed, those in the queue too.
    pub(super) fn fail_requests(&mut self, reason: &str) {
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submission) = command {
                self.admit(*submission);
            }
        }
        self.end_all(&format!("the engine has stopped: {reason}"));
    }

    fn end_all(&mut self, message: &str) {
        for (_, sequence) in self.active.drain() {
            let _ = sequence.events.send(TokenEvent::Failed {
                message: message.to_owned(),
            });
        }
    }

    /// Takes all commands that are there, waiting for one while idle. False ends the engine.
    fn take_commands(&mut self) -> bool {
        loop {
            let command = if self.scheduler.is_idle() {
                self.publish_stats();
                self.commands
                    .recv()
                    .map_err(|_| mpsc::TryRecvError::Disconnected)
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(Command::Submit(submission)) => self.admit(*submission),
                Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => return false,
                Err(mpsc::TryRecvError::Empty) => return true,
            }
        }
    }

    fn admit(&mut self, submission: Submission) {
        let Submission {
            request,
            events,
            submitted_at,
        } = submission;
        let id = self.next_id;
        self.next_id += 1;
        let params = &request.sampling_params;
        // Unseeded requests still differ from each other, and repeat when the server restarts.
        let seed = params
            .seed
            .unwrap_or_else(|| splitmix64(self.seed.wrapping_add(id)));
        let vocab_size = self.shared.info.vocab_size;
        let sampler = SequenceSampler::new(params, seed, &request.prompt_token_ids, vocab_size);
        let active = ActiveSequence {
            events,
            sampler,
            penalty_slot: None,
            num_sampled: 0,
            num_prompt_logprobs: params.prompt_logprobs,
            // The first prompt token has nothing before it, so its entry stays.
            prompt_logprobs: vec![None; request.prompt_token_ids.len()],
            submitted_at,
            started_at: None,
        };
        self.active.insert(id, active);
        if let Err(error) = self.scheduler.add(id, request)
            && let Some(refused) = self.end(id)
        {
            let _ = refused.events.send(TokenEvent::Failed {
                message: error.to_string(),
            });
        }
    }

    /// Ends the sequences that nobody listens to any more.
    fn drop_abandoned(&mut self) {
        let abandoned: Vec<SequenceId> = self
            .active
            .iter()
            .filter(|(_, active)| active.events.is_closed())
            .map(|(&id, _)| id)
            .collect();
        for id in abandoned {
            self.end(id);
            self.scheduler.abort(id);
        }
    }

    fn step(&mut self) -> candle_core::Result<()> {
        let batch = self.scheduler.schedule();
        if batch.sequences.is_empty() {
            candle_core::bail!(
                "the scheduler has {} waiting sequences and runs none",
                self.scheduler.num_waiting()
            );
        }
        self.note_starts(&batch);
        let mut input = StepInput::new(&batch, &self.scheduler, self.shared.info.block_size);
        self.prepare_draws(&mut input)?;
        let uses = input.logits_uses.clone();
        let (active, vocab_size) = (&mut self.active, self.shared.info.vocab_size);
        let mut outcome = StepOutcome::default();
        self.ranks.run(input, |row, output| {
            read_row(active, uses[row], output, vocab_size, &mut outcome);
        })?;
        for (id, message) in outcome.failed.drain(..) {
            if let Some(sequence) = self.end(id) {
                let _ = sequence.events.send(TokenEvent::Failed { message });
            }
            self.scheduler.abort(id);
        }
        let mut num_tokens = outcome.sampled.len();
        for update in self.scheduler.update(&batch, &outcome.sampled) {
            if update.prompt_done {
                num_tokens += self.prompt_len(update.id);
            }
            self.send_update(&update, outcome.logprobs.remove(&update.id));
        }
        self.shared.stats.count_step(num_tokens);
        Ok(())
    }

    /// Lets the device draw what it can, with a penalty slot for each sequence that needs one.
    fn prepare_draws(&mut self, input: &mut StepInput) -> candle_core::Result<()> {
        if !self.ranks.draws_on_device() {
            return Ok(());
        }
        for (draw, logits_use) in input.draws.iter_mut().zip(&input.logits_uses) {
            let LogitsUse::Sample(id) = *logits_use else {
                continue;
            };
            let Some(active) = self.active.get_mut(&id) else {
                continue;
            };
            if active.sampler.has_penalty() && active.penalty_slot.is_none() {
                // Without a free one the engine draws this token itself.
                active.penalty_slot = self.free_penalty_slots.pop();
                if let Some(slot) = active.penalty_slot {
                    let (prompt, drawn) = active.sampler.seen_tokens();
                    self.ranks.mark_tokens(slot, &prompt, &drawn)?;
                }
            }
            *draw = active
                .sampler
                .device_draw(active.num_sampled, active.penalty_slot);
        }
        Ok(())
    }

    fn prompt_len(&self, id: SequenceId) -> usize {
        let active = self.active.get(&id);
        active.map_or(0, |active| active.prompt_logprobs.len())
    }

    fn note_starts(&mut self, batch: &ScheduledBatch) {
        let now = Instant::now();
        for scheduled in &batch.sequences {
            let Some(active) = self.active.get_mut(&scheduled.id) else {
                continue;
            };
            if active.started_at.is_none() {
                active.started_at = Some(now);
                self.shared
                    .stats
                    .num_requests_waiting
                    .fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Tells the listener what the step brought and forgets finished sequences.
    fn send_update(&mut self, update: &Update, logprobs: Option<TokenLogprobs>) {
        let Some(active) = self.active.get_mut(&update.id) else {
            return;
        };
        if update.prompt_done {
            let prompt_logprobs = active
                .num_prompt_logprobs
                .is_some()
                .then(|| std::mem::take(&mut active.prompt_logprobs));
            let _ = active.events.send(TokenEvent::Prompt {
                num_cached_tokens: update.num_cached_tokens,
                queue_time: active
                    .started_at
                    .map(|started_at| started_at - active.submitted_at)
                    .unwrap_or_default(),
                logprobs: prompt_logprobs,
                finish: update.finish.filter(|_| update.token_id.is_none()),
            });
        }
        if let Some(token_id) = update.token_id {
            let _ = active.events.send(TokenEvent::Token {
                token_id,
                logprobs,
                finish: update.finish,
            });
            self.shared
                .stats
                .generation_tokens
                .fetch_add(1, Ordering::Relaxed);
        }
        if update.finish.is_some() {
            self.end(update.id);
        }
    }

    /// Forgets a sequence's channel and takes it out of the waiting count if it is still there.
    fn end(&mut self, id: SequenceId) -> Option<ActiveSequence> {
        let active = self.active.remove(&id)?;
        self.free_penalty_slots.extend(active.penalty_slot);
        if active.started_at.is_none() {
            self.shared
                .stats
                .num_requests_waiting
                .fetch_sub(1, Ordering::Relaxed);
        }
        Some(active)
    }

    fn publish_stats(&self) {
        let (stats, order) = (&self.shared.stats, Ordering::Relaxed);
        let counters = self.scheduler.counters();
        stats
            .num_requests_running
            .store(self.scheduler.num_running(), order);
        stats
            .num_blocks_total
            .store(counters.num_blocks_total, order);
        stats.num_blocks_used.store(counters.num_blocks_used, order);
        stats
            .prefix_cache_queries
            .store(counters.prefix_cache_queries, order);
        stats
            .prefix_cache_hits
            .store(counters.prefix_cache_hits, order);
        stats.prompt_tokens.store(counters.prompt_tokens, order);
        stats.num_preemptions.store(counters.num_preemptions, order);
    }
}

/// Draws from one row and reports on it, or takes what the device drew.
fn read_row(
    active: &mut HashMap<SequenceId, ActiveSequence>,
    logits_use: LogitsUse,
    output: RowOutput<'_>,
    vocab_size: usize,
    outcome: &mut StepOutcome,
) {
    let (LogitsUse::PromptLogprob { id, .. } | LogitsUse::Sample(id)) = logits_use;
    let Some(active) = active.get_mut(&id) else {
        return;
    };
    let sampled = match (logits_use, output) {
        (LogitsUse::Sample(_), RowOutput::Drawn(drawn)) => active.sampler.note_drawn(drawn),
        (LogitsUse::Sample(_), RowOutput::Logits(logits)) => {
            // The sampler changes its row; the values are only lent.
            outcome.row.clear();
            outcome.row.extend_from_slice(&logits[..vocab_size]);
            active.sampler.sample(&mut outcome.row, active.num_sampled)
        }
        (
            LogitsUse::PromptLogprob {
                position, token_id, ..
            },
            RowOutput::Logits(logits),
        ) => {
            let num_top = active.num_prompt_logprobs.unwrap_or(0);
            match token_logprobs(&logits[..vocab_size], token_id, num_top) {
                Ok(logprobs) => active.prompt_logprobs[position] = Some(logprobs),
                Err(error) => outcome.fail(id, &error),
            }
            return;
        }
        // Only rows to sample from are given a draw.
        (LogitsUse::PromptLogprob { .. }, RowOutput::Drawn(_)) => return,
    };
    match sampled {
        Ok(Sampled { token_id, logprobs }) => {
            active.num_sampled += 1;
            outcome.sampled.push((id, token_id));
            outcome
                .logprobs
                .extend(logprobs.map(|logprobs| (id, logprobs)));
        }
        Err(error) => outcome.fail(id, &error),
    }
}

/// Steele's splitmix64: spreads consecutive numbers over all 64 bits.
fn splitmix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
