//! What the faults of a plan point to: another base model, of which size.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Adapter, adapter_dir::LoraTarget, faults::Fault};
use crate::weights::Checkpoint;

/// Sizes of well-known models by width; of Qwen2.5 where several have one.
const SIZES: &[(usize, &str)] = &[
    (896, "0.5B"),
    (1536, "1.5B"),
    (2048, "3B"),
    (3584, "7B"),
    (4096, "8B"),
    (5120, "14B or 32B"),
    (8192, "70B or 72B"),
];

/// Returns what the faults point to, one sentence each.
pub(super) fn of<'a>(
    base: &Checkpoint,
    adapters: impl Iterator<Item = &'a Adapter>,
    faults: &[(PathBuf, Fault)],
) -> Vec<String> {
    let mut hints = Vec::new();
    for adapter in adapters {
        let misfits = faults.iter().any(|(dir, fault)| {
            dir == adapter.dir() && matches!(fault, Fault::Shape { .. } | Fault::Unmatched { .. })
        });
        if !misfits {
            continue;
        }
        hints.extend(other_width(adapter, base));
        hints.extend(other_depth(adapter, base));
        hints.extend(other_base(adapter, base).map(|(wanted, given)| {
            format!("adapter_config.json names the base model {wanted}, the one given is {given}")
        }));
    }
    hints
}

/// Returns the names of the base that the adapter wants and of the one given, if they differ.
///
/// Only last parts of paths are compared: models move between machines.
pub(super) fn other_base(adapter: &Adapter, base: &Checkpoint) -> Option<(String, String)> {
    let wanted = adapter.config().base_model()?;
    let last = |path: &Path| Some(path.file_name()?.to_string_lossy().into_owned());
    let wanted_last = last(Path::new(wanted))?;
    let given = last(&std::fs::canonicalize(base.path()).ok()?)?;
    // A snapshot in the hub cache is named by its commit, its model by a directory above.
    let known = |name: &str| {
        (base.path().iter()).any(|part| {
            let part = part.to_string_lossy();
            part.eq_ignore_ascii_case(name)
                || part.starts_with("models--") && part.ends_with(&format!("--{name}"))
        })
    };
    let same = given.eq_ignore_ascii_case(&wanted_last) || known(&wanted_last);
    (!same).then(|| (wanted.to_owned(), given))
}

fn describe(width: usize) -> String {
    match SIZES.iter().find(|(found, _)| *found == width) {
        Some((_, size)) => format!("hidden_size {width} ({size})"),
        None => format!("hidden_size {width}"),
    }
}

/// Says on which width the adapter was trained, if it is another than the base's.
fn other_width(adapter: &Adapter, base: &Checkpoint) -> Option<String> {
    let ours = config_number(base, "hidden_size")?;
    let modules = adapter.modules().ok()?;
    let width = modules.iter().find_map(|module| {
        let last = module.module.rsplit('.').next()?;
        match (module.target, last) {
            (
                LoraTarget::Linear,
                "q_proj" | "k_proj" | "v_proj" | "gate_proj" | "up_proj" | "lm_head",
            ) => module.a.shape.get(1).copied(),
            (LoraTarget::Linear, "o_proj" | "down_proj") | (LoraTarget::Embedding, _) => {
                module.b.shape.first().copied()
            }
            _ => None,
        }
    })?;
    (width != ours).then(|| {
        format!(
            "the adapter was trained on a model of {}, the base has {}",
            describe(width),
            describe(ours)
        )
    })
}

/// Says how many layers the adapter needs, if the base has fewer.
fn other_depth(adapter: &Adapter, base: &Checkpoint) -> Option<String> {
    let ours = config_number(base, "num_hidden_layers")?;
    let layer_of = |module: &str| -> Option<usize> {
        module
            .split_once("layers.")?
            .1
            .split('.')
            .next()?
            .parse()
            .ok()
    };
    let last = (adapter.parts.keys())
        .filter_map(|(module, _)| layer_of(module))
        .max()?;
    (last >= ours).then(|| {
        format!(
            "the adapter has layers up to {last}, the base has {ours} (0 to {})",
            ours - 1
        )
    })
}

fn config_number(base: &Checkpoint, key: &str) -> Option<usize> {
    let value = base.config().get(key).and_then(Value::as_u64)?;
    usize::try_from(value).ok().filter(|value| *value > 0)
}
