//! All ranks of an engine: rank 0 on the calling thread, the others on threads of their own.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use candle_core::Result;

use crate::distributed::Comm;
use crate::weights::ModelSource;

use super::EngineError;
use super::batch::StepInput;
use super::model_runner::{LaunchedStep, ModelRunner, RowOutput, RunnerConfig};

/// What a rank other than the first is told.
enum RankCommand {
    Finish(usize),
    Step(Arc<StepInput>),
}

/// Free and total bytes of a rank's GPU, none on the CPU.
type Memory = Option<(u64, u64)>;

pub(super) struct Ranks {
    first: ModelRunner,
    others: Vec<(mpsc::Sender<RankCommand>, JoinHandle<()>)>,
    /// What each rank's GPU had left after loading.
    memory: Vec<Memory>,
}

impl Ranks {
    /// Loads every rank's part, all at once, and measures what memory is left.
    pub(super) fn load(
        config: &RunnerConfig,
        checkpoint: &Arc<dyn ModelSource>,
        tensor_parallel_size: usize,
    ) -> std::result::Result<Self, EngineError> {
        let mut comms = Comm::local_group(tensor_parallel_size).into_iter();
        let first_comm = comms.next().ok_or(EngineError::InvalidOption {
            option: "tensor-parallel-size",
            wanted: "at least 1".to_owned(),
            found: 0,
        })?;
        let mut others = Vec::new();
        let (loaded, outcomes) = mpsc::channel();
        for comm in comms {
            let (sender, commands) = mpsc::channel();
            let (config, loaded) = (config.clone(), loaded.clone());
            let checkpoint = Arc::clone(checkpoint);
            let thread = std::thread::Builder::new()
                .name(format!("rank-{}", comm.rank()))
                .spawn(move || run_rank(&config, checkpoint, comm, &loaded, &commands))
                .map_err(|source| EngineError::Thread { source })?;
            others.push((sender, thread));
        }
        let (first, memory) = load_and_measure(config, &**checkpoint, first_comm)?;
        let mut memory = vec![memory];
        for _ in &others {
            // Every rank sends exactly once, or ends and leaves the channel short.
            let outcome = outcomes.recv();
            memory.push(
                outcome.unwrap_or_else(|_| Err(EngineError::died("a rank ended while loading")))?,
            );
        }
        Ok(Self {
            first,
            others,
            memory,
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
    pub(super) fn finish(&mut self, num_blocks: usize) -> Result<()> {
        for (rank, _) in &self.others {
            // A rank that ended makes the first collective fail with its number.
            let _ = rank.send(RankCommand::Finish(num_blocks));
        }
        self.first.finish(num_blocks)
    }

    /// Launches one step on every rank; the others than the first also finish it.
    ///
    /// It must be finished before the next one is launched, unless it
    /// [is drawn on the device](StepInput::is_drawn_on_device).
    pub(super) fn launch(&mut self, input: StepInput) -> Result<LaunchedStep> {
        let input = Arc::new(input);
        for (rank, _) in &self.others {
            let _ = rank.send(RankCommand::Step(Arc::clone(&input)));
        }
        self.first.launch(input)
    }

    /// Waits for a step; its rows arrive on the calling thread. Steps are finished in the order of
    /// their launches.
    pub(super) fn finish_step(
        &mut self,
        step: LaunchedStep,
        on_row: impl FnMut(usize, RowOutput<'_>),
    ) -> Result<()> {
        self.first.finish_step(step, on_row)
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
        for (rank, thread) in self.others.drain(..) {
            drop(rank);
            // A rank that panicked has already been reported through its collective.
            let _ = thread.join();
        }
    }
}

fn load_and_measure(
    config: &RunnerConfig,
    checkpoint: &dyn ModelSource,
    comm: Comm,
) -> std::result::Result<(ModelRunner, Memory), EngineError> {
    let mut runner = ModelRunner::load(config, checkpoint, comm)?;
    let memory = runner.measure_memory()?;
    Ok((runner, memory))
}

fn run_rank(
    config: &RunnerConfig,
    checkpoint: Arc<dyn ModelSource>,
    comm: Comm,
    loaded: &mpsc::Sender<std::result::Result<Memory, EngineError>>,
    commands: &mpsc::Receiver<RankCommand>,
) {
    let rank = comm.rank();
    let loading = load_and_measure(config, &*checkpoint, comm);
    // Files that nothing reads any more need not stay mapped.
    drop(checkpoint);
    let mut runner = match loading {
        Ok((runner, memory)) => {
            let _ = loaded.send(Ok(memory));
            runner
        }
        Err(error) => {
            let _ = loaded.send(Err(error));
            return;
        }
    };
    while let Ok(command) = commands.recv() {
        let done = match command {
            RankCommand::Finish(num_blocks) => runner.finish(num_blocks),
            RankCommand::Step(input) => runner.run(input),
        };
        if let Err(error) = done {
            tracing::error!(rank, %error, "a step failed");
            return;
        }
    }
}
