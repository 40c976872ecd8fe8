//! The output head of training with its loss, forward and backward in one pass.

use super::Kernels;
use super::check::{self, F32View};
use super::cpu::{self, CrossEntropy, HeadSinks};
use super::training::{LinearPart, check_weight, low_rank};
use candle_core::{Result, Tensor, bail};

/// What is computed besides the losses.
pub struct HeadGradient<'a> {
    /// Factor of the sum of the losses.
    pub scale: f32,
    /// The gradient of the head's weight `[vocab_size * hidden_size]` is added here.
    pub weight: Option<&'a mut [f32]>,
}

/// Losses and gradients of the head.
pub struct HeadOutput {
    /// Of each row.
    pub losses: Vec<f32>,
    /// By the hidden states `[rows, hidden_size]`, through the weight alone.
    pub d_hidden: Option<Tensor>,
    /// By the low-rank term's `x` `[rows, rank]` and by the transpose of its `w`
    /// `[vocab_size, rank]`.
    pub d_low_rank: Option<(Tensor, Tensor)>,
}

impl Kernels {
    /// Returns the cross entropy of each row of `hidden: [rows, hidden_size]` against its target
    /// under the head `[vocab_size, hidden_size]`, which has no bias; where `gradient` is given,
    /// also the gradients of its scale times the sum of the losses.
    ///
    /// # Errors
    /// When shapes or dtypes disagree, or a target is not in the vocabulary.
    pub fn cross_entropy(
        &self,
        hidden: &Tensor,
        head: &LinearPart<'_>,
        targets: &[u32],
        gradient: Option<HeadGradient<'_>>,
    ) -> Result<HeadOutput> {
        let (weight, wants_gradient) = (head.weight, gradient.is_some());
        let (vocab_size, hidden_size) = (weight.rows(), weight.cols());
        let num_rows = check::rows_of("hidden", hidden, hidden_size)?;
        check_weight(weight, hidden_size)?;
        if head.bias.is_some() {
            bail!("a head with a bias");
        }
        check::has_len("targets", targets.len(), num_rows)?;
        check::all_below("target", targets, vocab_size)?;
        let sinks = match gradient {
            Some(HeadGradient { scale, weight }) => {
                let len = vocab_size * hidden_size;
                let found = weight.as_ref().map_or(len, |weight| weight.len());
                check::has_len("the gradient of the head", found, len)?;
                Some(HeadSinks { scale, weight })
            }
            None => None,
        };
        let term = low_rank(head, [num_rows, vocab_size])?;
        let rank = term.as_ref().map_or(0, |(x, _)| x.dims()[1]);
        let hidden = F32View::new("hidden", hidden)?;
        let args = CrossEntropy {
            hidden: hidden.get(),
            head: weight.cpu()?,
            low_rank: term.as_ref().map(|(x, w)| (x, w)),
            targets,
        };
        let found = cpu::cross_entropy(self.get(), &args, sinks);
        let tensor = |values, dims| self.tensor(values, dims);
        Ok(HeadOutput {
            losses: found.losses,
            d_hidden: match wants_gradient {
                true => Some(tensor(found.d_hidden, [num_rows, hidden_size])?),
                false => None,
            },
            d_low_rank: match wants_gradient && term.is_some() {
                true => Some((
                    tensor(found.d_x, [num_rows, rank])?,
                    tensor(found.d_w, [vocab_size, rank])?,
                )),
                false => None,
            },
        })
    }
}
