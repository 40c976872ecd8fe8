//! The part of a plan that puts tensors of an adapter in the place of the base's.

use super::{
    Adapter,
    faults::Fault,
    keys::Part,
    merged::Origin,
    plan::{Planner, shape_fault},
    tied,
};
use crate::weights::{StoredTensor, WeightsError};

impl Planner {
    /// Puts a tensor of the adapter in the place of the base's.
    pub(super) fn replace(
        &mut self,
        adapter: &Adapter,
        module: &str,
        part: Part,
    ) -> Result<(), WeightsError> {
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
            self.drop_earlier(&name, module, &tensor);
            self.set_origin(&name, adapter, module, part, &tensor);
        }
        Ok(())
    }

    /// Forgets what earlier adapters made of a tensor that this one replaces: PEFT merges one
    /// adapter after the other, so that the replacement overwrites it. The other tensor of a tied
    /// pair keeps it where it still fits: only an adapter on that tensor alone can have made it.
    fn drop_earlier(&mut self, name: &str, module: &str, tensor: &StoredTensor) {
        let index = self.adapter;
        let Some(recipe) = self.recipes.get_mut(name) else {
            return;
        };
        let own = name.rsplit_once('.').map_or(name, |(own, _)| own);
        let is_kept = own != module && recipe.info.shape == tensor.shape;
        let num_deltas = recipe.deltas.len();
        (recipe.deltas).retain(|delta| is_kept || delta.adapter == index);
        let rows = recipe.token_rows.take_if(|(adapter, owner)| {
            // Rows of the embedding are put in a tied head too.
            *adapter != index && !(is_kept && owner == own)
        });
        if num_deltas != recipe.deltas.len() || rows.is_some() {
            self.warnings.push(format!(
                "{}: {} replaces {name} whole, what earlier adapters trained of it is lost; put \
                 this adapter before them to keep it",
                self.dir.display(),
                tensor.name
            ));
        }
    }

    /// PEFT writes some replacements twice; that is one replacement only if they are equal.
    pub(super) fn check_copies(
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

    /// Has rows of an embedding replaced; of a tied one, in the head too.
    pub(super) fn put_token_rows(
        &mut self,
        adapter: &Adapter,
        module: &str,
    ) -> Result<(), WeightsError> {
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
}
