//! One test a rule. Blocks hold 4 tokens unless a test says otherwise.

use super::super::request::{FinishReason, SamplingParams};
use super::*;

pub(super) fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 32,
        num_blocks: 16,
        block_size: 4,
        policy: SchedulingPolicy::Fcfs,
        prefix_caching: PrefixCaching::Enabled,
        long_prefill_token_threshold: 0,
    }
}

pub(super) fn request(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        request_id: "request".to_owned(),
        prompt_token_ids: prompt.to_vec(),
        sampling_params: SamplingParams {
            max_tokens,
            ..SamplingParams::default()
        },
        priority: 0,
    }
}

pub(super) fn add_with_priority(
    scheduler: &mut Scheduler,
    id: SequenceId,
    request: GenerateRequest,
    priority: i64,
) {
    let request = GenerateRequest {
        priority,
        ..request
    };
    scheduler.add(id, request).unwrap();
}

/// A prompt that shares nothing with a prompt of another `first` token.
pub(super) fn prompt(first: u32, len: u32) -> Vec<u32> {
    (first..first + len).collect()
}

pub(super) fn scheduled(batch: &ScheduledBatch) -> Vec<(SequenceId, usize)> {
    let pairs = batch.sequences.iter();
    pairs.map(|entry| (entry.id, entry.num_tokens)).collect()
}

pub(super) fn launch(scheduler: &mut Scheduler) -> ScheduledBatch {
    let batch = scheduler.schedule();
    scheduler.note_launch(&batch);
    scheduler.blocks.assert_consistent();
    batch
}

/// Draws `token` for each sequence of the batch that may want one.
pub(super) fn finish_step(
    scheduler: &mut Scheduler,
    batch: &ScheduledBatch,
    token: u32,
) -> Vec<Update> {
    let drawing = batch.sequences.iter().filter(|entry| entry.is_last);
    let sampled: Vec<_> = drawing.map(|entry| (entry.id, token)).collect();
    scheduler.update(batch, &sampled)
}

pub(super) fn step(scheduler: &mut Scheduler) -> (Vec<(SequenceId, usize)>, Vec<Update>) {
    let batch = launch(scheduler);
    let updates = finish_step(scheduler, &batch, 1000);
    scheduler.blocks.assert_consistent();
    (scheduled(&batch), updates)
}

#[test]
fn one_step_mixes_decodes_and_prompts() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 6), 9)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(1, 6)]);
    scheduler.add(2, request(&prompt(200, 5), 9)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(1, 1), (2, 5)]);
    assert_eq!(step(&mut scheduler).0, [(1, 1), (2, 1)]);
}

#[test]
fn long_prompt_is_computed_in_chunks_that_leave_room_for_decodes() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_batched_tokens: 8,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 3), 9)).unwrap();
    scheduler.add(2, request(&prompt(200, 14), 9)).unwrap();
    let (first, updates) = step(&mut scheduler);
    assert_eq!(first, [(1, 3), (2, 5)]);
    assert_eq!(updates.len(), 1, "an unfinished prompt has no news");
    assert_eq!(step(&mut scheduler).0, [(1, 1), (2, 7)]);
    let (third, updates) = step(&mut scheduler);
    assert_eq!(third, [(1, 1), (2, 2)]);
    assert!(updates[1].prompt_done && updates[1].token_id == Some(1000));
    assert!(!updates[0].prompt_done);
}

#[test]
fn long_prefill_threshold_caps_each_chunk() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        long_prefill_token_threshold: 6,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 14), 9)).unwrap();
    scheduler.add(2, request(&prompt(200, 7), 9)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(1, 6), (2, 6)]);
    assert_eq!(step(&mut scheduler).0, [(1, 6), (2, 1)]);
    assert_eq!(step(&mut scheduler).0, [(1, 2), (2, 1)]);
}

#[test]
fn no_more_than_max_num_seqs_run() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 2,
        ..config()
    });
    for id in 1..=3 {
        scheduler
            .add(id, request(&prompt(100 * id as u32, 4), 2))
            .unwrap();
    }
    assert_eq!(step(&mut scheduler).0, [(1, 4), (2, 4)]);
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (2, 1));
    step(&mut scheduler);
    assert_eq!(step(&mut scheduler).0, [(3, 4)]);
}

#[test]
fn cached_prefix_is_not_computed_again() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 10), 1)).unwrap();
    step(&mut scheduler);
    assert!(scheduler.is_idle());
    scheduler.add(2, request(&prompt(100, 10), 1)).unwrap();
    let (batch, updates) = step(&mut scheduler);
    assert_eq!(batch, [(2, 1)]);
    assert_eq!(updates[0].num_cached_tokens, 9);
    let counters = scheduler.counters();
    assert_eq!(counters.prefix_cache_queries, 20);
    assert_eq!(counters.prefix_cache_hits, 9);
    assert_eq!(counters.prompt_tokens, 20);
}

#[test]
fn sequences_of_one_step_compute_their_common_prefix_once() {
    let mut scheduler = Scheduler::new(config());
    for id in 1..=3 {
        scheduler.add(id, request(&prompt(100, 10), 2)).unwrap();
    }
    let (batch, updates) = step(&mut scheduler);
    assert_eq!(batch, [(1, 10), (2, 2), (3, 2)]);
    let cached = updates.iter().map(|update| update.num_cached_tokens);
    assert_eq!(cached.collect::<Vec<_>>(), [0, 8, 8]);
    assert_eq!(scheduler.counters().num_blocks_used, 5);
}

#[test]
fn one_token_waits_for_the_step_that_fills_its_prefix() {
    let mut scheduler = Scheduler::new(config());
    for id in 1..=3 {
        scheduler.add(id, request(&prompt(100, 9), 2)).unwrap();
    }
    assert_eq!(step(&mut scheduler).0, [(1, 9)]);
    assert_eq!(step(&mut scheduler).0, [(1, 1), (2, 1), (3, 1)]);
    // So does a longer rest of which the step has room for one token.
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_batched_tokens: 11,
        ..config()
    });
    for id in 1..=2 {
        scheduler.add(id, request(&prompt(100, 10), 2)).unwrap();
    }
    assert_eq!(step(&mut scheduler).0, [(1, 10)]);
    assert_eq!(step(&mut scheduler).0, [(1, 1), (2, 2)]);
}

#[test]
fn block_whose_step_was_taken_back_is_not_found() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 4,
        max_model_len: 16,
        policy: SchedulingPolicy::Priority,
        long_prefill_token_threshold: 4,
        ..config()
    });
    for (id, len, priority) in [(1, 12, 9), (2, 4, 10)] {
        add_with_priority(
            &mut scheduler,
            id,
            request(&prompt(100 * id as u32, len), 9),
            priority,
        );
    }
    assert_eq!(step(&mut scheduler).0, [(1, 4), (2, 4)]);
    // Now the first in the batch is the worst, and the second one needs a block.
    known(&mut scheduler.sequences, 2).priority = 1;
    assert_eq!(step(&mut scheduler).0, [(2, 1)]);
    let preempted = known(&mut scheduler.sequences, 1);
    preempted.hash_full_blocks(4);
    let hashes = &preempted.block_hashes;
    assert_eq!(scheduler.blocks.num_cached_blocks(hashes), 1);
}

#[test]
fn generated_tokens_are_found_in_the_prefix_cache_too() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 3), 6)).unwrap();
    while !scheduler.is_idle() {
        step(&mut scheduler);
    }
    let conversation: Vec<u32> = [100, 101, 102, 1000, 1000, 1000, 1000, 1000, 7].to_vec();
    scheduler.add(2, request(&conversation, 1)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(2, 1)]);
}

#[test]
fn of_a_fully_cached_prompt_only_the_last_token_is_computed_for_its_logits() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 8), 9)).unwrap();
    step(&mut scheduler);
    scheduler.add(2, request(&prompt(100, 8), 9)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(1, 1), (2, 1)]);
    let tables = [1, 2].map(|id| scheduler.sequence(id).block_table.clone());
    assert_eq!(tables[0][0], tables[1][0]);
    assert_ne!(tables[0][1], tables[1][1], "a shared block is not written");
}

#[test]
fn prompt_logprobs_compute_the_whole_prompt() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 10), 1)).unwrap();
    step(&mut scheduler);
    let mut with_logprobs = request(&prompt(100, 10), 1);
    with_logprobs.sampling_params.prompt_logprobs = Some(0);
    scheduler.add(2, with_logprobs).unwrap();
    let (batch, updates) = step(&mut scheduler);
    assert_eq!(batch, [(2, 10)]);
    assert_eq!(updates[0].num_cached_tokens, 0);
    assert_eq!(scheduler.counters().prefix_cache_queries, 10);
}

#[test]
fn disabled_prefix_cache_shares_nothing() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        prefix_caching: PrefixCaching::Disabled,
        ..config()
    });
    for id in 1..=2 {
        scheduler.add(id, request(&prompt(100, 10), 1)).unwrap();
        assert_eq!(step(&mut scheduler).0, [(id, 10)]);
    }
    assert_eq!(scheduler.counters().prefix_cache_queries, 0);
}

#[test]
fn last_running_sequence_is_preempted_and_keeps_its_tokens() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 15), 17)).unwrap();
    scheduler.add(2, request(&prompt(200, 15), 17)).unwrap();
    for _ in 0..2 {
        step(&mut scheduler);
    }
    // Both hold four full blocks and the next token of either needs a ninth.
    assert_eq!(step(&mut scheduler).0, [(1, 1)]);
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (1, 1));
    let preempted = scheduler.sequence(2);
    assert_eq!(preempted.status, SequenceStatus::Waiting);
    assert_eq!(preempted.output_token_ids(), [1000, 1000]);
    assert!(preempted.block_table.is_empty());
    assert_eq!(scheduler.counters().num_preemptions, 1);
}

#[test]
fn preempted_sequence_comes_first_and_finds_its_prefix_blocks() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 15), 4)).unwrap();
    scheduler.add(2, request(&prompt(200, 15), 4)).unwrap();
    step(&mut scheduler);
    step(&mut scheduler);
    scheduler.add(3, request(&prompt(300, 4), 4)).unwrap();
    step(&mut scheduler);
    let (batch, updates) = step(&mut scheduler);
    assert_eq!(batch, [(1, 1)]);
    assert_eq!(updates[0].finish, Some(FinishReason::Length));
    // 17 tokens, of which the fourth block was evicted for sequence 1.
    let (batch, updates) = step(&mut scheduler);
    assert_eq!(batch, [(2, 5), (3, 4)]);
    assert!(!updates[0].prompt_done, "the prompt is reported once");
    assert_eq!(updates[0].num_cached_tokens, 0, "of the first admission");
}

#[test]
fn nothing_is_admitted_in_a_step_that_preempts() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 16), 9)).unwrap();
    scheduler.add(2, request(&prompt(200, 16), 9)).unwrap();
    step(&mut scheduler);
    scheduler.add(3, request(&prompt(300, 2), 9)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(1, 1)]);
}

#[test]
fn prompt_is_admitted_only_when_all_of_it_fits() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8,
        max_num_batched_tokens: 8,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 17), 1)).unwrap();
    scheduler.add(2, request(&prompt(200, 17), 1)).unwrap();
    scheduler.add(3, request(&prompt(300, 2), 1)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(1, 8)]);
    assert_eq!(step(&mut scheduler).0, [(1, 8)]);
    assert_eq!(
        step(&mut scheduler).0,
        [(1, 1)],
        "3 does not overtake 2, which waits for blocks"
    );
    assert_eq!(step(&mut scheduler).0, [(2, 8)]);
    assert_eq!(scheduler.counters().num_preemptions, 0);
}

#[test]
fn priority_policy_admits_the_lowest_value_first() {
    let config = SchedulerConfig {
        policy: SchedulingPolicy::Priority,
        max_num_seqs: 1,
        ..config()
    };
    let mut scheduler = Scheduler::new(config);
    for (id, priority) in [(1, 5), (2, -1), (3, 5), (4, 0)] {
        add_with_priority(
            &mut scheduler,
            id,
            request(&prompt(100 * id as u32, 4), 1),
            priority,
        );
    }
    let mut order = Vec::new();
    while !scheduler.is_idle() {
        order.extend(step(&mut scheduler).0.iter().map(|&(id, _)| id));
    }
    assert_eq!(order, [2, 4, 1, 3]);
}

#[test]
fn fcfs_policy_ignores_priority() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 1,
        ..config()
    });
    for (id, priority) in [(1, 5), (2, -1)] {
        add_with_priority(
            &mut scheduler,
            id,
            request(&prompt(100 * id as u32, 4), 1),
            priority,
        );
    }
    assert_eq!(step(&mut scheduler).0, [(1, 4)]);
}

#[test]
fn priority_policy_preempts_the_worst_even_if_it_was_scheduled_already() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8,
        policy: SchedulingPolicy::Priority,
        ..config()
    });
    // Sequence 1 stands first among the running ones, and can still take its token this step.
    for (id, len, priority) in [(1, 14, 9), (2, 16, 1)] {
        add_with_priority(
            &mut scheduler,
            id,
            request(&prompt(100 * id as u32, len), 9),
            priority,
        );
        step(&mut scheduler);
    }
    assert_eq!(step(&mut scheduler).0, [(2, 1)]);
    assert_eq!(scheduler.sequence(1).status, SequenceStatus::Waiting);
}

#[test]
fn no_token_asked_for_ends_after_the_prompt() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 32), 0)).unwrap();
    let (_, updates) = step(&mut scheduler);
    let want = Update {
        id: 1,
        token_id: None,
        prompt_done: true,
        num_cached_tokens: 0,
        finish: Some(FinishReason::Length),
    };
    assert_eq!(updates, [want]);
    assert!(scheduler.is_idle());
}

#[test]
fn sequence_ends_at_the_models_length() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 30), 100)).unwrap();
    assert_eq!(step(&mut scheduler).1[0].finish, None);
    assert_eq!(step(&mut scheduler).1[0].finish, Some(FinishReason::Length));
    assert_eq!(scheduler.counters().num_blocks_used, 0);
}

#[test]
fn impossible_prompts_are_refused() {
    let mut scheduler = Scheduler::new(config());
    assert_eq!(
        scheduler.add(1, request(&[], 1)),
        Err(AddError::EmptyPrompt)
    );
    let want = AddError::PromptTooLong {
        prompt_len: 32,
        min_output_len: 1,
        max_model_len: 32,
    };
    assert_eq!(scheduler.add(1, request(&prompt(100, 32), 1)), Err(want));
    assert!(scheduler.is_idle());
}

#[test]
#[should_panic(expected = "hold no sequence of 65 tokens")]
fn blocks_that_hold_no_full_sequence_are_refused_at_the_start() {
    Scheduler::new(SchedulerConfig {
        max_model_len: 65,
        ..config()
    });
}

#[test]
fn longest_sequence_alone_runs_to_its_end_with_the_fewest_blocks() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8,
        max_num_batched_tokens: 3,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 31), 9)).unwrap();
    scheduler.add(2, request(&prompt(200, 31), 9)).unwrap();
    let mut num_steps = 0;
    while !scheduler.is_idle() {
        step(&mut scheduler);
        num_steps += 1;
    }
    assert_eq!(num_steps, 22);
}

#[test]
fn abort_frees_the_blocks_of_running_and_waiting_sequences() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 1,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 9), 9)).unwrap();
    scheduler.add(2, request(&prompt(200, 9), 9)).unwrap();
    step(&mut scheduler);
    scheduler.abort(1);
    scheduler.abort(2);
    scheduler.abort(3);
    assert!(scheduler.is_idle() && !scheduler.has(1));
    assert_eq!(scheduler.counters().num_blocks_used, 0);
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (0, 0));
    assert_eq!(scheduler.schedule(), ScheduledBatch::default());
}

#[test]
fn sequences_aborted_during_a_step_are_passed_over() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 4), 9)).unwrap();
    scheduler.add(2, request(&prompt(200, 4), 9)).unwrap();
    let batch = launch(&mut scheduler);
    scheduler.abort(1);
    let updates = scheduler.update(&batch, &[(1, 5), (2, 6)]);
    let news: Vec<_> = updates.iter().map(|u| (u.id, u.token_id)).collect();
    assert_eq!(news, [(2, Some(6))]);
}

#[test]
fn sequence_without_its_token_is_not_scheduled() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 4), 9)).unwrap();
    scheduler.add(2, request(&prompt(200, 4), 9)).unwrap();
    let batch = launch(&mut scheduler);
    assert_eq!(scheduler.update(&batch, &[(2, 6)]).len(), 1);
    assert_eq!(scheduled(&scheduler.schedule()), [(2, 1)]);
}

#[test]
fn tokens_are_matched_by_id_in_any_order() {
    let mut scheduler = Scheduler::new(config());
    for id in 1..=3 {
        scheduler
            .add(id, request(&prompt(100 * id as u32, 4), 9))
            .unwrap();
    }
    let batch = launch(&mut scheduler);
    let updates = scheduler.update(&batch, &[(3, 33), (1, 11), (2, 22)]);
    let news: Vec<_> = updates.iter().map(|u| (u.id, u.token_id)).collect();
    assert_eq!(news, [(1, Some(11)), (2, Some(22)), (3, Some(33))]);
}
