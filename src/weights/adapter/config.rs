//! `adapter_config.json` of a PEFT adapter: what is read, what is refused, and the scaling.
//!
//! Semantics are those of PEFT's `LoraConfig`. Whatever changes a merge and is not built here is
//! refused by name, because a key that is skipped in silence gives a model that is subtly wrong.

use std::collections::BTreeMap;

use fancy_regex::Regex;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::faults::Fault;

/// The keys of `adapter_config.json` that a merge or a training looks at.
#[derive(Debug, Clone)]
struct RawConfig {
    peft_type: Option<String>,
    base_model_name_or_path: Option<String>,
    r: Option<Value>,
    lora_alpha: Option<f64>,
    lora_dropout: Option<f64>,
    use_rslora: Option<bool>,
    use_dora: Option<bool>,
    fan_in_fan_out: Option<bool>,
    bias: Option<String>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
    modules_to_save: Option<Vec<String>>,
    trainable_token_indices: Option<TokenIndices>,
    target_modules: Option<Value>,
    layers_to_transform: Option<Value>,
    exclude_modules: Option<Value>,
    init_lora_weights: Option<Value>,
    other: Map<String, Value>,
}

impl RawConfig {
    /// Sorts the content of the file into keys.
    fn from_json(json: Value) -> Result<Self, Fault> {
        let Value::Object(mut other) = json else {
            return Err(Fault::Config {
                key: "its content".to_owned(),
                reason: "must be an object".to_owned(),
            });
        };
        let keys = &mut other;
        Ok(Self {
            peft_type: take(keys, "peft_type")?,
            base_model_name_or_path: take(keys, "base_model_name_or_path")?,
            r: take(keys, "r")?,
            lora_alpha: take(keys, "lora_alpha")?,
            lora_dropout: take(keys, "lora_dropout")?,
            use_rslora: take(keys, "use_rslora")?,
            use_dora: take(keys, "use_dora")?,
            fan_in_fan_out: take(keys, "fan_in_fan_out")?,
            bias: take(keys, "bias")?,
            rank_pattern: take(keys, "rank_pattern")?,
            alpha_pattern: take(keys, "alpha_pattern")?,
            modules_to_save: take(keys, "modules_to_save")?,
            trainable_token_indices: take(keys, "trainable_token_indices")?,
            target_modules: take(keys, "target_modules")?,
            layers_to_transform: take(keys, "layers_to_transform")?,
            exclude_modules: take(keys, "exclude_modules")?,
            init_lora_weights: take(keys, "init_lora_weights")?,
            other,
        })
    }
}

/// Takes the value of a key out; `None` if it is missing or null.
fn take<T: DeserializeOwned>(keys: &mut Map<String, Value>, key: &str) -> Result<Option<T>, Fault> {
    let value = keys.remove(key).unwrap_or_default();
    serde_json::from_value(value).map_err(|error| Fault::Config {
        key: key.to_owned(),
        reason: format!("cannot be read: {error}"),
    })
}

/// `trainable_token_indices`: a list means the input embedding.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum TokenIndices {
    Embedding(Vec<usize>),
    ByModule(BTreeMap<String, Vec<usize>>),
}

/// A checked `adapter_config.json`.
#[derive(Debug, Clone)]
pub struct AdapterConfig {
    base_model: Option<String>,
    rank: usize,
    alpha: f64,
    dropout: f64,
    rslora: bool,
    pub(super) dora: bool,
    pub(super) fan_in_fan_out: bool,
    /// Whether training changed biases of the base.
    pub(super) trains_biases: bool,
    rank_pattern: Vec<Pattern>,
    alpha_pattern: Vec<Pattern>,
    pub(super) modules_to_save: Vec<String>,
    token_indices: BTreeMap<String, Vec<usize>>,
    /// The list form of `target_modules`, when every layer is meant.
    pub(super) every_layer_targets: Vec<String>,
}

/// One entry of `rank_pattern` or `alpha_pattern`.
#[derive(Debug, Clone)]
struct Pattern {
    key: String,
    regex: Regex,
    value: f64,
}

impl Pattern {
    /// Compiles PEFT's rule: Python's `re.match(rf"(.*\.)?({key})$", module)`.
    fn compile(key: &str, value: &Value) -> Result<Self, Fault> {
        let invalid = |reason: String| Fault::Config {
            key: format!("rank_pattern/alpha_pattern entry {key:?}"),
            reason,
        };
        let value = value
            .as_f64()
            .ok_or_else(|| invalid(format!("must be a number, found {value}")))?;
        let regex = Regex::new(&format!(r"^(.*\.)?({key})$"))
            .map_err(|error| invalid(format!("is not a regular expression: {error}")))?;
        Ok(Self {
            key: key.to_owned(),
            regex,
            value,
        })
    }

    fn compile_all(patterns: Option<Map<String, Value>>) -> Result<Vec<Self>, Fault> {
        (patterns.unwrap_or_default().iter())
            .map(|(key, value)| Self::compile(key, value))
            .collect()
    }

    fn matches(&self, module: &str) -> bool {
        // A pattern that backtracks without end matches nothing that it was written for.
        self.regex.is_match(module).unwrap_or(false)
    }
}

impl AdapterConfig {
    /// Reads the content of `adapter_config.json`.
    ///
    /// # Errors
    /// The faults: keys of a wrong type, and every feature that cannot be merged.
    pub(super) fn from_json(json: Value) -> Result<Self, Vec<Fault>> {
        let raw = RawConfig::from_json(json).map_err(|fault| vec![fault])?;
        let refused = refusals(&raw);
        if !refused.is_empty() {
            return Err(refused);
        }
        Self::from_raw(raw).map_err(|fault| vec![fault])
    }

    fn from_raw(raw: RawConfig) -> Result<Self, Fault> {
        let rank = match &raw.r {
            None => 8,
            Some(value) => (value.as_u64())
                .and_then(|rank| usize::try_from(rank).ok())
                .filter(|rank| *rank > 0)
                .ok_or_else(|| Fault::Config {
                    key: "r".to_owned(),
                    reason: format!("must be a whole number above 0, found {value}"),
                })?,
        };
        let is_unset = |value: &Option<Value>| value.as_ref().is_none_or(is_off);
        let whole = is_unset(&raw.layers_to_transform) && is_unset(&raw.exclude_modules);
        let targets = match raw.target_modules {
            Some(Value::Array(targets)) if whole => targets,
            _ => Vec::new(),
        };
        Ok(Self {
            base_model: raw.base_model_name_or_path.filter(|base| !base.is_empty()),
            rank,
            alpha: raw.lora_alpha.unwrap_or(8.0),
            dropout: raw.lora_dropout.unwrap_or(0.0),
            rslora: raw.use_rslora.unwrap_or(false),
            dora: raw.use_dora.unwrap_or(false),
            fan_in_fan_out: raw.fan_in_fan_out.unwrap_or(false),
            trains_biases: raw.bias.is_some_and(|bias| bias != "none"),
            rank_pattern: Pattern::compile_all(raw.rank_pattern)?,
            alpha_pattern: Pattern::compile_all(raw.alpha_pattern)?,
            modules_to_save: raw.modules_to_save.unwrap_or_default(),
            token_indices: match raw.trainable_token_indices {
                None => BTreeMap::new(),
                Some(TokenIndices::ByModule(indices)) => indices,
                Some(TokenIndices::Embedding(indices)) => {
                    BTreeMap::from([("embed_tokens".to_owned(), indices)])
                }
            },
            every_layer_targets: (targets.iter())
                .filter_map(|target| target.as_str().map(str::to_owned))
                .collect(),
        })
    }

    /// Returns `base_model_name_or_path`: the model that the adapter was trained on.
    pub fn base_model(&self) -> Option<&str> {
        self.base_model.as_deref()
    }

    /// Returns `lora_alpha`, without the patterns.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// Returns `r`, without the patterns.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns `lora_dropout`, 0 where it is not given.
    pub fn dropout(&self) -> f64 {
        self.dropout
    }

    /// Returns `use_rslora`.
    pub fn use_rslora(&self) -> bool {
        self.rslora
    }

    /// Returns `use_dora`.
    pub fn use_dora(&self) -> bool {
        self.dora
    }

    /// Returns `modules_to_save`.
    pub fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    /// Returns `target_modules` where it is a list that holds for every layer, else nothing.
    pub fn every_layer_targets(&self) -> &[String] {
        &self.every_layer_targets
    }

    /// Returns the keys that make the adapter more than one rank and alpha on a list of modules
    /// in every layer, with modules that are saved whole.
    pub fn keys_beyond_plain_lora(&self) -> Vec<&'static str> {
        let keys = [
            ("rank_pattern", !self.rank_pattern.is_empty()),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
            ("bias", self.trains_biases),
            ("trainable_token_indices", !self.token_indices.is_empty()),
            (
                "target_modules, which is no list for every layer,",
                self.every_layer_targets.is_empty(),
            ),
        ];
        let used = keys.into_iter().filter(|(_, is_used)| *is_used);
        used.map(|(key, _)| key).collect()
    }

    /// Returns the rank that the configuration gives to a module.
    pub fn rank_of(&self, module: &str) -> usize {
        // PEFT writes whole numbers; anything else is found when it is compared with A.
        first_match(&self.rank_pattern, module).map_or(self.rank, |value| value as usize)
    }

    /// Returns the factor of `B·A` for a module whose `A` has `rank` rows.
    ///
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rank stabilisation (rsLoRA,
    /// arXiv:2312.03732). This is the only place of the program with this formula.
    pub fn scaling(&self, module: &str, rank: usize) -> f64 {
        let alpha = first_match(&self.alpha_pattern, module).unwrap_or(self.alpha);
        let rank = rank as f64;
        alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Returns whether PEFT versions before 0.14 would give another alpha to the module.
    ///
    /// They looked up rank and alpha by one key, the first of both patterns that matches.
    pub(super) fn is_ambiguous(&self, module: &str) -> bool {
        let of = |patterns: &[Pattern]| patterns.iter().position(|entry| entry.matches(module));
        match (of(&self.rank_pattern), of(&self.alpha_pattern)) {
            (Some(rank), Some(alpha)) => {
                self.rank_pattern[rank].key != self.alpha_pattern[alpha].key
            }
            _ => false,
        }
    }

    /// Returns whether `modules_to_save` names the module.
    pub(super) fn saves_module(&self, module: &str) -> bool {
        (self.modules_to_save.iter()).any(|saved| is_module(module, saved))
    }

    /// Returns the token ids whose rows of a module were trained.
    pub(super) fn token_indices_of(&self, module: &str) -> Option<&[usize]> {
        (self.token_indices.iter())
            .find(|(name, _)| is_module(module, name))
            .map(|(_, indices)| indices.as_slice())
    }
}

fn first_match(patterns: &[Pattern], module: &str) -> Option<f64> {
    (patterns.iter())
        .find(|entry| entry.matches(module))
        .map(|entry| entry.value)
}

/// Returns whether `name` means `module`: the whole path or its last parts.
pub(super) fn is_module(module: &str, name: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Keys of other kinds of adapters, each with what it is; harmless while null, false or empty.
const OTHER_KINDS: &[(&str, &str)] = &[
    (
        "layer_replication",
        "layer replication (another layer count)",
    ),
    ("use_bdlora", "block-diagonal LoRA"),
    ("bdlora_config", "block-diagonal LoRA"),
    (
        "alora_invocation_tokens",
        "activated LoRA (it depends on the prompt)",
    ),
    ("arrow_config", "Arrow routing (it depends on the prompt)"),
    ("use_qalora", "QALoRA"),
    ("target_parameters", "LoRA on parameters of expert layers"),
    ("use_kasa", "KaSA"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("use_monteclora", "MonteCLoRA"),
    ("velora_config", "VeLoRA"),
    ("use_velora", "VeLoRA"),
];

/// Ways of initialisation that change the base weights when PEFT loads the adapter.
const MUTATING_INITS: &[&str] = &["pissa", "olora", "corda", "lora_ga", "loftq"];

fn refusals(raw: &RawConfig) -> Vec<Fault> {
    let mut faults = Vec::new();
    let peft_type = raw.peft_type.as_deref().unwrap_or("LORA");
    if peft_type != "LORA" {
        faults.push(Fault::Refused {
            what: format!("peft_type {peft_type}"),
            advice: "only LORA adapters are folded in; merge this one with PEFT's \
                     merge_and_unload",
        });
    }
    if let Some(Value::String(init)) = &raw.init_lora_weights {
        let init = init.to_ascii_lowercase();
        if MUTATING_INITS.iter().any(|kind| init.starts_with(kind)) {
            faults.push(Fault::Refused {
                what: format!("init_lora_weights {init:?}, which changes the base at load time"),
                advice: "convert it to a plain LoRA first: LLaMA-Factory writes one to \
                         pissa_converted/, PEFT with save_pretrained(..., \
                         path_initial_model_for_weight_conversion=...)",
            });
        }
    }
    for (key, what) in OTHER_KINDS {
        if raw.other.get(*key).is_some_and(|value| !is_off(value)) {
            faults.push(Fault::Refused {
                what: format!("{key}: {what}"),
                advice: "it cannot be added to the weights of a plain model; merge it with the \
                         version of PEFT that trained it",
            });
        }
    }
    faults
}

/// Returns whether a value stands for "not used".
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(json: Value) -> AdapterConfig {
        AdapterConfig::from_json(json).unwrap()
    }

    #[test]
    fn scaling_is_alpha_over_rank_or_over_its_root() {
        let plain = config(json!({"peft_type": "LORA", "r": 16, "lora_alpha": 8}));
        assert_eq!(plain.scaling("model.layers.0.mlp.up_proj", 16), 0.5);
        let stable = config(json!({"r": 16, "lora_alpha": 8, "use_rslora": true}));
        assert_eq!(stable.scaling("q_proj", 16), 2.0);
    }

    #[test]
    fn patterns_match_as_python_does_and_the_first_wins() {
        let config = config(json!({
            "r": 8, "lora_alpha": 16,
            "rank_pattern": {r"layers\.1\..*q_proj": 4, "q_proj": 2, "^model.layers.0.mlp.up_proj": 32},
            "alpha_pattern": {"k_proj|v_proj": 3.5},
        }));
        assert_eq!(config.rank_of("model.layers.1.self_attn.q_proj"), 4);
        assert_eq!(config.rank_of("model.layers.0.self_attn.q_proj"), 2);
        assert_eq!(config.rank_of("model.layers.0.mlp.up_proj"), 32);
        assert_eq!(config.rank_of("model.layers.0.self_attn.xq_proj"), 8);
        assert_eq!(
            config.scaling("model.layers.0.self_attn.v_proj", 8),
            3.5 / 8.0
        );
        assert_eq!(config.scaling("model.layers.0.self_attn.o_proj", 8), 2.0);
    }

    #[test]
    fn kinds_that_do_not_add_to_the_base_are_refused_by_name() {
        for (key, value) in [
            ("peft_type", json!("IA3")),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("init_lora_weights", json!("olora")),
            ("layer_replication", json!([[0, 4]])),
            ("alora_invocation_tokens", json!([1])),
        ] {
            let faults = AdapterConfig::from_json(json!({key: value, "r": 8})).unwrap_err();
            let text = faults[0].to_string();
            let shown = value.as_str().unwrap_or(key);
            assert!(text.contains(shown), "{text}");
        }
        for plain in [
            json!(true),
            json!("gaussian"),
            json!("eva"),
            json!("orthogonal"),
        ] {
            config(
                json!({"init_lora_weights": plain, "layer_replication": null, "loftq_config": {}}),
            );
        }
    }

    #[test]
    fn a_key_of_the_wrong_type_is_named() {
        for (key, wrong) in [
            ("lora_alpha", json!("16")),
            ("use_dora", json!(1)),
            ("modules_to_save", json!("lm_head")),
            ("trainable_token_indices", json!({"embed_tokens": -1})),
        ] {
            let faults = AdapterConfig::from_json(json!({key: wrong, "r": 8})).unwrap_err();
            let text = faults[0].to_string();
            let wanted = format!("adapter_config.json: {key} cannot be read");
            assert!(text.starts_with(&wanted), "{text}");
        }
        let faults = AdapterConfig::from_json(json!([])).unwrap_err();
        assert!(faults[0].to_string().contains("must be an object"));
    }

    #[test]
    fn a_rank_that_is_no_number_is_a_fault() {
        for wrong in [json!(0), json!(-1), json!("8"), json!(1.5)] {
            assert!(AdapterConfig::from_json(json!({"r": wrong})).is_err());
        }
    }
}
