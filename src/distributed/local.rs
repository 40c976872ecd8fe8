//! A group of ranks in one process: values meet in shared memory.
//!
//! For CPU ranks, where tensor parallelism is there to be tested and to run the same code as on
//! GPUs, not to be fast.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use candle_core::{Error, Result};

/// What a collective deposits and takes away.
struct Exchange {
    /// This round's values by rank; `None` until the rank arrives.
    deposits: Vec<Option<Vec<f32>>>,
    /// All values of the finished round.
    collected: Arc<Vec<Vec<f32>>>,
    /// Counts finished rounds, so that a waiting rank knows its own is over.
    round: u64,
    /// The first rank that left the group.
    left: Option<usize>,
}

/// The meeting point of a group's ranks.
pub(super) struct LocalGroup {
    exchange: Mutex<Exchange>,
    changed: Condvar,
}

impl LocalGroup {
    /// Creates the meeting point of `world_size` ranks.
    pub(super) fn new(world_size: usize) -> Self {
        let exchange = Exchange {
            deposits: vec![None; world_size],
            collected: Arc::new(Vec::new()),
            round: 0,
            left: None,
        };
        Self {
            exchange: Mutex::new(exchange),
            changed: Condvar::new(),
        }
    }

    /// Gives `values` and returns every rank's, in rank order.
    pub(super) fn exchange(&self, rank: usize, values: Vec<f32>) -> Result<Arc<Vec<Vec<f32>>>> {
        let mut exchange = self.lock();
        let round = exchange.round;
        exchange.deposits[rank] = Some(values);
        if exchange.deposits.iter().all(Option::is_some) {
            let collected = exchange
                .deposits
                .iter_mut()
                .filter_map(Option::take)
                .collect();
            exchange.collected = Arc::new(collected);
            exchange.round += 1;
            self.changed.notify_all();
            return Ok(Arc::clone(&exchange.collected));
        }
        while exchange.round == round {
            if let Some(left) = exchange.left {
                return Err(Error::Msg(format!(
                    "collective on rank {rank}: rank {left} has ended"
                )));
            }
            // A poisoned lock means that a rank panicked inside; the values are still whole.
            exchange = self
                .changed
                .wait(exchange)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        Ok(Arc::clone(&exchange.collected))
    }

    /// Marks that `rank` will not answer any more and wakes the waiting ones.
    pub(super) fn leave(&self, rank: usize) {
        self.lock().left.get_or_insert(rank);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Exchange> {
        self.exchange
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
