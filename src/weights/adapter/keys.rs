//! What the name of a tensor in `adapter_model.safetensors` says.
//!
//! Names are those that PEFT's `get_peft_model_state_dict` writes; the adapter's own name
//! (`.default`), which it removes and raw state dicts keep, may be there.

/// What PEFT puts in front of the names of the model it wraps.
const PREFIX: &str = "base_model.model.";

/// The part that a tensor plays in the adapter of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// `A` of a linear, `[r, in]`.
    A,
    /// `B` of a linear, `[out, r]`.
    B,
    /// What training added to the bias, before scaling.
    BiasOfB,
    /// `A` of an embedding, `[r, vocabulary]`.
    EmbeddingA,
    /// `B` of an embedding, `[hidden, r]`.
    EmbeddingB,
    /// DoRA's length of every row.
    Magnitude,
    /// Rows of an embedding by token id; in spite of PEFT's name for them no difference.
    TokenRows,
    /// The weight below the adapter, as it was during training.
    BaseWeight,
    /// The bias below the adapter.
    BaseBias,
    /// A trained copy of a weight (`modules_to_save`).
    SavedWeight,
    /// A trained copy of a bias.
    SavedBias,
    /// A weight that takes the place of the base's.
    Weight,
    /// A bias that takes the place of the base's.
    Bias,
}

/// Splits a tensor's name into its module, as the base model names it, and its part.
///
/// Returns `None` for a name that no form of LoRA has.
pub(super) fn parse(name: &str) -> Option<(&str, Part)> {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    for (marker, part) in [
        (".lora_A", Part::A),
        (".lora_B", Part::B),
        (".lora_embedding_A", Part::EmbeddingA),
        (".lora_embedding_B", Part::EmbeddingB),
        (".lora_magnitude_vector", Part::Magnitude),
        (".token_adapter.trainable_tokens_delta", Part::TokenRows),
    ] {
        let Some((module, rest)) = name.split_once(marker) else {
            continue;
        };
        return match (part, leaf(rest)?) {
            (Part::B, "bias") => Some((module, Part::BiasOfB)),
            (Part::A | Part::B | Part::Magnitude, "weight") => Some((module, part)),
            (Part::A | Part::B, _) => None,
            (_, "") => Some((module, part)),
            _ => None,
        };
    }
    let (module, leaf) = name.rsplit_once('.')?;
    let (own, saved, base) = match leaf {
        "weight" => (Part::Weight, Part::SavedWeight, Part::BaseWeight),
        "bias" => (Part::Bias, Part::SavedBias, Part::BaseBias),
        _ => return None,
    };
    for below in [
        ".token_adapter.base_layer",
        ".base_layer",
        ".original_module",
    ] {
        if let Some(module) = module.strip_suffix(below) {
            return Some((module, base));
        }
    }
    match module.split_once(".modules_to_save") {
        Some((module, rest)) if rest.is_empty() || rest.starts_with('.') => Some((module, saved)),
        _ => Some((module, own)),
    }
}

/// Returns the last part of what follows a marker, without the adapter's name.
///
/// What follows is `""`, `.weight`, `.default.weight` or `.default`.
fn leaf(rest: &str) -> Option<&str> {
    if rest.is_empty() {
        return Some("");
    }
    let parts: Vec<&str> = rest.strip_prefix('.')?.split('.').collect();
    match parts[..] {
        [leaf @ ("weight" | "bias")] | [_, leaf @ ("weight" | "bias")] => Some(leaf),
        [_] => Some(""),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_name_is_understood() {
        let cases = [
            (
                "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
                "model.layers.0.mlp.up_proj",
                Part::A,
            ),
            (
                "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight",
                "model.layers.0.mlp.up_proj",
                Part::B,
            ),
            (
                "base_model.model.lm_head.lora_B.bias",
                "lm_head",
                Part::BiasOfB,
            ),
            (
                "base_model.model.model.embed_tokens.lora_embedding_A",
                "model.embed_tokens",
                Part::EmbeddingA,
            ),
            (
                "base_model.model.model.embed_tokens.lora_embedding_B.default",
                "model.embed_tokens",
                Part::EmbeddingB,
            ),
            (
                "base_model.model.lm_head.lora_magnitude_vector",
                "lm_head",
                Part::Magnitude,
            ),
            (
                "base_model.model.lm_head.lora_magnitude_vector.default.weight",
                "lm_head",
                Part::Magnitude,
            ),
            (
                "base_model.model.model.embed_tokens.base_layer.weight",
                "model.embed_tokens",
                Part::BaseWeight,
            ),
            (
                "base_model.model.lm_head.original_module.weight",
                "lm_head",
                Part::BaseWeight,
            ),
            (
                "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
                "model.layers.0.self_attn.q_proj",
                Part::BaseBias,
            ),
            ("base_model.model.lm_head.weight", "lm_head", Part::Weight),
            (
                "base_model.model.lm_head.modules_to_save.default.weight",
                "lm_head",
                Part::SavedWeight,
            ),
            (
                "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
                "model.embed_tokens",
                Part::TokenRows,
            ),
            (
                "model.layers.0.self_attn.q_proj.bias",
                "model.layers.0.self_attn.q_proj",
                Part::Bias,
            ),
        ];
        for (name, module, part) in cases {
            assert_eq!(parse(name), Some((module, part)), "{name}");
        }
    }

    #[test]
    fn foreign_names_have_no_part() {
        for name in [
            "base_model.model.model.layers.0.mlp.lora_A",
            "base_model.model.x.lora_A.a.b.weight",
            "base_model.model.x.vera_lambda_b",
            "lm_head",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
