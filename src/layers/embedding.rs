//! Token embedding and output head, divided over the vocabulary.

use std::ops::Range;

use candle_core::{Result, Tensor};

use crate::kernels::{Matrix, vocab_part_len};

use super::{ForwardContext, LayerError, Loader};

/// The rows of the vocabulary that a rank holds; the last rank may hold fewer.
fn vocab_part(vocab_size: usize, loader: &Loader<'_>) -> Range<usize> {
    let len = vocab_part_len(vocab_size, loader.world_size());
    let start = (loader.rank() * len).min(vocab_size);
    start..(start + len).min(vocab_size)
}

/// The embedding table: each rank looks up its rows, the ranks' results are added.
pub struct VocabParallelEmbedding {
    table: Matrix,
    vocab_start: usize,
}

impl VocabParallelEmbedding {
    /// Loads this rank's rows of `weight` `[vocab_size, hidden_size]`.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn load(
        loader: &Loader<'_>,
        vocab_size: usize,
        hidden_size: usize,
    ) -> std::result::Result<Self, LayerError> {
        let rows = vocab_part(vocab_size, loader);
        let vocab_start = rows.start;
        let table = loader.matrix("weight", [vocab_size, hidden_size], rows, 0..hidden_size)?;
        Ok(Self { table, vocab_start })
    }

    /// Returns the embeddings of `ids`, f32 `[ids, hidden_size]`.
    ///
    /// # Errors
    /// When a rank has ended.
    pub fn forward(&self, ids: &[u32], context: &ForwardContext<'_>) -> Result<Tensor> {
        let rows =
            context
                .kernels
                .embed_batch(ids, context.batch, &self.table, self.vocab_start)?;
        context.all_reduce(&rows)
    }
}

/// The product with the vocabulary: own weights, or the embedding's where they are tied.
pub struct LmHead {
    weight: Option<Matrix>,
    vocab_size: usize,
}

impl LmHead {
    /// Loads `lm_head.weight` at `loader`.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn load(
        loader: &Loader<'_>,
        vocab_size: usize,
        hidden_size: usize,
    ) -> std::result::Result<Self, LayerError> {
        let rows = vocab_part(vocab_size, loader);
        let weight = loader.matrix("weight", [vocab_size, hidden_size], rows, 0..hidden_size)?;
        Ok(Self {
            weight: Some(weight),
            vocab_size,
        })
    }

    /// Returns a head that multiplies with the embedding table.
    pub fn tied(vocab_size: usize) -> Self {
        Self {
            weight: None,
            vocab_size,
        }
    }

    /// Returns the logits of `x` f32 `[rows, hidden_size]`: `[rows, vocab_size]` on every CPU rank and on the first GPU.
    ///
    /// # Errors
    /// When a rank has ended.
    pub fn forward(
        &self,
        x: &Tensor,
        embedding: &VocabParallelEmbedding,
        context: &ForwardContext<'_>,
    ) -> Result<Tensor> {
        let weight = self.weight.as_ref().unwrap_or(&embedding.table);
        let width = vocab_part_len(self.vocab_size, context.comm.world_size());
        let logits = context.kernels.logits(x, weight, width)?;
        let logits = context.all_gather_columns(&logits)?;
        // Ranks of GPUs give columns of which the last ones mean nothing, all to rank 0.
        match logits.dims()[1] > self.vocab_size {
            true => logits.narrow(1, 0, self.vocab_size),
            false => Ok(logits),
        }
    }
}
