//! Encoded examples to one micro-batch: integers laid out for the model.
//!
//! Both layouts are the same kind of batch: sequences side by side, with the borders in
//! `cu_seqlens`, so that attention stays within each and positions begin anew. Packed, a sequence
//! is an example; padded, it is a row filled up to the longest with tokens whose label is
//! [`IGNORE_INDEX`], which causal attention keeps from being seen. The examples of an update are
//! the same either way, and so is the loss.

use crate::text::{IGNORE_INDEX, SupervisedExample};

use super::TrainBatch;

/// Padded rows are multiples of this long, as LLaMA-Factory's are.
const PAD_TO_MULTIPLE_OF: usize = 8;

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

/// Lays out the examples with these indices in `data`.
pub fn collate(data: &[SupervisedExample], indices: &[usize], layout: Layout) -> TrainBatch {
    let lengths = indices.iter().map(|&index| data[index].input_ids.len());
    let padded = lengths
        .max()
        .unwrap_or(0)
        .next_multiple_of(PAD_TO_MULTIPLE_OF);
    let mut batch = TrainBatch {
        cu_seqlens: vec![0],
        ..TrainBatch::default()
    };
    for &index in indices {
        push(&mut batch, index, &data[index]);
        if let Layout::Padded { pad_token_id } = layout {
            pad(
                &mut batch,
                data[index].input_ids.len(),
                padded,
                pad_token_id,
            );
        }
        batch.cu_seqlens.push(batch.input_ids.len() as u32);
    }
    batch
}

fn push(batch: &mut TrainBatch, index: usize, example: &SupervisedExample) {
    batch.input_ids.extend_from_slice(&example.input_ids);
    // Labels are token ids or -100, both of which are far within 32 bits.
    batch
        .labels
        .extend(example.labels.iter().map(|&label| label as i32));
    batch.position_ids.extend(0..example.input_ids.len() as u32);
    batch.rows.push(index as u64);
}

fn pad(batch: &mut TrainBatch, length: usize, padded: usize, pad_token_id: u32) {
    let missing = padded - length;
    batch
        .input_ids
        .extend(std::iter::repeat_n(pad_token_id, missing));
    batch
        .labels
        .extend(std::iter::repeat_n(IGNORE_INDEX as i32, missing));
    batch.position_ids.extend(length as u32..padded as u32);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(length: u32, learned_from: u32) -> SupervisedExample {
        let label = |id| {
            if id < learned_from {
                IGNORE_INDEX
            } else {
                i64::from(id)
            }
        };
        SupervisedExample {
            input_ids: (0..length).collect(),
            labels: (0..length).map(label).collect(),
        }
    }

    #[test]
    fn packed_examples_lie_side_by_side() {
        let batch = collate(&[example(3, 1), example(2, 0)], &[1, 0], Layout::Packed);
        assert_eq!(batch.input_ids, [0, 1, 0, 1, 2]);
        assert_eq!(batch.labels, [0, 1, -100, 1, 2]);
        assert_eq!(batch.position_ids, [0, 1, 0, 1, 2]);
        assert_eq!(batch.cu_seqlens, [0, 2, 5]);
        assert_eq!(batch.rows, [1, 0]);
    }

    #[test]
    fn padded_rows_are_a_multiple_of_eight_long() {
        let data = [example(9, 1), example(2, 0)];
        let batch = collate(&data, &[0, 1], Layout::Padded { pad_token_id: 99 });
        assert_eq!(batch.cu_seqlens, [0, 16, 32]);
        assert_eq!(
            batch.input_ids[8..18],
            [8, 99, 99, 99, 99, 99, 99, 99, 0, 1]
        );
        assert_eq!(batch.labels[9..16], [-100; 7]);
        assert_eq!(batch.position_ids[14..18], [14, 15, 0, 1]);
    }

    #[test]
    fn both_layouts_learn_the_same_tokens() {
        let data = [example(9, 4), example(5, 0), example(1, 0)];
        let packed = collate(&data, &[0, 1, 2], Layout::Packed);
        let padded = collate(&data, &[0, 1, 2], Layout::Padded { pad_token_id: 0 });
        // The first label of a sequence has no logits before it: 5 + 4 + 0.
        assert_eq!(packed.num_targets(), 9);
        assert_eq!(padded.num_targets(), 9);
        assert_eq!((packed.num_tokens(), padded.num_tokens()), (15, 48));
    }

    #[test]
    fn no_examples_make_an_empty_batch() {
        let batch = collate(&[], &[], Layout::Packed);
        assert_eq!((batch.num_tokens(), batch.cu_seqlens), (0, vec![0]));
    }
}
