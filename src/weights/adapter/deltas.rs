//! The part of a plan that adds low-rank products and biases to tensors of the base.

use serde_json::Value;

use super::{
    Adapter,
    faults::Fault,
    keys::Part,
    merged::{Delta, Layout},
    plan::{Planner, shape_fault},
};
use crate::weights::{StoredTensor, WeightsError};

impl Planner {
    pub(super) fn add_linear(
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

    pub(super) fn add_embedding(
        &mut self,
        adapter: &Adapter,
        module: &str,
    ) -> Result<(), WeightsError> {
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
        let scale = config.scaling(module, rank) as f32;
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
            weight: self.weight,
            column_factors: None,
        };
        if let Some(recipe) = self.recipes.get_mut(name) {
            recipe.deltas.push(delta);
        }
    }

    /// Complains of a `B` that has no `A`.
    pub(super) fn check_pair(&mut self, adapter: &Adapter, module: &str, part: Part) {
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
    pub(super) fn add_bias(&mut self, adapter: &Adapter, module: &str) -> Result<(), WeightsError> {
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

    pub(super) fn check_magnitude(
        &mut self,
        adapter: &Adapter,
        module: &str,
    ) -> Result<(), WeightsError> {
        let magnitude = self.part(adapter, module, Part::Magnitude)?;
        let has = |part| adapter.parts.contains_key(&(module.to_owned(), part));
        let is_embedding = has(Part::EmbeddingA);
        let recipe = self.recipes.get(&format!("{module}.weight"));
        let transposed = recipe.is_some_and(|recipe| {
            (recipe.deltas.iter()).any(|delta| delta.layout == Layout::Transposed)
        });
        let shape = recipe.map(|recipe| recipe.info.shape.clone());
        if (is_embedding || transposed) && self.num_adapters > 1 {
            let what = match is_embedding {
                true => "an embedding",
                false => "a transposed weight (fan_in_fan_out)",
            };
            self.fault(Fault::Combination {
                what: format!("{}: DoRA on {what} beside other adapters", magnitude.name),
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
        if let Some([rows, cols]) = shape.as_deref() {
            // Outputs of a transposed weight are its columns; of an embedding, whose rows are
            // tokens, PEFT measures the columns too.
            let expected = match is_embedding || transposed {
                true => cols,
                false => rows,
            };
            if magnitude.shape.iter().product::<usize>() != *expected {
                self.fault(shape_fault(&magnitude, &[*expected], ["out", ""]));
            }
        }
        Ok(())
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
