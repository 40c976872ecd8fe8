//! Which tensor of the base takes what from which adapter, by headers alone.
//!
//! Every tensor of every adapter is used exactly once or becomes a [`Fault`]; all faults are
//! gathered, so that one run tells everything that is wrong.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use candle_core::quantized::GgmlDType;
use serde_json::Value;

use super::{
    Adapter,
    adapter_dir::is_float,
    config::is_module,
    faults::{AdapterFaults, Fault},
    hints,
    keys::Part,
    merged::{Accumulate, MergeOptions, MergedCheckpoint, Origin, Recipe},
    tied::{self, Tied},
};
use crate::weights::{
    Checkpoint, Format, StoredTensor, TensorInfo, TensorSource, WeightsError,
    state_dict_order::sort_as_state_dict,
};

/// Plans all but the question whether tied embeddings stay tied.
pub(super) fn plan(
    base: Arc<Checkpoint>,
    adapters: Vec<(Adapter, f32)>,
    options: MergeOptions,
) -> Result<MergedCheckpoint, WeightsError> {
    check_base(&base, adapters.is_empty())?;
    let mut planner = Planner {
        recipes: BTreeMap::new(),
        tied: None,
        faults: Vec::new(),
        warnings: Vec::new(),
        adapter: 0,
        num_adapters: adapters.len(),
        dir: PathBuf::new(),
        weight: 1.0,
    };
    planner.add_base(&base, options.dtype)?;
    planner.check_combination(&adapters, options.accumulate);
    for (index, (adapter, weight)) in adapters.iter().enumerate() {
        planner.adapter = index;
        planner.dir = adapter.dir().to_owned();
        planner.weight = *weight;
        planner.add_adapter(adapter, base.config())?;
        planner.warn_of_base(adapter, &base);
    }
    if !planner.faults.is_empty() {
        let adapters = adapters.iter().map(|(adapter, _)| adapter);
        return Err(AdapterFaults {
            hints: hints::of(&base, adapters, &planner.faults),
            faults: planner.faults,
        }
        .into());
    }
    let mut infos: Vec<TensorInfo> = (planner.recipes.values())
        .map(|recipe| recipe.info.clone())
        .collect();
    sort_as_state_dict(&mut infos);
    let recipes: Vec<Recipe> = (infos.iter())
        .filter_map(|info| planner.recipes.remove(&info.name))
        .collect();
    let mut merged = MergedCheckpoint {
        config: base.config().clone(),
        base,
        adapters: adapters.into_iter().map(|(adapter, _)| adapter).collect(),
        options,
        by_name: HashMap::new(),
        recipes,
        config_changes: Vec::new(),
        warnings: planner.warnings,
        right_factors: Mutex::default(),
    };
    merged.index_recipes();
    Ok(merged)
}

impl MergedCheckpoint {
    /// Finds recipes by name again after their list changed.
    pub(super) fn index_recipes(&mut self) {
        self.right_factors = Mutex::default();
        self.by_name = (self.recipes.iter().enumerate())
            .map(|(index, recipe)| (recipe.info.name.clone(), index))
            .collect();
    }
}

/// Refuses bases whose weights are not plain floats.
fn check_base(base: &Checkpoint, re_export: bool) -> Result<(), WeightsError> {
    let refuse = |reason: String| {
        Err(WeightsError::NotABase {
            path: base.path().to_owned(),
            reason,
        })
    };
    if base.format() == Format::Gguf {
        return refuse(
            "it is a GGUF file; give the Hugging Face directory that it was made from, or make one \
             with infold merge --model FILE.gguf --output DIRECTORY"
                .to_owned(),
        );
    }
    let quantization = (base.config().get("quantization_config")).filter(|value| !value.is_null());
    if let (Some(quantization), false) = (quantization, re_export) {
        let method = quantization
            .get("quant_method")
            .and_then(Value::as_str)
            .unwrap_or("unknown");
        return refuse(format!(
            "its weights are quantised ({method}); merge into the model that it was quantised \
             from, then quantise the result"
        ));
    }
    let is_quantised = |name: &&str| {
        [".qweight", ".qzeros", ".absmax", ".weight_packed", ".SCB"]
            .iter()
            .any(|end| name.ends_with(end))
    };
    match base.names().find(is_quantised) {
        Some(name) => refuse(format!(
            "tensor {name} is quantised; merge into the unquantised model"
        )),
        None => Ok(()),
    }
}

/// The state of a plan while adapters are added, one after the other.
pub(super) struct Planner {
    /// By name.
    pub(super) recipes: BTreeMap<String, Recipe>,
    pub(super) tied: Option<Tied>,
    pub(super) faults: Vec<(PathBuf, Fault)>,
    pub(super) warnings: Vec<String>,
    /// The adapter being added: its number, directory and weight.
    pub(super) adapter: usize,
    pub(super) dir: PathBuf,
    pub(super) weight: f32,
    pub(super) num_adapters: usize,
}

impl Planner {
    /// Starts with a copy of the base; tied embeddings are two tensors until the end.
    fn add_base(
        &mut self,
        base: &Checkpoint,
        dtype: Option<GgmlDType>,
    ) -> Result<(), WeightsError> {
        for info in base.tensors()? {
            let recipe = Recipe {
                base_dtype: info.dtype,
                origin: Origin::Base(info.name.clone()),
                deltas: Vec::new(),
                token_rows: None,
                info: TensorInfo {
                    dtype: dtype.filter(|_| is_float(info.dtype)).unwrap_or(info.dtype),
                    ..info
                },
            };
            self.recipes.insert(recipe.info.name.clone(), recipe);
        }
        self.tied = tied::find(base);
        if let Some(Tied { embedding, head }) = &self.tied
            && !self.recipes.contains_key(head)
            && let Some(recipe) = self.recipes.get(embedding)
        {
            let mut recipe = recipe.clone();
            recipe.info.name.clone_from(head);
            self.recipes.insert(head.clone(), recipe);
        }
        Ok(())
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.faults.push((self.dir.clone(), fault));
    }

    fn check_combination(&mut self, adapters: &[(Adapter, f32)], accumulate: Accumulate) {
        for (adapter, weight) in adapters {
            self.dir = adapter.dir().to_owned();
            if !weight.is_finite() {
                self.fault(Fault::Combination {
                    what: format!("the adapter's weight is {weight}"),
                    advice: "give a finite number",
                });
            }
            if adapter.config().dora && *weight != 1.0 {
                self.fault(Fault::Combination {
                    what: format!("a DoRA adapter has weight {weight}"),
                    advice: "DoRA also changes the length of rows, which a weight has no meaning \
                             for; leave the weight at 1",
                });
            }
            if adapter.config().dora && adapters.len() > 1 && accumulate == Accumulate::Fp32 {
                self.fault(Fault::Combination {
                    what: "a DoRA adapter is summed with others".to_owned(),
                    advice: "its change depends on the weights that it meets; fold the adapters \
                             in one after the other with --accumulate llamafactory",
                });
            }
        }
    }

    fn add_adapter(&mut self, adapter: &Adapter, config: &Value) -> Result<(), WeightsError> {
        for fault in adapter.faults.clone() {
            self.fault(fault);
        }
        let keys: Vec<(String, Part)> = adapter.parts.keys().cloned().collect();
        // What replaces comes first: deltas are added to it and must have its shape. A weight of
        // its own wins over the one below the adapter.
        for wanted in [
            Part::BaseWeight,
            Part::BaseBias,
            Part::SavedWeight,
            Part::SavedBias,
            Part::Weight,
            Part::Bias,
        ] {
            for (module, part) in keys.iter().filter(|(_, part)| *part == wanted) {
                self.replace(adapter, module, *part)?;
            }
        }
        for (module, part) in &keys {
            match part {
                Part::A => self.add_linear(adapter, module, config)?,
                Part::EmbeddingA => self.add_embedding(adapter, module)?,
                Part::B | Part::EmbeddingB => self.check_pair(adapter, module, *part),
                Part::BiasOfB => self.add_bias(adapter, module)?,
                Part::TokenRows => self.put_token_rows(adapter, module)?,
                Part::Magnitude => self.check_magnitude(adapter, module)?,
                Part::SavedWeight => self.check_copies(adapter, module, Part::Weight, *part)?,
                Part::SavedBias => self.check_copies(adapter, module, Part::Bias, *part)?,
                Part::BaseWeight | Part::BaseBias | Part::Weight | Part::Bias => {}
            }
        }
        self.check_targets(adapter);
        self.warn_of_no_effect();
        self.warn_of_biases(adapter);
        Ok(())
    }

    /// Returns the tensor that plays a part, which the adapter is known to have.
    pub(super) fn part(
        &self,
        adapter: &Adapter,
        module: &str,
        part: Part,
    ) -> Result<StoredTensor, WeightsError> {
        let missing = || WeightsError::MissingTensor {
            path: self.dir.clone(),
            tensor: format!("{module} ({part:?})"),
        };
        adapter.part(module, part)?.ok_or_else(missing)
    }

    /// Complains of targets that the base has and for which the file has nothing.
    fn check_targets(&mut self, adapter: &Adapter) {
        if !adapter.faults.is_empty() {
            // Tensors that could not be used may be those of the target.
            return;
        }
        let config = adapter.config();
        let targets = config.every_layer_targets.iter();
        let targets = targets.map(|target| ("target_modules", target));
        let saved = config.modules_to_save.iter();
        let saved = saved.map(|module| ("modules_to_save", module));
        for (key, target) in targets.chain(saved) {
            let tied = self.tied.as_ref();
            let in_base = (self.recipes.keys())
                .filter(|name| (name.strip_suffix(".weight")).is_some_and(|m| is_module(m, target)))
                .collect::<Vec<_>>();
            // Of two tied modules the file may have one.
            let is_there = |(module, _): &(String, Part)| {
                let is_tied_to = |name: &&String| {
                    let other = tied.and_then(|tied| tied.other(name));
                    other.and_then(|other| other.strip_suffix(".weight")) == Some(module)
                };
                is_module(module, target)
                    || key == "modules_to_save" && in_base.iter().any(is_tied_to)
            };
            if !in_base.is_empty() && !adapter.parts.keys().any(is_there) {
                self.fault(Fault::MissingTarget {
                    key,
                    target: target.clone(),
                });
            }
        }
    }

    /// Warns when a scale of 0 makes nothing of the whole adapter.
    fn warn_of_no_effect(&mut self) {
        let index = self.adapter;
        let mut deltas = (self.recipes.values().flat_map(|recipe| &recipe.deltas))
            .filter(|delta| delta.adapter == index)
            .peekable();
        if deltas.peek().is_some() && deltas.all(|delta| delta.scale * delta.weight == 0.0) {
            self.warnings.push(format!(
                "{}: every scale is 0 (lora_alpha or the adapter's weight), its low-rank pairs \
                 change nothing",
                self.dir.display()
            ));
        }
    }

    /// Warns of biases that were trained and are not in the file.
    fn warn_of_biases(&mut self, adapter: &Adapter) {
        let is_bias = |(_, part): &(String, Part)| matches!(part, Part::BaseBias | Part::Bias);
        let base_has_any = self.recipes.keys().any(|name| name.ends_with("_proj.bias"));
        if adapter.config().trains_biases && base_has_any && !adapter.parts.keys().any(is_bias) {
            self.warnings.push(format!(
                "{}: biases were trained (bias in adapter_config.json) and are not in the file, the \
                 base's are kept: PEFT before 0.21 does not save those of bias=\"lora_only\"",
                self.dir.display()
            ));
        }
    }

    /// Warns when the adapter names another base, by the last part of its path.
    fn warn_of_base(&mut self, adapter: &Adapter, base: &Checkpoint) {
        if let Some((wanted, given)) = hints::other_base(adapter, base) {
            self.warnings.push(format!(
                "{} was trained on {wanted}, the base given is {given}: its shapes fit, but if \
                 the weights differ the result is wrong",
                self.dir.display()
            ));
        }
    }
}

/// Describes a shape that differs, naming the first dimension that does.
pub(super) fn shape_fault(
    tensor: &StoredTensor,
    expected: &[usize],
    dims: [&'static str; 2],
) -> Fault {
    let differs = |dim: &usize| tensor.shape.get(*dim) != expected.get(*dim);
    let dim = match (0..2).find(differs) {
        Some(dim) if tensor.shape.len() == expected.len() => dims[dim],
        _ => "count",
    };
    Fault::Shape {
        tensor: tensor.name.clone(),
        expected: expected.to_vec(),
        found: tensor.shape.clone(),
        dim,
    }
}
