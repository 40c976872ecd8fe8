//! A long random run against a model of the KV cache.
//!
//! Prompts and tokens come from a vocabulary of two or three, so that prefixes collide, and the
//! blocks are few, so that preemption is frequent. Each slot of the modelled cache holds the
//! prefix it was computed for; a block shared or freed wrongly shows as a slot with another
//! prefix than its reader's.

use std::collections::{HashMap, HashSet};

use super::super::block_manager::BlockHash;
use super::super::request::SamplingParams;
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

struct Simulation {
    random: Random,
    config: SchedulerConfig,
    vocab_size: u32,
    scheduler: Scheduler,
    /// The prefix each slot was written for.
    slots: Vec<u64>,
    next_id: SequenceId,
    /// Steps each live sequence was seen in, to find starvation.
    ages: HashMap<SequenceId, usize>,
    num_finished: usize,
    num_copies: usize,
}

impl Simulation {
    fn new(seed: u64) -> Self {
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
            vocab_size: random.from(2, 3) as u32,
            random,
            config,
            scheduler: Scheduler::new(config),
            slots: vec![0; num_blocks * block_size],
            next_id: 0,
            ages: HashMap::new(),
            num_finished: 0,
            num_copies: 0,
        }
    }

    fn token(&mut self) -> u32 {
        self.random.below(u64::from(self.vocab_size)) as u32
    }

    fn add(&mut self) {
        let prompt_len = self.random.from(1, self.config.max_model_len as u64 - 1);
        let prompt_token_ids = (0..prompt_len).map(|_| self.token()).collect();
        let sampling_params = SamplingParams {
            max_tokens: self.random.from(0, 20),
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
        self.scheduler.add(self.next_id, request).unwrap();
        self.ages.insert(self.next_id, 0);
        self.next_id += 1;
    }

    fn abort(&mut self) {
        let mut ids: Vec<_> = self.ages.keys().copied().collect();
        ids.sort_unstable();
        if !ids.is_empty() {
            let id = ids[self.random.from(0, ids.len() as u64 - 1)];
            self.scheduler.abort(id);
            self.ages.remove(&id);
        }
    }

    fn step(&mut self) {
        let batch = self.scheduler.schedule();
        self.check_batch(&batch);
        self.check_invariants();
        for BlockCopy { source, target } in &batch.copies {
            let start = |block: u32| block as usize * self.config.block_size;
            let source = start(*source)..start(*source) + self.config.block_size;
            self.slots.copy_within(source, start(*target));
            self.num_copies += 1;
        }
        // One by one is stricter than a real step, which writes all before it reads any.
        let mut written = HashSet::new();
        for entry in &batch.sequences {
            self.check_computed_slots(entry.id);
            self.write_slots(entry, &mut written);
        }
        let mut sampled = Vec::new();
        for entry in &batch.sequences {
            if self
                .scheduler
                .sequence(entry.id)
                .samples_after(entry.num_tokens)
            {
                sampled.push((entry.id, self.token()));
            }
        }
        if self.random.below(20) == 0 {
            self.abort();
        }
        for update in self.scheduler.update(&batch, &sampled) {
            assert_eq!(self.scheduler.has(update.id), update.finish.is_none());
            if update.finish.is_some() {
                self.ages.remove(&update.id);
                self.num_finished += 1;
            }
        }
    }

    fn check_batch(&mut self, batch: &ScheduledBatch) {
        let num_tokens: usize = batch.sequences.iter().map(|entry| entry.num_tokens).sum();
        assert_eq!(num_tokens, batch.num_tokens);
        assert!(num_tokens <= self.config.max_num_batched_tokens);
        assert!(batch.sequences.len() <= self.config.max_num_seqs);
        assert_eq!(num_tokens == 0, self.ages.is_empty(), "a step must advance");
        for entry in &batch.sequences {
            let sequence = self.scheduler.sequence(entry.id);
            assert!(entry.num_tokens > 0);
            assert!(entry.num_tokens <= sequence.num_uncomputed_tokens());
            let threshold = self.config.long_prefill_token_threshold;
            assert!(threshold == 0 || entry.num_tokens <= threshold);
            let computed = sequence.num_computed_tokens + entry.num_tokens;
            assert!(sequence.block_table.len() * self.config.block_size >= computed);
        }
        for age in self.ages.values_mut() {
            *age += 1;
            // More steps than a run has: the final drain must end.
            assert!(*age < 5_000, "a sequence starves");
        }
    }

    fn prefixes(&self, id: SequenceId) -> impl Iterator<Item = (usize, u64)> {
        let sequence = self.scheduler.sequence(id);
        let block_size = self.config.block_size;
        let mut prefix = 0;
        sequence
            .token_ids
            .iter()
            .enumerate()
            .map_while(move |(position, &token)| {
                prefix = extend_prefix(prefix, token);
                let block = *sequence.block_table.get(position / block_size)?;
                Some((block as usize * block_size + position % block_size, prefix))
            })
    }

    fn check_computed_slots(&self, id: SequenceId) {
        let num_computed_tokens = self.scheduler.sequence(id).num_computed_tokens;
        for (slot, prefix) in self.prefixes(id).take(num_computed_tokens) {
            assert_eq!(self.slots[slot], prefix, "sequence {id} reads another's");
        }
    }

    fn write_slots(&mut self, entry: &ScheduledSequence, written: &mut HashSet<usize>) {
        let sequence = self.scheduler.sequence(entry.id);
        let new_slots: Vec<_> = self
            .prefixes(entry.id)
            .skip(sequence.num_computed_tokens)
            .take(entry.num_tokens)
            .collect();
        assert_eq!(new_slots.len(), entry.num_tokens);
        for (slot, prefix) in new_slots {
            assert!(written.insert(slot), "slot {slot} is written twice");
            self.slots[slot] = prefix;
        }
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
        assert_eq!(sequences.len(), self.ages.len());
        assert_eq!(running.len() + waiting.len(), sequences.len());
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
                0..3 if self.ages.len() < 24 => self.add(),
                3 if self.random.below(4) == 0 => self.abort(),
                _ => self.step(),
            }
            self.check_invariants();
        }
        while !self.scheduler.is_idle() {
            self.step();
        }
        assert_eq!(self.scheduler.counters().num_blocks_used, 0);
    }
}

#[test]
fn random_operations_never_mix_up_blocks() {
    let mut counters = SchedulerCounters::default();
    let (mut num_finished, mut num_copies) = (0, 0);
    for seed in 0..100 {
        let mut simulation = Simulation::new(seed);
        simulation.run(1_200);
        let of_run = simulation.scheduler.counters();
        counters.num_preemptions += of_run.num_preemptions;
        counters.prefix_cache_hits += of_run.prefix_cache_hits;
        num_finished += simulation.num_finished;
        num_copies += simulation.num_copies;
    }
    // The run is worth something only if what it is about did happen.
    assert!(counters.num_preemptions > 1_000, "{counters:?}");
    assert!(counters.prefix_cache_hits > 10_000, "{counters:?}");
    assert!(num_copies > 1_000, "{num_copies} copies");
    assert!(num_finished > 10_000, "{num_finished} finished");
}
