//! Input and output embeddings that are one tensor, and what adapters do to that.
//!
//! A model with `tie_word_embeddings` stores one matrix. An adapter on one of its two uses makes
//! two matrices of it; written as one, as PEFT before 2026 did, the result is wrong. Here both
//! are planned, and the second is dropped only if it comes out equal.

use serde_json::Value;

use super::{
    faults::{AdapterFaults, Fault},
    merged::{MergedCheckpoint, Recipe},
};
use crate::weights::{Checkpoint, WeightsError, torch_dtype};

/// Rows compared at a time.
const COMPARED_ROWS: usize = 1024;

/// The two names of a tied matrix.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tied {
    pub(super) embedding: String,
    pub(super) head: String,
}

impl Tied {
    /// Returns the other name of the matrix, if `name` is one of the two.
    pub(super) fn other(&self, name: &str) -> Option<&str> {
        if name == self.embedding {
            Some(&self.head)
        } else if name == self.head {
            Some(&self.embedding)
        } else {
            None
        }
    }
}

/// Returns whether the name is that of an input embedding.
pub(super) fn is_embedding(name: &str) -> bool {
    name.ends_with("embed_tokens.weight") || name.ends_with("wte.weight")
}

const HEAD: &str = "lm_head.weight";

/// Returns the tied matrix of a base, if it has one.
pub(super) fn find(base: &Checkpoint) -> Option<Tied> {
    let embedding = base.names().find(|name| is_embedding(name))?;
    let stated = (base.config().get("tie_word_embeddings")).and_then(Value::as_bool);
    stated.unwrap_or(!base.contains(HEAD)).then(|| Tied {
        embedding: embedding.to_owned(),
        head: HEAD.to_owned(),
    })
}

/// Decides whether tied embeddings stay tied, and what changes in `config.json`.
///
/// # Errors
/// Embeddings that grew unequally; values that cannot be made.
pub(super) fn settle(merged: &mut MergedCheckpoint) -> Result<(), WeightsError> {
    if let Some(tied) = find(&merged.base) {
        let index = |name: &str| merged.by_name.get(name).copied();
        if let (Some(embedding), Some(head)) = (index(&tied.embedding), index(&tied.head)) {
            if are_equal(merged, embedding, head)? {
                merged.recipes.remove(head);
                merged.index_recipes();
            } else {
                change(merged, "tie_word_embeddings", false.into());
            }
        }
    }
    settle_vocabulary(merged)?;
    if let Some(dtype) = merged.options.dtype {
        let name = torch_dtype(dtype);
        for key in ["torch_dtype", "dtype"] {
            if merged.config.get(key).is_some_and(|found| found != name) {
                change(merged, key, name.into());
            }
        }
    }
    Ok(())
}

/// Follows a vocabulary that grew in training.
fn settle_vocabulary(merged: &mut MergedCheckpoint) -> Result<(), WeightsError> {
    let rows = |wanted: &dyn Fn(&str) -> bool| {
        let found = merged
            .recipes
            .iter()
            .find(|recipe| wanted(&recipe.info.name));
        found.map(|recipe| recipe.info.shape[0])
    };
    let embedding = rows(&is_embedding);
    let head = rows(&|name| name == HEAD);
    let (Some(embedding), head) = (embedding, head) else {
        return Ok(());
    };
    if let Some(head) = head.filter(|head| *head != embedding) {
        let dir = merged
            .adapters
            .first()
            .map(|adapter| adapter.dir().to_owned());
        return Err(AdapterFaults {
            faults: vec![(
                dir.unwrap_or_default(),
                Fault::Combination {
                    what: format!(
                        "the input embedding gets {embedding} rows, the output embedding {head}"
                    ),
                    advice: "the adapter was trained with a resized vocabulary and saved only one \
                             of the two; save it with save_embedding_layers=True",
                },
            )],
            hints: Vec::new(),
        }
        .into());
    }
    let base_rows = merged.base.names().find(|name| is_embedding(name));
    let base_rows = base_rows.map(|name| merged.base.tensor(name)).transpose()?;
    if base_rows.is_some_and(|tensor| tensor.shape[0] != embedding) {
        change(merged, "vocab_size", embedding.into());
    }
    Ok(())
}

fn change(merged: &mut MergedCheckpoint, key: &str, value: Value) {
    merged.config_changes.push((key.to_owned(), value.clone()));
    if let Some(config) = merged.config.as_object_mut() {
        config.insert(key.to_owned(), value);
    }
}

/// Returns whether two tensors come out equal, bit by bit.
fn are_equal(merged: &MergedCheckpoint, left: usize, right: usize) -> Result<bool, WeightsError> {
    let [left, right] = [left, right].map(|index| &merged.recipes[index]);
    let made_alike = |a: &Recipe, b: &Recipe| {
        a.origin == b.origin && a.deltas == b.deltas && a.token_rows == b.token_rows
    };
    if left.info.shape != right.info.shape || left.info.dtype != right.info.dtype {
        return Ok(false);
    }
    if made_alike(left, right) {
        return Ok(true);
    }
    let num_rows = left.info.shape[0];
    for start in (0..num_rows).step_by(COMPARED_ROWS) {
        let rows = start..(start + COMPARED_ROWS).min(num_rows);
        let [left, right] =
            [left, right].map(|recipe| merged.fold_rows(&recipe.info.name, rows.clone()));
        if left?.tensor.data != right?.tensor.data {
            return Ok(false);
        }
    }
    Ok(true)
}
