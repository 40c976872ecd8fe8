//! What is trained, where it lies in one flat buffer, and how it starts.
//!
//! One buffer of f32 holds every A `[rank, in]` and B `[out, rank]` (with DoRA the magnitudes
//! `[out]` too), layer by layer in the order of the decoder, and behind them the modules that are
//! trained whole, so that gradients, moments, clipping and collectives are loops over one slice.
//! Initialisation and scaling are PEFT's (`tuners/lora/layer.py`, `tuners/lora/dora.py`).

use candle_core::{DType, Tensor};

use crate::kernels::Kernels;
use crate::models::ModelConfig;
use crate::weights::TensorSource;

use super::TrainError;
use super::modules::{Linear, Module, names};
use super::mt19937::Mt19937;

/// Which linears get an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoraTarget {
    /// Every linear of the layers.
    All,
    /// Those whose full name is an entry or ends in `.entry`; the output head may be one.
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
    /// Whether the norms of the weights' rows are trained apart (DoRA).
    pub use_dora: bool,
    /// Which linears.
    pub target: LoraTarget,
    /// Ends of the names of modules that are trained and saved whole (PEFT's `modules_to_save`).
    pub modules_to_save: Vec<String>,
    /// The type that the trained values are multiplied and saved in: f32, or bf16 or f16, to which
    /// the f32 values of the optimizer are then rounded in every pass (DeepSpeed's way).
    pub dtype: DType,
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
    /// A linear of a layer, or the output head.
    pub module: Module,
    /// Inputs of the linear.
    pub in_features: usize,
    /// Outputs of the linear.
    pub out_features: usize,
    /// Where A `[rank, in_features]` begins.
    pub a_offset: usize,
    /// Where B `[out_features, rank]` begins.
    pub b_offset: usize,
    /// Where the magnitudes `[out_features]` begin, with DoRA.
    pub magnitude_offset: Option<usize>,
}

/// One module that is trained whole and where it lies in the flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WholeEntry {
    /// The module.
    pub module: Module,
    /// Shape of its weight.
    pub shape: Vec<usize>,
    /// Where its weight begins.
    pub offset: usize,
    /// Where its bias `[shape[0]]` begins, if it has one.
    pub bias_offset: Option<usize>,
}

/// What a tensor of the flat buffer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    A,
    B,
    Magnitude,
    Weight,
    /// A norm's weight, or a bias.
    Vector,
}

/// One tensor of the flat buffer.
pub(super) struct FlatTensor {
    /// Its name in PEFT's state dict.
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) role: Role,
}

impl FlatTensor {
    /// Returns the number of its elements.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Everything that is trained of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraLayout {
    options: LoraOptions,
    entries: Vec<LoraEntry>,
    whole: Vec<WholeEntry>,
    num_lora_params: usize,
    num_params: usize,
}

impl LoraLayout {
    /// Lays out what is trained of a model.
    ///
    /// # Errors
    /// [`TrainError::UnknownTarget`] or [`TrainError::UnknownModule`] when a name matches nothing,
    /// [`TrainError::InvalidOption`] when a number is out of range or a module is to be trained
    /// in both ways, [`TrainError::Unsupported`] for DoRA on the output head.
    pub fn new(config: &ModelConfig, options: LoraOptions) -> Result<Self, TrainError> {
        options.check()?;
        check_targets(config, &options)?;
        let (mut entries, mut offset) = (Vec::new(), 0);
        for module in linears(config) {
            if !is_target(&options.target, module) {
                continue;
            }
            let shape = module.shape(config);
            let (out_features, in_features) = (shape[0], shape[1]);
            let b_offset = offset + options.rank * in_features;
            let end = b_offset + options.rank * out_features;
            entries.push(LoraEntry {
                module,
                in_features,
                out_features,
                a_offset: offset,
                b_offset,
                magnitude_offset: options.use_dora.then_some(end),
            });
            offset = end + if options.use_dora { out_features } else { 0 };
        }
        let num_lora_params = offset;
        let mut whole = Vec::new();
        for module in Module::all(config) {
            if !is_whole(&options.modules_to_save, module) {
                continue;
            }
            let shape = module.shape(config);
            let end = offset + shape.iter().product::<usize>();
            let bias_len = if module.has_bias(config) { shape[0] } else { 0 };
            whole.push(WholeEntry {
                module,
                shape,
                offset,
                bias_offset: (bias_len > 0).then_some(end),
            });
            offset = end + bias_len;
        }
        Ok(Self {
            options,
            entries,
            whole,
            num_lora_params,
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

    /// Returns the modules trained whole in the order of the buffer.
    pub fn whole(&self) -> &[WholeEntry] {
        &self.whole
    }

    /// Returns the number of trainable parameters.
    pub fn num_params(&self) -> usize {
        self.num_params
    }

    /// Returns the number of those that adapters have; they come first.
    pub(super) fn num_lora_params(&self) -> usize {
        self.num_lora_params
    }

    /// Returns the entry of a linear, if it is adapted.
    pub fn entry(&self, module: Module) -> Option<&LoraEntry> {
        self.entries.iter().find(|entry| entry.module == module)
    }

    /// Returns the entry of a module, if it is trained whole.
    pub fn whole_entry(&self, module: Module) -> Option<&WholeEntry> {
        self.whole.iter().find(|entry| entry.module == module)
    }

    /// Returns the lowest layer with something to train, the number of layers if none has.
    pub(super) fn lowest_layer(&self, num_layers: usize) -> usize {
        let lora = self.entries.iter().map(|entry| entry.module);
        let whole = self.whole.iter().map(|entry| entry.module);
        let layers = lora.chain(whole).filter_map(Module::layer);
        match self.whole_entry(Module::Embedding) {
            Some(_) => 0,
            None => layers.min().unwrap_or(num_layers),
        }
    }

    /// Returns the names that `target_modules` of `adapter_config.json` holds: last name parts,
    /// or full names where a target does not cover every layer.
    pub fn target_modules(&self) -> Vec<String> {
        match &self.options.target {
            LoraTarget::All => Linear::ALL.map(|linear| linear.name().to_owned()).to_vec(),
            LoraTarget::Modules(targets) => targets.clone(),
        }
    }

    /// Returns all tensors in the order of the flat buffer, which they fill without gaps.
    pub(super) fn tensors(&self) -> Vec<FlatTensor> {
        let rank = self.options.rank;
        let mut tensors = Vec::new();
        let mut push = |name: String, shape: Vec<usize>, role| {
            let name = format!("base_model.model.{name}");
            tensors.push(FlatTensor { name, shape, role });
        };
        for entry in &self.entries {
            let path = entry.module.path();
            let (a, b) = ([rank, entry.in_features], [entry.out_features, rank]);
            push(format!("{path}.lora_A.weight"), a.to_vec(), Role::A);
            push(format!("{path}.lora_B.weight"), b.to_vec(), Role::B);
            if entry.magnitude_offset.is_some() {
                let name = format!("{path}.lora_magnitude_vector");
                push(name, vec![entry.out_features], Role::Magnitude);
            }
        }
        for entry in &self.whole {
            let path = entry.module.path();
            let role = match entry.shape.len() {
                1 => Role::Vector,
                _ => Role::Weight,
            };
            push(format!("{path}.weight"), entry.shape.clone(), role);
            if entry.bias_offset.is_some() {
                push(format!("{path}.bias"), vec![entry.shape[0]], Role::Vector);
            }
        }
        tensors
    }

    /// Returns fresh adapters, bit-equal to what PEFT draws after `set_seed(seed)`: A uniform
    /// in ±1/√in (`kaiming_uniform_(a=√5)`), B zero. Magnitudes and whole modules are zero until
    /// [`LoraLayout::copy_base`].
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

    /// Fills in what starts as the base has it: whole modules, and as magnitudes the norms of the
    /// weights' rows.
    ///
    /// # Errors
    /// [`TrainError::Weights`] naming a tensor that is missing or of another shape.
    pub fn copy_base(
        &self,
        params: &mut [f32],
        source: &dyn TensorSource,
        config: &ModelConfig,
        kernels: &Kernels,
    ) -> Result<(), TrainError> {
        let read = |name: &str, shape: &[usize]| {
            let tensor = source.tensor(name)?;
            tensor.expect_shape(shape)?;
            Ok::<_, TrainError>(tensor)
        };
        let in_tensor = |name: &str| TrainError::kernel(format!("tensor \"{name}\""));
        for entry in &self.entries {
            let Some(offset) = entry.magnitude_offset else {
                continue;
            };
            let (name, shape) = (entry.module.weight_name(config), entry.module.shape(config));
            let tensor = read(&name, &shape)?;
            let norms = kernels
                .load_matrix(tensor.dtype, shape[0], shape[1], tensor.data)
                .and_then(|weight| kernels.row_norms(&weight, None, 0.0))
                .map_err(in_tensor(&name))?;
            params[offset..offset + norms.len()].copy_from_slice(&norms);
        }
        for entry in &self.whole {
            let weight = (
                entry.module.weight_name(config),
                &entry.shape[..],
                entry.offset,
            );
            let bias = entry.bias_offset.map(|offset| {
                let name = format!("{}.bias", entry.module.path());
                (name, &entry.shape[..1], offset)
            });
            for (name, shape, offset) in [Some(weight), bias].into_iter().flatten() {
                let (tensor, len) = (read(&name, shape)?, shape.iter().product());
                let values = kernels
                    .load_vector(tensor.dtype, len, &tensor.data)
                    .and_then(|values| values.to_vec1())
                    .map_err(in_tensor(&name))?;
                params[offset..offset + len].copy_from_slice(&values);
            }
        }
        Ok(())
    }

    /// Returns both factors of an entry as tensors that share the memory of `flat`, which holds
    /// the adapters' parameters at least.
    ///
    /// # Errors
    /// When `flat` is shorter.
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
}

/// Returns the linears that can have an adapter, in the order of the decoder.
fn linears(config: &ModelConfig) -> impl Iterator<Item = Module> {
    let is_linear = |module: &Module| matches!(module, Module::Linear(..) | Module::LmHead);
    Module::all(config).into_iter().filter(is_linear)
}

fn matches(target: &str, path: &str) -> bool {
    path == target
        || path
            .strip_suffix(target)
            .is_some_and(|rest| rest.ends_with('.'))
}

fn is_target(target: &LoraTarget, module: Module) -> bool {
    match target {
        // As in LLaMA-Factory and PEFT, the head is no part of "all".
        LoraTarget::All => module != Module::LmHead,
        LoraTarget::Modules(targets) => {
            let path = module.path();
            targets.iter().any(|target| matches(target, &path))
        }
    }
}

/// PEFT compares ends of names, not parts of them: `norm` is every norm.
fn is_whole(names: &[String], module: Module) -> bool {
    let path = module.path();
    names.iter().any(|name| path.ends_with(name.as_str()))
}

/// Refuses entries that match nothing: PEFT trains silently less then.
fn check_targets(config: &ModelConfig, options: &LoraOptions) -> Result<(), TrainError> {
    let modules = Module::all(config);
    let unmatched = |names: &[String], is_match: &dyn Fn(&str, Module) -> bool| {
        let matches_none = |name: &&String| !modules.iter().any(|m| is_match(name, *m));
        names
            .iter()
            .filter(matches_none)
            .cloned()
            .collect::<Vec<_>>()
    };
    if let LoraTarget::Modules(targets) = &options.target {
        let candidates: Vec<Module> = linears(config).collect();
        let missing = unmatched(targets, &|target, module| {
            candidates.contains(&module) && matches(target, &module.path())
        });
        if !missing.is_empty() || targets.is_empty() {
            return Err(TrainError::UnknownTarget {
                missing,
                available: names(candidates).join(", "),
            });
        }
    }
    let missing = unmatched(&options.modules_to_save, &|name, module| {
        module.path().ends_with(name)
    });
    if !missing.is_empty() {
        return Err(TrainError::UnknownModule {
            missing,
            available: names(modules).join(", "),
        });
    }
    let is_both = |module: &Module| {
        is_target(&options.target, *module) && is_whole(&options.modules_to_save, *module)
    };
    if let Some(module) = linears(config).find(is_both) {
        return Err(TrainError::InvalidOption {
            key: "additional_target",
            wanted: "modules that have no adapter".to_owned(),
            found: format!("{}, which lora_target names too", module.name()),
        });
    }
    if options.use_dora && is_target(&options.target, Module::LmHead) {
        return Err(TrainError::Unsupported {
            what: "use_dora on lm_head".to_owned(),
            advice: "leave lm_head out of lora_target, or train it whole with additional_target"
                .to_owned(),
        });
    }
    Ok(())
}
