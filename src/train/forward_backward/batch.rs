//! One packed micro-batch.

use super::super::TrainError;
use crate::models::ModelConfig;

/// The label of a token that is not learned.
pub(super) const IGNORED: i32 = -100;

/// Sequences one after another, without padding; attention stays inside each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrainBatch {
    /// Tokens of all sequences.
    pub input_ids: Vec<u32>,
    /// What each token should have been predicted as, -100 where it is not learned: the token
    /// before it in the same sequence predicts it, as in Hugging Face's models.
    pub labels: Vec<i32>,
    /// Position of each token in its sequence.
    pub position_ids: Vec<u32>,
    /// Where each sequence begins, and the number of tokens.
    pub cu_seqlens: Vec<u32>,
    /// Rows of the data set, for messages.
    pub rows: Vec<u64>,
}

impl TrainBatch {
    /// Returns the number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Returns the number of tokens that are learned.
    pub fn num_targets(&self) -> usize {
        self.target_pairs().count()
    }

    /// Appends the sequences of another batch.
    pub fn append(&mut self, other: &Self) {
        let start = self.num_tokens() as u32;
        self.input_ids.extend_from_slice(&other.input_ids);
        self.labels.extend_from_slice(&other.labels);
        self.position_ids.extend_from_slice(&other.position_ids);
        let skip = usize::from(!self.cu_seqlens.is_empty());
        let ends = other.cu_seqlens.iter().skip(skip);
        self.cu_seqlens.extend(ends.map(|end| start + end));
        self.rows.extend_from_slice(&other.rows);
    }

    /// Returns the rows that predict something, and what.
    pub(super) fn targets(&self) -> (Vec<u32>, Vec<u32>) {
        self.target_pairs().unzip()
    }

    fn target_pairs(&self) -> impl Iterator<Item = (u32, u32)> {
        let sequences = self.cu_seqlens.windows(2);
        sequences
            .flat_map(|bounds| (bounds[0] + 1).min(bounds[1])..bounds[1])
            .filter_map(|token| {
                let label = self.labels[token as usize];
                (label != IGNORED).then_some((token - 1, label as u32))
            })
    }

    /// Checks the batch against itself and the model.
    pub(super) fn check(
        &self,
        config: &ModelConfig,
        max_positions: usize,
    ) -> Result<(), TrainError> {
        let wrong = |what: String| Err(TrainError::Batch { what });
        let num_tokens = self.num_tokens();
        if self.labels.len() != num_tokens || self.position_ids.len() != num_tokens {
            let (labels, positions) = (self.labels.len(), self.position_ids.len());
            return wrong(format!(
                "{num_tokens} tokens with {labels} labels and {positions} positions"
            ));
        }
        let is_rising = self.cu_seqlens.windows(2).all(|pair| pair[0] <= pair[1]);
        let ends = (self.cu_seqlens.first(), self.cu_seqlens.last());
        if !is_rising || ends != (Some(&0), Some(&(num_tokens as u32))) {
            let offsets = &self.cu_seqlens;
            return wrong(format!(
                "cu_seqlens must rise from 0 to {num_tokens}, got {offsets:?}"
            ));
        }
        let vocab_size = config.vocab_size;
        if let Some(id) = self.input_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return wrong(format!(
                "token {id} is outside the vocabulary of {vocab_size}"
            ));
        }
        let is_label =
            |label: i32| label == IGNORED || (0..vocab_size as i64).contains(&i64::from(label));
        if let Some(label) = self.labels.iter().find(|&&label| !is_label(label)) {
            return wrong(format!(
                "label {label} is neither {IGNORED} nor in the vocabulary of {vocab_size}"
            ));
        }
        match self
            .position_ids
            .iter()
            .find(|&&p| p as usize >= max_positions)
        {
            Some(position) => wrong(format!(
                "position {position} is beyond the longest sequence, {max_positions} tokens"
            )),
            None => Ok(()),
        }
    }
}
