//! Which linears get adapters, where their factors lie in one flat buffer, and how they start.
//!
//! One buffer of f32 holds every A `[rank, in]` and B `[out, rank]`, layer by layer in the order
//! of the decoder, so that gradients, moments, clipping and collectives are loops over one slice.
//! Initialisation and scaling are PEFT's (`tuners/lora/layer.py`).

use candle_core::{Device, Tensor};

use crate::models::ModelConfig;

use super::TrainError;
use super::mt19937::Mt19937;

/// A linear of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linear {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output of the attention.
    O,
    /// Gates of the MLP.
    Gate,
    /// Inputs of the MLP.
    Up,
    /// Output of the MLP.
    Down,
}

impl Linear {
    /// All linears in the order of the decoder.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Returns the module's name in the checkpoint.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Returns the module's full name, as `model.layers.3.self_attn.q_proj`.
    pub fn path(self, layer: usize) -> String {
        let block = match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        };
        format!("model.layers.{layer}.{block}.{}", self.name())
    }

    /// Returns `[out_features, in_features]`.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let hidden = config.hidden_size;
        let heads = config.num_heads * config.head_dim;
        let kv_heads = config.num_kv_heads * config.head_dim;
        match self {
            Self::Q => [heads, hidden],
            Self::K | Self::V => [kv_heads, hidden],
            Self::O => [hidden, heads],
            Self::Gate | Self::Up => [config.intermediate_size, hidden],
            Self::Down => [hidden, config.intermediate_size],
        }
    }
}

/// Which linears get an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoraTarget {
    /// Every linear of the layers.
    All,
    /// Those whose full name is an entry or ends in `.entry`.
    Modules(Vec<String>),
}

/// The numbers of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    /// Columns of B; at least 1.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// Probability that an element of an adapter's input is dropped, in 0..1.
    pub dropout: f32,
    /// Whether the scaling is `alpha / sqrt(rank)`, not `alpha / rank`.
    pub use_rslora: bool,
    /// Which linears.
    pub target: LoraTarget,
}

impl LoraOptions {
    /// Returns the factor of `B A x`.
    pub fn scaling(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    fn check(&self) -> Result<(), TrainError> {
        let invalid = |key, wanted: &str, found: String| TrainError::InvalidOption {
            key,
            wanted: wanted.to_owned(),
            found,
        };
        if self.rank == 0 {
            return Err(invalid("lora_rank", "at least 1", "0".to_owned()));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let found = self.dropout.to_string();
            return Err(invalid("lora_dropout", "at least 0 and below 1", found));
        }
        if !self.alpha.is_finite() {
            return Err(invalid(
                "lora_alpha",
                "a finite number",
                self.alpha.to_string(),
            ));
        }
        Ok(())
    }
}

/// One adapted linear and where its factors lie in the flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraEntry {
    /// Layer, from 0.
    pub layer: usize,
    /// Linear.
    pub linear: Linear,
    /// Inputs of the linear.
    pub in_features: usize,
    /// Outputs of the linear.
    pub out_features: usize,
    /// Where A `[rank, in_features]` begins.
    pub a_offset: usize,
    /// Where B `[out_features, rank]` begins.
    pub b_offset: usize,
}

/// All adapted linears of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraLayout {
    options: LoraOptions,
    entries: Vec<LoraEntry>,
    num_params: usize,
}

impl LoraLayout {
    /// Lays out the adapters of a model.
    ///
    /// # Errors
    /// [`TrainError::UnknownTarget`] when an entry of the target names nothing,
    /// [`TrainError::InvalidOption`] when a number is out of range.
    pub fn new(config: &ModelConfig, options: LoraOptions) -> Result<Self, TrainError> {
        options.check()?;
        if let LoraTarget::Modules(targets) = &options.target {
            check_targets(targets, config.num_layers)?;
        }
        let mut entries = Vec::new();
        let mut offset = 0;
        for layer in 0..config.num_layers {
            for linear in Linear::ALL {
                if !is_target(&options.target, &linear.path(layer)) {
                    continue;
                }
                let [out_features, in_features] = linear.shape(config);
                let b_offset = offset + options.rank * in_features;
                entries.push(LoraEntry {
                    layer,
                    linear,
                    in_features,
                    out_features,
                    a_offset: offset,
                    b_offset,
                });
                offset = b_offset + options.rank * out_features;
            }
        }
        Ok(Self {
            options,
            entries,
            num_params: offset,
        })
    }

    /// Returns the options.
    pub fn options(&self) -> &LoraOptions {
        &self.options
    }

    /// Returns the adapted linears in the order of the buffer.
    pub fn entries(&self) -> &[LoraEntry] {
        &self.entries
    }

    /// Returns the number of trainable parameters.
    pub fn num_params(&self) -> usize {
        self.num_params
    }

    /// Returns the entry of a linear, if it is adapted.
    pub fn entry(&self, layer: usize, linear: Linear) -> Option<&LoraEntry> {
        let is_it = |entry: &&LoraEntry| entry.layer == layer && entry.linear == linear;
        self.entries.iter().find(is_it)
    }

    /// Returns the names that `target_modules` of `adapter_config.json` holds: last name parts,
    /// or full names where a target does not cover every layer.
    pub fn target_modules(&self) -> Vec<String> {
        match &self.options.target {
            LoraTarget::All => Linear::ALL.map(|linear| linear.name().to_owned()).to_vec(),
            LoraTarget::Modules(targets) => targets.clone(),
        }
    }

    /// Returns fresh parameters, bit-equal to what PEFT draws after `set_seed(seed)`: A uniform
    /// in ±1/√in (`kaiming_uniform_(a=√5)`), B zero.
    ///
    /// PEFT's constructors fill A and B once before `reset_lora_parameters` fills A again, so
    /// those words of the generator are passed over.
    pub fn init(&self, seed: u64) -> Vec<f32> {
        let mut generator = Mt19937::new(seed);
        let mut params = vec![0f32; self.num_params];
        let rank = self.options.rank;
        for entry in &self.entries {
            for _ in 0..rank * (entry.in_features + entry.out_features) {
                generator.next_u32();
            }
            let bound = (1.0 / (entry.in_features as f64).sqrt()) as f32;
            for value in &mut params[entry.a_offset..entry.b_offset] {
                // 24 random bits as a number in 0..1, as torch's `uniform_` in f32.
                let uniform = (generator.next_u32() & 0x00ff_ffff) as f32 / 16_777_216.0;
                *value = uniform * (bound + bound) - bound;
            }
        }
        params
    }

    /// Returns both factors of an entry as tensors that share the memory of `flat`.
    ///
    /// # Errors
    /// When `flat` is not `[num_params]`.
    pub(super) fn factors(
        &self,
        flat: &Tensor,
        entry: &LoraEntry,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let rank = self.options.rank;
        let (a_len, b_len) = (rank * entry.in_features, rank * entry.out_features);
        let a = flat.narrow(0, entry.a_offset, a_len)?;
        let b = flat.narrow(0, entry.b_offset, b_len)?;
        Ok((
            a.reshape((rank, entry.in_features))?,
            b.reshape((entry.out_features, rank))?,
        ))
    }

    /// Returns the flat buffer as a tensor.
    ///
    /// # Errors
    /// When it has another length than the layout.
    pub(super) fn tensor(&self, params: Vec<f32>) -> candle_core::Result<Tensor> {
        Tensor::from_vec(params, self.num_params, &Device::Cpu)
    }
}

fn matches(target: &str, path: &str) -> bool {
    path == target
        || path
            .strip_suffix(target)
            .is_some_and(|rest| rest.ends_with('.'))
}

fn is_target(target: &LoraTarget, path: &str) -> bool {
    match target {
        LoraTarget::All => true,
        LoraTarget::Modules(targets) => targets.iter().any(|target| matches(target, path)),
    }
}

/// Refuses entries that match nothing: PEFT trains silently less then.
fn check_targets(targets: &[String], num_layers: usize) -> Result<(), TrainError> {
    let exists = |target: &&String| {
        let mut paths =
            (0..num_layers).flat_map(|layer| Linear::ALL.map(|linear| linear.path(layer)));
        paths.any(|path| matches(target, &path))
    };
    let missing: Vec<String> = targets.iter().filter(|t| !exists(t)).cloned().collect();
    if missing.is_empty() && !targets.is_empty() {
        return Ok(());
    }
    Err(TrainError::UnknownTarget {
        missing,
        available: Linear::ALL.map(Linear::name).join(", "),
    })
}
