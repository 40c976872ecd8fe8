//! The order in which PyTorch modules list their tensors, which decides what goes in which shard.
//!
//! A checkpoint does not keep it (safetensors sorts by name), so it is made anew from the names:
//! embedding, layers by number, final norm, head; in a layer as the modules of transformers'
//! Llama and Qwen families are declared; names that are not known come after their like.

use super::TensorInfo;

/// Parts of names in the order in which modules declare them.
const DECLARED: &[&str] = &[
    "model",
    "transformer",
    "embed_tokens",
    "wte",
    "wpe",
    "layers",
    "h",
    "ln_1",
    "self_attn",
    "attn",
    "ln_2",
    "mlp",
    "c_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_norm",
    "k_norm",
    "gate_proj",
    "up_proj",
    "down_proj",
    "c_fc",
    "c_proj",
    "input_layernorm",
    "post_attention_layernorm",
];

/// What comes after everything that is not known.
const LAST: &[&str] = &["norm", "ln_f", "lm_head"];

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Key<'a> {
    Declared(usize),
    Number(u64),
    Other(&'a str),
    Leaf(usize),
    Last(usize),
}

fn key(part: &str) -> Key<'_> {
    let position = |list: &[&str]| list.iter().position(|known| *known == part);
    if let Some(place) = position(DECLARED) {
        Key::Declared(place)
    } else if let Some(place) = position(LAST) {
        Key::Last(place)
    } else if let Some(place) = position(&["weight", "bias"]) {
        Key::Leaf(place)
    } else if let Ok(number) = part.parse() {
        Key::Number(number)
    } else {
        Key::Other(part)
    }
}

/// Sorts tensors as the model's `state_dict()` lists them.
pub(super) fn sort_as_state_dict(tensors: &mut [TensorInfo]) {
    tensors.sort_by(|a, b| {
        let a_keys = a.name.split('.').map(key);
        let b_keys = b.name.split('.').map(key);
        a_keys.cmp(b_keys).then_with(|| a.name.cmp(&b.name))
    });
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;

    use super::*;

    #[test]
    fn the_order_is_that_of_the_modules() {
        let wanted = [
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.k_proj.bias",
            "model.layers.0.self_attn.v_proj.weight",
            "model.layers.0.self_attn.v_proj.bias",
            "model.layers.0.self_attn.o_proj.weight",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.self_attn.k_norm.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
            "model.layers.2.self_attn.q_proj.weight",
            "model.layers.10.self_attn.q_proj.weight",
            "model.unheard_of.weight",
            "model.norm.weight",
            "lm_head.weight",
        ];
        let mut tensors: Vec<TensorInfo> = wanted
            .iter()
            .map(|name| TensorInfo {
                name: (*name).to_owned(),
                dtype: GgmlDType::F32,
                shape: vec![1],
            })
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        sort_as_state_dict(&mut tensors);
        let names: Vec<&str> = tensors.iter().map(|tensor| &*tensor.name).collect();
        assert_eq!(names, wanted);
    }
}
