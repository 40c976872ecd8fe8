//! A group of ranks in one process: values meet in shared memory.
//!
//! For CPU ranks, where tensor parallelism is there to be tested and to run the same code as on
//! GPUs, not to be fast.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use candle_core::{Result, bail};

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
    /// How long a rank waits for the others; none is for ever.
    timeout: Option<Duration>,
}

impl LocalGroup {
    /// Creates the meeting point of `world_size` ranks, which wait for each other at most
    /// `timeout`.
    pub(super) fn new(world_size: usize, timeout: Option<Duration>) -> Self {
        let exchange = Exchange {
            deposits: vec![None; world_size],
            collected: Arc::new(Vec::new()),
            round: 0,
            left: None,
        };
        Self {
            exchange: Mutex::new(exchange),
            changed: Condvar::new(),
            timeout,
        }
    }

    /// Gives `values` to the collective `name` and returns every rank's, in rank order.
    pub(super) fn exchange(
        &self,
        name: &str,
        rank: usize,
        values: Vec<f32>,
    ) -> Result<Arc<Vec<Vec<f32>>>> {
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
        let since = Instant::now();
        while exchange.round == round {
            if let Some(left) = exchange.left {
                bail!("{name} on rank {rank}: rank {left} has ended");
            }
            let waited = since.elapsed();
            let left = self.timeout.map(|timeout| timeout.saturating_sub(waited));
            if left == Some(Duration::ZERO) {
                bail!(
                    "{name} on rank {rank}: {} did not come within {:?}",
                    missing(&exchange.deposits),
                    self.timeout.unwrap_or_default()
                );
            }
            exchange = self.wait(exchange, left);
        }
        Ok(Arc::clone(&exchange.collected))
    }

    /// Marks that `rank` will not answer any more and wakes the waiting ones.
    pub(super) fn leave(&self, rank: usize) {
        self.lock().left.get_or_insert(rank);
        self.changed.notify_all();
    }

    /// Waits for a change, at most `timeout`.
    fn wait<'a>(
        &self,
        exchange: MutexGuard<'a, Exchange>,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, Exchange> {
        // A poisoned lock means that a rank panicked inside; the values are still whole.
        match timeout {
            None => self
                .changed
                .wait(exchange)
                .unwrap_or_else(|poisoned| poisoned.into_inner()),
            Some(timeout) => {
                let waited = self.changed.wait_timeout(exchange, timeout);
                waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Exchange> {
        self.exchange
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Names the ranks that have given nothing.
fn missing(deposits: &[Option<Vec<f32>>]) -> String {
    let missing = deposits.iter().enumerate();
    let missing: Vec<String> = missing
        .filter(|(_, deposit)| deposit.is_none())
        .map(|(rank, _)| format!("rank {rank}"))
        .collect();
    missing.join(", ")
}
