//! Token ids and labels of one example: which tokens are cut and which are learned.
//!
//! Rules: LLaMA-Factory's `data/processor/supervised.py` and `infer_seqlen`. It knows neither
//! templates nor data sets.

use super::EncodedTurn;

/// Label of a token that is not learned.
pub const IGNORE_INDEX: i64 = -100;

/// Which answers of a conversation are learned: `mask_history` is [`LearnedTurns::Last`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LearnedTurns {
    /// Every one.
    #[default]
    All,
    /// The last; the turns before it are cut first when there are too many tokens.
    Last,
}

/// Whether prompts are learned too: `train_on_prompt` is [`PromptLabels::Learned`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PromptLabels {
    /// Prompts are given.
    #[default]
    Masked,
    /// Prompts are learned as answers are.
    Learned,
}

/// How an example is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SupervisedOptions {
    /// Most tokens of an example.
    pub cutoff_len: usize,
    /// Which answers are learned.
    pub learned_turns: LearnedTurns,
    /// Whether prompts are learned.
    pub prompt_labels: PromptLabels,
    /// The token put once behind the whole conversation, for templates with `efficient_eos`.
    pub efficient_eos: Option<u32>,
}

/// One example. Both lists have the same length, of at most `cutoff_len`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SupervisedExample {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// For each token its id, or [`IGNORE_INDEX`] where it is not learned. Not shifted.
    pub labels: Vec<i64>,
}

impl SupervisedExample {
    /// Returns how many tokens are learned.
    pub fn num_learned(&self) -> usize {
        self.labels
            .iter()
            .filter(|&&label| label != IGNORE_INDEX)
            .count()
    }
}

/// Returns the example that the turns make, or nothing when no token of it is learned.
pub fn encode_supervised(
    turns: &[EncodedTurn],
    options: &SupervisedOptions,
) -> Option<SupervisedExample> {
    let SupervisedOptions {
        cutoff_len,
        learned_turns,
        prompt_labels,
        efficient_eos,
    } = *options;
    let last_first = learned_turns == LearnedTurns::Last;
    let in_order = |index: usize| {
        if last_first {
            turns.len() - 1 - index
        } else {
            index
        }
    };
    let mut num_tokens = usize::from(efficient_eos.is_some());
    let mut pieces = Vec::with_capacity(turns.len());
    for index in 0..turns.len() {
        if num_tokens >= cutoff_len {
            break;
        }
        let turn = &turns[in_order(index)];
        let (prompt, response) = truncated_lengths(
            turn.prompt_ids.len(),
            turn.response_ids.len(),
            cutoff_len - num_tokens,
        );
        let (prompt, response) = (&turn.prompt_ids[..prompt], &turn.response_ids[..response]);
        num_tokens += prompt.len() + response.len();
        let mut piece = SupervisedExample {
            input_ids: [prompt, response].concat(),
            labels: vec![IGNORE_INDEX; prompt.len() + response.len()],
        };
        match prompt_labels {
            PromptLabels::Learned => learn(&mut piece, 0..prompt.len()),
            // The end of the answer before is learned at the first token of this prompt.
            PromptLabels::Masked => {
                if let (Some(eos), Some(label), true) = (
                    efficient_eos,
                    piece.labels.first_mut(),
                    index != 0 && !prompt.is_empty(),
                ) {
                    *label = i64::from(eos);
                }
            }
        }
        if !last_first || index == 0 {
            learn(&mut piece, prompt.len()..prompt.len() + response.len());
        }
        pieces.push(piece);
    }
    if last_first {
        pieces.reverse();
    }
    let mut example = SupervisedExample::default();
    for piece in pieces {
        example.input_ids.extend(piece.input_ids);
        example.labels.extend(piece.labels);
    }
    if let Some(eos) = efficient_eos {
        example.input_ids.push(eos);
        example.labels.push(i64::from(eos));
    }
    (example.num_learned() > 0).then_some(example)
}

fn learn(example: &mut SupervisedExample, range: std::ops::Range<usize>) {
    for index in range {
        example.labels[index] = i64::from(example.input_ids[index]);
    }
}

/// Returns how many tokens of a prompt and of its response are kept of a budget, the heads of both.
///
/// A part that is less than half of the budget is kept whole while the other is cut; if neither
/// is, both are cut in proportion. The product is taken in f64 as Python takes it, since the
/// rounding of the quotient decides whether a token falls off.
pub fn truncated_lengths(prompt: usize, response: usize, budget: usize) -> (usize, usize) {
    let max_response = if response * 2 < budget {
        budget
    } else if prompt * 2 < budget {
        budget - prompt
    } else {
        (budget as f64 * (response as f64 / (prompt + response) as f64)) as usize
    };
    let response = response.min(max_response);
    (prompt.min(budget.saturating_sub(response)), response)
}
