//! What Hugging Face and llama.cpp call the same tensor, and how the rows of one differ.
//!
//! Used in both directions: the reader of GGUF files and their writer share this map. Names follow
//! llama.cpp's `gguf-py/gguf/constants.py`, the order of rows `LlamaModel.permute` of its
//! converter.

use super::WeightsError;

/// Tensors outside the layers: (GGUF, Hugging Face), both without `.weight`.
const MODEL_NAMES: [(&str, &str); 3] = [
    ("token_embd", "model.embed_tokens"),
    ("output", "lm_head"),
    ("output_norm", "model.norm"),
];

/// Tensors of a layer: (GGUF after `blk.N.`, Hugging Face after `model.layers.N.`).
const LAYER_NAMES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Returns the Hugging Face name of a GGUF tensor; `None` for one that no rule covers.
pub(super) fn hf_name(gguf_name: &str) -> Option<String> {
    let (stem, kind) = gguf_name.rsplit_once('.')?;
    if let Some((_, hf)) = MODEL_NAMES.iter().find(|(gguf, _)| *gguf == stem) {
        return Some(format!("{hf}.{kind}"));
    }
    let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let (_, hf) = LAYER_NAMES.iter().find(|(gguf, _)| *gguf == part)?;
    Some(format!("model.layers.{layer}.{hf}.{kind}"))
}

/// Returns the GGUF name of a Hugging Face tensor (`….weight`, `….bias`); `None` for one that
/// llama.cpp has no name for.
pub fn gguf_name(hf_name: &str) -> Option<String> {
    let (stem, kind) = hf_name.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    if let Some((gguf, _)) = MODEL_NAMES.iter().find(|(_, hf)| *hf == stem) {
        return Some(format!("{gguf}.{kind}"));
    }
    let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
    let number: usize = layer.parse().ok()?;
    let (gguf, _) = LAYER_NAMES.iter().find(|(_, hf)| *hf == part)?;
    Some(format!("blk.{number}.{gguf}.{kind}"))
}

/// How the rows of a tensor in a GGUF file relate to those of the Hugging Face checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// As in the Hugging Face checkpoint.
    AsStored,
    /// The rows of each head are interleaved.
    ///
    /// The rotary embedding turns pairs of rows of a head. Hugging Face pairs row `i` with
    /// `i + head_dim / 2`, llama.cpp's `llama` pairs `2 i` with `2 i + 1`: row
    /// `half * head_dim / 2 + i` of a head is stored as row `2 i + half`.
    Interleaved {
        /// Heads that the rows make up.
        num_heads: usize,
    },
}

impl RowOrder {
    /// Returns the order of the rows of the tensor `gguf_name` of `num_rows` rows in a GGUF file
    /// of `architecture`: q and k (weights and biases) of `llama` are interleaved.
    ///
    /// # Errors
    /// [`WeightsError::UnevenShard`] when the rows do not make up that many heads of even width.
    pub fn of(
        architecture: &str,
        gguf_name: &str,
        num_rows: usize,
        heads: HeadCounts,
    ) -> Result<Self, WeightsError> {
        let num_heads = match part_of(gguf_name) {
            Some("attn_q") if architecture == "llama" => heads.query,
            Some("attn_k") if architecture == "llama" => heads.key_value,
            _ => return Ok(Self::AsStored),
        };
        if num_heads == 0
            || !num_rows.is_multiple_of(num_heads)
            || !(num_rows / num_heads).is_multiple_of(2)
        {
            return Err(WeightsError::UnevenShard {
                tensor: gguf_name.to_owned(),
                dim: 0,
                size: num_rows,
                world_size: num_heads,
            });
        }
        Ok(Self::Interleaved { num_heads })
    }

    /// Returns which row of the GGUF tensor is row `row` of the Hugging Face tensor.
    pub(super) fn stored_row(self, row: usize, num_rows: usize) -> usize {
        let Self::Interleaved { num_heads } = self else {
            return row;
        };
        let head_dim = num_rows / num_heads;
        let (first, row, pairs) = (row / head_dim * head_dim, row % head_dim, head_dim / 2);
        first + 2 * (row % pairs) + row / pairs
    }

    /// Returns which row of the Hugging Face tensor is row `row` of the GGUF tensor.
    pub fn source_row(self, row: usize, num_rows: usize) -> usize {
        let Self::Interleaved { num_heads } = self else {
            return row;
        };
        let head_dim = num_rows / num_heads;
        let (first, row, pairs) = (row / head_dim * head_dim, row % head_dim, head_dim / 2);
        first + row % 2 * pairs + row / 2
    }
}

/// The heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadCounts {
    /// Query heads.
    pub query: usize,
    /// Key and value heads.
    pub key_value: usize,
}

/// Returns `attn_q` for `blk.3.attn_q.weight`.
pub(super) fn part_of(gguf_name: &str) -> Option<&str> {
    let (_layer, rest) = gguf_name.strip_prefix("blk.")?.split_once('.')?;
    rest.split_once('.').map(|(part, _kind)| part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_comes_back_through_the_other_direction() {
        let layers = LAYER_NAMES
            .iter()
            .map(|(gguf, hf)| (format!("blk.7.{gguf}"), format!("model.layers.7.{hf}")));
        let model = MODEL_NAMES
            .iter()
            .map(|(gguf, hf)| ((*gguf).to_owned(), (*hf).to_owned()));
        for (gguf, hf) in layers.chain(model) {
            for kind in ["weight", "bias"] {
                let (gguf, hf) = (format!("{gguf}.{kind}"), format!("{hf}.{kind}"));
                assert_eq!(gguf_name(&hf).as_deref(), Some(gguf.as_str()));
                assert_eq!(hf_name(&gguf).as_deref(), Some(hf.as_str()));
            }
        }
    }

    #[test]
    fn names_that_llama_cpp_does_not_know_are_not_guessed() {
        for name in [
            "model.layers.x.mlp.up_proj.weight",
            "model.layers.0.mlp.experts.1.up_proj.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.embed_tokens.weight.absmax",
            "lm_head",
        ] {
            assert_eq!(gguf_name(name), None, "{name}");
        }
    }

    #[test]
    fn both_directions_of_a_row_undo_each_other() {
        let heads = HeadCounts {
            query: 4,
            key_value: 2,
        };
        let order = RowOrder::of("llama", "blk.0.attn_k.weight", 16, heads).unwrap();
        assert_eq!(order, RowOrder::Interleaved { num_heads: 2 });
        for row in 0..16 {
            assert_eq!(order.source_row(order.stored_row(row, 16), 16), row);
        }
        // Head 1 has rows 8..16; its second half begins at 12 and lies between the first's rows.
        assert_eq!(order.stored_row(12, 16), 9);
        assert_eq!(order.source_row(10, 16), 9);
        let qwen = RowOrder::of("qwen2", "blk.0.attn_k.weight", 16, heads).unwrap();
        assert_eq!(qwen.source_row(9, 16), 9);
    }
}
