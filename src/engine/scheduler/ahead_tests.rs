//! What holds while a step is launched before the one before it is read. Blocks hold 4 tokens.

use super::super::request::FinishReason;
use super::tests::{
    add_with_priority, config, finish_step, launch, prompt, request, scheduled, step,
};
use super::*;

const TOKEN: u32 = 1000;

#[test]
fn a_pending_token_is_scheduled_before_it_is_known() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 6), 9)).unwrap();
    let mut before = launch(&mut scheduler);
    for num_output in 1..9 {
        let next = launch(&mut scheduler);
        assert_eq!(scheduled(&next), [(1, 1)]);
        assert_eq!(scheduler.sequence(1).num_pending_tokens, 2);
        let updates = finish_step(&mut scheduler, &before, TOKEN + num_output);
        assert_eq!(updates[0].token_id, Some(TOKEN + num_output));
        assert_eq!(updates[0].prompt_done, num_output == 1);
        let sequence = scheduler.sequence(1);
        assert_eq!(sequence.num_output_tokens(), num_output as usize);
        assert_eq!(sequence.num_computed_tokens, sequence.token_ids.len());
        before = next;
    }
    assert_eq!(scheduler.schedule().sequences, []);
    let updates = finish_step(&mut scheduler, &before, TOKEN);
    assert_eq!(updates[0].finish, Some(FinishReason::Length));
    assert!(scheduler.is_idle());
}

#[test]
fn a_sequence_whose_last_token_is_pending_leaves_its_place_and_blocks_at_once() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 1,
        num_blocks: 8,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 30), 1)).unwrap();
    scheduler.add(2, request(&prompt(200, 30), 0)).unwrap();
    scheduler.add(3, request(&prompt(300, 30), 9)).unwrap();
    let mut before = launch(&mut scheduler);
    for (id, token_id) in [(1, Some(TOKEN)), (2, None)] {
        assert_eq!(scheduled(&before), [(id, 30)]);
        let next = launch(&mut scheduler);
        assert_eq!(scheduled(&next), [(id + 1, 30)]);
        assert_eq!(scheduler.counters().num_blocks_used, 8);
        assert_eq!(scheduler.num_running(), 2);
        let updates = finish_step(&mut scheduler, &before, TOKEN);
        assert_eq!(updates[0].token_id, token_id);
        assert_eq!(updates[0].finish, Some(FinishReason::Length));
        assert_eq!(scheduler.num_running(), 1);
        before = next;
    }
    assert_eq!(scheduler.counters().num_preemptions, 0);
}

#[test]
fn the_model_length_is_seen_before_the_token_is_known() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 30), 100)).unwrap();
    let first = launch(&mut scheduler);
    let second = launch(&mut scheduler);
    assert_eq!(scheduled(&second), [(1, 1)]);
    finish_step(&mut scheduler, &first, TOKEN);
    assert_eq!(scheduler.schedule().sequences, []);
    let updates = finish_step(&mut scheduler, &second, TOKEN);
    assert_eq!(updates[0].finish, Some(FinishReason::Length));
}

#[test]
fn what_a_step_drew_for_a_sequence_that_had_ended_is_dropped() {
    let mut scheduler = Scheduler::new(config());
    for id in 1..=2 {
        let mut stopping = request(&prompt(100 * id as u32, 5), 9);
        stopping.sampling_params.stop_token_ids = vec![7];
        scheduler.add(id, stopping).unwrap();
    }
    let first = launch(&mut scheduler);
    let second = launch(&mut scheduler);
    let updates = scheduler.update(&first, &[(1, 7), (2, 8)]);
    assert_eq!(updates[0].finish, Some(FinishReason::StopToken(7)));
    // The blocks are free although a launched step still works on them.
    assert_eq!(scheduler.counters().num_blocks_used, 2);
    let third = launch(&mut scheduler);
    assert_eq!(scheduled(&third), [(2, 1)]);
    let updates = scheduler.update(&second, &[(1, 9), (2, 9)]);
    assert_eq!(updates.len(), 1);
    assert_eq!(scheduler.sequence(2).output_token_ids(), [8, 9]);
    scheduler.abort(2);
    assert_eq!(scheduler.update(&third, &[(2, 9)]), []);
    assert_eq!(scheduler.counters().num_blocks_used, 0);
}

#[test]
fn a_block_that_a_pending_token_fills_is_cached_once_it_is_known() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 7), 20)).unwrap();
    let first = launch(&mut scheduler);
    launch(&mut scheduler);
    let first_hash = BlockHash::of(None, &prompt(100, 4));
    let hashes = [
        first_hash,
        BlockHash::of(Some(&first_hash), &[104, 105, 106, TOKEN]),
    ];
    assert_eq!(scheduler.blocks.num_cached_blocks(&hashes), 1);
    finish_step(&mut scheduler, &first, TOKEN);
    assert_eq!(scheduler.blocks.num_cached_blocks(&hashes), 2);
}

#[test]
fn a_preempted_sequence_gets_its_pending_token_before_it_is_admitted_again() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8,
        ..config()
    });
    scheduler.add(1, request(&prompt(100, 15), 3)).unwrap();
    scheduler.add(2, request(&prompt(200, 15), 9)).unwrap();
    step(&mut scheduler);
    let first = launch(&mut scheduler);
    scheduler.add(3, request(&prompt(300, 2), 9)).unwrap();
    // Both hold four full blocks and the next token of either needs a ninth.
    let second = launch(&mut scheduler);
    assert_eq!(scheduled(&second), [(1, 1)]);
    let preempted = scheduler.sequence(2);
    assert_eq!(preempted.status, SequenceStatus::Waiting);
    assert_eq!(preempted.num_pending_tokens, 1);
    assert_eq!(
        scheduler.num_waiting(),
        2,
        "a step that preempts admits nobody"
    );
    finish_step(&mut scheduler, &first, TOKEN);
    assert_eq!(scheduler.sequence(2).output_token_ids(), [TOKEN, TOKEN]);
    // Sequence 1 has given its blocks back: there is room for all.
    let third = launch(&mut scheduler);
    let ids: Vec<_> = scheduled(&third).iter().map(|&(id, _)| id).collect();
    assert_eq!(ids, [2, 3]);
    finish_step(&mut scheduler, &second, TOKEN);
    let updates = finish_step(&mut scheduler, &third, TOKEN);
    assert!(!updates[0].prompt_done && updates[1].prompt_done);
}

#[test]
fn a_preempted_sequence_may_end_while_it_waits() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8,
        policy: SchedulingPolicy::Priority,
        ..config()
    });
    for (id, priority) in [(1, 0), (2, 5)] {
        let mut stopping = request(&prompt(100 * id as u32, 15), 9);
        stopping.sampling_params.stop_token_ids = vec![7];
        add_with_priority(&mut scheduler, id, stopping, priority);
    }
    step(&mut scheduler);
    let first = launch(&mut scheduler);
    let second = launch(&mut scheduler);
    assert_eq!(scheduled(&second), [(1, 1)]);
    let updates = scheduler.update(&first, &[(1, 8), (2, 7)]);
    assert_eq!(updates[1].finish, Some(FinishReason::StopToken(7)));
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (1, 0));
    finish_step(&mut scheduler, &second, 8);
    assert_eq!(scheduled(&launch(&mut scheduler)), [(1, 1)]);
}

#[test]
fn a_finished_prompt_lends_its_beginning_before_its_last_token_is_known() {
    let mut scheduler = Scheduler::new(config());
    scheduler.add(1, request(&prompt(100, 10), 1)).unwrap();
    launch(&mut scheduler);
    scheduler.add(2, request(&prompt(100, 10), 1)).unwrap();
    let batch = launch(&mut scheduler);
    assert_eq!(scheduled(&batch), [(2, 1)]);
    assert_eq!(batch.copies.len(), 1);
}
