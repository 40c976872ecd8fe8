//! Small checkpoints of random weights in the head sizes that the CUDA kernels have.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Tokens of [`SHAPES`]: no multiple of 8, as after resizing.
pub(crate) const VOCAB_SIZE: usize = 1003;

/// A random checkpoint's shape.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) model_type: &'static str,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) tied: bool,
    pub(crate) vocab_size: usize,
    /// What rows 3 and 90 of the down projections are multiplied by: two elements of the residual
    /// stream that grow large, as in Qwen2.5.
    pub(crate) outliers: f32,
    pub(crate) linears: Linears,
}

/// What the layers' weights are drawn from.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Linears {
    Uniform,
    /// E4M3 times a power of two, each row's largest E4M3's: FP8 rounds none of them.
    E4m3,
}

impl Linears {
    /// Returns element `i` of a matrix of `cols` columns, given a number of -1 to 1.
    fn value(self, uniform: f32, i: usize, cols: usize) -> f32 {
        let width = (cols as f32).sqrt();
        match self {
            Self::Uniform => 2.0 / width * uniform,
            Self::E4m3 => {
                let is_largest = i % cols == i / cols * 7 % cols;
                let value = 448.0 * if is_largest { 1.0 } else { uniform };
                // Four bits from the leading one on, at least of 2^-6.
                let step = (value.abs().log2().floor().max(-6.0) - 3.0).exp2();
                let scale = (width * 448.0).recip().log2().round().exp2();
                (value / step).round_ties_even() * step * scale
            }
        }
    }
}

pub(crate) const SHAPES: [Shape; 3] = [
    Shape {
        model_type: "qwen2",
        hidden: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        tied: true,
        vocab_size: VOCAB_SIZE,
        outliers: 1.0,
        linears: Linears::Uniform,
    },
    Shape {
        model_type: "qwen3",
        hidden: 192,
        heads: 7,
        kv_heads: 1,
        head_dim: 128,
        tied: false,
        vocab_size: VOCAB_SIZE,
        outliers: 1.0,
        linears: Linears::Uniform,
    },
    Shape {
        model_type: "llama",
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        tied: true,
        vocab_size: VOCAB_SIZE,
        outliers: 1.0,
        linears: Linears::Uniform,
    },
];

const LAYERS: usize = 3;

impl Shape {
    /// The MLP's width; of nine heads SmolLM2's, which three ranks divide.
    fn intermediate(&self) -> usize {
        match self.heads {
            9 => 1536,
            _ => 640,
        }
    }

    fn config(&self) -> Value {
        json!({
            "model_type": self.model_type, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate(), "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": self.vocab_size, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096, "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied, "torch_dtype": "bfloat16",
        })
    }

    /// Writes the checkpoint and returns its folder.
    pub(crate) fn write(&self) -> tempfile::TempDir {
        let mut random = StdRng::seed_from_u64(self.hidden as u64);
        let mut tensors = HashMap::new();
        let mut add = |name: String, dims: &[usize], mean: f32, spread: f32| {
            let cols = dims.last().copied().unwrap_or(1);
            let values = (0..dims.iter().product::<usize>()).map(|i| {
                let is_outlier = name.contains("down_proj") && [3, 90].contains(&(i / cols));
                let scale = if is_outlier { self.outliers } else { 1.0 };
                let uniform = random.random_range(-1.0..1.0f32);
                let value = match name.ends_with("_proj.weight") {
                    true => self.linears.value(uniform, i, cols),
                    false => mean + spread * uniform,
                };
                half::bf16::from_f32(scale * value)
            });
            let bytes: Vec<u8> = values.flat_map(half::bf16::to_le_bytes).collect();
            tensors.insert(name.clone(), (dims.to_vec(), bytes));
        };
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        add(
            "model.embed_tokens.weight".into(),
            &[self.vocab_size, self.hidden],
            0.0,
            0.5,
        );
        add("model.norm.weight".into(), &[self.hidden], 1.0, 0.1);
        if !self.tied {
            add(
                "lm_head.weight".into(),
                &[self.vocab_size, self.hidden],
                0.0,
                0.3,
            );
        }
        for layer in 0..LAYERS {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let linears = [
                ("self_attn.q_proj", q, self.hidden),
                ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.v_proj", kv, self.hidden),
                ("self_attn.o_proj", self.hidden, q),
                ("mlp.gate_proj", self.intermediate(), self.hidden),
                ("mlp.up_proj", self.intermediate(), self.hidden),
                ("mlp.down_proj", self.hidden, self.intermediate()),
            ];
            for (part, rows, cols) in linears {
                add(name(&format!("{part}.weight")), &[rows, cols], 0.0, 1.0);
                let is_qkv = !part.ends_with("o_proj") && part.starts_with("self_attn");
                if self.model_type == "qwen2" && is_qkv {
                    add(name(&format!("{part}.bias")), &[rows], 0.0, 0.5);
                }
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(name(&format!("{norm}.weight")), &[self.hidden], 1.0, 0.1);
            }
            if self.model_type == "qwen3" {
                for norm in ["q_norm", "k_norm"] {
                    add(
                        name(&format!("self_attn.{norm}.weight")),
                        &[self.head_dim],
                        1.0,
                        0.2,
                    );
                }
            }
        }
        let views = tensors.iter().map(|(name, (dims, bytes))| {
            let dtype = safetensors::Dtype::BF16;
            (name, TensorView::new(dtype, dims.clone(), bytes).unwrap())
        });
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        safetensors::serialize_to_file(views, None, &file).unwrap();
        let config = serde_json::to_vec(&self.config()).unwrap();
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        folder
    }
}
