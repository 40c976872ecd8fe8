//! How an engine runs, and the memory plan that follows from it.

use std::time::Duration;

use candle_core::DType;

use crate::kernels::{CollectiveChoice, Kernels, Quantization};
use crate::models::ModelConfig;

use super::EngineError;
use super::args::Dtype;
use super::fault::Fault;
use super::scheduler::SchedulingPolicy;

/// Longest sequence to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxModelLen {
    /// What the model was made for.
    FromModel,
    /// The largest that fits in the KV cache, at most what the model was made for.
    Auto,
    /// This many tokens.
    Tokens(usize),
}

/// Type of the stored keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCacheDtype {
    /// On a CPU f32 beside f32 weights, f16 beside all others; on a GPU the type it computes in.
    Auto,
    /// 4 bytes a value, on a CPU.
    F32,
    /// 2 bytes a value; on a GPU that computes in it.
    F16,
    /// 2 bytes a value, on a GPU that computes in it.
    Bf16,
    /// E4M3 without scales: 1 byte a value, rounded when it is written, ±448 for all that is larger.
    Fp8,
}

impl KvCacheDtype {
    /// Returns what an engine stores that computes in `computing` on a GPU.
    ///
    /// # Errors
    /// [`EngineError::UnsupportedKvCacheDtype`] for another type of 16 bits or more.
    pub(super) fn on_gpu(self, computing: DType) -> Result<DType, EngineError> {
        match (self, computing) {
            (Self::Fp8, _) => Ok(DType::F8E4M3),
            (Self::Auto, _) | (Self::F16, DType::F16) | (Self::Bf16, DType::BF16) => Ok(computing),
            (Self::F32 | Self::F16 | Self::Bf16, _) => Err(EngineError::UnsupportedKvCacheDtype {
                found: self.name(),
                place: match computing {
                    DType::F16 => "a GPU that computes in float16",
                    _ => "a GPU that computes in bfloat16",
                },
                choices: "auto or fp8",
            }),
        }
    }

    /// Returns what an engine on a CPU stores, which stores `auto` when nobody chooses.
    ///
    /// # Errors
    /// [`EngineError::UnsupportedKvCacheDtype`] for bfloat16.
    pub(super) fn on_cpu(self, auto: DType) -> Result<DType, EngineError> {
        match self {
            Self::Auto => Ok(auto),
            Self::F32 => Ok(DType::F32),
            Self::F16 => Ok(DType::F16),
            Self::Fp8 => Ok(DType::F8E4M3),
            Self::Bf16 => Err(EngineError::UnsupportedKvCacheDtype {
                found: self.name(),
                place: "a CPU",
                choices: "auto, float32, float16 or fp8",
            }),
        }
    }

    /// Returns its name on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::Fp8 => "fp8",
        }
    }
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// On a GPU where there is one, else on the CPU.
    Auto,
    /// On the CPU.
    Cpu,
    /// On this GPU and, with more ranks, on those after it.
    Cuda(usize),
}

impl DeviceChoice {
    /// Returns what `Auto` means on this machine; others stay.
    pub(super) fn resolve(self) -> Self {
        match self {
            Self::Auto if Kernels::num_gpus() > 0 => Self::Cuda(0),
            Self::Auto => Self::Cpu,
            other => other,
        }
    }
}

/// Which steps of a GPU are recorded as graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Graphs {
    /// None: every kernel is launched on its own (`--enforce-eager`).
    Off,
    /// Steps of one token a sequence, up to 512 sequences.
    Decode,
}

/// Whether a step is launched before the one before it is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AsyncScheduling {
    /// On GPUs. A CPU has computed a step once it is launched, so nothing is gained there.
    #[default]
    OnGpus,
    /// Everywhere (`--async-scheduling`).
    On,
    /// Nowhere: each step waits for the one before (`--no-async-scheduling`).
    Off,
}

/// Sequences of the largest recorded step.
const MAX_GRAPH_SEQUENCES: usize = 512;

impl Graphs {
    /// Returns what steps of at most `max_num_seqs` sequences are padded to, largest first: the
    /// first of a class of sizes decides which algorithms the others take.
    pub(super) fn buckets(self, max_num_seqs: usize) -> Vec<usize> {
        let padded = (1..=max_num_seqs.min(MAX_GRAPH_SEQUENCES)).filter_map(|num| self.bucket(num));
        let mut buckets: Vec<usize> = padded.map(|bucket| bucket.min(max_num_seqs)).collect();
        buckets.dedup();
        buckets.reverse();
        buckets
    }

    /// Returns how many sequences a step of `num_sequences` is padded to, if it is recorded:
    /// 1, 2, 4, then multiples of 8, from 256 on of 16.
    pub(super) fn bucket(self, num_sequences: usize) -> Option<usize> {
        match (self, num_sequences) {
            (Self::Off, _) | (_, 0) => None,
            (_, 1 | 2) => Some(num_sequences),
            (_, 3 | 4) => Some(4),
            (_, ..=256) => Some(num_sequences.next_multiple_of(8)),
            (_, ..=MAX_GRAPH_SEQUENCES) => Some(num_sequences.next_multiple_of(16)),
            _ => None,
        }
    }
}

/// Options of [`super::Engine::start`]; defaults are vLLM's where it has them.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOptions {
    /// CPU or GPU.
    pub device: DeviceChoice,
    /// Type that a GPU computes in; on the CPU activations are f32 throughout.
    pub dtype: Dtype,
    /// What a GPU makes of the layers' weights while it loads them.
    pub quantization: Quantization,
    /// Part of each GPU's memory that the program may take, `(0, 1]`.
    pub gpu_memory_utilization: f64,
    /// What is recorded on a GPU.
    pub graphs: Graphs,
    /// Whether the next step is prepared while one runs.
    pub async_scheduling: AsyncScheduling,
    /// Ranks that share each layer.
    pub tensor_parallel_size: usize,
    /// Replicas of the whole, each with its own ranks, scheduler and KV cache, that share the
    /// requests. On GPUs replica `r` has those from `r * tensor_parallel_size` after the first on.
    pub data_parallel_size: usize,
    /// How ranks on GPUs meet.
    pub collectives: CollectiveChoice,
    /// How long ranks wait for each other, and for a step on a GPU, before the engine ends.
    pub distributed_timeout: Duration,
    /// A failure on demand, for tests.
    pub fault: Option<Fault>,
    /// CPU threads of all replicas; the cores this process may use when absent.
    pub num_threads: Option<usize>,
    /// Longest sequence.
    pub max_model_len: MaxModelLen,
    /// Most sequences in one batch.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// Tokens a KV block holds, a multiple of 16.
    pub block_size: usize,
    /// Bytes of the KV caches of a replica's ranks together; planned from free memory when absent.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Type of keys and values.
    pub kv_cache_dtype: KvCacheDtype,
    /// Whether prompts reuse blocks of earlier ones.
    pub prefix_caching: bool,
    /// Which request goes first.
    pub scheduling_policy: SchedulingPolicy,
    /// Prompt tokens of one sequence a step; 0 is no limit but the budget.
    pub long_prefill_token_threshold: usize,
    /// Seed of requests that bring none.
    pub seed: u64,
    /// Requests that may wait before new ones are refused.
    pub max_num_waiting: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Cpu,
            dtype: Dtype::Auto,
            quantization: Quantization::None,
            gpu_memory_utilization: 0.92,
            graphs: Graphs::Decode,
            async_scheduling: AsyncScheduling::OnGpus,
            tensor_parallel_size: 1,
            data_parallel_size: 1,
            collectives: CollectiveChoice::Fastest,
            distributed_timeout: Duration::from_secs(60),
            fault: None,
            num_threads: None,
            max_model_len: MaxModelLen::FromModel,
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            block_size: 16,
            kv_cache_memory_bytes: None,
            kv_cache_dtype: KvCacheDtype::Auto,
            prefix_caching: true,
            scheduling_policy: SchedulingPolicy::Fcfs,
            long_prefill_token_threshold: 0,
            seed: 0,
            max_num_waiting: 1024,
        }
    }
}

impl EngineOptions {
    /// Returns whether steps are launched ahead on the device that is chosen.
    pub(super) fn launches_ahead(&self) -> bool {
        match self.async_scheduling {
            AsyncScheduling::OnGpus => self.device.resolve() != DeviceChoice::Cpu,
            AsyncScheduling::On => true,
            AsyncScheduling::Off => false,
        }
    }

    /// Checks what does not depend on the model.
    pub(super) fn check(&self) -> Result<(), EngineError> {
        let invalid = |option: &'static str, wanted: String, found: usize| {
            Err(EngineError::InvalidOption {
                option,
                wanted,
                found,
            })
        };
        if self.block_size == 0 || !self.block_size.is_multiple_of(16) {
            return invalid(
                "block-size",
                "a positive multiple of 16".to_owned(),
                self.block_size,
            );
        }
        if self.max_num_seqs == 0 {
            return invalid("max-num-seqs", "at least 1".to_owned(), 0);
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            let wanted = format!("at least max-num-seqs ({})", self.max_num_seqs);
            return invalid(
                "max-num-batched-tokens",
                wanted,
                self.max_num_batched_tokens,
            );
        }
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            return Err(EngineError::InvalidUtilization {
                found: self.gpu_memory_utilization,
            });
        }
        let most = (MAX_RANKS / self.tensor_parallel_size.max(1)).max(1);
        if self.data_parallel_size == 0 || self.data_parallel_size > most {
            let wanted = format!("1 to {most}");
            return invalid("data-parallel-size", wanted, self.data_parallel_size);
        }
        if let Some(message) = self.fault.and_then(|fault| self.lacks(fault)) {
            return Err(EngineError::InvalidFault { message });
        }
        if self.num_threads == Some(0) {
            return invalid("threads", "at least 1".to_owned(), 0);
        }
        Ok(())
    }

    /// Says what a fault names that is not there.
    fn lacks(&self, Fault { replica, rank, .. }: Fault) -> Option<String> {
        let (replicas, ranks) = (self.data_parallel_size, self.tensor_parallel_size);
        if replica >= replicas {
            return Some(format!("names replica {replica} of {replicas} replicas"));
        }
        (rank >= ranks).then(|| format!("names rank {rank} of {ranks} ranks"))
    }
}

/// A number of bytes, for people.
pub(super) struct Bytes(pub(super) u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (shift, unit) = match self.0 {
            0..=0x3ff => return write!(f, "{} bytes", self.0),
            0x400..=0xf_ffff => (10, "KiB"),
            0x10_0000..=0x3fff_ffff => (20, "MiB"),
            _ => (30, "GiB"),
        };
        write!(f, "{:.2} {unit}", self.0 as f64 / (1u64 << shift) as f64)
    }
}

/// What the KV cache will hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KvPlan {
    pub(super) num_blocks: usize,
    pub(super) max_model_len: usize,
    /// Bytes of all blocks on all ranks.
    pub(super) size_bytes: u64,
}

/// Most bytes taken for the KV cache on a CPU when nobody says how many: what vLLM takes there.
const DEFAULT_KV_CACHE_BYTES: u64 = 4 << 30;
/// Most ranks of all replicas together.
const MAX_RANKS: usize = 1024;

/// Returns the bytes that the KV cache of each of `num_replicas` takes on the CPU beside weights
/// of `weight_bytes`.
pub(super) fn cpu_kv_budget(weight_bytes: u64, num_replicas: usize) -> u64 {
    let num_replicas = num_replicas as u64;
    // Mapped weights count as available memory until they are read, so take them off. Replicas
    // share those, but each packs quantised ones for itself.
    let available = available_memory().saturating_sub(weight_bytes * num_replicas);
    DEFAULT_KV_CACHE_BYTES.min(available / 2 / num_replicas)
}

/// Plans the KV cache: `bytes_per_value` is 4, 2 or 1, `default_budget` the bytes that it takes when
/// nobody says how many.
pub(super) fn plan_kv_cache(
    options: &EngineOptions,
    model: &ModelConfig,
    bytes_per_value: usize,
    default_budget: u64,
) -> Result<KvPlan, EngineError> {
    // With more ranks than KV heads each rank still keeps one.
    let num_kv_heads = model.num_kv_heads.max(options.tensor_parallel_size);
    let token_bytes = 2 * model.num_layers * num_kv_heads * model.head_dim * bytes_per_value;
    let block_bytes = (token_bytes * options.block_size) as u64;
    let wanted_len = match options.max_model_len {
        MaxModelLen::Tokens(tokens) => tokens,
        MaxModelLen::FromModel | MaxModelLen::Auto => model.max_position_embeddings,
    };
    let blocks_for = |tokens: usize| tokens.div_ceil(options.block_size) as u64;
    // More than every sequence at its longest would never be used.
    let most = blocks_for(wanted_len) * options.max_num_seqs as u64;
    let budget = options.kv_cache_memory_bytes.unwrap_or(default_budget);
    let num_blocks = (budget / block_bytes)
        .min(most)
        .min(u64::from(u32::MAX) / options.block_size as u64);
    let fitting_len = num_blocks as usize * options.block_size;
    let max_model_len = match options.max_model_len {
        MaxModelLen::Auto => wanted_len.min(fitting_len),
        MaxModelLen::FromModel | MaxModelLen::Tokens(_) => wanted_len,
    };
    if max_model_len == 0 || fitting_len < max_model_len {
        return Err(EngineError::KvCacheTooSmall {
            max_model_len: wanted_len,
            needed_bytes: blocks_for(wanted_len) * block_bytes,
            available_bytes: budget,
            fitting_len,
        });
    }
    Ok(KvPlan {
        num_blocks: num_blocks as usize,
        max_model_len,
        size_bytes: num_blocks * block_bytes,
    })
}

/// Returns the bytes that this process may still take: free memory of the machine, or what its
/// control group leaves.
fn available_memory() -> u64 {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let machine = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(8 << 30, |kib| kib * 1024);
    let limit = read("/sys/fs/cgroup/memory.max").trim().parse::<u64>().ok();
    let used = read("/sys/fs/cgroup/memory.current")
        .trim()
        .parse::<u64>()
        .unwrap_or(0);
    limit.map_or(machine, |limit| machine.min(limit.saturating_sub(used)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn model() -> ModelConfig {
        ModelConfig::from_json(&json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 1024,
        }))
        .unwrap()
    }

    #[test]
    fn a_cache_too_small_names_the_length_that_would_fit() {
        // 2 · 2 layers · 2 heads · 16 dims · 4 bytes = 512 bytes a token, 8 KiB a block.
        let options = EngineOptions {
            kv_cache_memory_bytes: Some(10 * 8192),
            ..EngineOptions::default()
        };
        let error = plan_kv_cache(&options, &model(), 4, 0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a sequence of 1024 tokens needs 512.00 KiB of KV cache, 80.00 KiB are available; \
             --max-model-len 160 would fit, or raise --kv-cache-memory-bytes"
        );
    }

    #[test]
    fn a_cache_too_small_for_a_block_names_no_length() {
        let options = EngineOptions {
            kv_cache_memory_bytes: Some(1000),
            ..EngineOptions::default()
        };
        let error = plan_kv_cache(&options, &model(), 4, 0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a sequence of 1024 tokens needs 512.00 KiB of KV cache, 1000 bytes are available; \
             raise --kv-cache-memory-bytes"
        );
    }

    #[test]
    fn sizes_are_told_in_units_that_fit() {
        let sizes = [1023, 1024, 1 << 20, 3 << 29, 1 << 40].map(|size| Bytes(size).to_string());
        assert_eq!(
            sizes,
            [
                "1023 bytes",
                "1.00 KiB",
                "1.00 MiB",
                "1.50 GiB",
                "1024.00 GiB"
            ]
        );
    }

    #[test]
    fn auto_shortens_to_what_fits() {
        let options = EngineOptions {
            kv_cache_memory_bytes: Some(10 * 8192),
            max_model_len: MaxModelLen::Auto,
            ..EngineOptions::default()
        };
        let plan = plan_kv_cache(&options, &model(), 4, 0).unwrap();
        assert_eq!(
            plan,
            KvPlan {
                num_blocks: 10,
                max_model_len: 160,
                size_bytes: 10 * 8192
            }
        );
    }

    #[test]
    fn a_byte_a_value_makes_twice_the_blocks_of_two() {
        let options = EngineOptions {
            kv_cache_memory_bytes: Some(1 << 20),
            ..EngineOptions::default()
        };
        let blocks = |bytes| {
            let plan = plan_kv_cache(&options, &model(), bytes, 0).unwrap();
            assert!(plan.size_bytes <= 1 << 20);
            plan.num_blocks
        };
        assert_eq!([blocks(2), blocks(1)], [256, 512]);
    }

    #[test]
    fn a_cache_is_of_a_type_that_its_device_reads() {
        use KvCacheDtype::{Auto, Bf16, F16, F32, Fp8};
        let on_gpu = |dtype: KvCacheDtype, computing| dtype.on_gpu(computing).ok();
        for computing in [DType::F16, DType::BF16] {
            assert_eq!(on_gpu(Auto, computing), Some(computing));
            assert_eq!(on_gpu(Fp8, computing), Some(DType::F8E4M3));
            assert_eq!(on_gpu(F32, computing), None);
        }
        assert_eq!(on_gpu(F16, DType::F16), Some(DType::F16));
        assert_eq!(on_gpu(Bf16, DType::BF16), Some(DType::BF16));
        assert_eq!(on_gpu(Bf16, DType::F16), None);
        let refused = F16.on_gpu(DType::BF16).unwrap_err().to_string();
        assert!(
            refused.contains("--kv-cache-dtype float16 on a GPU that computes in bfloat16")
                && refused.contains("use auto or fp8"),
            "{refused}"
        );
        let on_cpu = |dtype: KvCacheDtype| dtype.on_cpu(DType::F16).ok();
        let got = [Auto, F32, F16, Fp8, Bf16].map(on_cpu);
        let want = [DType::F16, DType::F32, DType::F16, DType::F8E4M3].map(Some);
        assert_eq!((&got[..4], got[4]), (&want[..], None));
    }

    #[test]
    fn steps_are_padded_to_few_sizes() {
        let bucket = |num| Graphs::Decode.bucket(num);
        let buckets = [1, 2, 3, 5, 9, 256, 257, 512].map(bucket);
        assert_eq!(buckets, [1, 2, 4, 8, 16, 256, 272, 512].map(Some));
        assert_eq!([bucket(0), bucket(513), Graphs::Off.bucket(1)], [None; 3]);
        assert_eq!(Graphs::Decode.buckets(21), [21, 16, 8, 4, 2, 1]);
        assert_eq!(Graphs::Decode.buckets(4096).len(), 51);
    }

    #[test]
    fn no_more_blocks_than_all_sequences_can_fill() {
        let options = EngineOptions {
            max_num_seqs: 2,
            max_num_batched_tokens: 64,
            ..EngineOptions::default()
        };
        let plan = plan_kv_cache(&options, &model(), 4, 4 << 30).unwrap();
        assert_eq!(plan.num_blocks, 2 * 1024 / 16);
    }
}
