//! Which tensor of the base takes what from which adapter, by headers alone.
//!
//! Every tensor of every adapter is used exactly once or becomes a [`Fault`]; all faults are
//! gathered, so that one run tells everything that is wrong.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
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
    merged::{Accumulate, Delta, Layout, MergeOptions, MergedCheckpoint, Origin, Recipe},
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
    };
    merged.index_recipes();
    Ok(merged)
}

impl MergedCheckpoint {
    /// Finds recipes by name again after their list changed.
    pub(super) fn index_recipes(&mut self) {
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
            "it is a GGUF file; give the Hugging Face directory that it was made from".to_owned(),
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
struct Planner {
    /// By name.
    recipes: BTreeMap<String, Recipe>,
    tied: Option<Tied>,
    faults: Vec<(PathBuf, Fault)>,
    warnings: Vec<String>,
    /// The adapter being added: its number, directory and weight.
    adapter: usize,
    dir: PathBuf,
    weight: f32,
    num_adapters: usize,
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

    fn fault(&mut self, fault: Fault) {
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
        Ok(())
    }

    /// Returns the tensor that plays a part, which the adapter is known to have.
    fn part(
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

    /// Puts a tensor of the adapter in the place of the base's.
    fn replace(&mut self, adapter: &Adapter, module: &str, part: Part) -> Result<(), WeightsError> {
        let tensor = self.part(adapter, module, part)?;
        let leaf = match part {
            Part::BaseWeight | Part::SavedWeight | Part::Weight => "weight",
            _ => "bias",
        };
        let name = format!("{module}.{leaf}");
        let Some(recipe) = self.recipes.get(&name) else {
            self.fault(Fault::Unmatched {
                tensor: tensor.name,
            });
            return Ok(());
        };
        // A vocabulary may have grown in training.
        let resizable = self.is_vocabulary(&name) && tensor.shape.len() == 2;
        let fits = tensor.shape == recipe.info.shape
            || resizable && tensor.shape[1] == recipe.info.shape[1];
        if !fits {
            self.fault(shape_fault(&tensor, &recipe.info.shape, ["out", "in"]));
            return Ok(());
        }
        let is_base = matches!(part, Part::BaseWeight | Part::BaseBias);
        let is_own = !is_base && adapter.config().saves_module(module);
        let mut names = vec![name.clone()];
        if let (Some(tied), false) = (&self.tied, is_own) {
            // Below the adapter the two are one tensor, unless the file has both.
            let other = tied.other(&name);
            let has_other = |other: &str| {
                let module = other.trim_end_matches(".weight");
                [Part::BaseWeight, Part::Weight]
                    .iter()
                    .any(|part| adapter.parts.contains_key(&(module.to_owned(), *part)))
            };
            names.extend(other.filter(|other| !has_other(other)).map(str::to_owned));
        }
        for name in names {
            self.set_origin(&name, adapter, module, part, &tensor);
        }
        Ok(())
    }

    /// PEFT writes some replacements twice; that is one replacement only if they are equal.
    fn check_copies(
        &mut self,
        adapter: &Adapter,
        module: &str,
        first: Part,
        second: Part,
    ) -> Result<(), WeightsError> {
        let Some(first) = adapter.part(module, first)? else {
            return Ok(());
        };
        let second = self.part(adapter, module, second)?;
        if (first.dtype, &first.shape, &first.data) != (second.dtype, &second.shape, &second.data) {
            self.fault(Fault::ReplacedTwice {
                tensor: module.to_owned(),
                first: first.name,
                second: second.name,
            });
        }
        Ok(())
    }

    fn set_origin(
        &mut self,
        name: &str,
        adapter: &Adapter,
        module: &str,
        part: Part,
        tensor: &StoredTensor,
    ) {
        let Some(recipe) = self.recipes.get_mut(name) else {
            return;
        };
        let first = match &recipe.origin {
            Origin::Adapter { adapter: first, .. } if *first != self.adapter => Some(*first),
            _ => None,
        };
        recipe.origin = Origin::Adapter {
            adapter: self.adapter,
            module: module.to_owned(),
            part,
        };
        recipe.info.shape.clone_from(&tensor.shape);
        if let Some(first) = first {
            let second = format!("{} of {}", tensor.name, adapter.dir().display());
            self.fault(Fault::ReplacedTwice {
                tensor: name.to_owned(),
                first: format!("adapter {} of the list", first + 1),
                second,
            });
        } else if self.weight != 1.0 && !matches!(part, Part::BaseWeight | Part::BaseBias) {
            self.fault(Fault::Combination {
                what: format!(
                    "{} replaces a tensor, and the adapter's weight is {}",
                    tensor.name, self.weight
                ),
                advice: "a replacement cannot be weighted; leave the weight at 1",
            });
        }
    }

    fn is_vocabulary(&self, name: &str) -> bool {
        name == "lm_head.weight"
            || tied::is_embedding(name)
            || self
                .tied
                .as_ref()
                .is_some_and(|tied| tied.other(name).is_some())
    }

    fn add_linear(
        &mut self,
        adapter: &Adapter,
        module: &str,
        config: &Value,
    ) -> Result<(), WeightsError> {
        let a = self.part(adapter, module, Part::A)?;
        let Some(b) = adapter.part(module, Part::B)? else {
            self.fault(Fault::Unpaired {
                module: module.to_owned(),
                found: "lora_A",
                missing: "lora_B",
            });
            return Ok(());
        };
        let name = format!("{module}.weight");
        let Some(recipe) = self.recipes.get(&name) else {
            self.fault(Fault::Unmatched { tensor: a.name });
            self.fault(Fault::Unmatched { tensor: b.name });
            return Ok(());
        };
        let shape = recipe.info.shape.clone();
        let transposed = adapter.config().fan_in_fan_out
            && shape.len() == 2
            && (shape[0] != shape[1] && a.shape[1..] == shape[..1] || is_conv1d(config));
        let (out, input) = match shape[..] {
            [rows, cols] if transposed => (cols, rows),
            [rows, cols] => (rows, cols),
            _ => {
                self.fault(shape_fault(&a, &shape, ["rank", "in"]));
                return Ok(());
            }
        };
        if self.check_rank(adapter, module, &a, &b, input, out) {
            let layout = if transposed {
                Layout::Transposed
            } else {
                Layout::Linear
            };
            self.add_delta(adapter, &name, module, layout, a.shape[0]);
        }
        Ok(())
    }

    fn add_embedding(&mut self, adapter: &Adapter, module: &str) -> Result<(), WeightsError> {
        let a = self.part(adapter, module, Part::EmbeddingA)?;
        let Some(b) = adapter.part(module, Part::EmbeddingB)? else {
            self.fault(Fault::Unpaired {
                module: module.to_owned(),
                found: "lora_embedding_A",
                missing: "lora_embedding_B",
            });
            return Ok(());
        };
        let name = format!("{module}.weight");
        match self.recipes.get(&name).map(|recipe| &recipe.info.shape[..]) {
            Some(&[vocabulary, hidden]) => {
                if self.check_rank(adapter, module, &a, &b, vocabulary, hidden) {
                    self.add_delta(adapter, &name, module, Layout::Embedding, a.shape[0]);
                }
            }
            _ => {
                self.fault(Fault::Unmatched { tensor: a.name });
                self.fault(Fault::Unmatched { tensor: b.name });
            }
        }
        Ok(())
    }

    /// Checks `A` `[r, input]` and `B` `[out, r]` against the base and the configuration.
    fn check_rank(
        &mut self,
        adapter: &Adapter,
        module: &str,
        a: &StoredTensor,
        b: &StoredTensor,
        input: usize,
        out: usize,
    ) -> bool {
        let rank = adapter.config().rank_of(module);
        let before = self.faults.len();
        let [a_rank, b_rank] = [(a, 0), (b, 1)].map(|(tensor, dim)| tensor.shape.get(dim).copied());
        match (&a.shape[..], &b.shape[..]) {
            ([_, found_in], [found_out, _]) => {
                if *found_in != input {
                    self.fault(shape_fault(a, &[rank, input], ["rank", "in"]));
                }
                if *found_out != out {
                    self.fault(shape_fault(b, &[out, rank], ["out", "rank"]));
                }
            }
            _ => self.fault(shape_fault(a, &[rank, input], ["rank", "in"])),
        }
        if a_rank != Some(rank) || b_rank != Some(rank) {
            self.fault(Fault::Rank {
                module: module.to_owned(),
                a: a_rank.unwrap_or(0),
                b: b_rank.unwrap_or(0),
                config: rank,
            });
        }
        self.faults.len() == before
    }

    fn add_delta(
        &mut self,
        adapter: &Adapter,
        name: &str,
        module: &str,
        layout: Layout,
        rank: usize,
    ) {
        let config = adapter.config();
        if config.is_ambiguous(module) {
            self.warnings.push(format!(
                "{module}: rank_pattern and alpha_pattern match it by different keys, PEFT before \
                 0.14 would have used lora_alpha instead of the pattern"
            ));
        }
        // PyTorch multiplies by the scaling as a double, rounded to f32 first.
        let scale = config.scaling(module, rank) as f32 * self.weight;
        if config.dora
            && layout != Layout::Bias
            && !adapter
                .parts
                .contains_key(&(module.to_owned(), Part::Magnitude))
        {
            self.fault(Fault::Unpaired {
                module: module.to_owned(),
                found: "a DoRA pair (use_dora is true)",
                missing: "lora_magnitude_vector",
            });
        }
        let delta = Delta {
            adapter: self.adapter,
            module: module.to_owned(),
            layout,
            scale,
            column_factors: None,
        };
        if let Some(recipe) = self.recipes.get_mut(name) {
            recipe.deltas.push(delta);
        }
    }

    /// Complains of a `B` that has no `A`.
    fn check_pair(&mut self, adapter: &Adapter, module: &str, part: Part) {
        let (wanted, found, missing) = match part {
            Part::B => (Part::A, "lora_B", "lora_A"),
            _ => (Part::EmbeddingA, "lora_embedding_B", "lora_embedding_A"),
        };
        if !adapter.parts.contains_key(&(module.to_owned(), wanted)) {
            self.fault(Fault::Unpaired {
                module: module.to_owned(),
                found,
                missing,
            });
        }
    }

    /// Adds what `lora_bias` trained to the base's bias.
    fn add_bias(&mut self, adapter: &Adapter, module: &str) -> Result<(), WeightsError> {
        let bias = self.part(adapter, module, Part::BiasOfB)?;
        let name = format!("{module}.bias");
        match self
            .recipes
            .get(&name)
            .map(|recipe| recipe.info.shape.clone())
        {
            None => self.fault(Fault::Refused {
                what: format!("{} (lora_bias): the base layer has no bias, it", bias.name),
                advice: "train without lora_bias, or on a base with biases",
            }),
            Some(shape) if shape != bias.shape => {
                self.fault(shape_fault(&bias, &shape, ["out", ""]))
            }
            Some(_) => {
                let rank = adapter.part(module, Part::A)?.map_or(1, |a| a.shape[0]);
                self.add_delta(adapter, &name, module, Layout::Bias, rank);
            }
        }
        Ok(())
    }

    fn check_magnitude(&mut self, adapter: &Adapter, module: &str) -> Result<(), WeightsError> {
        let magnitude = self.part(adapter, module, Part::Magnitude)?;
        let has = |part| adapter.parts.contains_key(&(module.to_owned(), part));
        let is_embedding = has(Part::EmbeddingA);
        if is_embedding && self.num_adapters > 1 {
            self.fault(Fault::Combination {
                what: format!(
                    "{}: DoRA on an embedding beside other adapters",
                    magnitude.name
                ),
                advice: "merge this adapter first, alone, then the others into the result",
            });
            return Ok(());
        }
        if !(has(Part::A) || is_embedding) || !adapter.config().dora {
            self.fault(Fault::Unpaired {
                module: module.to_owned(),
                found: "lora_magnitude_vector",
                missing: "lora_A and use_dora in adapter_config.json",
            });
            return Ok(());
        }
        let recipe = self.recipes.get(&format!("{module}.weight"));
        let transposed = recipe.is_some_and(|recipe| {
            (recipe.deltas.iter()).any(|delta| delta.layout == Layout::Transposed)
        });
        let shape = recipe.map(|recipe| recipe.info.shape.clone());
        if transposed {
            self.fault(Fault::Refused {
                what: format!(
                    "{}: DoRA on a transposed weight (fan_in_fan_out)",
                    magnitude.name
                ),
                advice: "merge it with PEFT's merge_and_unload",
            });
        } else if let Some([rows, cols]) = shape.as_deref() {
            // Of an embedding, whose rows are tokens, PEFT measures the columns.
            let expected = if is_embedding { cols } else { rows };
            if magnitude.shape.iter().product::<usize>() != *expected {
                self.fault(shape_fault(&magnitude, &[*expected], ["out", ""]));
            }
        }
        Ok(())
    }

    /// Has rows of an embedding replaced; of a tied one, in the head too.
    fn put_token_rows(&mut self, adapter: &Adapter, module: &str) -> Result<(), WeightsError> {
        let rows = self.part(adapter, module, Part::TokenRows)?;
        let name = format!("{module}.weight");
        let Some(shape) = self
            .recipes
            .get(&name)
            .map(|recipe| recipe.info.shape.clone())
        else {
            self.fault(Fault::Unmatched { tensor: rows.name });
            return Ok(());
        };
        let indices = adapter
            .config()
            .token_indices_of(module)
            .unwrap_or_default();
        let expected = [indices.len(), shape.get(1).copied().unwrap_or(0)];
        if rows.shape != expected {
            self.fault(shape_fault(
                &rows,
                &expected,
                ["tokens in trainable_token_indices", "hidden"],
            ));
            return Ok(());
        }
        if let Some(index) = indices.iter().find(|index| **index >= shape[0]) {
            self.fault(Fault::Config {
                key: "trainable_token_indices".to_owned(),
                reason: format!("has token {index}, {name} has {} rows", shape[0]),
            });
            return Ok(());
        }
        let mut names = vec![name.clone()];
        names.extend(
            self.tied
                .as_ref()
                .and_then(|tied| tied.other(&name))
                .map(str::to_owned),
        );
        for name in names {
            let Some(recipe) = self.recipes.get_mut(&name) else {
                continue;
            };
            // A head with rows of its own keeps them.
            let is_own = name == format!("{module}.weight");
            let first = recipe.token_rows.as_ref().map(|(adapter, _)| *adapter);
            if is_own || first.is_none() {
                recipe.token_rows = Some((self.adapter, module.to_owned()));
            }
            if let Some(first) = first.filter(|first| *first != self.adapter) {
                self.fault(Fault::ReplacedTwice {
                    tensor: name,
                    first: format!("the token rows of adapter {} of the list", first + 1),
                    second: rows.name.clone(),
                });
            }
        }
        Ok(())
    }

    /// Complains of targets that the base has and for which the file has nothing.
    fn check_targets(&mut self, adapter: &Adapter) {
        if !adapter.faults.is_empty() {
            // Tensors that could not be used may be those of the target.
            return;
        }
        for target in &adapter.config().every_layer_targets {
            let in_base = (self.recipes.keys())
                .filter_map(|name| name.strip_suffix(".weight"))
                .any(|module| is_module(module, target));
            let in_file = (adapter.parts.keys()).any(|(module, _)| is_module(module, target));
            if in_base && !in_file {
                self.fault(Fault::MissingTarget {
                    target: target.clone(),
                });
            }
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

/// Returns whether the linears of a family store their weights as `[in, out]`.
fn is_conv1d(config: &Value) -> bool {
    let model_type = config.get("model_type").and_then(Value::as_str);
    matches!(
        model_type,
        Some("gpt2" | "openai-gpt" | "imagegpt" | "decision_transformer")
    )
}

/// Describes a shape that differs, naming the first dimension that does.
fn shape_fault(tensor: &StoredTensor, expected: &[usize], dims: [&'static str; 2]) -> Fault {
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
