//! One replica's engine thread: loads the ranks, runs the [`EngineCore`], and tells how it ended.
//!
//! Started by [`super::Engine::start`]. Knows of other replicas only what they share: one
//! [`Death`], and turns in NCCL.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use candle_core::DType;

use crate::kernels::Collectives;
use crate::models::ModelConfig;
use crate::weights::ModelSource;

use super::block_manager::PrefixCaching;
use super::config::{Bytes, EngineOptions, KvPlan, MaxModelLen, plan_kv_cache};
use super::core::EngineCore;
use super::handle::{Command, Death, EngineInfo, Running, Shared};
use super::model_runner::{self, Placement, RunnerConfig};
use super::ranks::{RankOptions, Ranks};
use super::scheduler::{Scheduler, SchedulerConfig};
use super::stats::SharedStats;
use super::watchdog::{Watch, Watchdog, panic_message};
use super::{EngineError, default_num_threads};

/// What a replica's engine thread is made of before it runs.
pub(super) struct EngineThread {
    /// Which of [`EngineOptions::data_parallel_size`] it is.
    pub(super) replica: usize,
    pub(super) model: ModelConfig,
    pub(super) placement: Placement,
    pub(super) kv_dtype: DType,
    /// Bytes that its KV cache takes on a CPU when nobody says how many.
    pub(super) cpu_kv_budget: u64,
    pub(super) options: EngineOptions,
    pub(super) death: Arc<Death>,
    /// Taken by who joins or leaves a group of NCCL.
    pub(super) turn: Arc<Mutex<()>>,
    /// Let go of at the end.
    pub(super) running: Arc<Running>,
}

/// An engine thread's loaded parts.
struct LoadedEngine {
    ranks: Ranks,
    plan: KvPlan,
    watch: Arc<Watch>,
    /// Ends with this.
    _watchdog: Watchdog,
}

type Ready = mpsc::Sender<Result<Arc<Shared>, EngineError>>;
pub(super) type Started = mpsc::Receiver<Result<Arc<Shared>, EngineError>>;

impl EngineThread {
    /// Starts the thread; returns where its commands go, and where it tells what loading came to.
    pub(super) fn start(
        self,
        checkpoint: Arc<dyn ModelSource>,
    ) -> Result<(mpsc::Sender<Command>, Started), EngineError> {
        let (ready, started) = mpsc::channel();
        let (commands, receiver) = mpsc::channel();
        std::thread::Builder::new()
            .name(format!("engine-{}", self.replica))
            .spawn(move || {
                let _span = (self.options.data_parallel_size > 1)
                    .then(|| tracing::info_span!("replica", number = self.replica).entered());
                self.run(checkpoint, receiver, &ready);
            })
            .map_err(|source| EngineError::Thread { source })?;
        Ok((commands, started))
    }

    fn run(
        self,
        checkpoint: Arc<dyn ModelSource>,
        commands: mpsc::Receiver<Command>,
        ready: &Ready,
    ) {
        let start = Instant::now();
        let loading = self.load(&checkpoint, ready);
        // What the model reads it holds itself; on a GPU that is nothing.
        drop(checkpoint);
        let LoadedEngine {
            ranks,
            plan,
            watch,
            _watchdog,
        } = match loading {
            Ok(loaded) => loaded,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let seconds = start.elapsed().as_millis() as f64 / 1e3;
        tracing::info!(seconds, "weights loaded");
        let shared = Arc::new(Shared {
            info: self.info(&plan),
            stats: SharedStats::default(),
        });
        let scheduler = Scheduler::new(self.scheduler_config(&plan));
        let mut core = EngineCore::new(
            scheduler,
            ranks,
            commands,
            Arc::clone(&shared),
            &self.options,
        );
        if ready.send(Ok(shared)).is_err() {
            return;
        }
        // The core is not used after a panic: it is dropped and the process is told to end.
        let failure = match catch_unwind(AssertUnwindSafe(|| core.run())) {
            Ok(Ok(())) => {
                let turn = self.nccl_turn();
                drop(core);
                drop(turn);
                // Who waits for the end has waited for the memory of the GPUs too.
                drop(self.running);
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("the engine thread panicked: {}", panic_message(&*panic)),
        };
        let failure = blame(
            &self.options,
            self.replica,
            watch.failure().unwrap_or(failure),
        );
        self.death.set(failure.clone());
        core.fail_requests(&failure);
        // Kernels of other ranks may still write to this one's memory, which goes with the process.
        std::mem::forget(core);
    }

    /// Loads the ranks and gives each its KV cache. On the CPU its size is known before, so that
    /// one too small is found before anything is read.
    fn load(
        &self,
        checkpoint: &Arc<dyn ModelSource>,
        ready: &Ready,
    ) -> Result<LoadedEngine, EngineError> {
        let _turn = self.nccl_turn();
        let plan = |budget| {
            plan_kv_cache(
                &self.options,
                &self.model,
                self.kv_dtype.size_in_bytes(),
                budget,
            )
        };
        let cpu_plan = match self.placement {
            Placement::Cpu { .. } => Some(plan(self.cpu_kv_budget)?),
            Placement::Gpu { .. } => None,
        };
        let config = self.runner_config(cpu_plan.as_ref());
        let watch = Arc::new(Watch::new(self.options.tensor_parallel_size));
        let watchdog = self.start_watchdog(&watch, ready)?;
        let rank_options = RankOptions {
            num_ranks: self.options.tensor_parallel_size,
            timeout: self.options.distributed_timeout,
            fault: (self.options.fault).filter(|fault| fault.replica == self.replica),
            watch: Arc::clone(&watch),
        };
        let mut ranks = Ranks::load(&config, checkpoint, rank_options)?;
        let plan = match cpu_plan {
            Some(plan) => plan,
            None => {
                let budget = ranks.kv_cache_budget(self.options.gpu_memory_utilization);
                plan(budget.unwrap_or_default())?
            }
        };
        log_plan(
            &**checkpoint,
            &self.model,
            &plan,
            self.kv_dtype,
            &self.options,
        );
        ranks.finish(plan.num_blocks)?;
        Ok(LoadedEngine {
            ranks,
            plan,
            watch,
            _watchdog: watchdog,
        })
    }

    /// Starts the thread that tells of a failure where the engine thread cannot, because it waits
    /// for the rank that failed.
    fn start_watchdog(&self, watch: &Arc<Watch>, ready: &Ready) -> Result<Watchdog, EngineError> {
        // A step of a CPU may take any time; its ranks time each other in their collectives.
        let timeout = match self.placement {
            Placement::Cpu { .. } => None,
            Placement::Gpu { .. } => Some(self.options.distributed_timeout),
        };
        let (death, ready) = (Arc::clone(&self.death), ready.clone());
        let (options, replica) = (self.options.clone(), self.replica);
        let on_failure = move |failure: String| {
            let failure = blame(&options, replica, failure);
            death.set(failure.clone());
            // Nobody listens any more if the engine has started.
            let _ = ready.send(Err(EngineError::died(failure)));
        };
        Watchdog::start(watch, timeout, on_failure).map_err(|source| EngineError::Thread { source })
    }

    /// Returns what every rank is loaded with.
    fn runner_config(&self, cpu_plan: Option<&KvPlan>) -> RunnerConfig {
        let wanted_len = match self.options.max_model_len {
            MaxModelLen::Tokens(tokens) => tokens,
            MaxModelLen::FromModel | MaxModelLen::Auto => self.model.max_position_embeddings,
        };
        let max_model_len = cpu_plan.map_or(wanted_len, |plan| plan.max_model_len);
        let max_num_seqs = self.options.max_num_seqs;
        RunnerConfig {
            model: self.model.clone(),
            max_model_len,
            placement: self.placement,
            block_size: self.options.block_size,
            kv_dtype: self.kv_dtype,
            // Few short sequences have no more to be computed.
            max_num_tokens: (self.options.max_num_batched_tokens)
                .min(max_num_seqs.saturating_mul(max_model_len).max(1)),
            max_num_seqs,
            graphs: self.options.graphs,
            launches_ahead: self.options.launches_ahead(),
        }
    }

    fn info(&self, plan: &KvPlan) -> EngineInfo {
        EngineInfo {
            max_model_len: plan.max_model_len,
            vocab_size: self.model.vocab_size,
            max_num_seqs: self.options.max_num_seqs,
            max_num_batched_tokens: self.options.max_num_batched_tokens,
            block_size: self.options.block_size,
            max_num_waiting: self.options.max_num_waiting,
            num_replicas: self.options.data_parallel_size,
        }
    }

    /// Waits until no other replica joins or leaves a group of NCCL, where this one has such a
    /// group: engines of one process that came and went at once have failed in it.
    fn nccl_turn(&self) -> Option<MutexGuard<'_, ()>> {
        match self.placement {
            Placement::Gpu {
                collectives: Collectives::Nccl(_),
                ..
            } => Some(self.turn.lock().unwrap_or_else(PoisonError::into_inner)),
            _ => None,
        }
    }

    fn scheduler_config(&self, plan: &KvPlan) -> SchedulerConfig {
        SchedulerConfig {
            max_num_seqs: self.options.max_num_seqs,
            max_num_batched_tokens: self.options.max_num_batched_tokens,
            max_model_len: plan.max_model_len,
            num_blocks: plan.num_blocks,
            block_size: self.options.block_size,
            policy: self.options.scheduling_policy,
            prefix_caching: if self.options.prefix_caching {
                PrefixCaching::Enabled
            } else {
                PrefixCaching::Disabled
            },
            long_prefill_token_threshold: self.options.long_prefill_token_threshold,
        }
    }
}

/// Names the replica that failed, where there are several.
fn blame(options: &EngineOptions, replica: usize, failure: String) -> String {
    match options.data_parallel_size {
        1 => failure,
        _ => format!("replica {replica}: {failure}"),
    }
}

fn log_plan(
    checkpoint: &dyn ModelSource,
    model: &ModelConfig,
    plan: &KvPlan,
    kv_dtype: DType,
    options: &EngineOptions,
) {
    let dtype = model_runner::weight_dtype(checkpoint)
        .map_or_else(|| "?".to_owned(), |dtype| format!("{dtype:?}"));
    tracing::info!(
        "model {}: {} with {} layers, {:.1} M parameters, {dtype} weights of {}",
        model_runner::display_name(checkpoint.path()),
        model.architecture.name(),
        model.num_layers,
        checkpoint.num_parameters() as f64 / 1e6,
        Bytes(checkpoint.size_bytes()),
    );
    tracing::info!(
        "KV cache: {} blocks of {} tokens, {kv_dtype:?}, {} at most; max model length {} tokens; {} threads, \
         tensor parallel size {}, data parallel size {}",
        plan.num_blocks,
        options.block_size,
        Bytes(plan.size_bytes),
        plan.max_model_len,
        options.num_threads.unwrap_or_else(default_num_threads),
        options.tensor_parallel_size,
        options.data_parallel_size,
    );
}
