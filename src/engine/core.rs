//! The engine thread: takes commands, runs steps, sends events. Owns all engine state.
//!
//! With asynchronous scheduling at most one step is in flight: each turn the next one is scheduled
//! and launched, and only then the one before is waited for and its tokens are sent, while the
//! device works. What the next step needs of the one before are the tokens drawn; those stay on
//! the device. Sequences that end by a token nobody could foresee leave a row in the next step
//! whose result is dropped: ids are never used twice.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::kernels::{MAX_STEP_BIASES, drawn_id};

use super::EngineOptions;
use super::batch::{LogitsUse, StepInput};
use super::handle::{Command, Shared, Submission};
use super::model_runner::{LaunchedStep, RowOutput};
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
    /// How many alternatives each prompt token is reported with, when asked for.
    num_prompt_logprobs: Option<usize>,
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    num_prompt_tokens: usize,
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

/// A launched step that the scheduler has not heard of.
struct InFlight {
    batch: ScheduledBatch,
    uses: Vec<LogitsUse>,
    /// None once its rows were read.
    launched: Option<LaunchedStep>,
    outcome: StepOutcome,
    /// Input ids that stand for the tokens drawn here in the next step.
    next_ids: HashMap<SequenceId, u32>,
    /// Whether the next step may be launched before this one is finished.
    may_stay: bool,
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
    launches_ahead: bool,
    in_flight: Option<InFlight>,
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
        options: &EngineOptions,
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
            seed: options.seed,
            launches_ahead: options.launches_ahead(),
            in_flight: None,
        }
    }

    /// Serves until told to stop or until no handle is left.
    ///
    /// # Errors
    /// When a step fails: the state of the ranks is then unknown and the engine must end.
    pub(super) fn run(&mut self) -> candle_core::Result<()> {
        while self.take_commands() {
            self.drop_abandoned();
            if !self.is_idle() {
                self.step()?;
            }
            self.publish_stats();
        }
        if let Some(launched) = self.in_flight.take().and_then(|step| step.launched) {
            self.ranks.finish_step(launched, |_, _| {})?;
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

    fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.in_flight.is_none()
    }

    /// Takes all commands that are there, waiting for one while idle. False ends the engine.
    fn take_commands(&mut self) -> bool {
        loop {
            let command = if self.is_idle() {
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
            number,
            events,
            submitted_at,
        } = submission;
        let id = self.next_id;
        self.next_id += 1;
        let params = &request.sampling_params;
        // Unseeded requests still differ from each other, at other replicas too, and repeat when
        // the server restarts.
        let seed = params
            .seed
            .unwrap_or_else(|| splitmix64(self.seed.wrapping_add(number)));
        let vocab_size = self.shared.info.vocab_size;
        let sampler = SequenceSampler::new(params, seed, &request.prompt_token_ids, vocab_size);
        let active = ActiveSequence {
            events,
            sampler,
            penalty_slot: None,
            num_prompt_logprobs: params.prompt_logprobs,
            prompt_logprobs: match params.prompt_logprobs {
                // The first prompt token has nothing before it, so its entry stays.
                Some(_) => vec![None; request.prompt_token_ids.len()],
                None => Vec::new(),
            },
            num_prompt_tokens: request.prompt_token_ids.len(),
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

    /// Launches the next step and finishes the one before, or the next one where nothing may be
    /// left in flight.
    fn step(&mut self) -> candle_core::Result<()> {
        let previous = self.in_flight.take();
        let next = self.launch(previous.as_ref())?;
        if previous.is_none() && next.is_none() {
            candle_core::bail!(
                "the scheduler has {} waiting sequences and runs none",
                self.scheduler.num_waiting()
            );
        }
        if let Some(previous) = previous {
            self.finish(previous)?;
        }
        match next {
            Some(next) if next.may_stay => self.in_flight = Some(next),
            Some(next) => self.finish(next)?,
            None => {}
        }
        Ok(())
    }

    /// Schedules and launches a step; none where every sequence waits for the `previous` one.
    fn launch(&mut self, previous: Option<&InFlight>) -> candle_core::Result<Option<InFlight>> {
        let batch = self.scheduler.schedule();
        if batch.sequences.is_empty() {
            return Ok(None);
        }
        self.note_starts(&batch);
        let nothing = HashMap::new();
        let pending_ids = previous.map_or(&nothing, |previous| &previous.next_ids);
        let block_size = self.shared.info.block_size;
        let mut input = StepInput::new(&batch, &self.scheduler, block_size, pending_ids);
        self.prepare_draws(&mut input)?;
        let uses = input.logits_uses.clone();
        let draws_all = match self.ranks.draws_on_device() {
            true => input.is_drawn_on_device(),
            false => uses.iter().all(LogitsUse::is_sample),
        };
        self.scheduler.note_launch(&batch);
        let launched = self.ranks.launch(input)?;
        let mut step = InFlight {
            batch,
            uses,
            launched: Some(launched),
            outcome: StepOutcome::default(),
            next_ids: HashMap::new(),
            may_stay: self.launches_ahead && draws_all,
        };
        if !self.ranks.draws_on_device() {
            // The CPU is done, and the engine draws.
            self.read(&mut step)?;
        }
        if step.may_stay {
            step.next_ids = self.next_ids(&step);
        }
        Ok(Some(step))
    }

    /// Returns the input ids that stand for the tokens that a step draws, which are its only rows.
    fn next_ids(&self, step: &InFlight) -> HashMap<SequenceId, u32> {
        if !self.ranks.draws_on_device() {
            return step.outcome.sampled.iter().copied().collect();
        }
        let rows = step.uses.iter().zip(0..);
        rows.map(|(logits_use, row)| (logits_use.id(), drawn_id(row)))
            .collect()
    }

    /// Waits for a step and takes what came of its rows.
    fn read(&mut self, step: &mut InFlight) -> candle_core::Result<()> {
        let Some(launched) = step.launched.take() else {
            return Ok(());
        };
        let (active, vocab_size) = (&mut self.active, self.shared.info.vocab_size);
        let (uses, outcome) = (&step.uses, &mut step.outcome);
        self.ranks.finish_step(launched, |row, output| {
            read_row(active, uses[row], output, vocab_size, outcome);
        })
    }

    /// Tells the scheduler and the listeners what a step brought.
    fn finish(&mut self, mut step: InFlight) -> candle_core::Result<()> {
        self.read(&mut step)?;
        let InFlight {
            batch, mut outcome, ..
        } = step;
        for (id, message) in outcome.failed.drain(..) {
            if let Some(sequence) = self.end(id) {
                let _ = sequence.events.send(TokenEvent::Failed { message });
            }
            self.scheduler.abort(id);
        }
        let updates = self.scheduler.update(&batch, &outcome.sampled);
        // Before anybody hears of it: who reads a last token finds its blocks free.
        self.publish_stats();
        let mut num_tokens = 0;
        for update in updates {
            num_tokens += usize::from(update.token_id.is_some());
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
        let mut num_biases = 0;
        for (draw, logits_use) in input.draws.iter_mut().zip(&input.logits_uses) {
            let LogitsUse::Sample { id, output_index } = *logits_use else {
                continue;
            };
            let Some(active) = self.active.get_mut(&id) else {
                continue;
            };
            let Some(mut device_draw) = active.sampler.device_draw(output_index) else {
                continue;
            };
            if num_biases + device_draw.biases.len() > MAX_STEP_BIASES {
                // The engine draws this token itself, of which the slot would not hear.
                self.free_penalty_slots.extend(active.penalty_slot.take());
                continue;
            }
            if active.sampler.has_penalty() {
                if active.penalty_slot.is_none() {
                    active.penalty_slot = self.free_penalty_slots.pop();
                    if let Some(slot) = active.penalty_slot {
                        let (prompt, drawn) = active.sampler.seen_tokens();
                        self.ranks.mark_tokens(slot, &prompt, &drawn)?;
                    }
                }
                device_draw.penalty_slot = active.penalty_slot;
                if device_draw.penalty_slot.is_none() {
                    // Without a free one the engine draws this token itself.
                    continue;
                }
            }
            num_biases += device_draw.biases.len();
            *draw = Some(device_draw);
        }
        Ok(())
    }

    fn prompt_len(&self, id: SequenceId) -> usize {
        let active = self.active.get(&id);
        active.map_or(0, |active| active.num_prompt_tokens)
    }

    fn note_starts(&mut self, batch: &ScheduledBatch) {
        let now = Instant::now();
        // Before they cease to wait: a replica that computes a long prompt must not look idle.
        let running = &self.shared.stats.num_requests_running;
        running.store(self.scheduler.num_running(), Ordering::Relaxed);
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
            // Who reads the last token finds it counted.
            let generated = &self.shared.stats.generation_tokens;
            generated.fetch_add(1, Ordering::Relaxed);
            let _ = active.events.send(TokenEvent::Token {
                token_id,
                logprobs,
                finish: update.finish,
            });
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
    let id = logits_use.id();
    let Some(active) = active.get_mut(&id) else {
        return;
    };
    let sampled = match (logits_use, output) {
        (LogitsUse::Sample { .. }, RowOutput::Drawn(drawn)) => active.sampler.note_drawn(drawn),
        (LogitsUse::Sample { output_index, .. }, RowOutput::Logits(logits)) => {
            // The sampler changes its row; the values are only lent.
            outcome.row.clear();
            outcome.row.extend_from_slice(&logits[..vocab_size]);
            active.sampler.sample(&mut outcome.row, output_index)
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
