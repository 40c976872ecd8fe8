//! What PEFT merges, bit for bit (`scripts/make_adapter_fixtures.py`), and what must be refused.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::*;
use crate::weights::{Checkpoint, ShardPlan, StoredTensor, TensorSource, WeightsError, hex};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn cases() -> Vec<Value> {
    let text = std::fs::read(fixtures().join("adapters/cases.json")).unwrap();
    let json: Value = serde_json::from_slice(&text).unwrap();
    json["cases"].as_array().unwrap().clone()
}

fn base_of(case: &Value) -> Checkpoint {
    let name = case["base"].as_str().unwrap();
    let own = fixtures().join("adapters/bases").join(name);
    let path = if own.exists() {
        own
    } else {
        fixtures().join(name)
    };
    Checkpoint::open(&path).unwrap()
}

fn plan_of(case: &Value) -> Result<MergedCheckpoint, WeightsError> {
    let adapters = case["adapters"].as_array().unwrap();
    let adapters = adapters.iter().map(|adapter| {
        let dir = fixtures()
            .join("adapters")
            .join(adapter["dir"].as_str().unwrap());
        let weight = adapter["weight"].as_f64().unwrap() as f32;
        Ok::<_, WeightsError>((Adapter::open(&dir, None)?, weight))
    });
    let accumulate = match case["accumulate"].as_str() {
        Some("llamafactory") => Accumulate::LlamaFactory,
        _ => Accumulate::Fp32,
    };
    let options = MergeOptions {
        accumulate,
        dtype: None,
    };
    MergedCheckpoint::plan(
        Arc::new(base_of(case)),
        adapters.collect::<Result<_, _>>()?,
        options,
    )
}

fn all_tensors(source: &dyn TensorSource) -> BTreeMap<String, StoredTensor> {
    (source.tensors().unwrap().iter())
        .map(|info| (info.name.clone(), source.tensor(&info.name).unwrap()))
        .collect()
}

#[test]
fn merged_weights_are_bit_equal_to_those_of_peft() {
    let mut merged = 0;
    for case in cases().iter().filter(|case| case["expect"] == "merged") {
        let name = case["case"].as_str().unwrap();
        let plan = plan_of(case).unwrap_or_else(|error| panic!("{name}: {error}"));
        let tensors = all_tensors(&plan);
        assert_eq!(tensors.len() as u64, case["num_tensors"], "{name}");
        let base = all_tensors(&base_of(case));
        let golden = case["tensors"].as_object().unwrap();
        for (tensor_name, tensor) in &tensors {
            let Some(golden) = golden.get(tensor_name) else {
                assert_eq!(tensor.data, base[tensor_name].data, "{name}: {tensor_name}");
                continue;
            };
            assert_eq!(
                serde_json::json!(tensor.shape),
                golden["shape"],
                "{name}: {tensor_name}"
            );
            let sha256 = hex(&Sha256::digest(&tensor.data));
            assert_eq!(sha256, golden["sha256"], "{name}: {tensor_name}");
        }
        let size: usize = tensors.values().map(|tensor| tensor.data.len()).sum();
        assert_eq!(size as u64, case["total_size"], "{name}");
        let changes = case["config_changes"].as_object().unwrap();
        let found: BTreeMap<_, _> = plan.config_changes().iter().cloned().collect();
        let wanted: BTreeMap<_, _> = changes.clone().into_iter().collect();
        assert_eq!(found, wanted, "{name}");
        merged += 1;
    }
    assert!(merged > 50);
}

#[test]
fn modules_saved_whole_that_are_not_in_the_file_are_a_fault() {
    let dir = tempfile::tempdir().unwrap();
    let from = fixtures().join("adapters/all_linear_f32/adapter");
    std::fs::copy(from.join(TENSORS_FILE), dir.path().join(TENSORS_FILE)).unwrap();
    let text = std::fs::read(from.join(CONFIG_FILE)).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    let case = cases()
        .into_iter()
        .find(|case| case["case"] == "all_linear_f32");
    let base = base_of(&case.unwrap());
    let base = Arc::new(base);
    for (modules, fault) in [
        (serde_json::json!(["norm"]), true),
        // Which the base does not have.
        (serde_json::json!(["score"]), false),
        (Value::Null, false),
    ] {
        config["modules_to_save"] = modules.clone();
        std::fs::write(dir.path().join(CONFIG_FILE), config.to_string()).unwrap();
        let adapter = Adapter::open(dir.path(), None).unwrap();
        let options = MergeOptions {
            accumulate: Accumulate::Fp32,
            dtype: None,
        };
        let plan = MergedCheckpoint::plan(Arc::clone(&base), vec![(adapter, 1.0)], options);
        let told = plan
            .err()
            .map_or_else(String::new, |error| error.to_string());
        let wanted = "modules_to_save names \"norm\", the file has no tensor for it";
        assert_eq!(told.contains(wanted), fault, "{modules}: {told}");
    }
}

#[test]
fn a_replacement_overwrites_what_earlier_adapters_trained() {
    const HEAD: &str = "lm_head.weight";
    const EMBEDDING: &str = "model.embed_tokens.weight";
    let plan_in_row = |base: &str, adapters: &[&str], accumulate: &str| {
        let adapters = adapters
            .iter()
            .map(|name| serde_json::json!({"dir": format!("{name}/adapter"), "weight": 1.0}));
        plan_of(&serde_json::json!({
            "base": base, "adapters": adapters.collect::<Vec<_>>(), "accumulate": accumulate,
        }))
        .unwrap()
    };
    for (base, earlier, replacing, name) in [
        // The replacement has more rows than the earlier delta.
        (
            "tiny-llama",
            "lm_head_lora_untied",
            "resized_vocab_modules_to_save_untied",
            HEAD,
        ),
        (
            "tiny-qwen2-untied",
            "embedding_lora_untied",
            "modules_to_save_both_untied",
            EMBEDDING,
        ),
        (
            "tiny-qwen2-untied",
            "newer_trainable_tokens_untied",
            "modules_to_save_both_untied",
            EMBEDDING,
        ),
    ] {
        for accumulate in ["fp32", "llamafactory"] {
            let alone = plan_in_row(base, &[replacing], accumulate);
            let row = plan_in_row(base, &[earlier, replacing], accumulate);
            let wanted = alone.tensor(name).unwrap();
            let found = row.tensor(name).unwrap();
            assert_eq!(found.shape, wanted.shape, "{earlier} {accumulate}");
            assert!(found.data == wanted.data, "{earlier} {accumulate}");
            let is_told = |plan: &MergedCheckpoint| {
                let mut warnings = plan.warnings().iter();
                warnings.any(|warning| warning.contains(&format!("replaces {name} whole")))
            };
            assert!(is_told(&row) && !is_told(&alone), "{:?}", row.warnings());
        }
    }
}

#[test]
fn what_later_adapters_train_is_put_on_a_replacement() {
    let plan_of = |adapters: Value| {
        let case = serde_json::json!({"base": "tiny-qwen2-untied", "adapters": adapters});
        plan_of(&case).unwrap()
    };
    let adapter = |name| serde_json::json!({"dir": format!("{name}/adapter"), "weight": 1.0});
    let replacing = adapter("modules_to_save_both_untied");
    let embedding = |plan: &MergedCheckpoint| plan.tensor("model.embed_tokens.weight").unwrap();
    let alone = embedding(&plan_of(serde_json::json!([replacing])));
    for later in ["embedding_lora_untied", "newer_trainable_tokens_untied"] {
        let row = plan_of(serde_json::json!([replacing, adapter(later)]));
        assert!(embedding(&row).data != alone.data, "{later}");
        assert!(!(row.warnings().iter()).any(|warning| warning.contains("whole")));
    }
}

#[test]
fn trained_biases_that_are_not_in_the_file_are_told() {
    for (name, is_told) in [("bias_lora_only_lost", true), ("bias_all_bf16", false)] {
        let case = cases().into_iter().find(|case| case["case"] == name);
        let plan = plan_of(&case.unwrap()).unwrap();
        let told = (plan.warnings().iter()).any(|warning| warning.contains("biases were trained"));
        assert_eq!(told, is_told, "{name}: {:?}", plan.warnings());
    }
}

#[test]
fn an_adapter_without_effect_is_told() {
    let case = cases().into_iter().find(|case| case["case"] == "rslora");
    let mut case = case.unwrap();
    for (weight, is_told) in [(0.0, true), (0.5, false)] {
        case["adapters"][0]["weight"] = weight.into();
        let plan = plan_of(&case).unwrap();
        let told = (plan.warnings().iter()).any(|warning| warning.contains("every scale is 0"));
        assert_eq!(told, is_told, "{:?}", plan.warnings());
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_with_a_reason() {
    let mut refused = Vec::new();
    for case in cases().iter().filter(|case| case["expect"] == "refused") {
        let name = case["case"].as_str().unwrap();
        // What overflows is found when the weights are made, not in the plan.
        let error = match plan_of(case) {
            Err(error) => error,
            Ok(plan) => {
                let made = plan.tensors().unwrap().into_iter();
                let mut made = made.map(|info| plan.tensor(&info.name));
                made.find_map(Result::err)
                    .unwrap_or_else(|| panic!("{name} was merged"))
            }
        };
        let text = error
            .to_string()
            .replace(&*fixtures().to_string_lossy(), "FIXTURES");
        refused.push(format!("{name}: {text}"));
    }
    insta::assert_snapshot!(refused.join("\n\n"));
}

#[test]
fn rows_of_a_tensor_are_those_of_the_whole() {
    let case = cases()
        .into_iter()
        .find(|case| case["case"] == "all_linear_bf16")
        .unwrap();
    let plan = plan_of(&case).unwrap();
    for info in plan.tensors().unwrap() {
        let whole = plan.tensor(&info.name).unwrap();
        let mut joined = Vec::new();
        for start in (0..info.shape[0]).step_by(7) {
            let rows = start..(start + 7).min(info.shape[0]);
            joined.extend_from_slice(&plan.rows(&info.name, rows).unwrap().data);
        }
        assert_eq!(joined, whole.data, "{}", info.name);
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let case = cases()
        .into_iter()
        .find(|case| case["case"] == "dora_f32")
        .unwrap();
    let made_by = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let plan = plan_of(&case).unwrap();
            let tensors = all_tensors(&plan).into_values().map(|tensor| tensor.data);
            tensors.collect::<Vec<_>>()
        })
    };
    assert_eq!(made_by(1), made_by(5));
}

#[test]
fn shards_hold_the_tensors_in_the_order_of_save_pretrained() {
    let json: Value =
        serde_json::from_slice(&std::fs::read(fixtures().join("adapters/shards.json")).unwrap())
            .unwrap();
    let all = cases();
    for entry in json["entries"].as_array().unwrap() {
        let limit = match &entry["max_shard_size"] {
            Value::String(size) => {
                let (number, unit) = size.split_at(size.len() - 2);
                let unit = [("KB", 1e3), ("MB", 1e6), ("GB", 1e9)]
                    .into_iter()
                    .find_map(|(name, bytes)| (name == unit).then_some(bytes));
                (number.parse::<f64>().unwrap() * unit.unwrap()) as u64
            }
            bytes => bytes.as_u64().unwrap(),
        };
        let source: Box<dyn TensorSource> = match &entry["source"] {
            source if source["base"].is_string() => {
                let mut case = all[0].clone();
                case["base"] = source["base"].clone();
                case["adapters"] = serde_json::json!([]);
                Box::new(plan_of(&case).unwrap())
            }
            source => {
                let case = all
                    .iter()
                    .find(|case| case["case"] == source["case"])
                    .unwrap();
                Box::new(plan_of(case).unwrap())
            }
        };
        let plan = ShardPlan::new(source.tensors().unwrap(), limit);
        let dir = tempfile::tempdir().unwrap();
        let written =
            crate::weights::write_shards(&plan, &*source, dir.path(), &mut |_| {}).unwrap();
        let mut found: BTreeMap<String, (u64, String)> = (written.into_iter())
            .map(|file| (file.name, (file.bytes, file.sha256)))
            .collect();
        if let Some((name, index)) = plan.index() {
            let sha256 = hex(&Sha256::digest(&index));
            found.insert(name.to_owned(), (index.len() as u64, sha256));
        }
        let wanted: BTreeMap<String, (u64, String)> = (entry["files"].as_object().unwrap().iter())
            .map(|(name, file)| {
                let sha256 = file["sha256"].as_str().unwrap().to_owned();
                (name.clone(), (file["size"].as_u64().unwrap(), sha256))
            })
            .collect();
        assert_eq!(found, wanted, "{} {limit}", entry["source"]);
    }
}
