//! Token ids in, token events out: the continuous-batching engine.
//!
//! One thread owns all state (scheduler, KV blocks, model ranks); the rest of the program holds
//! an [`EngineHandle`], which is a sender plus shared counters. Knows no HTTP and no text.

mod args;
mod batch;
mod block_manager;
mod config;
mod core;
mod fault;
mod handle;
mod model_runner;
mod ranks;
mod request;
mod sampler;
mod scheduler;
mod sequence;
mod stats;
mod watchdog;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use candle_core::DType;
use candle_core::quantized::GgmlDType;

use crate::kernels::{Collectives, Kernels};
use crate::layers::LayerError;
use crate::models::{ModelConfig, ModelError};
use crate::weights::{ModelSource, WeightsError};

pub use crate::kernels::{CollectiveChoice, Quantization};
pub use args::{Dtype, EngineArgs, LoadFormat, parse_size};
pub use config::{AsyncScheduling, DeviceChoice, EngineOptions, Graphs, KvCacheDtype, MaxModelLen};
pub use fault::{FAULT_VARIABLE, Fault, FaultKind};
pub use handle::{EngineHandle, EngineInfo, SubmitError, TokenStream};
pub use request::{FinishReason, GenerateRequest, SamplingParams, TokenEvent, TokenLogprobs};
pub use scheduler::SchedulingPolicy;
pub use stats::{Stats, StepTokens};

#[cfg(test)]
pub(crate) use handle::mock_engine;

use self::core::EngineCore;
use block_manager::PrefixCaching;
use config::{KvPlan, cpu_kv_budget, plan_kv_cache};
use handle::{Command, Death, Shared};
use model_runner::{Placement, RunnerConfig};
use ranks::{RankOptions, Ranks};
use scheduler::{Scheduler, SchedulerConfig};
use stats::SharedStats;
use watchdog::{Watch, Watchdog, panic_message};

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An option has a value that can not work.
    #[error("--{option} must be {wanted}, found {found}")]
    InvalidOption {
        /// The flag's name.
        option: &'static str,
        /// What it may be.
        wanted: String,
        /// What it is.
        found: usize,
    },
    /// `--gpu-memory-utilization` is no part of a whole.
    #[error("--gpu-memory-utilization must be above 0 and at most 1, found {found}")]
    InvalidUtilization {
        /// What it is.
        found: f64,
    },
    /// A GPU can not compute in the wanted type.
    #[error(
        "a GPU computes in float16 or bfloat16, not in {found}; use --dtype auto, half or bfloat16, or --device cpu"
    )]
    UnsupportedDtype {
        /// The wanted type.
        found: &'static str,
    },
    /// There are no kernels for keys and values of that type.
    #[error("--kv-cache-dtype {found} on {place}: no kernel there reads that type; use {choices}")]
    UnsupportedKvCacheDtype {
        /// The wanted type.
        found: &'static str,
        /// The device and what it computes in.
        place: &'static str,
        /// What may be asked for.
        choices: &'static str,
    },
    /// There are no FP8 kernels for the device.
    #[error(
        "--quantization fp8 needs a GPU of compute capability 9.0 (H100, H200), and this is a CPU; serve a \
         GGUF file for smaller weights, or leave the flag out"
    )]
    QuantizationOnCpu,
    /// The checkpoint's weights have been rounded already.
    #[error(
        "--quantization fp8 on weights that are stored as {found}; give the checkpoint in float32, float16 or \
         bfloat16, or leave the flag out"
    )]
    AlreadyQuantized {
        /// How the weights are stored.
        found: String,
    },
    /// There are fewer GPUs than ranks.
    #[error(
        "--tensor-parallel-size {wanted} from GPU {first} on needs GPUs up to {}, CUDA sees {found} \
         (CUDA_VISIBLE_DEVICES chooses which)", first + wanted - 1
    )]
    TooFewGpus {
        /// Ranks.
        wanted: usize,
        /// The first rank's GPU.
        first: usize,
        /// How many there are.
        found: usize,
    },
    /// The KV cache can not hold one sequence of the wanted length.
    #[error(
        "a sequence of {max_model_len} tokens needs {needed_bytes} bytes of KV cache, {available_bytes} are \
         available; --max-model-len {fitting_len} would fit, or raise --kv-cache-memory-bytes"
    )]
    KvCacheTooSmall {
        /// The wanted length.
        max_model_len: usize,
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes there are.
        available_bytes: u64,
        /// The longest that fits.
        fitting_len: usize,
    },
    /// The model's description is wrong or asks for too much.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The checkpoint is damaged.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A layer did not get its weights.
    #[error(transparent)]
    Layer(Box<LayerError>),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The system gave no thread.
    #[error("no thread could be started: {source}")]
    Thread {
        /// What the system said.
        source: std::io::Error,
    },
    /// The failure on demand can not be had.
    #[error("INFOLD_FAULT {message}")]
    InvalidFault {
        /// What is wrong with it.
        message: String,
    },
    /// The engine ended while it started.
    #[error("the engine ended while starting: {reason}")]
    Died {
        /// What ended it.
        reason: String,
    },
}

impl From<LayerError> for EngineError {
    /// Boxed: it is by far the largest of the causes.
    fn from(error: LayerError) -> Self {
        Self::Layer(Box::new(error))
    }
}

impl EngineError {
    fn died(reason: impl Into<String>) -> Self {
        Self::Died {
            reason: reason.into(),
        }
    }

    /// Returns whether the user can mend this: a wrong option, model or file.
    pub fn is_user_error(&self) -> bool {
        !matches!(
            self,
            Self::Tensor(_) | Self::Thread { .. } | Self::Died { .. }
        )
    }
}

/// Starts engines.
pub struct Engine;

impl Engine {
    /// Checks, plans memory, loads the model on all ranks and starts the engine thread.
    ///
    /// Returns when the engine is ready to take requests.
    ///
    /// # Errors
    /// [`EngineError`]; head counts that the ranks do not divide are found before loading.
    pub fn start(
        checkpoint: Arc<dyn ModelSource>,
        options: &EngineOptions,
    ) -> Result<EngineHandle, EngineError> {
        options.check()?;
        let model = ModelConfig::from_json(checkpoint.config())?;
        model.check_tensor_parallel(options.tensor_parallel_size)?;
        let placement = placement(&*checkpoint, options)?;
        let kv_dtype = match placement {
            Placement::Cpu { .. } => options.kv_cache_dtype.on_cpu(cpu_kv_dtype(&*checkpoint))?,
            Placement::Gpu { dtype, .. } => options.kv_cache_dtype.on_gpu(dtype)?,
        };

        let (ready, started) = mpsc::channel();
        let (commands, receiver) = mpsc::channel();
        let thread = EngineThread {
            model,
            placement,
            kv_dtype,
            options: options.clone(),
        };
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || thread.run(checkpoint, receiver, &ready))
            .map_err(|source| EngineError::Thread { source })?;
        let shared = started
            .recv()
            .unwrap_or_else(|_| Err(EngineError::died("its thread panicked")))?;
        Ok(EngineHandle::new(commands, shared))
    }
}

/// What the engine thread is made of before it runs.
struct EngineThread {
    model: ModelConfig,
    placement: Placement,
    kv_dtype: DType,
    options: EngineOptions,
}

/// An engine thread's loaded parts.
struct LoadedEngine {
    ranks: Ranks,
    plan: KvPlan,
    watch: Arc<Watch>,
    death: Arc<Death>,
    /// Ends with this.
    _watchdog: Watchdog,
}

type Ready = mpsc::Sender<Result<Arc<Shared>, EngineError>>;

impl EngineThread {
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
            death,
            _watchdog,
        } = match loading {
            Ok(loaded) => loaded,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        tracing::info!(seconds = start.elapsed().as_secs_f32(), "weights loaded");
        let shared = Arc::new(Shared {
            info: self.info(&plan),
            stats: SharedStats::default(),
            death: Arc::clone(&death),
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
                // Who waits for the end waits for the memory of the GPUs too.
                drop(core);
                return death.set("it was stopped".to_owned());
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("the engine thread panicked: {}", panic_message(&*panic)),
        };
        let failure = watch.failure().unwrap_or(failure);
        death.set(failure.clone());
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
        let plan = |budget| {
            plan_kv_cache(
                &self.options,
                &self.model,
                self.kv_dtype.size_in_bytes(),
                budget,
            )
        };
        let cpu_plan = match self.placement {
            Placement::Cpu { .. } => Some(plan(cpu_kv_budget(checkpoint.size_bytes()))?),
            Placement::Gpu { .. } => None,
        };
        let config = self.runner_config(cpu_plan.as_ref());
        let watch = Arc::new(Watch::new(self.options.tensor_parallel_size));
        let death = Arc::new(Death::default());
        let watchdog = self.start_watchdog(&watch, &death, ready)?;
        let rank_options = RankOptions {
            num_ranks: self.options.tensor_parallel_size,
            timeout: self.options.distributed_timeout,
            fault: self.options.fault,
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
            death,
            _watchdog: watchdog,
        })
    }

    /// Starts the thread that tells of a failure where the engine thread cannot, because it waits
    /// for the rank that failed.
    fn start_watchdog(
        &self,
        watch: &Arc<Watch>,
        death: &Arc<Death>,
        ready: &Ready,
    ) -> Result<Watchdog, EngineError> {
        // A step of a CPU may take any time; its ranks time each other in their collectives.
        let timeout = match self.placement {
            Placement::Cpu { .. } => None,
            Placement::Gpu { .. } => Some(self.options.distributed_timeout),
        };
        let (death, ready) = (Arc::clone(death), ready.clone());
        let on_failure = move |failure: String| {
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
        RunnerConfig {
            model: self.model.clone(),
            max_model_len: cpu_plan.map_or(wanted_len, |plan| plan.max_model_len),
            placement: self.placement,
            block_size: self.options.block_size,
            kv_dtype: self.kv_dtype,
            max_num_tokens: self.options.max_num_batched_tokens,
            max_num_seqs: self.options.max_num_seqs,
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

/// Returns where the ranks run.
fn placement(
    checkpoint: &dyn ModelSource,
    options: &EngineOptions,
) -> Result<Placement, EngineError> {
    let size = options.tensor_parallel_size;
    let DeviceChoice::Cuda(first) = options.device.resolve() else {
        if options.quantization == Quantization::Fp8 {
            return Err(EngineError::QuantizationOnCpu);
        }
        let num_threads = options.num_threads.unwrap_or_else(default_num_threads);
        return Ok(Placement::Cpu {
            num_threads: (num_threads / size).max(1),
        });
    };
    let found = Kernels::num_gpus();
    if found > 0 && first + size > found {
        return Err(EngineError::TooFewGpus {
            wanted: size,
            first,
            found,
        });
    }
    let dtype = match options.dtype {
        Dtype::Float16 => DType::F16,
        Dtype::Bfloat16 => DType::BF16,
        Dtype::Float32 => return Err(EngineError::UnsupportedDtype { found: "float32" }),
        Dtype::Auto => match model_runner::weight_dtype(checkpoint) {
            Some(GgmlDType::BF16) => DType::BF16,
            _ => DType::F16,
        },
    };
    let quantization = options.quantization;
    if quantization == Quantization::Fp8 {
        check_unquantized(checkpoint)?;
    }
    // Before the GPUs are touched.
    options.kv_cache_dtype.on_gpu(dtype)?;
    Ok(Placement::Gpu {
        first,
        dtype,
        quantization,
        collectives: match size {
            1 => Collectives::Peers,
            _ => Kernels::choose_collectives(first, size, options.collectives)?,
        },
    })
}

/// Refuses blocks of GGUF files, whose weights have lost what FP8 would keep.
fn check_unquantized(checkpoint: &dyn ModelSource) -> Result<(), EngineError> {
    match model_runner::weight_dtype(checkpoint) {
        Some(GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) | None => Ok(()),
        Some(other) => Err(EngineError::AlreadyQuantized {
            found: format!("{other:?}"),
        }),
    }
}

/// Returns the number of cores this process may use.
fn default_num_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Returns what keys and values are stored as on a CPU when nobody chooses.
fn cpu_kv_dtype(checkpoint: &dyn ModelSource) -> DType {
    match model_runner::weight_dtype(checkpoint) {
        Some(GgmlDType::F32) | None => DType::F32,
        Some(_) => DType::F16,
    }
}

fn log_plan(
    checkpoint: &dyn ModelSource,
    model: &ModelConfig,
    plan: &KvPlan,
    kv_dtype: DType,
    options: &EngineOptions,
) {
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let dtype = model_runner::weight_dtype(checkpoint)
        .map_or_else(|| "?".to_owned(), |dtype| format!("{dtype:?}"));
    tracing::info!(
        "model {}: {} with {} layers, {:.1} M parameters, {dtype} weights of {:.2} GiB",
        model_runner::display_name(checkpoint.path()),
        model.architecture.name(),
        model.num_layers,
        checkpoint.num_parameters() as f64 / 1e6,
        gib(checkpoint.size_bytes()),
    );
    tracing::info!(
        "KV cache: {} blocks of {} tokens, {kv_dtype:?}, {:.2} GiB at most; max model length {} tokens; {} threads, \
         tensor parallel size {}",
        plan.num_blocks,
        options.block_size,
        gib(plan.size_bytes),
        plan.max_model_len,
        options.num_threads.unwrap_or_else(default_num_threads),
        options.tensor_parallel_size,
    );
}
