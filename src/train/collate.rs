//! Encoded examples to one micro-batch: integers laid out for the model.
//!
//! Both layouts are the same kind of batch: sequences side by side, with the borders in
//! `cu_seqlens`, so that attention stays within each and positions begin anew. Packed, a sequence
//! is an example; padded, it is a row filled up to the longest with tokens whose label is
//! [`IGNORE_INDEX`], which causal attention keeps from being seen. The examples of an update are
//! the same either way, and so is the loss.

/// The label of a position that is not learned.
pub const IGNORE_INDEX: i64 = -100;

/// Padded rows are multiples of this long, as LLaMA-Factory's are.
const PAD_TO_MULTIPLE_OF: usize = 8;

/// One example as tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodedExample {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// The same ids where they are learned, [`IGNORE_INDEX`] elsewhere; as long as `input_ids`.
    pub labels: Vec<i64>,
}

/// How examples are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Side by side without padding.
    Packed,
    /// One row each, filled up with this token.
    Padded {
        /// The padding token.
        pad_token_id: u32,
    },
}

/// One micro-batch. `tokens` is the sum of the lengths of its sequences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[tokens]`.
    pub input_ids: Vec<u32>,
    /// `[tokens]`, not shifted: the logits at a position are compared with the next label.
    pub labels: Vec<i64>,
    /// `[tokens]`, from 0 in each sequence.
    pub position_ids: Vec<u32>,
    /// `[sequences + 1]`: where each sequence begins, and the end.
    pub cu_seqlens: Vec<u32>,
    /// `[sequences]`: the index of each example in the data, for error texts.
    pub examples: Vec<usize>,
}

impl Batch {
    /// Lays out `examples`, given with their indices in the data.
    pub fn collate<'a>(
        examples: impl IntoIterator<Item = (usize, &'a EncodedExample)>,
        layout: Layout,
    ) -> Self {
        let examples: Vec<(usize, &EncodedExample)> = examples.into_iter().collect();
        let lengths = examples.iter().map(|(_, example)| example.input_ids.len());
        let longest = lengths.max().unwrap_or(0);
        let padded = longest.next_multiple_of(PAD_TO_MULTIPLE_OF);
        let mut batch = Self {
            cu_seqlens: vec![0],
            ..Self::default()
        };
        for (index, example) in examples {
            batch.push(index, example);
            if let Layout::Padded { pad_token_id } = layout {
                batch.pad_to(example.input_ids.len(), padded, pad_token_id);
            }
            batch.cu_seqlens.push(batch.input_ids.len() as u32);
        }
        batch
    }

    fn push(&mut self, index: usize, example: &EncodedExample) {
        self.input_ids.extend_from_slice(&example.input_ids);
        self.labels.extend_from_slice(&example.labels);
        self.position_ids.extend(0..example.input_ids.len() as u32);
        self.examples.push(index);
    }

    fn pad_to(&mut self, length: usize, padded: usize, pad_token_id: u32) {
        let missing = padded - length;
        self.input_ids.extend(std::iter::repeat_n(pad_token_id, missing));
        self.labels.extend(std::iter::repeat_n(IGNORE_INDEX, missing));
        self.position_ids.extend(length as u32..padded as u32);
    }

    /// Returns the tokens, padding included.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Returns the positions whose next token is learned: the terms of the loss.
    ///
    /// The first label of a sequence is nobody's next token, so it never counts.
    pub fn num_target_tokens(&self) -> usize {
        self.cu_seqlens
            .windows(2)
            .map(|border| {
                let labels = &self.labels[border[0] as usize..border[1] as usize];
                let next = labels.iter().skip(1);
                next.filter(|label| **label != IGNORE_INDEX).count()
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(length: u32, learned_from: u32) -> EncodedExample {
        let label = |id| {
            if id < learned_from {
                IGNORE_INDEX
            } else {
                i64::from(id)
            }
        };
        EncodedExample {
            input_ids: (0..length).collect(),
            labels: (0..length).map(label).collect(),
        }
    }

    #[test]
    fn packed_examples_lie_side_by_side() {
        let (a, b) = (example(3, 1), example(2, 0));
        let batch = Batch::collate([(7, &a), (4, &b)], Layout::Packed);
        assert_eq!(batch.input_ids, [0, 1, 2, 0, 1]);
        assert_eq!(batch.labels, [-100, 1, 2, 0, 1]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 1]);
        assert_eq!(batch.cu_seqlens, [0, 3, 5]);
        assert_eq!(batch.examples, [7, 4]);
    }

    #[test]
    fn padded_rows_are_a_multiple_of_eight_long() {
        let (a, b) = (example(9, 1), example(2, 0));
        let batch = Batch::collate([(0, &a), (1, &b)], Layout::Padded { pad_token_id: 99 });
        assert_eq!(batch.cu_seqlens, [0, 16, 32]);
        assert_eq!(batch.input_ids[8..18], [8, 99, 99, 99, 99, 99, 99, 99, 0, 1]);
        assert_eq!(batch.labels[9..16], [IGNORE_INDEX; 7]);
        assert_eq!(batch.position_ids[14..18], [14, 15, 0, 1]);
    }

    #[test]
    fn both_layouts_learn_the_same_tokens() {
        let examples = [example(9, 4), example(5, 0), example(1, 0)];
        let numbered = || examples.iter().enumerate();
        let packed = Batch::collate(numbered(), Layout::Packed);
        let padded = Batch::collate(numbered(), Layout::Padded { pad_token_id: 0 });
        // The first label of a sequence has no logits before it: 5 + 4 + 0.
        assert_eq!(packed.num_target_tokens(), 9);
        assert_eq!(padded.num_target_tokens(), 9);
        assert_eq!(packed.num_tokens(), 15);
        assert_eq!(padded.num_tokens(), 48);
    }

    #[test]
    fn no_examples_make_an_empty_batch() {
        let batch = Batch::collate([], Layout::Packed);
        assert_eq!((batch.num_tokens(), batch.cu_seqlens), (0, vec![0]));
    }
}
