//! The flags that every command with an engine takes: vLLM's names, spellings and defaults.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};

use crate::kernels::Quantization;
use crate::models::ModelConfig;
use crate::weights::{Checkpoint, DummyCheckpoint, HubOptions, ModelSource, open_model};

use super::{
    AsyncScheduling, CollectiveChoice, DeviceChoice, Engine, EngineError, EngineHandle,
    EngineOptions, FAULT_VARIABLE, Fault, Graphs, KvCacheDtype, MaxModelLen, SchedulingPolicy,
};

/// Set to 1, it allows a `--max-model-len` beyond the model's; vLLM's name.
pub(super) const ALLOW_LONG_VARIABLE: &str = "VLLM_ALLOW_LONG_MAX_MODEL_LEN";

/// What the engine is built with.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Take this branch, tag or commit of a hub model [default: main]
    #[arg(long)]
    pub revision: Option<String>,

    /// Keep downloaded models here [default: the hub cache]
    #[arg(long, value_name = "DIRECTORY")]
    pub download_dir: Option<PathBuf>,

    /// Take weights from the model's files (auto) or make random ones in the shape of config.json (dummy)
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    pub load_format: LoadFormat,

    /// Run here: auto (a GPU where there is one), cpu, cuda, or cuda:N
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceChoice,

    /// Let the program take this part of each GPU's memory
    #[arg(long, value_name = "FRACTION", default_value_t = 0.92)]
    pub gpu_memory_utilization: f64,

    /// Launch every kernel on its own instead of replaying recorded steps on a GPU
    #[arg(long)]
    pub enforce_eager: bool,

    /// Compute with this type; auto is bfloat16 for bfloat16 checkpoints, else float16
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,

    /// Multiply the layers' weights in this form on a GPU: fp8 (E4M3, one scale a row, activations quantised a token at a time), or none for the type of --dtype
    #[arg(long, value_name = "METHOD", default_value = "none", value_parser = parse_quantization)]
    pub quantization: Quantization,

    /// Limit prompt plus output to this many tokens: 8192, 8k, 8K, 25.6k, or auto for the most that fits [default: the model's]
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true, value_parser = parse_max_model_len)]
    pub max_model_len: Option<MaxModelLen>,

    /// Split the model over this many ranks
    #[arg(
        long,
        value_name = "RANKS",
        default_value_t = 1,
        value_parser = parse_positive
    )]
    pub tensor_parallel_size: usize,

    /// Run this many replicas of the model, each on as many ranks, and share the requests among them
    #[arg(
        long,
        value_name = "REPLICAS",
        default_value_t = 1,
        value_parser = parse_positive
    )]
    pub data_parallel_size: usize,

    /// Let GPUs meet through NCCL instead of own kernels, as where they cannot reach each other's memory
    #[arg(long)]
    pub disable_custom_all_reduce: bool,

    /// End when a rank, or a step on a GPU, keeps the others waiting for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = parse_positive)]
    pub distributed_timeout_seconds: usize,

    /// Compute with this many threads [default: the cores this process may use]
    #[arg(long, value_name = "THREADS", value_parser = parse_positive)]
    pub threads: Option<usize>,

    /// Reserve this much memory for the KV cache of a replica, e.g. 4GiB [default: from the free memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub kv_cache_memory_bytes: Option<usize>,

    /// Store keys and values as this type: fp8 (or fp8_e4m3: E4M3 without scales, a byte a value), float16, float32, bfloat16, or auto, which is float32 beside float32 weights, else float16, and on a GPU the type of --dtype
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = parse_kv_cache_dtype)]
    pub kv_cache_dtype: KvCacheDtype,

    /// Keep this many tokens in a KV block
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = parse_positive)]
    pub block_size: usize,

    /// Run at most this many sequences at once [default: 256, on a GPU 512]
    #[arg(long, value_name = "SEQUENCES", value_parser = parse_positive)]
    pub max_num_seqs: Option<usize>,

    /// Compute at most this many tokens in a step [default: 2048, on a GPU 8192]
    #[arg(long, value_name = "TOKENS", value_parser = parse_positive)]
    pub max_num_batched_tokens: Option<usize>,

    /// Let at most this many sequences wait; more are answered with 429
    #[arg(long, value_name = "SEQUENCES", default_value_t = 1024, value_parser = parse_positive)]
    pub max_queued_requests: usize,

    /// Reuse the KV blocks of equal prompt beginnings [default: on]
    #[arg(
        long,
        action = ArgAction::SetTrue,
        overrides_with = "no_enable_prefix_caching"
    )]
    pub enable_prefix_caching: bool,

    /// Compute every prompt from its beginning [default: off]
    #[arg(long, action = ArgAction::SetTrue)]
    pub no_enable_prefix_caching: bool,

    /// Prepare the next step while one runs [default: on a GPU]
    #[arg(
        long,
        action = ArgAction::SetTrue,
        overrides_with = "no_async_scheduling"
    )]
    pub async_scheduling: bool,

    /// Let each step wait for the one before [default: on a CPU]
    #[arg(
        long,
        action = ArgAction::SetTrue,
        overrides_with = "async_scheduling"
    )]
    pub no_async_scheduling: bool,

    /// Run waiting requests in this order; priority runs lower values first
    #[arg(long, value_enum, default_value_t = SchedulingPolicy::Fcfs)]
    pub scheduling_policy: SchedulingPolicy,

    /// Seed the engine's random numbers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl EngineArgs {
    /// Finds the model, downloads it where it is a hub id, and opens its checkpoint.
    ///
    /// # Errors
    /// [`EngineError::Weights`] naming the file or the hub's answer.
    pub fn open(&self, model: &str) -> Result<Arc<Checkpoint>, EngineError> {
        Ok(Arc::new(open_model(model, &self.hub_options())?))
    }

    /// Makes a model of random weights in the shape that the `config.json` of the directory `model`
    /// gives (`--load-format dummy`).
    ///
    /// # Errors
    /// [`EngineError::Weights`] or [`EngineError::Model`] naming the file or key.
    pub fn open_dummy(&self, model: &str) -> Result<Arc<dyn ModelSource>, EngineError> {
        let path = PathBuf::from(model);
        let config = DummyCheckpoint::read_config(&path)?;
        let tensors = ModelConfig::from_json(&config)?.tensors();
        Ok(Arc::new(DummyCheckpoint::new(&path, config, tensors)))
    }

    /// Starts an engine on an open checkpoint.
    ///
    /// # Errors
    /// [`EngineError::BeyondModelLen`] before anything is loaded; see [`Engine::start`].
    pub fn start(&self, checkpoint: Arc<dyn ModelSource>) -> Result<EngineHandle, EngineError> {
        self.check_max_model_len(checkpoint.as_ref())?;
        if self.dtype == Dtype::Float16 && self.device.resolve() == DeviceChoice::Cpu {
            tracing::info!(
                "activations are float32 on a CPU, so --dtype half can not overflow here"
            );
        }
        let options = EngineOptions {
            fault: fault_on_demand()?,
            ..self.options()
        };
        Engine::start(checkpoint, &options)
    }

    /// Refuses sequences longer than the model knows, as vLLM does and with its way out.
    fn check_max_model_len(&self, checkpoint: &dyn ModelSource) -> Result<(), EngineError> {
        let Some(MaxModelLen::Tokens(asked)) = self.max_model_len else {
            return Ok(());
        };
        let of_model = ModelConfig::from_json(checkpoint.config())?.longest_sequence();
        if asked <= of_model {
            return Ok(());
        }
        let error = EngineError::BeyondModelLen { asked, of_model };
        if std::env::var_os(ALLOW_LONG_VARIABLE).is_some_and(|value| value == "1") {
            tracing::warn!("{error}");
            return Ok(());
        }
        Err(error)
    }

    /// Returns where and how models are looked up on the hub.
    pub fn hub_options(&self) -> HubOptions {
        let mut options = HubOptions::from_vars(|name| std::env::var(name).ok());
        options.revision.clone_from(&self.revision);
        if let Some(directory) = &self.download_dir {
            options.cache_dir.clone_from(directory);
        }
        options
    }

    fn options(&self) -> EngineOptions {
        let device = self.device.resolve();
        let (num_seqs, num_tokens) = match device {
            DeviceChoice::Cpu => (256, 2048),
            _ => (512, 8192),
        };
        let max_num_seqs = self.max_num_seqs.unwrap_or(num_seqs);
        EngineOptions {
            device,
            dtype: self.dtype,
            quantization: self.quantization,
            gpu_memory_utilization: self.gpu_memory_utilization,
            graphs: match self.enforce_eager {
                true => Graphs::Off,
                false => Graphs::Decode,
            },
            async_scheduling: match (self.async_scheduling, self.no_async_scheduling) {
                (true, _) => AsyncScheduling::On,
                (false, true) => AsyncScheduling::Off,
                (false, false) => AsyncScheduling::OnGpus,
            },
            tensor_parallel_size: self.tensor_parallel_size,
            data_parallel_size: self.data_parallel_size,
            collectives: match self.disable_custom_all_reduce {
                true => CollectiveChoice::Nccl,
                false => CollectiveChoice::Fastest,
            },
            distributed_timeout: Duration::from_secs(self.distributed_timeout_seconds as u64),
            fault: None,
            num_threads: self.threads,
            max_model_len: self.max_model_len.unwrap_or(MaxModelLen::FromModel),
            max_num_seqs,
            // As vLLM: a budget below the number of sequences could not give each its token.
            max_num_batched_tokens: self
                .max_num_batched_tokens
                .unwrap_or(num_tokens.max(max_num_seqs)),
            block_size: self.block_size,
            kv_cache_memory_bytes: self.kv_cache_memory_bytes.map(|bytes| bytes as u64),
            kv_cache_dtype: self.kv_cache_dtype,
            prefix_caching: !self.no_enable_prefix_caching,
            scheduling_policy: self.scheduling_policy,
            long_prefill_token_threshold: 0,
            seed: self.seed,
            max_num_waiting: self.max_queued_requests,
        }
    }
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// Safetensors or GGUF, whichever the model has.
    #[value(aliases = ["safetensors", "hf", "gguf"])]
    Auto,
    /// Random numbers: for measuring speed without the files.
    Dummy,
}

/// Reads the failure on demand from its variable.
fn fault_on_demand() -> Result<Option<Fault>, EngineError> {
    let Some(text) = std::env::var_os(FAULT_VARIABLE) else {
        return Ok(None);
    };
    let fault = text.to_string_lossy().parse();
    let fault: Fault = fault.map_err(|message| EngineError::InvalidFault { message })?;
    tracing::warn!(
        replica = fault.replica,
        rank = fault.rank,
        step = fault.step,
        "{FAULT_VARIABLE} is set: this rank of this replica will fail"
    );
    Ok(Some(fault))
}

/// A number format for weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// By checkpoint.
    Auto,
    /// IEEE half precision.
    #[value(alias = "half")]
    Float16,
    /// Brain float.
    Bfloat16,
    /// IEEE single precision.
    #[value(alias = "float")]
    Float32,
}

/// Reads `auto`, `cpu`, `cuda` or `cuda:1`.
fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    match text {
        "auto" => Ok(DeviceChoice::Auto),
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        _ => text
            .strip_prefix("cuda:")
            .and_then(|ordinal| ordinal.parse().ok())
            .map(DeviceChoice::Cuda)
            .ok_or_else(|| format!("expected auto, cpu, cuda or cuda:N, got `{text}`")),
    }
}

/// Reads `fp8`, or what vLLM calls a model that stays as it is.
fn parse_quantization(text: &str) -> Result<Quantization, String> {
    match text {
        "fp8" => Ok(Quantization::Fp8),
        "auto" | "none" | "None" | "gguf" => Ok(Quantization::None),
        _ => Err(format!(
            "`{text}` is not supported (only fp8, auto, none, None, gguf); serve a GGUF file for \
             weights that are stored quantised"
        )),
    }
}

/// Reads vLLM's names of types that are built, and float32.
fn parse_kv_cache_dtype(text: &str) -> Result<KvCacheDtype, String> {
    match text {
        "auto" => Ok(KvCacheDtype::Auto),
        "fp8" | "fp8_e4m3" => Ok(KvCacheDtype::Fp8),
        "float16" => Ok(KvCacheDtype::F16),
        "bfloat16" => Ok(KvCacheDtype::Bf16),
        "float32" => Ok(KvCacheDtype::F32),
        _ => Err(format!(
            "`{text}` is not built (only auto, fp8, fp8_e4m3, float16, bfloat16, float32); use fp8 for a \
             cache of half the size"
        )),
    }
}

fn parse_positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1, got 0".to_owned()),
        Ok(value) => Ok(value),
        Err(_) => Err(format!("expected a whole number, got `{text}`")),
    }
}

/// Reads `8192`, `8k` (8000), `8K` (8192), `25.6k`, `auto` or `-1`.
fn parse_max_model_len(text: &str) -> Result<MaxModelLen, String> {
    if text == "auto" || text == "-1" {
        return Ok(MaxModelLen::Auto);
    }
    match scaled(text, &LENGTH_UNITS) {
        Some(0) => Err("expected at least 1, got 0".to_owned()),
        Some(tokens) => Ok(MaxModelLen::Tokens(tokens)),
        None => Err(format!(
            "expected a number such as 8192, 8k, 8K or auto, got `{text}`"
        )),
    }
}

/// Reads a number of bytes: `1073741824`, `4G` (decimal), `4GiB` (binary).
pub fn parse_size(text: &str) -> Result<usize, String> {
    scaled(text, &SIZE_UNITS)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("expected a size such as 512MiB or 4GiB, got `{text}`"))
}

/// vLLM's units: a small letter is decimal, a capital one binary.
const LENGTH_UNITS: [(&str, f64); 7] = [
    ("", 1.0),
    ("k", 1e3),
    ("K", 1024.0),
    ("m", 1e6),
    ("M", 1_048_576.0),
    ("g", 1e9),
    ("G", 1_073_741_824.0),
];

const SIZE_UNITS: [(&str, f64); 14] = [
    ("", 1.0),
    ("B", 1.0),
    ("k", 1e3),
    ("K", 1024.0),
    ("KB", 1e3),
    ("KiB", 1024.0),
    ("m", 1e6),
    ("M", 1_048_576.0),
    ("MB", 1e6),
    ("MiB", 1_048_576.0),
    ("g", 1e9),
    ("G", 1_073_741_824.0),
    ("GB", 1e9),
    ("GiB", 1_073_741_824.0),
];

/// Reads a number with a unit; only a unit may follow a fraction.
fn scaled(text: &str, units: &[(&str, f64)]) -> Option<usize> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    if let Ok(whole) = digits.parse::<u64>() {
        let value = (whole as f64 * factor).round();
        return (value < u32::MAX as f64 * 65536.0).then_some(value as usize);
    }
    let number: f64 = digits.parse().ok()?;
    let usable = !unit.is_empty() && number.is_finite() && (0.0..1e12).contains(&number);
    usable.then_some((number * factor).round() as usize)
}
