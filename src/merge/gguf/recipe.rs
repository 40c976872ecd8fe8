//! Which tensor of a file is stored in which type.
//!
//! The rules are those of `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp`, for dense
//! models and without an importance matrix.

use candle_core::quantized::GgmlDType;

use super::shape::ModelShape;

/// The type of a file, as `--gguf` names it: that of most of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum GgufFileType {
    /// 32 bits a weight.
    #[value(name = "f32")]
    F32,
    /// 16 bits a weight, IEEE half precision.
    #[value(name = "f16")]
    F16,
    /// 16 bits a weight, as most models are trained.
    #[value(name = "bf16")]
    BF16,
    /// 8.5 bits a weight.
    #[value(name = "q8_0")]
    Q8_0,
    /// About 4.8 bits a weight: Q4_K, the tensors that matter most in Q6_K.
    #[value(name = "q4_k_m")]
    Q4KM,
    /// About 4.6 bits a weight: Q4_K, few tensors in Q5_K.
    #[value(name = "q4_k_s")]
    Q4KS,
    /// 6.6 bits a weight.
    #[value(name = "q6_k")]
    Q6K,
}

impl GgufFileType {
    /// Returns `general.file_type`, llama.cpp's `llama_ftype`.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Q4KS => 14,
            Self::Q4KM => 15,
            Self::Q6K => 18,
            Self::BF16 => 32,
        }
    }

    /// Returns the name in flags, such as `q4_k_m`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4KM => "q4_k_m",
            Self::Q4KS => "q4_k_s",
            Self::Q6K => "q6_k",
        }
    }

    fn base_type(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::BF16 => GgmlDType::BF16,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4KM | Self::Q4KS => GgmlDType::Q4K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }
}

/// Returns the type of a matrix with rows of `columns`, as the recipe has it and as it can be
/// stored: blocks that the rows do not divide into are replaced by smaller ones of more bits.
pub(super) fn matrix_type(
    file_type: GgufFileType,
    gguf_name: &str,
    columns: usize,
    shape: &ModelShape,
) -> (GgmlDType, GgmlDType) {
    let wanted = wanted_type(file_type, gguf_name, columns, shape);
    let mut stored = wanted;
    while !columns.is_multiple_of(stored.block_size()) {
        stored = match stored {
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            GgmlDType::Q6K => GgmlDType::Q8_0,
            _ => GgmlDType::F16,
        };
    }
    (wanted, stored)
}

fn wanted_type(
    file_type: GgufFileType,
    gguf_name: &str,
    columns: usize,
    shape: &ModelShape,
) -> GgmlDType {
    use GgufFileType::{Q4KM, Q4KS, Q6K};
    let base = file_type.base_type();
    if !matches!(file_type, Q4KM | Q4KS | Q6K) {
        return base;
    }
    let is_head = match shape.tie_word_embeddings {
        true => gguf_name == "token_embd.weight",
        false => gguf_name == "output.weight",
    };
    if is_head {
        return match columns.is_multiple_of(base.block_size()) {
            true => GgmlDType::Q6K,
            false => GgmlDType::Q8_0,
        };
    }
    let Some((layer, part)) = layer_and_part(gguf_name) else {
        return base;
    };
    let num_layers = shape.num_layers;
    match (file_type, part) {
        (Q4KM, "attn_v" | "ffn_down") if use_more_bits(layer, num_layers) => GgmlDType::Q6K,
        (Q4KS, "attn_v") if layer < 4 => GgmlDType::Q5K,
        (Q4KS, "ffn_down") if layer < num_layers / 8 => GgmlDType::Q5K,
        (Q4KM | Q4KS, "attn_v") if is_70b(shape) => GgmlDType::Q5K,
        _ => base,
    }
}

/// The first and last eighth of the layers and every third between.
fn use_more_bits(layer: usize, num_layers: usize) -> bool {
    let eighth = num_layers / 8;
    layer < eighth || layer >= 7 * num_layers / 8 || (layer - eighth) % 3 == 2
}

/// llama.cpp's class of models whose eight query heads share one v: its tensor is small, and more
/// bits for it cost little.
fn is_70b(shape: &ModelShape) -> bool {
    let grouped = shape.heads.query != shape.heads.key_value;
    match shape.architecture.as_str() {
        "qwen2" => shape.num_layers == 80,
        "llama" => shape.num_layers == 80 && grouped,
        _ => false,
    }
}

/// Returns `(3, "attn_v")` for `blk.3.attn_v.weight`.
fn layer_and_part(gguf_name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = gguf_name.strip_prefix("blk.")?.split_once('.')?;
    let (part, _kind) = rest.split_once('.')?;
    Some((layer.parse().ok()?, part))
}
