//! All ranks of an engine: rank 0 on the calling thread, the others on threads of their own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use candle_core::Result;

use crate::distributed::Comm;
use crate::weights::ModelSource;

use super::EngineError;
use super::batch::StepInput;
use super::fault::Fault;
use super::model_runner::{LaunchedStep, ModelRunner, RowOutput, RunnerConfig};
use super::watchdog::{Operation, RankWatch, Watch, panic_message};

/// What a rank other than the first is told.
enum RankCommand {
    /// Connect the ranks, with a KV cache of this many blocks.
    Finish(usize),
    /// Run the step of this number.
    Step(u64, Arc<StepInput>),
}

/// Free and total bytes of a rank's GPU, none on the CPU.
type Memory = Option<(u64, u64)>;

/// What ranks are started with besides their model.
pub(super) struct RankOptions {
    /// How many there are.
    pub(super) num_ranks: usize,
    /// How long they wait for each other.
    pub(super) timeout: Duration,
    /// A failure on demand.
    pub(super) fault: Option<Fault>,
    /// Where they report.
    pub(super) watch: Arc<Watch>,
}

pub(super) struct Ranks {
    first: ModelRunner,
    others: Vec<(mpsc::Sender<RankCommand>, JoinHandle<()>)>,
    /// What each rank's GPU had left after loading.
    memory: Vec<Memory>,
    fault: Option<Fault>,
    watch: Arc<Watch>,
    num_steps: u64,
    /// Steps launched and not finished.
    num_in_flight: u64,
}

impl Ranks {
    /// Loads every rank's part, all at once, and measures what memory is left.
    pub(super) fn load(
        config: &RunnerConfig,
        checkpoint: &Arc<dyn ModelSource>,
        options: RankOptions,
    ) -> std::result::Result<Self, EngineError> {
        let RankOptions {
            num_ranks,
            timeout,
            fault,
            watch,
        } = options;
        let mut comms = Comm::local_group_within(num_ranks, timeout).into_iter();
        let first_comm = comms.next().ok_or(EngineError::InvalidOption {
            option: "tensor-parallel-size",
            wanted: "at least 1".to_owned(),
            found: 0,
        })?;
        let mut others = Vec::new();
        let (told, outcomes) = mpsc::channel();
        for comm in comms {
            let (sender, commands) = mpsc::channel();
            let rank = OtherRank {
                rank: comm.rank(),
                watch: watch.rank(comm.rank()),
                fault,
                told: told.clone(),
                commands,
            };
            let (config, checkpoint) = (config.clone(), Arc::clone(checkpoint));
            let thread = std::thread::Builder::new()
                .name(format!("rank-{}", comm.rank()))
                .spawn(move || rank.run(&config, checkpoint, comm))
                .map_err(|source| EngineError::Thread { source })?;
            others.push((sender, thread));
        }
        let first_comm = Arc::new(first_comm);
        let loading = load_and_measure(config, &**checkpoint, &first_comm, &watch.rank(0));
        let (first, memory) = match loading {
            Ok(loaded) => loaded,
            Err(error) => {
                // What another rank met before is the cause.
                let earlier = outcomes.try_iter().find_map(std::result::Result::err);
                return Err(earlier.unwrap_or(error));
            }
        };
        let mut memory = vec![memory];
        for _ in &others {
            // Every rank sends exactly once.
            let outcome = outcomes.recv();
            memory.push(
                outcome.unwrap_or_else(|_| Err(EngineError::died("a rank ended while loading")))?,
            );
        }
        Ok(Self {
            first,
            others,
            memory,
            fault,
            watch,
            num_steps: 0,
            num_in_flight: 0,
        })
    }

    /// Returns bytes that the KV caches of all ranks may take when the fraction `utilization` of
    /// each GPU is used; none on the CPU.
    pub(super) fn kv_cache_budget(&self, utilization: f64) -> Option<u64> {
        let budget = |&(free, total): &(u64, u64)| {
            let used = total - free;
            ((total as f64 * utilization) as u64).saturating_sub(used)
        };
        let smallest = self.memory.iter().flatten().map(budget).min()?;
        Some(smallest * self.memory.len() as u64)
    }

    /// Allocates every rank's KV cache and connects the ranks.
    ///
    /// # Errors
    /// The first failure of any rank.
    pub(super) fn finish(&mut self, num_blocks: usize) -> Result<()> {
        for (rank, _) in &self.others {
            // A rank that ended makes the first collective fail with its number.
            let _ = rank.send(RankCommand::Finish(num_blocks));
        }
        self.watched(Operation::Connecting, |ranks| {
            ranks.first.finish(num_blocks)
        })
    }

    /// Launches one step on every rank; the others than the first also finish it.
    ///
    /// It must be finished before the next one is launched, unless it
    /// [is drawn on the device](StepInput::is_drawn_on_device).
    ///
    /// # Errors
    /// The first failure of any rank, as text. The ranks are of no use afterwards.
    pub(super) fn launch(&mut self, input: StepInput) -> Result<LaunchedStep> {
        let input = Arc::new(input);
        self.num_steps += 1;
        let step = self.num_steps;
        for (rank, _) in &self.others {
            let _ = rank.send(RankCommand::Step(step, Arc::clone(&input)));
        }
        self.watched(Operation::Step(step), |ranks| {
            if let Some(fault) = ranks.fault {
                fault.strike(0, step)?;
            }
            let launched = ranks.first.launch(input)?;
            ranks.num_in_flight += 1;
            Ok(launched)
        })
    }

    /// Waits for a step; its rows arrive on the calling thread. Steps are finished in the order of
    /// their launches.
    ///
    /// # Errors
    /// As [`Self::launch`].
    pub(super) fn finish_step(
        &mut self,
        step: LaunchedStep,
        on_row: impl FnMut(usize, RowOutput<'_>),
    ) -> Result<()> {
        let number = self.num_steps + 1 - self.num_in_flight;
        self.watched(Operation::Step(number), |ranks| {
            ranks.first.finish_step(step, on_row)?;
            ranks.num_in_flight -= 1;
            Ok(())
        })
    }

    /// Lets the first rank work and reports on it; its error becomes the first one of any rank.
    fn watched<R>(
        &mut self,
        operation: Operation,
        work: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<R> {
        let watch = self.watch.rank(0);
        watch.begin(operation);
        // After a panic the engine ends: nothing looks at what it left.
        let error = match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(Ok(value)) => {
                if self.num_in_flight == 0 {
                    watch.end();
                }
                return Ok(value);
            }
            Ok(Err(error)) => {
                watch.fail(operation, &error);
                error
            }
            Err(panic) => {
                watch.fail_by_panic(operation, &*panic);
                candle_core::Error::Msg(panic_message(&*panic))
            }
        };
        Err(self.watch.failure().map_or(error, candle_core::Error::Msg))
    }

    /// Returns whether tokens are drawn on the device.
    pub(super) fn draws_on_device(&self) -> bool {
        self.first.draws_on_device()
    }

    /// Fills a penalty slot of the device that draws.
    pub(super) fn mark_tokens(&self, slot: usize, prompt: &[u32], drawn: &[u32]) -> Result<()> {
        self.first.mark_tokens(slot, prompt, drawn)
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        // Without its sender a rank ends.
        let (senders, threads): (Vec<_>, Vec<_>) = self.others.drain(..).unzip();
        drop(senders);
        // After a failure a rank may hang: the process ends without it.
        if self.watch.failure().is_some() {
            return;
        }
        // All ranks leave together.
        self.first.leave_group();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

fn load_and_measure(
    config: &RunnerConfig,
    checkpoint: &dyn ModelSource,
    comm: &Arc<Comm>,
    watch: &RankWatch,
) -> std::result::Result<(ModelRunner, Memory), EngineError> {
    let mut runner = ModelRunner::load(config, checkpoint, Arc::clone(comm), watch.clone())?;
    let memory = runner.measure_memory()?;
    Ok((runner, memory))
}

/// A rank with a thread of its own.
struct OtherRank {
    rank: usize,
    watch: RankWatch,
    fault: Option<Fault>,
    /// Told once what loading came to.
    told: mpsc::Sender<std::result::Result<Memory, EngineError>>,
    commands: mpsc::Receiver<RankCommand>,
}

impl OtherRank {
    /// Loads, then obeys until the commands end or one fails.
    fn run(&self, config: &RunnerConfig, checkpoint: Arc<dyn ModelSource>, comm: Comm) {
        // Held until a failure is recorded: when it goes, the other ranks meet the consequences.
        let comm = Arc::new(comm);
        let Some(mut runner) = self.load(config, checkpoint, &comm) else {
            return;
        };
        while let Ok(command) = self.commands.recv() {
            let operation = match command {
                RankCommand::Finish(_) => Operation::Connecting,
                RankCommand::Step(step, _) => Operation::Step(step),
            };
            match catch_unwind(AssertUnwindSafe(|| self.obey(&mut runner, command))) {
                Ok(Ok(())) => {
                    self.watch.end();
                    continue;
                }
                Ok(Err(error)) => self.watch.fail(operation, error),
                Err(panic) => self.watch.fail_by_panic(operation, &*panic),
            }
            // Kernels of other ranks may still write to this one's memory, which goes with the
            // process.
            std::mem::forget(runner);
            return;
        }
    }

    fn load(
        &self,
        config: &RunnerConfig,
        checkpoint: Arc<dyn ModelSource>,
        comm: &Arc<Comm>,
    ) -> Option<ModelRunner> {
        // Files that nothing reads any more need not stay mapped: the checkpoint goes in here.
        let loading = catch_unwind(AssertUnwindSafe(move || {
            load_and_measure(config, &*checkpoint, comm, &self.watch)
        }));
        let (outcome, runner) = match loading {
            Ok(Ok((runner, memory))) => (Ok(memory), Some(runner)),
            Ok(Err(error)) => (Err(error), None),
            Err(panic) => {
                let text = format!(
                    "rank {} panicked while loading: {}",
                    self.rank,
                    panic_message(&*panic)
                );
                (Err(EngineError::died(text)), None)
            }
        };
        let _ = self.told.send(outcome);
        runner
    }

    fn obey(&self, runner: &mut ModelRunner, command: RankCommand) -> Result<()> {
        match command {
            RankCommand::Finish(num_blocks) => runner.finish(num_blocks),
            RankCommand::Step(step, input) => {
                if let Some(fault) = self.fault {
                    fault.strike(self.rank, step)?;
                }
                self.watch.begin(Operation::Step(step));
                runner.run(input)
            }
        }
    }
}
