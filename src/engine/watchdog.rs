//! What ranks tell of themselves, and the thread that notices when one fails or hangs.
//!
//! A failing rank is recorded before its group learns that it has left. So the first record is the
//! cause, and what other ranks meet afterwards is its consequence and is dropped. Knows nothing of
//! what ranks compute.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a rank is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    /// Taking its weights.
    Loading,
    /// Meeting the other ranks and recording steps.
    Connecting,
    /// This step, counted from 1.
    Step(u64),
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loading => f.write_str("loading"),
            Self::Connecting => f.write_str("connecting the ranks"),
            Self::Step(step) => write!(f, "step {step}"),
        }
    }
}

/// One rank's last report.
#[derive(Clone, Copy)]
struct Report {
    operation: Operation,
    /// When it began or last made progress; none once it is done.
    since: Option<Instant>,
}

struct State {
    reports: Vec<Report>,
    /// The first failure.
    failure: Option<String>,
    /// What is to be called after a failure.
    interrupts: Vec<Box<dyn FnOnce() + Send>>,
    /// Set when the engine needs no watching any more.
    is_over: bool,
}

/// The meeting point of the ranks' reports and the watchdog.
pub(super) struct Watch {
    state: Mutex<State>,
    changed: Condvar,
}

impl Watch {
    /// Makes a watch over ranks that are loading; loading has no time limit.
    pub(super) fn new(num_ranks: usize) -> Self {
        let loading = Report {
            operation: Operation::Loading,
            since: None,
        };
        Self {
            state: Mutex::new(State {
                reports: vec![loading; num_ranks],
                failure: None,
                interrupts: Vec::new(),
                is_over: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Returns the first failure.
    pub(super) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Returns where `rank` reports.
    pub(super) fn rank(self: &Arc<Self>, rank: usize) -> RankWatch {
        RankWatch {
            watch: Arc::clone(self),
            rank,
        }
    }

    fn record(&self, failure: String) {
        self.lock().failure.get_or_insert(failure);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Reports are whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a failure, or for an operation that takes longer than `timeout`; none when the
    /// watch is over.
    fn wait_for_failure(&self, timeout: Option<Duration>) -> Option<String> {
        let mut state = self.lock();
        loop {
            if let Some(timeout) = timeout
                && state.failure.is_none()
            {
                state.failure = overdue(&state.reports, timeout);
            }
            if state.failure.is_some() || state.is_over {
                return state.failure.clone();
            }
            state = match timeout {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(timeout) => {
                    let waited = self.changed.wait_timeout(state, timeout / 4);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// Where one rank reports.
#[derive(Clone)]
pub(super) struct RankWatch {
    watch: Arc<Watch>,
    rank: usize,
}

impl RankWatch {
    /// Notes that the rank begins an operation or makes progress in it.
    pub(super) fn begin(&self, operation: Operation) {
        self.watch.lock().reports[self.rank] = Report {
            operation,
            since: Some(Instant::now()),
        };
    }

    /// Notes that the rank is done with what it began.
    pub(super) fn end(&self) {
        self.watch.lock().reports[self.rank].since = None;
    }

    /// Leaves `interrupt` to be called when any rank has failed: it lets this one go that may be
    /// waiting for the other.
    pub(super) fn on_failure(&self, interrupt: impl FnOnce() + Send + 'static) {
        self.watch.lock().interrupts.push(Box::new(interrupt));
    }

    /// Records that the rank has failed, unless one has before.
    pub(super) fn fail(&self, operation: Operation, cause: impl fmt::Display) {
        let (rank, cause) = (self.rank, cause.to_string());
        tracing::debug!("rank {rank}, {operation}: {cause}");
        // Where RUST_BACKTRACE is set, candle's errors carry a backtrace below.
        let cause = cause.lines().next().unwrap_or_default();
        self.watch
            .record(format!("rank {rank} failed in {operation}: {cause}"));
    }

    /// Records that the rank has panicked, unless one has failed before.
    pub(super) fn fail_by_panic(&self, operation: Operation, panic: &(dyn Any + Send)) {
        let (rank, message) = (self.rank, panic_message(panic));
        self.watch
            .record(format!("rank {rank} panicked in {operation}: {message}"));
    }
}

/// Describes an operation that has taken longer than `timeout`, and the ranks that are behind.
fn overdue(reports: &[Report], timeout: Duration) -> Option<String> {
    let is_late = |report: &Report| report.since.is_some_and(|since| since.elapsed() > timeout);
    let operation = reports.iter().find(|report| is_late(report))?.operation;
    let ranks = |which: &dyn Fn(&Report) -> bool| {
        let ranks = reports.iter().enumerate();
        let names = ranks.filter(|(_, report)| which(report));
        let names: Vec<String> = names.map(|(rank, _)| format!("rank {rank}")).collect();
        names.join(", ")
    };
    let waiting = ranks(&|report| report.operation == operation && report.since.is_some());
    let behind = ranks(&|report| report.operation < operation);
    let mut text = format!("{operation} has not ended on {waiting} within {timeout:?}");
    if !behind.is_empty() {
        text += &format!("; {behind} did not begin it");
    }
    Some(text)
}

/// The thread that waits for a failure; dropping this ends it.
pub(super) struct Watchdog {
    watch: Arc<Watch>,
}

impl Watchdog {
    /// Calls `on_failure` with the cause when a rank fails or, with a `timeout`, when an operation
    /// takes longer; then what the ranks left to be called.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn start(
        watch: &Arc<Watch>,
        timeout: Option<Duration>,
        on_failure: impl FnOnce(String) + Send + 'static,
    ) -> std::io::Result<Self> {
        let watched = Arc::clone(watch);
        std::thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || {
                if let Some(failure) = watched.wait_for_failure(timeout) {
                    on_failure(failure);
                    let interrupts = std::mem::take(&mut watched.lock().interrupts);
                    for interrupt in interrupts {
                        // One may wait for a rank that another one lets go.
                        let _ = std::thread::Builder::new().spawn(interrupt);
                    }
                }
            })?;
        Ok(Self {
            watch: Arc::clone(watch),
        })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.watch.lock().is_over = true;
        self.watch.changed.notify_all();
    }
}

/// Returns what a panic says.
pub(super) fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "without a message".to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn watched(
        watch: &Arc<Watch>,
        timeout: Option<Duration>,
    ) -> (Watchdog, mpsc::Receiver<String>) {
        let (sender, failures) = mpsc::channel();
        let dog = Watchdog::start(watch, timeout, move |failure| sender.send(failure).unwrap());
        (dog.unwrap(), failures)
    }

    #[test]
    fn the_first_failure_is_the_cause() {
        let watch = Arc::new(Watch::new(2));
        let (sender, interrupted) = mpsc::channel();
        watch.rank(0).on_failure(move || sender.send(()).unwrap());
        watch.rank(1).fail(Operation::Step(7), "out of memory");
        watch.rank(0).fail(Operation::Step(7), "rank 1 has ended");
        let (_dog, failures) = watched(&watch, None);
        let want = "rank 1 failed in step 7: out of memory";
        assert_eq!(failures.recv().unwrap(), want);
        assert_eq!(watch.failure().unwrap(), want);
        interrupted.recv().unwrap();
    }

    #[test]
    fn a_step_that_does_not_end_is_named_with_who_is_missing() {
        let watch = Arc::new(Watch::new(3));
        watch.rank(1).begin(Operation::Step(3));
        watch.rank(1).end();
        watch.rank(0).begin(Operation::Step(4));
        watch.rank(2).begin(Operation::Step(4));
        let (_dog, failures) = watched(&watch, Some(Duration::from_millis(20)));
        assert_eq!(
            failures.recv().unwrap(),
            "step 4 has not ended on rank 0, rank 2 within 20ms; rank 1 did not begin it"
        );
    }

    #[test]
    fn idle_ranks_are_never_late_and_the_thread_ends_with_the_watchdog() {
        let watch = Arc::new(Watch::new(1));
        watch.rank(0).begin(Operation::Step(1));
        watch.rank(0).end();
        let (dog, failures) = watched(&watch, Some(Duration::from_nanos(1)));
        drop(dog);
        assert!(
            failures.recv().is_err(),
            "its thread has ended without a failure"
        );
    }
}
