//! Which example goes into which micro-batch of which rank, in accelerate's order.
//!
//! Epoch `e` is the permutation that `torch.randperm` draws from a generator seeded `seed + e`
//! (accelerate's `SeedableRandomSampler`); it is cut into batches, and batch `k · W + p` goes to
//! rank `p` of `W`; the end is filled up from the epoch's first examples until all ranks have
//! equally many full batches (`BatchSamplerShard` with `even_batches`). Loss curves are therefore
//! comparable with LLaMA-Factory's step by step. Knows indices only.

use super::mt19937::Mt19937;

/// In which order an epoch visits the examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As they stand in the data (`disable_shuffling`, evaluation).
    Sequential,
    /// Permuted anew each epoch from this seed (`data_seed`, else `seed`).
    Shuffled {
        /// The seed of epoch 0.
        seed: u64,
    },
}

/// What becomes of the examples that do not fill a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remainder {
    /// The last batch is filled up with the epoch's first examples when there are several ranks.
    Keep,
    /// They are left out (`dataloader_drop_last`).
    Drop,
}

/// The order of examples over epochs and ranks.
#[derive(Debug, Clone, Copy)]
pub struct Sampler {
    /// Examples in the data set.
    pub num_examples: usize,
    /// Examples of one micro-batch on one rank, at least 1.
    pub batch_size: usize,
    /// Data-parallel ranks, at least 1.
    pub world_size: usize,
    /// The order within an epoch.
    pub order: Order,
    /// The end of an epoch.
    pub remainder: Remainder,
}

impl Sampler {
    /// Returns the micro-batches of one rank in one epoch; equal for all ranks.
    pub fn batches_per_epoch(&self) -> usize {
        match self.remainder {
            Remainder::Keep => self
                .num_examples
                .div_ceil(self.batch_size)
                .div_ceil(self.world_size),
            Remainder::Drop => self.num_examples / self.batch_size / self.world_size,
        }
    }

    /// Returns the micro-batches of `rank` in `epoch` as indices of examples.
    pub fn epoch(&self, epoch: u64, rank: usize) -> Vec<Vec<usize>> {
        let indices = self.permutation(epoch);
        let batches: Vec<&[usize]> = indices.chunks(self.batch_size).collect();
        let num_batches = self.batches_per_epoch();
        let full = match batches.last() {
            None => return Vec::new(),
            Some(last) if last.len() == self.batch_size => batches.len(),
            Some(_) => batches.len() - 1,
        };
        // One rank keeps a short last batch as it is: there is nobody to keep in step with.
        let pad = self.remainder == Remainder::Keep && self.world_size > 1;
        let mut wrapped = Wrapped::new(&indices, self.batch_size * self.world_size);
        let mut mine = Vec::with_capacity(num_batches);
        for number in 0..num_batches * self.world_size {
            let batch = match batches.get(number) {
                Some(batch) if number < full || !pad => batch.to_vec(),
                other => wrapped.fill(other.copied().unwrap_or(&[]), self.batch_size),
            };
            if number % self.world_size == rank {
                mine.push(batch);
            }
        }
        mine
    }

    fn permutation(&self, epoch: u64) -> Vec<usize> {
        match self.order {
            Order::Sequential => (0..self.num_examples).collect(),
            Order::Shuffled { seed } => torch_randperm(self.num_examples, seed + epoch),
        }
    }
}

/// Supplies the examples that fill up the end of an epoch: its first batches, over and over.
struct Wrapped<'a> {
    first: &'a [usize],
    position: usize,
}

impl<'a> Wrapped<'a> {
    fn new(indices: &'a [usize], length: usize) -> Self {
        let first = &indices[..length.min(indices.len())];
        Self { first, position: 0 }
    }

    fn fill(&mut self, batch: &[usize], batch_size: usize) -> Vec<usize> {
        let mut filled = batch.to_vec();
        while filled.len() < batch_size {
            filled.push(self.first[self.position % self.first.len()]);
            self.position += 1;
        }
        filled
    }
}

/// Returns `torch.randperm(n, generator=torch.Generator().manual_seed(seed))`.
fn torch_randperm(n: usize, seed: u64) -> Vec<usize> {
    let mut generator = Mt19937::new(seed);
    let mut permutation: Vec<usize> = (0..n).collect();
    for i in 0..n.saturating_sub(1) {
        let offset = generator.next_u32() as usize % (n - i);
        permutation.swap(i, i + offset);
    }
    permutation
}

#[cfg(test)]
mod tests;
