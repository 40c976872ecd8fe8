//! From examples and batch sizes to optimiser updates and epochs, by the rules of Hugging Face's
//! `Trainer` (since 4.47: a short last accumulation of an epoch is an update too).
//!
//! Called by the plan, which prints the numbers, and by the trainer, which runs them.

/// How long a run is asked to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Duration {
    /// Passes over the data; a fraction is allowed (`num_train_epochs`).
    Epochs(f64),
    /// Optimiser updates (`max_steps`).
    Updates(u64),
}

/// The length of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepCounts {
    /// Micro-batches of one rank in one epoch.
    pub micro_batches_per_epoch: u64,
    /// Optimiser updates in one epoch, at least 1.
    pub updates_per_epoch: u64,
    /// Optimiser updates of the run.
    pub total_updates: u64,
    /// Epochs begun.
    pub num_epochs: u64,
}

impl StepCounts {
    /// Counts the updates of a run of `duration` with `accumulation` micro-batches an update.
    pub fn new(micro_batches_per_epoch: u64, accumulation: u64, duration: Duration) -> Self {
        let updates_per_epoch = micro_batches_per_epoch.div_ceil(accumulation).max(1);
        let (total_updates, num_epochs) = match duration {
            Duration::Epochs(epochs) => (
                (epochs * updates_per_epoch as f64).ceil() as u64,
                epochs.ceil() as u64,
            ),
            Duration::Updates(updates) => (updates, updates.div_ceil(updates_per_epoch)),
        };
        Self {
            micro_batches_per_epoch,
            updates_per_epoch,
            total_updates,
            num_epochs,
        }
    }

    /// Returns the updates of a linear warm-up: `warmup_steps` if positive, else the ratio of all.
    pub fn warmup_updates(&self, warmup_steps: u64, warmup_ratio: f64) -> u64 {
        if warmup_steps > 0 {
            warmup_steps
        } else {
            (self.total_updates as f64 * warmup_ratio).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sampler::{Order, Remainder, Sampler};
    use super::*;

    fn reference_run(world_size: usize) -> StepCounts {
        let sampler = Sampler {
            num_examples: 2030,
            batch_size: 4,
            world_size,
            order: Order::Shuffled { seed: 42 },
            remainder: Remainder::Keep,
        };
        StepCounts::new(
            sampler.batches_per_epoch() as u64,
            4,
            Duration::Epochs(30.0),
        )
    }

    #[test]
    fn the_reference_run_has_3810_updates_on_one_gpu_and_480_on_eight() {
        assert_eq!(reference_run(1).micro_batches_per_epoch, 508);
        assert_eq!(reference_run(1).total_updates, 3810);
        assert_eq!(reference_run(8).micro_batches_per_epoch, 64);
        assert_eq!(reference_run(8).total_updates, 480);
    }

    #[test]
    fn a_short_last_accumulation_is_an_update() {
        let counts = StepCounts::new(10, 4, Duration::Epochs(2.0));
        assert_eq!((counts.updates_per_epoch, counts.total_updates), (3, 6));
    }

    #[test]
    fn a_fraction_of_an_epoch_rounds_up() {
        let counts = StepCounts::new(10, 1, Duration::Epochs(1.25));
        assert_eq!((counts.total_updates, counts.num_epochs), (13, 2));
    }

    #[test]
    fn updates_asked_for_override_epochs() {
        let counts = StepCounts::new(10, 1, Duration::Updates(25));
        assert_eq!((counts.total_updates, counts.num_epochs), (25, 3));
    }

    #[test]
    fn warmup_steps_win_over_the_ratio() {
        let counts = StepCounts::new(10, 1, Duration::Updates(25));
        assert_eq!(counts.warmup_updates(7, 0.1), 7);
        assert_eq!(counts.warmup_updates(0, 0.1), 3);
    }
}
