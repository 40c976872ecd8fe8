//! What a merge did: a table for people, `merge_report.json` for programs.
//!
//! The report holds nothing that differs between two runs on the same inputs.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::ops::Range;
use std::sync::Mutex;

use serde_json::{Value, json};

use super::args::MergeConfig;
use crate::weights::{
    Accumulate, DeltaStats, MergedCheckpoint, StoredTensor, TensorInfo, TensorSource, WeightsError,
    WrittenFile,
};

/// The name of the report in the output directory.
pub(super) const REPORT_FILE: &str = "merge_report.json";

/// A merged checkpoint that keeps account of the rows that it hands to the writer of shards, who
/// asks for each once.
pub(super) struct Observed<'a> {
    merged: &'a MergedCheckpoint,
    /// Names of tensors and their change, by kind of module.
    seen: Mutex<BTreeMap<String, (HashSet<String>, DeltaStats)>>,
}

impl<'a> Observed<'a> {
    /// Begins to watch.
    pub(super) fn new(merged: &'a MergedCheckpoint) -> Self {
        Self {
            merged,
            seen: Mutex::default(),
        }
    }

    /// Returns what changed so far, by kind of module.
    pub(super) fn kinds(&self) -> Vec<Kind> {
        let seen = self
            .seen
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        (seen.iter())
            .map(|(name, (tensors, stats))| Kind {
                name: name.clone(),
                num_tensors: tensors.len(),
                stats: *stats,
            })
            .collect()
    }
}

/// The change of all modules of one kind.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Kind {
    /// `q_proj`, `embed_tokens`, `q_proj.bias`, ….
    pub(super) name: String,
    pub(super) num_tensors: usize,
    pub(super) stats: DeltaStats,
}

impl TensorSource for Observed<'_> {
    fn tensors(&self) -> Result<Vec<TensorInfo>, WeightsError> {
        self.merged.tensors()
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        self.merged.tensor(name)
    }

    fn read_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<(), WeightsError> {
        if let Some(stats) = self.merged.fold_rows_into(name, rows, bytes)? {
            let mut seen = self
                .seen
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let (tensors, sum) = seen.entry(kind_of(name)).or_default();
            tensors.insert(name.to_owned());
            sum.add(&stats);
        }
        Ok(())
    }
}

/// Returns the last part of the module's name, with `.bias` for biases.
fn kind_of(name: &str) -> String {
    match name.rsplit_once('.') {
        Some((module, "weight")) => module.rsplit('.').next().unwrap_or(module).to_owned(),
        Some((module, leaf)) => {
            format!("{}.{leaf}", module.rsplit('.').next().unwrap_or(module))
        }
        None => name.to_owned(),
    }
}

/// How many tensors go which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    /// Tensors in which an adapter has a part.
    pub(super) merged: usize,
    /// The rest.
    pub(super) copied: usize,
}

impl Counts {
    pub(super) fn of(merged: &MergedCheckpoint) -> Result<Self, WeightsError> {
        let tensors = merged.tensors()?;
        let touched = tensors
            .iter()
            .filter(|info| merged.is_touched(&info.name))
            .count();
        Ok(Self {
            merged: touched,
            copied: tensors.len() - touched,
        })
    }
}

/// All that is told at the end.
pub(super) struct Report<'a> {
    pub(super) config: &'a MergeConfig,
    pub(super) merged: &'a MergedCheckpoint,
    pub(super) counts: Counts,
    pub(super) kinds: Vec<Kind>,
    pub(super) changes: &'a [String],
    /// Weight files and all others.
    pub(super) files: &'a [WrittenFile],
}

impl Report<'_> {
    /// Returns the content of `merge_report.json`.
    pub(super) fn to_json(&self) -> String {
        let adapters: Vec<Value> = (self.config.adapters.iter())
            .map(|(path, weight)| json!({"path": path, "weight": weight}))
            .collect();
        let kinds: Vec<Value> = (self.kinds.iter())
            .map(
                |Kind {
                     name,
                     num_tensors,
                     stats,
                 }| {
                    json!({
                        "module": name,
                        "tensors": num_tensors,
                        "weights": stats.num_values,
                        "weights_changed": stats.num_changed,
                        "max_abs_delta": stats.max_abs_delta,
                        "relative_norm": stats.relative_norm(),
                        "relative_rounding_loss": stats.relative_loss(),
                    })
                },
            )
            .collect();
        let files: Vec<Value> = (self.files.iter())
            .map(|file| json!({"name": file.name, "bytes": file.bytes, "sha256": file.sha256}))
            .collect();
        let report = json!({
            "program": concat!("infold ", env!("CARGO_PKG_VERSION")),
            "model": self.config.model,
            "adapters": adapters,
            "accumulate": match self.config.options.accumulate {
                Accumulate::Fp32 => "fp32",
                Accumulate::LlamaFactory => "llamafactory",
            },
            "tensors_merged": self.counts.merged,
            "tensors_copied": self.counts.copied,
            "modules": kinds,
            "changes": self.changes,
            "warnings": self.merged.warnings(),
            "files": files,
        });
        format!("{report:#}\n")
    }

    /// Returns the table.
    pub(super) fn to_table(&self) -> String {
        let mut table = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "{} tensors merged, {} copied",
            self.counts.merged, self.counts.copied
        );
        if !self.kinds.is_empty() {
            let _ = writeln!(
                table,
                "{:<20} {:>7} {:>9} {:>10} {:>10} {:>14}",
                "module", "tensors", "changed", "max |Δ|", "‖Δ‖/‖W‖", "rounding lost"
            );
        }
        for Kind {
            name,
            num_tensors,
            stats,
        } in &self.kinds
        {
            let changed = 100.0 * stats.num_changed as f64 / stats.num_values.max(1) as f64;
            let _ = writeln!(
                table,
                "{name:<20} {num_tensors:>7} {changed:>8.1}% {:>10.3e} {:>10.3e} {:>13.2}%",
                stats.max_abs_delta,
                stats.relative_norm(),
                100.0 * stats.relative_loss()
            );
        }
        for change in self.changes {
            let _ = writeln!(table, "changed: {change}");
        }
        if let Some(advice) = self.advice() {
            let _ = writeln!(table, "{advice}");
        }
        table
    }

    /// Says so when much of the change is lost in rounding.
    fn advice(&self) -> Option<String> {
        let mut all = DeltaStats::default();
        for kind in &self.kinds {
            all.add(&kind.stats);
        }
        let loss = all.relative_loss();
        (loss > 0.5).then(|| {
            format!(
                "note: rounding took {:.0} % of the adapters' change; --dtype float32 (or float16) \
                 keeps more of it",
                100.0 * loss
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_modules_without_their_path() {
        assert_eq!(kind_of("model.layers.0.self_attn.q_proj.weight"), "q_proj");
        assert_eq!(
            kind_of("model.layers.0.self_attn.q_proj.bias"),
            "q_proj.bias"
        );
        assert_eq!(kind_of("lm_head.weight"), "lm_head");
    }
}
