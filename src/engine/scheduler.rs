//! Decides which tokens of which sequences one engine step computes.
//!
//! There is no prefill or decode phase: each step hands out a budget of tokens, first to running
//! sequences (one token to those that decode, a chunk to those whose prompt is unfinished), then
//! to waiting ones. When blocks run out, the sequence that is served last loses its blocks and
//! waits to be computed again. The policy is vLLM V1's (`vllm/v1/core/sched/scheduler.py`).
//!
//! A step writes the keys and values of all its tokens, layer by layer, before any token attends
//! to them, but for sequences of one token. So a block enters the prefix cache when the tokens
//! that fill it are scheduled, and a later sequence of the same step shares it already if it has
//! more than one token to compute, else in the next step: the choices of one request compute their
//! prompt once.
//!
//! Steps run in the order of their launches, so what is launched counts as computed. A step may
//! be launched before the one before it is read: the token that a sequence draws there is then
//! pending, and may be scheduled although nobody knows it.
//!
//! Pure: knows no tensor, thread or clock. The engine thread calls [`Scheduler::schedule`], lays
//! out the batch, calls [`Scheduler::note_launch`], and reports what came of it through
//! [`Scheduler::update`], at the latest before the schedule after the next.

use std::collections::{BTreeMap, HashMap};

use super::block_manager::{BlockHash, BlockManager, FullBlock, OutOfBlocks, PrefixCaching};
use super::request::GenerateRequest;
use super::sequence::{Sequence, SequenceId, SequenceStatus};

#[cfg(test)]
mod ahead_tests;
mod scheduled;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use scheduled::SchedulerCounters;
pub(super) use scheduled::{BlockCopy, ScheduledBatch, Update};

/// Which sequence is served first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SchedulingPolicy {
    /// First come, first served.
    #[default]
    Fcfs,
    /// Lower priority values first, then in order of arrival.
    Priority,
}

/// What bounds a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SchedulerConfig {
    /// Most sequences that run at once.
    pub(super) max_num_seqs: usize,
    /// Most tokens of one step.
    pub(super) max_num_batched_tokens: usize,
    /// Most prompt and generated tokens of one sequence.
    pub(super) max_model_len: usize,
    /// KV blocks in all.
    pub(super) num_blocks: usize,
    /// Tokens a block holds.
    pub(super) block_size: usize,
    pub(super) policy: SchedulingPolicy,
    pub(super) prefix_caching: PrefixCaching,
    /// Most tokens of one sequence in one step; 0 is no limit.
    pub(super) long_prefill_token_threshold: usize,
}

/// Why a request can not be scheduled, ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum AddError {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error(
        "the prompt has {prompt_len} tokens and at least {min_output_len} must follow, \
         but the model's length is {max_model_len}"
    )]
    PromptTooLong {
        prompt_len: usize,
        /// 1 where a token is to be drawn, 0 where none is.
        min_output_len: usize,
        max_model_len: usize,
    },
}

/// Why a waiting sequence stays in the queue for this step.
struct NotNow;

impl From<OutOfBlocks> for NotNow {
    fn from(_: OutOfBlocks) -> Self {
        Self
    }
}

/// Lower is served first. Arrival numbers are unique, so keys are too.
type ServiceKey = (i64, u64);

/// All sequences and all blocks.
#[derive(Debug)]
pub(super) struct Scheduler {
    config: SchedulerConfig,
    blocks: BlockManager,
    sequences: HashMap<SequenceId, Sequence>,
    /// Admitted sequences in the order of admission.
    running: Vec<SequenceId>,
    /// A preempted sequence returns to its old place, which is the front unless priorities differ.
    waiting: BTreeMap<ServiceKey, SequenceId>,
    num_arrivals: u64,
    counters: SchedulerCounters,
}

impl Scheduler {
    /// Makes a scheduler without sequences.
    ///
    /// # Panics
    /// If a limit is 0, or if one sequence of `max_model_len` tokens does not fit into all
    /// blocks. Because it does fit, a sequence that runs alone can always go on, and with it the
    /// whole queue: there is no deadlock to be found at run time.
    pub(super) fn new(config: SchedulerConfig) -> Self {
        assert!(
            config.max_num_seqs > 0 && config.max_num_batched_tokens > 0,
            "a step takes at least one token of one sequence"
        );
        assert!(
            config.max_model_len <= config.num_blocks * config.block_size,
            "{} blocks of {} tokens hold no sequence of {} tokens",
            config.num_blocks,
            config.block_size,
            config.max_model_len
        );
        Self {
            config,
            blocks: BlockManager::new(config.num_blocks, config.block_size, config.prefix_caching),
            sequences: HashMap::new(),
            running: Vec::new(),
            waiting: BTreeMap::new(),
            num_arrivals: 0,
            counters: SchedulerCounters::default(),
        }
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// [`AddError`] when the prompt is empty or leaves no room for what is asked.
    ///
    /// # Panics
    /// If a sequence of this id is still there.
    pub(super) fn add(&mut self, id: SequenceId, request: GenerateRequest) -> Result<(), AddError> {
        let prompt_len = request.prompt_token_ids.len();
        if prompt_len == 0 {
            return Err(AddError::EmptyPrompt);
        }
        let min_output_len = request.sampling_params.max_tokens.min(1);
        let max_model_len = self.config.max_model_len;
        if prompt_len + min_output_len > max_model_len {
            return Err(AddError::PromptTooLong {
                prompt_len,
                min_output_len,
                max_model_len,
            });
        }
        let sequence = Sequence::new(id, self.num_arrivals, request);
        self.num_arrivals += 1;
        self.waiting
            .insert(service_key(self.config.policy, &sequence), id);
        let previous = self.sequences.insert(id, sequence);
        assert!(previous.is_none(), "sequence id {id} is in use");
        Ok(())
    }

    /// Chooses the next step's tokens and gives their sequences blocks.
    ///
    /// The batch is empty only when no sequence can be computed, which is when there is none or
    /// each one waits for the token that an [`Self::update`] is to bring.
    ///
    /// The batch must be launched as it is: nothing may be aborted before, because sequences of
    /// one batch share blocks.
    pub(super) fn schedule(&mut self) -> ScheduledBatch {
        let num_preemptions = self.counters.num_preemptions;
        let mut batch = ScheduledBatch {
            sequences: Vec::with_capacity(self.running.len() + self.waiting.len().min(16)),
            num_tokens: 0,
            copies: Vec::new(),
        };
        self.retire_ending();
        self.blocks.begin_step();
        self.schedule_running(&mut batch);
        // Blocks just taken from a sequence are meant for those that run, not for newcomers.
        if self.counters.num_preemptions == num_preemptions {
            self.schedule_waiting(&mut batch);
        }
        batch
    }

    /// Returns a sequence that was added and has not ended.
    ///
    /// # Panics
    /// If there is none of this id.
    pub(super) fn sequence(&self, id: SequenceId) -> &Sequence {
        &self.sequences[&id]
    }

    /// Takes note that a batch just scheduled was launched: its tokens count as computed, and
    /// the tokens it draws are pending.
    pub(super) fn note_launch(&mut self, batch: &ScheduledBatch) {
        for entry in &batch.sequences {
            let sequence = known(&mut self.sequences, entry.id);
            sequence.num_computed_tokens += entry.num_tokens;
            let draws = entry.is_last && sequence.sampling_params.max_tokens > 0;
            sequence.num_pending_tokens += usize::from(draws);
        }
    }

    /// Takes note of what a launched step drew. Steps are reported in the order of their launches.
    ///
    /// `sampled` holds one token for each sequence of the batch that draws one, best in the
    /// batch's order. One that fails in sampling must be aborted: it is not computed further
    /// without its token. Sequences that ended or were aborted since the launch are passed over.
    ///
    /// Returns the sequences whose prompt is done or that have a new token, in the batch's order.
    pub(super) fn update(
        &mut self,
        batch: &ScheduledBatch,
        sampled: &[(SequenceId, u32)],
    ) -> Vec<Update> {
        let mut updates = Vec::with_capacity(sampled.len());
        let mut next = 0;
        for entry in &batch.sequences {
            let Some(sequence) = self.sequences.get_mut(&entry.id) else {
                continue;
            };
            if !entry.is_last {
                continue;
            }
            let token_id = token_of(sampled, &mut next, entry.id);
            let wants_token = sequence.sampling_params.max_tokens > 0;
            sequence.num_pending_tokens -= usize::from(wants_token);
            if wants_token && token_id.is_none() {
                continue;
            }
            // The first token is drawn from the logits of the prompt's end.
            let prompt_done = sequence.num_output_tokens() == 0;
            let token_id = token_id.filter(|_| wants_token);
            let num_known = sequence.token_ids.len();
            sequence.token_ids.extend(token_id);
            // The next step, launched already, may have filled a block with the token.
            let num_filled = sequence.num_computed_tokens;
            register_filled(
                &mut self.blocks,
                sequence,
                num_filled.min(num_known),
                num_filled,
            );
            updates.push(Update {
                id: entry.id,
                token_id,
                prompt_done,
                num_cached_tokens: sequence.num_cached_tokens,
                finish: sequence.finish_reason(self.config.max_model_len),
            });
        }
        self.remove_finished(&updates);
        updates
    }

    /// Drops a sequence and frees its blocks. An unknown id is passed over.
    pub(super) fn abort(&mut self, id: SequenceId) {
        let Some(mut sequence) = self.sequences.remove(&id) else {
            return;
        };
        match sequence.status {
            SequenceStatus::Waiting => {
                self.waiting
                    .remove(&service_key(self.config.policy, &sequence));
            }
            SequenceStatus::Running => {
                self.running.retain(|&running| running != id);
                free_blocks(&mut self.blocks, &mut sequence);
            }
            SequenceStatus::Ending => {}
        }
    }

    /// Returns whether the sequence was added and has not ended.
    #[cfg(test)]
    pub(super) fn has(&self, id: SequenceId) -> bool {
        self.sequences.contains_key(&id)
    }

    /// Returns whether there is no sequence.
    pub(super) fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Returns how many sequences are admitted, those included whose last token is pending.
    pub(super) fn num_running(&self) -> usize {
        self.sequences.len() - self.waiting.len()
    }

    /// Returns how many sequences wait, the preempted ones included.
    pub(super) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Returns the present counters.
    pub(super) fn counters(&self) -> SchedulerCounters {
        SchedulerCounters {
            num_blocks_total: self.blocks.num_blocks(),
            num_blocks_used: self.blocks.num_used_blocks(),
            ..self.counters
        }
    }

    /// Takes the blocks and the places of sequences whose last step is launched.
    fn retire_ending(&mut self) {
        let max_model_len = self.config.max_model_len;
        let (sequences, blocks) = (&mut self.sequences, &mut self.blocks);
        self.running.retain(|&id| {
            let sequence = known(sequences, id);
            let is_ending = sequence.is_launched_to_its_end(max_model_len);
            if is_ending {
                sequence.status = SequenceStatus::Ending;
                keep_beginning(blocks, sequence);
                blocks.free(&mut sequence.block_table);
            }
            !is_ending
        });
    }

    fn schedule_running(&mut self, batch: &mut ScheduledBatch) {
        let mut index = 0;
        while let Some(&id) = self.running.get(index) {
            let budget = self.config.max_num_batched_tokens - batch.num_tokens;
            if budget == 0 {
                break;
            }
            let sequence = known(&mut self.sequences, id);
            let num_tokens = self
                .config
                .chunk_len(sequence.num_uncomputed_tokens(), budget);
            if num_tokens == 0 {
                index += 1;
                continue;
            }
            let start = sequence.num_computed_tokens;
            let end = start + num_tokens;
            if self.blocks.grow(end, &mut sequence.block_table).is_ok() {
                register_filled(&mut self.blocks, sequence, start, end);
                batch.push(sequence, num_tokens);
                index += 1;
            } else if self.preempt_one(batch) < index {
                // The victim stood before this sequence, which has moved up.
                index -= 1;
            }
        }
    }

    fn schedule_waiting(&mut self, batch: &mut ScheduledBatch) {
        while self.running.len() < self.config.max_num_seqs {
            let budget = self.config.max_num_batched_tokens - batch.num_tokens;
            if budget == 0 {
                break;
            }
            // No other sequence may overtake the first one, or it could wait forever.
            let Some((&key, &id)) = self.waiting.first_key_value() else {
                break;
            };
            let Ok(num_tokens) = self.admit(id, budget, &mut batch.copies) else {
                break;
            };
            self.waiting.remove(&key);
            self.running.push(id);
            batch.push(&self.sequences[&id], num_tokens);
        }
    }

    /// Gives a waiting sequence its cached blocks and room for all its tokens, and returns how
    /// many of them the step computes.
    ///
    /// The room is for the whole prompt even if the step computes a chunk of it: otherwise
    /// several long prompts could be admitted that then preempt each other half-way.
    ///
    /// A cached block that begins as the rest of the tokens does lends its beginning by a copy,
    /// so that of a known prompt little more than the last token is computed.
    ///
    /// # Errors
    /// [`NotNow`] when blocks are missing, or one token would attend to blocks that this step
    /// fills: single tokens read the cache while the step's others are still being written.
    fn admit(
        &mut self,
        id: SequenceId,
        budget: usize,
        copies: &mut Vec<BlockCopy>,
    ) -> Result<usize, NotNow> {
        let block_size = self.config.block_size;
        let sequence = known(&mut self.sequences, id);
        // The step that preempts a sequence admits nobody, and before the next one is scheduled
        // the token is known that was pending then.
        debug_assert_eq!(
            sequence.num_pending_tokens, 0,
            "a token to be computed is not known"
        );
        let reads_cache = self.config.prefix_caching == PrefixCaching::Enabled
            && sequence.may_read_prefix_cache();
        let num_cached_blocks = if reads_cache {
            sequence.hash_full_blocks(block_size);
            // The last token is computed in any case: drawing the next one needs its logits.
            let num_readable = (sequence.token_ids.len() - 1) / block_size;
            self.blocks
                .num_cached_blocks(&sequence.block_hashes[..num_readable])
        } else {
            0
        };
        let beginning = if reads_cache {
            self.blocks
                .longest_beginning(parent_hash(sequence, num_cached_blocks), {
                    let last = sequence.token_ids.len() - 1;
                    &sequence.token_ids[num_cached_blocks * block_size..last]
                })
        } else {
            None
        };
        let prefix = &sequence.block_hashes[..num_cached_blocks];
        let num_copied = beginning.map_or(0, |(_, len)| len);
        let num_computed = num_cached_blocks * block_size + num_copied;
        let num_tokens = self
            .config
            .chunk_len(sequence.token_ids.len() - num_computed, budget);
        if num_tokens == 1 && !self.blocks.are_computed(prefix) {
            return Err(NotNow);
        }
        self.blocks
            .allocate(prefix, sequence.token_ids.len(), &mut sequence.block_table)?;
        sequence.status = SequenceStatus::Running;
        sequence.num_computed_tokens = num_computed;
        if let Some((source, _)) = beginning {
            // The source may have been evicted just now, even for this very table: what it holds
            // is overwritten by the step at the earliest, after the copies.
            let target = sequence.block_table[num_cached_blocks];
            copies.push(BlockCopy { source, target });
        }
        if sequence.num_preemptions == 0 {
            sequence.num_cached_tokens = sequence.num_computed_tokens;
            self.counters.prompt_tokens += sequence.num_prompt_tokens as u64;
            if reads_cache {
                self.counters.prefix_cache_queries += sequence.num_prompt_tokens as u64;
                self.counters.prefix_cache_hits += sequence.num_cached_tokens as u64;
            }
        }
        register_filled(
            &mut self.blocks,
            sequence,
            num_computed,
            num_computed + num_tokens,
        );
        Ok(num_tokens)
    }

    /// Takes the blocks of the running sequence that is served last, drops it from the batch and
    /// returns where it stood among the running ones.
    fn preempt_one(&mut self, batch: &mut ScheduledBatch) -> usize {
        let policy = self.config.policy;
        let (index, _) = self
            .running
            .iter()
            .enumerate()
            .max_by_key(|(_, id)| service_key(policy, &self.sequences[*id]))
            .expect("a sequence that lacks a block is running");
        let id = self.running.remove(index);
        batch.remove(id);
        let sequence = known(&mut self.sequences, id);
        free_blocks(&mut self.blocks, sequence);
        sequence.num_computed_tokens = 0;
        sequence.num_preemptions += 1;
        sequence.status = SequenceStatus::Waiting;
        self.waiting.insert(service_key(policy, sequence), id);
        self.counters.num_preemptions += 1;
        index
    }

    fn remove_finished(&mut self, updates: &[Update]) {
        let num_sequences = self.sequences.len();
        for update in updates.iter().filter(|update| update.finish.is_some()) {
            let Some(mut sequence) = self.sequences.remove(&update.id) else {
                continue;
            };
            match sequence.status {
                // It was preempted before anybody knew that this token is its last.
                SequenceStatus::Waiting => {
                    let key = service_key(self.config.policy, &sequence);
                    self.waiting.remove(&key);
                }
                SequenceStatus::Running => {
                    // All its blocks are computed by now, so none is to be forgotten.
                    keep_beginning(&mut self.blocks, &sequence);
                    self.blocks.free(&mut sequence.block_table);
                }
                SequenceStatus::Ending => {}
            }
        }
        if self.sequences.len() < num_sequences {
            self.running.retain(|id| self.sequences.contains_key(id));
        }
    }
}

impl SchedulerConfig {
    /// Returns how many of a sequence's tokens that are to be computed a step with `budget` tokens
    /// left takes.
    fn chunk_len(&self, num_uncomputed: usize, budget: usize) -> usize {
        let limit = match self.long_prefill_token_threshold {
            0 => budget,
            threshold => budget.min(threshold),
        };
        num_uncomputed.min(limit)
    }
}

fn service_key(policy: SchedulingPolicy, sequence: &Sequence) -> ServiceKey {
    let priority = match policy {
        SchedulingPolicy::Fcfs => 0,
        SchedulingPolicy::Priority => sequence.priority,
    };
    (priority, sequence.arrival)
}

fn known(sequences: &mut HashMap<SequenceId, Sequence>, id: SequenceId) -> &mut Sequence {
    sequences
        .get_mut(&id)
        .expect("ids in the queues are removed together with their sequence")
}

/// Enters the blocks that are full once tokens `start..end` are computed into the prefix cache.
/// One that a pending token fills is entered when the token is known.
fn register_filled(blocks: &mut BlockManager, sequence: &mut Sequence, start: usize, end: usize) {
    let block_size = blocks.block_size();
    let num_full_before = start / block_size;
    let num_full = end.min(sequence.token_ids.len()) / block_size;
    if num_full <= num_full_before || blocks.prefix_caching() == PrefixCaching::Disabled {
        return;
    }
    sequence.hash_full_blocks(block_size);
    for index in num_full_before..num_full {
        let contents = FullBlock {
            hash: sequence.block_hashes[index],
            parent: parent_hash(sequence, index),
            token_ids: &sequence.token_ids[index * block_size..(index + 1) * block_size],
        };
        blocks.register(sequence.block_table[index], contents);
    }
}

/// Lets later sequences copy from the block that a finished sequence left partly filled.
fn keep_beginning(blocks: &mut BlockManager, sequence: &Sequence) {
    let num_full = sequence.num_computed_tokens / blocks.block_size();
    let start = num_full * blocks.block_size();
    let token_ids = &sequence.token_ids[start..sequence.num_computed_tokens];
    if !token_ids.is_empty() && blocks.prefix_caching() == PrefixCaching::Enabled {
        let parent = parent_hash(sequence, num_full);
        blocks.register_beginning(sequence.block_table[num_full], parent, token_ids);
    }
}

/// Returns the hash of the block before block `index`, `None` for the first.
fn parent_hash(sequence: &Sequence, index: usize) -> Option<BlockHash> {
    let parent = index.checked_sub(1)?;
    Some(sequence.block_hashes[parent])
}

/// Frees a sequence's blocks, and drops from the prefix cache what only a scheduled step would
/// have filled: a sequence may be preempted after it got its part of the step.
fn free_blocks(blocks: &mut BlockManager, sequence: &mut Sequence) {
    let num_full = sequence.num_computed_tokens / blocks.block_size();
    for &block in &sequence.block_table[num_full..] {
        blocks.forget(block);
    }
    blocks.free(&mut sequence.block_table);
}

/// Finds a sequence's token, in one comparison if the tokens are in the order of the questions.
fn token_of(sampled: &[(SequenceId, u32)], next: &mut usize, id: SequenceId) -> Option<u32> {
    let is_wanted = |&(sampled_id, _): &(SequenceId, u32)| sampled_id == id;
    let index = if sampled.get(*next).is_some_and(is_wanted) {
        *next
    } else {
        sampled.iter().position(is_wanted)?
    };
    *next = index + 1;
    Some(sampled[index].1)
}
