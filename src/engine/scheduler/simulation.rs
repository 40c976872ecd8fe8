//! A long random run against a model of the KV cache, with and without launching ahead.
//!
//! Prompts and tokens come from a vocabulary of two or three, so that prefixes collide, and the
//! blocks are few, so that preemption is frequent. Each slot of the modelled cache holds the
//! prefix it was computed for; a block shared or freed wrongly shows as a slot with another
//! prefix than its reader's. The token that is drawn is a function of the prefix that the cache
//! holds, so that every sequence's tokens are known beforehand, whatever the order of steps.

use std::collections::{HashMap, HashSet};

use super::super::block_manager::BlockHash;
use super::super::request::{FinishReason, SamplingParams};
use super::scheduled::ScheduledSequence;
use super::*;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn from(&mut self, low: u64, high: u64) -> usize {
        (low + self.below(high - low + 1)) as usize
    }
}

/// Names all tokens up to a position; what a real cache's keys and values depend on.
fn extend_prefix(prefix: u64, token: u32) -> u64 {
    let mut mixed = Random(prefix ^ (u64::from(token) << 32));
    mixed.next()
}

/// Whether a step is launched before the one before it is read.
#[derive(Clone, Copy)]
enum Order {
    LaunchThenFinish,
    LaunchAhead,
}

/// What became of a launched step that the scheduler does not know yet.
struct InFlight {
    batch: ScheduledBatch,
    sampled: Vec<(SequenceId, u32)>,
}

/// What a sequence must come to.
struct Expected {
    output: Vec<u32>,
    finish: FinishReason,
    num_seen: usize,
    /// Steps the sequence was seen in, to find starvation.
    age: usize,
}

struct Simulation {
    order: Order,
    random: Random,
    config: SchedulerConfig,
    vocab_size: u32,
    scheduler: Scheduler,
    /// The prefix each slot was written for.
    slots: Vec<u64>,
    next_id: SequenceId,
    live: HashMap<SequenceId, Expected>,
    in_flight: Option<InFlight>,
    num_finished: usize,
    num_copies: usize,
    /// Tokens drawn for sequences that had ended meanwhile.
    num_wasted: usize,
    /// Steps before which a sequence was preempted whose token was pending.
    num_preempted_pending: usize,
}

impl Simulation {
    fn new(seed: u64, order: Order) -> Self {
        let mut random = Random(seed);
        let block_size = random.from(1, 4);
        let num_blocks = random.from(6, 24);
        let config = SchedulerConfig {
            max_num_seqs: random.from(1, 8),
            max_num_batched_tokens: random.from(1, 24),
            max_model_len: random.from(4, (num_blocks * block_size) as u64),
            num_blocks,
            block_size,
            policy: [SchedulingPolicy::Fcfs, SchedulingPolicy::Priority][random.from(0, 1)],
            prefix_caching: match random.below(8) {
                0 => PrefixCaching::Disabled,
                _ => PrefixCaching::Enabled,
            },
            long_prefill_token_threshold: [0, 2, 5][random.from(0, 2)],
        };
        Self {
            order,
            vocab_size: random.from(2, 3) as u32,
            random,
            config,
            scheduler: Scheduler::new(config),
            slots: vec![0; num_blocks * block_size],
            next_id: 0,
            live: HashMap::new(),
            in_flight: None,
            num_finished: 0,
            num_copies: 0,
            num_wasted: 0,
            num_preempted_pending: 0,
        }
    }

    fn token(&mut self) -> u32 {
        self.random.below(u64::from(self.vocab_size)) as u32
    }

    /// Returns the token that follows a prefix.
    fn drawn_after(&self, prefix: u64) -> u32 {
        Random(prefix).below(u64::from(self.vocab_size)) as u32
    }

    /// Returns what the request's own words make of it.
    fn expected(&self, request: &GenerateRequest) -> Expected {
        let params = &request.sampling_params;
        let prompt = &request.prompt_token_ids;
        let mut prefix = prompt
            .iter()
            .fold(0, |prefix, &token| extend_prefix(prefix, token));
        let longest = self.config.max_model_len - prompt.len();
        let (mut output, mut finish) = (Vec::new(), FinishReason::Length);
        while output.len() < params.max_tokens.min(longest) {
            let token = self.drawn_after(prefix);
            prefix = extend_prefix(prefix, token);
            output.push(token);
            if params.stop_token_ids.contains(&token) && output.len() >= params.min_tokens {
                finish = FinishReason::StopToken(token);
                break;
            }
        }
        Expected {
            output,
            finish,
            num_seen: 0,
            age: 0,
        }
    }

    fn add(&mut self) {
        let prompt_len = self.random.from(1, self.config.max_model_len as u64 - 1);
        let prompt_token_ids = (0..prompt_len).map(|_| self.token()).collect();
        let sampling_params = SamplingParams {
            max_tokens: self.random.from(0, 20),
            min_tokens: self.random.from(0, 4),
            stop_token_ids: match self.random.below(6) {
                0 => vec![0],
                _ => Vec::new(),
            },
            prompt_logprobs: match self.random.below(8) {
                0 => Some(1),
                _ => None,
            },
            ..SamplingParams::default()
        };
        let request = GenerateRequest {
            request_id: self.next_id.to_string(),
            prompt_token_ids,
            sampling_params,
            priority: self.random.below(3) as i64,
        };
        self.live.insert(self.next_id, self.expected(&request));
        self.scheduler.add(self.next_id, request).unwrap();
        self.next_id += 1;
    }

    fn abort(&mut self) {
        let mut ids: Vec<_> = self.live.keys().copied().collect();
        ids.sort_unstable();
        if !ids.is_empty() {
            let id = ids[self.random.from(0, ids.len() as u64 - 1)];
            self.scheduler.abort(id);
            self.live.remove(&id);
        }
    }

    /// One turn of the engine's loop.
    fn step(&mut self) {
        let previous = self.in_flight.take();
        let next = self.launch(previous.as_ref());
        if self.random.below(20) == 0 {
            self.abort();
        }
        if let Some(previous) = previous {
            self.finish(&previous);
        }
        match (self.order, next) {
            (Order::LaunchAhead, next) => self.in_flight = next,
            (Order::LaunchThenFinish, Some(step)) => self.finish(&step),
            (Order::LaunchThenFinish, None) => {}
        }
    }

    fn finish(&mut self, step: &InFlight) {
        for &(id, _) in &step.sampled {
            self.num_wasted += usize::from(!self.live.contains_key(&id));
        }
        for update in self.scheduler.update(&step.batch, &step.sampled) {
            assert_eq!(self.scheduler.has(update.id), update.finish.is_none());
            let expected = self.live.get_mut(&update.id).unwrap();
            let want = expected.output.get(expected.num_seen).copied();
            assert_eq!(update.token_id, want, "sequence {}", update.id);
            assert_eq!(update.prompt_done, expected.num_seen == 0);
            expected.num_seen += 1;
            let is_last = expected.num_seen >= expected.output.len();
            assert_eq!(update.finish, is_last.then_some(expected.finish));
            if is_last {
                self.live.remove(&update.id);
                self.num_finished += 1;
            }
        }
    }

    /// Schedules a step and does at once what it does to the cache.
    fn launch(&mut self, previous: Option<&InFlight>) -> Option<InFlight> {
        let batch = self.scheduler.schedule();
        self.check_batch(&batch, previous);
        self.check_invariants();
        for BlockCopy { source, target } in &batch.copies {
            let start = |block: u32| block as usize * self.config.block_size;
            let source = start(*source)..start(*source) + self.config.block_size;
            self.slots.copy_within(source, start(*target));
            self.num_copies += 1;
        }
        if batch.sequences.is_empty() {
            return None;
        }
        let pending: HashMap<_, _> = previous
            .iter()
            .flat_map(|step| &step.sampled)
            .copied()
            .collect();
        let pending = |id: SequenceId| pending.get(&id).copied();
        // One by one is stricter than a real step, which writes all before it reads any.
        let mut written = HashSet::new();
        let mut sampled = Vec::new();
        for entry in &batch.sequences {
            self.check_computed_slots(entry.id);
            let last = self.write_slots(entry, pending(entry.id), &mut written);
            let params = &self.scheduler.sequence(entry.id).sampling_params;
            if entry.is_last && params.max_tokens > 0 {
                sampled.push((entry.id, self.drawn_after(last)));
            }
        }
        self.scheduler.note_launch(&batch);
        Some(InFlight { batch, sampled })
    }

    fn check_batch(&mut self, batch: &ScheduledBatch, previous: Option<&InFlight>) {
        let num_tokens: usize = batch.sequences.iter().map(|entry| entry.num_tokens).sum();
        assert_eq!(num_tokens, batch.num_tokens);
        assert!(num_tokens <= self.config.max_num_batched_tokens);
        assert!(batch.sequences.len() <= self.config.max_num_seqs);
        let may_be_empty = self.live.is_empty() || previous.is_some();
        assert!(num_tokens > 0 || may_be_empty, "a step must advance");
        assert!(num_tokens == 0 || !self.live.is_empty());
        let waiting = self.scheduler.waiting.values().next();
        let is_pending = |id| self.scheduler.sequences[id].num_pending_tokens > 0;
        self.num_preempted_pending += usize::from(waiting.is_some_and(is_pending));
        for entry in &batch.sequences {
            let sequence = self.scheduler.sequence(entry.id);
            assert!(entry.num_tokens > 0);
            assert!(sequence.num_pending_tokens <= usize::from(previous.is_some()));
            let num_left = sequence.num_uncomputed_tokens();
            assert!(entry.num_tokens <= num_left);
            assert_eq!(entry.is_last, entry.num_tokens == num_left);
            let threshold = self.config.long_prefill_token_threshold;
            assert!(threshold == 0 || entry.num_tokens <= threshold);
            let computed = sequence.num_computed_tokens + entry.num_tokens;
            assert!(sequence.block_table.len() * self.config.block_size >= computed);
        }
        for expected in self.live.values_mut() {
            expected.age += 1;
            // More steps than a run has: the final drain must end.
            assert!(expected.age < 5_000, "a sequence starves");
        }
    }

    /// Slot and prefix of each token that has a block, `pending` after the known ones.
    fn prefixes(&self, id: SequenceId, pending: Option<u32>) -> impl Iterator<Item = (usize, u64)> {
        let sequence = self.scheduler.sequence(id);
        let block_size = self.config.block_size;
        let mut prefix = 0;
        sequence
            .token_ids
            .iter()
            .copied()
            .chain(pending)
            .enumerate()
            .map_while(move |(position, token)| {
                prefix = extend_prefix(prefix, token);
                let block = *sequence.block_table.get(position / block_size)?;
                Some((block as usize * block_size + position % block_size, prefix))
            })
    }

    fn check_computed_slots(&self, id: SequenceId) {
        let num_computed_tokens = self.scheduler.sequence(id).num_computed_tokens;
        for (slot, prefix) in self.prefixes(id, None).take(num_computed_tokens) {
            assert_eq!(self.slots[slot], prefix, "sequence {id} reads another's");
        }
    }

    /// Writes what the entry computes and returns the prefix that its last slot then holds.
    fn write_slots(
        &mut self,
        entry: &ScheduledSequence,
        pending: Option<u32>,
        written: &mut HashSet<usize>,
    ) -> u64 {
        let sequence = self.scheduler.sequence(entry.id);
        let pending = pending.filter(|_| sequence.num_pending_tokens > 0);
        let new_slots: Vec<_> = self
            .prefixes(entry.id, pending)
            .skip(sequence.num_computed_tokens)
            .take(entry.num_tokens)
            .collect();
        assert_eq!(new_slots.len(), entry.num_tokens);
        for &(slot, prefix) in &new_slots {
            assert!(written.insert(slot), "slot {slot} is written twice");
            self.slots[slot] = prefix;
        }
        new_slots.last().unwrap().1
    }

    fn check_invariants(&self) {
        let Scheduler {
            blocks,
            sequences,
            running,
            waiting,
            ..
        } = &self.scheduler;
        blocks.assert_consistent();
        assert_eq!(sequences.len(), self.live.len());
        let ending = sequences.values();
        let ending: Vec<_> = ending
            .filter(|sequence| sequence.status == SequenceStatus::Ending)
            .collect();
        assert_eq!(
            running.len() + waiting.len() + ending.len(),
            sequences.len()
        );
        for sequence in ending {
            assert!(sequence.block_table.is_empty());
            assert!(sequence.is_launched_to_its_end(self.config.max_model_len));
        }
        assert!(running.len() <= self.config.max_num_seqs);
        for id in waiting.values() {
            assert_eq!(sequences[id].status, SequenceStatus::Waiting);
            assert!(sequences[id].block_table.is_empty());
            assert_eq!(sequences[id].num_computed_tokens, 0);
        }
        // Holders of each block with the prefix they expect of it, if it is full.
        let mut holders: HashMap<u32, Vec<Option<BlockHash>>> = HashMap::new();
        for id in running {
            let sequence = &sequences[id];
            assert_eq!(sequence.status, SequenceStatus::Running);
            assert!(sequence.token_ids.len() <= self.config.max_model_len);
            let covered = sequence.block_table.len() * self.config.block_size;
            assert!(covered >= sequence.num_computed_tokens);
            for (index, &block) in sequence.block_table.iter().enumerate() {
                let hash = sequence.block_hashes.get(index).copied();
                holders.entry(block).or_default().push(hash);
            }
        }
        assert_eq!(holders.len(), blocks.num_used_blocks());
        for (block, hashes) in holders {
            assert_eq!(blocks.ref_count(block) as usize, hashes.len());
            if hashes.len() > 1 {
                assert!(hashes[0].is_some(), "block {block} is shared but not full");
                assert!(hashes.iter().all(|hash| *hash == hashes[0]));
            }
        }
    }

    fn run(&mut self, num_operations: usize) {
        for _ in 0..num_operations {
            match self.random.below(10) {
                0..3 if self.live.len() < 24 => self.add(),
                3 if self.random.below(4) == 0 => self.abort(),
                _ => self.step(),
            }
            self.check_invariants();
        }
        while !self.scheduler.is_idle() || self.in_flight.is_some() {
            self.step();
        }
        assert!(self.live.is_empty());
        assert_eq!(self.scheduler.counters().num_blocks_used, 0);
    }
}

fn run_all(order: Order) {
    let mut counters = SchedulerCounters::default();
    let (mut num_finished, mut num_copies) = (0, 0);
    let (mut num_wasted, mut num_preempted_pending) = (0, 0);
    for seed in 0..100 {
        let mut simulation = Simulation::new(seed, order);
        simulation.run(1_200);
        let of_run = simulation.scheduler.counters();
        counters.num_preemptions += of_run.num_preemptions;
        counters.prefix_cache_hits += of_run.prefix_cache_hits;
        num_finished += simulation.num_finished;
        num_copies += simulation.num_copies;
        num_wasted += simulation.num_wasted;
        num_preempted_pending += simulation.num_preempted_pending;
    }
    // The run is worth something only if what it is about did happen.
    assert!(counters.num_preemptions > 1_000, "{counters:?}");
    assert!(counters.prefix_cache_hits > 10_000, "{counters:?}");
    assert!(num_copies > 1_000, "{num_copies} copies");
    assert!(num_finished > 10_000, "{num_finished} finished");
    if let Order::LaunchAhead = order {
        assert!(num_wasted > 500, "{num_wasted} wasted");
        assert!(
            num_preempted_pending > 100,
            "{num_preempted_pending} preempted while a token was pending"
        );
    }
}

#[test]
fn random_operations_never_mix_up_blocks() {
    run_all(Order::LaunchThenFinish);
}

#[test]
fn random_operations_never_mix_up_blocks_when_steps_are_launched_ahead() {
    run_all(Order::LaunchAhead);
}
