//! One sequence from its arrival to its end: tokens, blocks, progress.
//!
//! Plain data that the scheduler changes and the batch builder reads. Knows no tensor, thread or
//! clock; arrival is a counter.

use super::block_manager::BlockHash;
use super::request::{FinishReason, GenerateRequest, SamplingParams};

/// Names a sequence for as long as the engine lives.
pub(super) type SequenceId = u64;

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SequenceStatus {
    /// Not in the batch and without blocks: new, or preempted.
    Waiting,
    /// Admitted: holds blocks and is part of each step that has budget for it.
    Running,
    /// Its last step is launched, and its blocks are free again.
    Ending,
}

/// The state of one sequence.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// Prompt, then generated tokens.
    pub(super) token_ids: Vec<u32>,
    pub(super) num_prompt_tokens: usize,
    /// Leading tokens whose keys and values lie in `block_table`, or will before a later step
    /// reads them: those of launched steps count.
    pub(super) num_computed_tokens: usize,
    /// Tokens that launched steps draw and that nobody knows yet; they follow `token_ids`. At
    /// most 1 while a step is scheduled, 2 from its launch until the step before is finished.
    pub(super) num_pending_tokens: usize,
    /// Prompt tokens that the prefix cache gave at the first admission.
    pub(super) num_cached_tokens: usize,
    /// Times the sequence lost its blocks.
    pub(super) num_preemptions: usize,
    /// KV blocks in order of position; may reach beyond the computed tokens.
    pub(super) block_table: Vec<u32>,
    /// Chained hashes of the leading full blocks of `token_ids`, made when first needed.
    pub(super) block_hashes: Vec<BlockHash>,
    pub(super) status: SequenceStatus,
    /// Lower is served first under the priority policy.
    pub(super) priority: i64,
    /// Position in the order of arrival.
    pub(super) arrival: u64,
    pub(super) sampling_params: SamplingParams,
}

impl Sequence {
    /// Makes a waiting sequence that holds nothing yet.
    pub(super) fn new(id: SequenceId, arrival: u64, request: GenerateRequest) -> Self {
        let GenerateRequest {
            request_id: _,
            prompt_token_ids,
            sampling_params,
            priority,
        } = request;
        Self {
            id,
            num_prompt_tokens: prompt_token_ids.len(),
            token_ids: prompt_token_ids,
            num_computed_tokens: 0,
            num_pending_tokens: 0,
            num_cached_tokens: 0,
            num_preemptions: 0,
            block_table: Vec::new(),
            block_hashes: Vec::new(),
            status: SequenceStatus::Waiting,
            priority,
            arrival,
            sampling_params,
        }
    }

    /// Returns the tokens drawn so far that are known.
    pub(super) fn output_token_ids(&self) -> &[u32] {
        &self.token_ids[self.num_prompt_tokens..]
    }

    /// Returns how many known tokens were drawn so far.
    pub(super) fn num_output_tokens(&self) -> usize {
        self.token_ids.len() - self.num_prompt_tokens
    }

    /// Returns how many tokens there are, pending ones included.
    pub(super) fn num_tokens(&self) -> usize {
        self.token_ids.len() + self.num_pending_tokens
    }

    /// Returns how many tokens were drawn so far, pending ones included.
    pub(super) fn num_drawn_tokens(&self) -> usize {
        self.num_output_tokens() + self.num_pending_tokens
    }

    /// Returns how many tokens are not computed yet.
    pub(super) fn num_uncomputed_tokens(&self) -> usize {
        self.num_tokens() - self.num_computed_tokens
    }

    /// Returns whether a step that computes `num_tokens` more yields logits to draw from.
    pub(super) fn samples_after(&self, num_tokens: usize) -> bool {
        self.num_computed_tokens + num_tokens == self.num_tokens()
            && self.sampling_params.max_tokens > 0
    }

    /// Returns whether nothing is left to compute: all tokens that the request may have are
    /// there, the last one pending, or it wants none and its prompt is computed.
    pub(super) fn is_launched_to_its_end(&self, max_model_len: usize) -> bool {
        let max_tokens = self.sampling_params.max_tokens;
        let is_last_pending = self.num_pending_tokens > 0
            && (self.num_drawn_tokens() >= max_tokens || self.num_tokens() >= max_model_len);
        is_last_pending || (max_tokens == 0 && self.num_uncomputed_tokens() == 0)
    }

    /// Returns whether cached blocks may stand for computed tokens.
    ///
    /// Logprobs of the prompt need the prompt's logits, so until they are all there every
    /// position must be computed.
    pub(super) fn may_read_prefix_cache(&self) -> bool {
        self.sampling_params.prompt_logprobs.is_none() || self.num_output_tokens() > 0
    }

    /// Extends `block_hashes` to all full blocks of the known tokens.
    pub(super) fn hash_full_blocks(&mut self, block_size: usize) {
        let hashed_tokens = self.block_hashes.len() * block_size;
        for block in self.token_ids[hashed_tokens..].chunks_exact(block_size) {
            let hash = BlockHash::of(self.block_hashes.last(), block);
            self.block_hashes.push(hash);
        }
    }

    /// Returns why the sequence ends with its last token, or `None` if it goes on.
    ///
    /// The order of the checks is vLLM's (`check_stop`): an ending token counts only from
    /// `min_tokens` on and wins over the lengths, which always hold.
    pub(super) fn finish_reason(&self, max_model_len: usize) -> Option<FinishReason> {
        let params = &self.sampling_params;
        let num_output_tokens = self.num_output_tokens();
        if let Some(&last) = self.output_token_ids().last()
            && num_output_tokens >= params.min_tokens
        {
            if !params.ignore_eos && params.eos_token_ids.contains(&last) {
                return Some(FinishReason::EndOfSequence);
            }
            if params.stop_token_ids.contains(&last) {
                return Some(FinishReason::StopToken(last));
            }
        }
        if num_output_tokens >= params.max_tokens || self.token_ids.len() >= max_model_len {
            return Some(FinishReason::Length);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(output: &[u32], params: SamplingParams) -> Sequence {
        let mut sequence = Sequence::new(
            1,
            0,
            GenerateRequest {
                request_id: "request".to_owned(),
                prompt_token_ids: vec![1, 2, 3],
                sampling_params: params,
                priority: 0,
            },
        );
        sequence.token_ids.extend_from_slice(output);
        sequence
    }

    fn params() -> SamplingParams {
        SamplingParams {
            eos_token_ids: vec![7, 8],
            stop_token_ids: vec![5, 8],
            max_tokens: 4,
            ..SamplingParams::default()
        }
    }

    #[test]
    fn ends_follow_the_order_of_the_checks() {
        use FinishReason::{EndOfSequence, Length, StopToken};
        let ignore_eos = SamplingParams {
            ignore_eos: true,
            ..params()
        };
        let min_tokens = SamplingParams {
            min_tokens: 2,
            ..params()
        };
        let cases = [
            (vec![9], params(), 100, None),
            (vec![7], params(), 100, Some(EndOfSequence)),
            (vec![8], params(), 100, Some(EndOfSequence)),
            (vec![5], params(), 100, Some(StopToken(5))),
            (vec![7], ignore_eos.clone(), 100, None),
            (vec![8], ignore_eos, 100, Some(StopToken(8))),
            (vec![7], min_tokens.clone(), 100, None),
            (vec![5], min_tokens.clone(), 100, None),
            (vec![9, 7], min_tokens.clone(), 100, Some(EndOfSequence)),
            (vec![7], min_tokens, 4, Some(Length)),
            (vec![9, 9, 9, 9], params(), 100, Some(Length)),
            (vec![9, 9, 9, 7], params(), 100, Some(EndOfSequence)),
            (vec![9], params(), 4, Some(Length)),
            (vec![9], params(), 5, None),
        ];
        for (output, params, max_model_len, want) in cases {
            let got = sequence(&output, params.clone()).finish_reason(max_model_len);
            assert_eq!(got, want, "output {output:?}, {params:?}, {max_model_len}");
        }
    }

    #[test]
    fn no_token_asked_for_ends_with_the_prompt_and_samples_nothing() {
        let sequence = sequence(
            &[],
            SamplingParams {
                max_tokens: 0,
                ..params()
            },
        );
        assert_eq!(sequence.finish_reason(100), Some(FinishReason::Length));
        assert!(!sequence.samples_after(3));
    }

    #[test]
    fn the_length_ends_a_sequence_before_its_last_token_is_known() {
        let limited = SamplingParams {
            max_tokens: 2,
            ..params()
        };
        // Output, pending tokens, limits, whether it ends.
        let cases: [(&[u32], usize, SamplingParams, usize, bool); 6] = [
            (&[9], 0, limited.clone(), 100, false),
            (&[9], 1, limited.clone(), 100, true),
            (&[], 1, limited, 100, false),
            (&[9], 1, params(), 5, true),
            (&[9], 1, params(), 6, false),
            (&[9, 9], 0, params(), 5, false),
        ];
        for (output, num_pending, params, max_model_len, want) in cases {
            let mut sequence = sequence(output, params);
            sequence.num_pending_tokens = num_pending;
            assert_eq!(
                sequence.is_launched_to_its_end(max_model_len),
                want,
                "output {output:?}, {num_pending} pending, {max_model_len}"
            );
        }
    }

    #[test]
    fn hashes_cover_full_blocks_only_and_grow_with_the_tokens() {
        let mut sequence = sequence(&[], params());
        sequence.hash_full_blocks(2);
        assert_eq!(sequence.block_hashes.len(), 1);
        sequence.token_ids.extend([4, 5]);
        sequence.hash_full_blocks(2);
        let first = BlockHash::of(None, &[1, 2]);
        let second = BlockHash::of(Some(&first), &[3, 4]);
        assert_eq!(sequence.block_hashes, [first, second]);
    }
}
