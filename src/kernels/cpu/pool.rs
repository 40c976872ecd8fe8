//! The threads of one rank: fork-join over task indices, about a microsecond a dispatch.
//!
//! The calling thread works too. Tasks are handed out one by one from an atomic word, so a
//! worker that the operating system has put aside delays nothing that it has not begun. Idle
//! workers spin for a bounded time and then park, so an idle server costs nothing. It knows
//! nothing of tensors; the kernels of this folder call it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks: longer than the serial work between two
/// dispatches of a forward pass, shorter than what another thread would miss.
const SPIN_TIME: Duration = Duration::from_micros(60);

/// Workers plus the calling thread.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Held while a job runs; a second caller runs its job alone.
    gate: Mutex<()>,
}

struct Worker {
    parked: Arc<AtomicBool>,
    thread: Thread,
    join: Option<JoinHandle<()>>,
}

/// A cache line of its own, so that spinning on one word does not slow another.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// `epoch << 32 | number of tasks not yet claimed`. The epoch makes a claim of an old job
    /// fail after a new one has begun.
    state: Line<AtomicU64>,
    /// The job of the current epoch; valid while tasks of it are unfinished.
    job: AtomicPtr<Job>,
    unfinished: Line<AtomicUsize>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

struct Job {
    call: unsafe fn(*const (), usize),
    data: *const (),
    num_tasks: usize,
}

/// # Safety
///
/// `data` must point to a live `F`.
unsafe fn call<F: Fn(usize) + Sync>(data: *const (), task: usize) {
    // SAFETY: the caller promises a live `F`.
    let f = unsafe { &*data.cast::<F>() };
    f(task);
}

fn unclaimed(state: u64) -> usize {
    (state & u64::from(u32::MAX)) as usize
}

impl Pool {
    /// Starts `num_threads - 1` workers.
    pub(super) fn new(num_threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Line(AtomicU64::new(0)),
            job: AtomicPtr::new(std::ptr::null_mut()),
            unfinished: Line(AtomicUsize::new(0)),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        // The workers go into the pool one by one, so that a failed spawn drops those before it.
        let mut pool = Self {
            shared,
            workers: Vec::new(),
            gate: Mutex::new(()),
        };
        for index in 1..num_threads {
            let parked = Arc::new(AtomicBool::new(false));
            let join = std::thread::Builder::new()
                .name(format!("kernels-{index}"))
                .spawn({
                    let (shared, parked) = (pool.shared.clone(), parked.clone());
                    move || shared.work(&parked)
                })?;
            let thread = join.thread().clone();
            let join = Some(join);
            pool.workers.push(Worker {
                parked,
                thread,
                join,
            });
        }
        Ok(pool)
    }

    /// Returns the number of threads, the calling one included.
    pub(super) fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` with each of `0..num_tasks`, in no order, on all threads; returns when all
    /// calls have returned.
    ///
    /// # Panics
    ///
    /// When a call of `f` panics, after the other calls have ended.
    pub(super) fn run<F: Fn(usize) + Sync>(&self, num_tasks: usize, f: F) {
        if num_tasks <= 1 || self.workers.is_empty() {
            return (0..num_tasks).for_each(f);
        }
        let Ok(gate) = self.gate.try_lock() else {
            return (0..num_tasks).for_each(f);
        };
        assert!(
            num_tasks <= u32::MAX as usize,
            "{num_tasks} tasks in one job"
        );
        let shared = &*self.shared;
        let mut job = Job {
            call: call::<F>,
            data: (&raw const f).cast(),
            num_tasks,
        };
        shared.unfinished.0.store(num_tasks, Ordering::Relaxed);
        shared.job.store(&raw mut job, Ordering::Relaxed);
        let epoch = (shared.state.0.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // Sequentially consistent with the worker's parking: either the worker sees the tasks
        // or this thread sees that it is parked.
        let state = epoch << 32 | num_tasks as u64;
        shared.state.0.store(state, Ordering::SeqCst);
        for worker in &self.workers {
            if worker.parked.load(Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        while shared.claim_and_run() {}
        let mut spins = 0u32;
        while shared.unfinished.0.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < 20_000 {
                std::hint::spin_loop();
            } else {
                // A worker has lost its core in the middle of a task: lend it this one.
                std::thread::yield_now();
            }
        }
        let panic = shared.panic.lock().ok().and_then(|mut panic| panic.take());
        drop(gate);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Shared {
    /// Runs one task of the current job; false when none was left to claim.
    fn claim_and_run(&self) -> bool {
        let mut state = self.state.0.load(Ordering::Acquire);
        loop {
            let left = unclaimed(state);
            if left == 0 {
                return false;
            }
            let job = self.job.load(Ordering::Relaxed);
            match self.state.0.compare_exchange_weak(
                state,
                state - 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => {
                    // SAFETY: the exchange succeeded, so the epoch was current and task `left`
                    // unclaimed when `job` was read, and `run` keeps the job alive until this
                    // task is counted as finished below.
                    let run = || unsafe {
                        let Job {
                            call,
                            data,
                            num_tasks,
                        } = *job;
                        call(data, num_tasks - left);
                    };
                    if let Err(payload) = catch_unwind(AssertUnwindSafe(run))
                        && let Ok(mut panic) = self.panic.lock()
                    {
                        panic.get_or_insert(payload);
                    }
                    self.unfinished.0.fetch_sub(1, Ordering::Release);
                    return true;
                }
                Err(current) => state = current,
            }
        }
    }

    fn work(&self, parked: &AtomicBool) {
        while !self.stop.load(Ordering::Acquire) {
            if self.claim_and_run() || self.spin() {
                continue;
            }
            parked.store(true, Ordering::SeqCst);
            if unclaimed(self.state.0.load(Ordering::SeqCst)) == 0
                && !self.stop.load(Ordering::SeqCst)
            {
                std::thread::park();
            }
            parked.store(false, Ordering::SeqCst);
        }
    }

    /// Waits a bounded time for tasks; says whether any came.
    fn spin(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < SPIN_TIME {
            for _ in 0..64 {
                if unclaimed(self.state.0.load(Ordering::Relaxed)) > 0 {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        false
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in &mut self.workers {
            worker.thread.unpark();
            if let Some(join) = worker.join.take() {
                // A worker catches the panics of its tasks, so there is no result to report.
                drop(join.join());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        let pool = Pool::new(4).unwrap();
        for num_tasks in [0, 1, 2, 3, 100, 1000] {
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> =
                    (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(num_tasks, |task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts
                        .iter()
                        .all(|count| count.load(Ordering::Relaxed) == 1)
                );
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(2).unwrap();
        for bad in [0, 7, 63] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, |task| assert!(task != bad, "task {bad} fails"));
            }));
            let payload = outcome.unwrap_err();
            let text = payload.downcast_ref::<String>().unwrap();
            assert!(text.contains("fails"), "{text}");
            let sum = AtomicUsize::new(0);
            pool.run(10, |task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn parked_workers_wake_for_a_job_or_the_caller_does_it() {
        let pool = Pool::new(3).unwrap();
        let start = Instant::now();
        while !pool.workers.iter().all(|w| w.parked.load(Ordering::SeqCst)) {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "workers never park"
            );
            std::thread::yield_now();
        }
        let sum = AtomicUsize::new(0);
        pool.run(100, |task| {
            sum.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }

    #[test]
    fn a_second_caller_of_a_busy_pool_runs_its_job_alone() {
        let pool = Pool::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        pool.run(4, |_| {
            pool.run(5, |task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 40);
    }
}
