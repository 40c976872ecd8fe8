//! Token ids in, token events out: the continuous-batching engine.
//!
//! One thread owns all state (scheduler, KV blocks, model ranks); the rest of the program holds
//! an [`EngineHandle`], which is a sender plus shared counters. With data-parallel replicas there
//! are several such threads behind the one handle, which know nothing of each other. Knows no HTTP
//! and no text.

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
mod thread;
mod watchdog;

use std::sync::Arc;

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

use args::ALLOW_LONG_VARIABLE;
use config::{Bytes, cpu_kv_budget};
use handle::{Death, Replica, Running};
use model_runner::Placement;
use thread::EngineThread;

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
        "--tensor-parallel-size {ranks} with --data-parallel-size {replicas} from GPU {first} on needs GPUs up \
         to {}, CUDA sees {found} (CUDA_VISIBLE_DEVICES chooses which)", first + ranks * replicas - 1
    )]
    TooFewGpus {
        /// Ranks of a replica.
        ranks: usize,
        /// Replicas.
        replicas: usize,
        /// The first rank's GPU.
        first: usize,
        /// How many there are.
        found: usize,
    },
    /// The KV cache can not hold one sequence of the wanted length.
    #[error(
        "a sequence of {max_model_len} tokens needs {} of KV cache, {} are available; {}",
        Bytes(*needed_bytes), Bytes(*available_bytes), shorter(*fitting_len)
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
    /// Sequences would be longer than those that the model was made for.
    #[error(
        "--max-model-len {asked} is more than the {of_model} tokens that the model was made for (config.json: \
         max_position_embeddings, rope_scaling), beyond which its answers make no sense; give at most that, or \
         set {ALLOW_LONG_VARIABLE}=1 to have it anyway"
    )]
    BeyondModelLen {
        /// The wanted length.
        asked: usize,
        /// The longest that the model knows.
        of_model: usize,
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

/// Says what to do about a KV cache that holds no sequence of the wanted length.
fn shorter(fitting_len: usize) -> String {
    match fitting_len {
        0 => "raise --kv-cache-memory-bytes".to_owned(),
        fitting_len => {
            format!("--max-model-len {fitting_len} would fit, or raise --kv-cache-memory-bytes")
        }
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
    /// Checks, plans memory, loads the model on all ranks and starts the engine thread, or one for
    /// each of [`EngineOptions::data_parallel_size`] replicas.
    ///
    /// Returns when all are ready to take requests. On a CPU replicas read the same mapped pages of
    /// dense weights; of quantised ones each packs a copy, as each GPU has its own.
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
        let num_replicas = options.data_parallel_size;
        let placements = (0..num_replicas).map(|replica| placement(&*checkpoint, options, replica));
        let placements: Vec<Placement> = placements.collect::<Result<_, _>>()?;
        let cpu_kv_budget = cpu_kv_budget(checkpoint.size_bytes(), num_replicas);
        let death = Arc::new(Death::default());
        let (running, turn) = (Arc::new(Running(Arc::clone(&death))), Arc::default());
        let mut starting = Vec::new();
        for (replica, placement) in placements.into_iter().enumerate() {
            let kv_dtype = match placement {
                Placement::Cpu { .. } => {
                    options.kv_cache_dtype.on_cpu(cpu_kv_dtype(&*checkpoint))?
                }
                Placement::Gpu { dtype, .. } => options.kv_cache_dtype.on_gpu(dtype)?,
            };
            let thread = EngineThread {
                replica,
                model: model.clone(),
                placement,
                kv_dtype,
                cpu_kv_budget,
                options: options.clone(),
                death: Arc::clone(&death),
                turn: Arc::clone(&turn),
                running: Arc::clone(&running),
            };
            starting.push(thread.start(Arc::clone(&checkpoint))?);
        }
        // What replicas read they hold themselves.
        drop((checkpoint, running));
        let mut replicas = Vec::new();
        for (commands, started) in starting {
            let shared = started
                .recv()
                .unwrap_or_else(|_| Err(EngineError::died("its thread panicked")))?;
            replicas.push(Replica { commands, shared });
        }
        Ok(EngineHandle::new(replicas, death))
    }
}

/// Returns where a replica's ranks run.
fn placement(
    checkpoint: &dyn ModelSource,
    options: &EngineOptions,
    replica: usize,
) -> Result<Placement, EngineError> {
    let (size, num_replicas) = (options.tensor_parallel_size, options.data_parallel_size);
    let DeviceChoice::Cuda(first) = options.device.resolve() else {
        if options.quantization == Quantization::Fp8 {
            return Err(EngineError::QuantizationOnCpu);
        }
        let num_threads = options.num_threads.unwrap_or_else(default_num_threads);
        return Ok(Placement::Cpu {
            num_threads: (num_threads / size / num_replicas).max(1),
        });
    };
    check_num_gpus([size, num_replicas], first, Kernels::num_gpus())?;
    let first = first + size * replica;
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

/// Refuses more ranks than there are GPUs from `first` on; without any the driver says why.
fn check_num_gpus(
    [ranks, replicas]: [usize; 2],
    first: usize,
    found: usize,
) -> Result<(), EngineError> {
    if found == 0 || first + ranks * replicas <= found {
        return Ok(());
    }
    Err(EngineError::TooFewGpus {
        ranks,
        replicas,
        first,
        found,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_ranks_than_gpus_are_refused_by_their_flags() {
        assert!(check_num_gpus([2, 2], 0, 4).is_ok());
        assert!(check_num_gpus([2, 2], 0, 0).is_ok());
        let error = check_num_gpus([2, 2], 1, 4).unwrap_err().to_string();
        assert_eq!(
            error,
            "--tensor-parallel-size 2 with --data-parallel-size 2 from GPU 1 on needs GPUs up to 4, CUDA sees 4 \
             (CUDA_VISIBLE_DEVICES chooses which)"
        );
    }
}
