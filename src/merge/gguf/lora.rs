//! An adapter alone as a GGUF file, which llama.cpp and Ollama put on a base at load.
//!
//! The file has one `adapter.lora.alpha` for all modules; llama.cpp scales each module by
//! `alpha / rank`. Modules of other scales (rslora, `rank_pattern`, `alpha_pattern`) get theirs
//! folded into B, which `convert_lora_to_gguf.py` does not do.

use std::path::Path;

use anyhow::{Context, ensure};
use candle_core::quantized::GgmlDType;
use serde_json::Value;

use crate::weights::{
    GgufLayout, GgufTensor, GgufValue, RowOrder, StoredTensor, gguf_name, transpose,
};

use super::GgufSummary;
use super::metadata::{general, put_f32};
use super::plan::{made_tensor, summary_of, write_file};
use super::shape::ModelShape;

/// One module of an adapter: `ΔW = scale * B @ A`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraModule {
    /// Hugging Face name without PEFT's prefix and without `.weight`, such as
    /// `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Rows of A, columns of B.
    pub rank: usize,
    /// Columns of A: the module's inputs, for an embedding its tokens.
    pub in_features: usize,
    /// Rows of B: the module's outputs, for an embedding the hidden size.
    pub out_features: usize,
    /// A, `[rank, in_features]`.
    pub a: Vec<f32>,
    /// B, `[out_features, rank]`.
    pub b: Vec<f32>,
    /// What B A is multiplied by: `alpha / rank`, or with rslora `alpha / sqrt(rank)`.
    pub scale: f32,
}

/// Writes an adapter for the base with `config` (its `config.json`) as a GGUF file at `path`, in
/// f32.
///
/// # Errors
/// No modules; a module that the base does not have or that llama.cpp cannot adapt; shapes that do
/// not fit; a file that cannot be written.
pub fn export_gguf_lora(
    modules: &[LoraModule],
    config: &Value,
    name: Option<&str>,
    path: &Path,
) -> anyhow::Result<GgufSummary> {
    ensure!(!modules.is_empty(), "the adapter has no LoRA modules");
    let shape = ModelShape::from_config(config)?;
    let alpha = common_alpha(modules);
    let mut tensors = Vec::new();
    for module in modules {
        tensors.extend(module.tensors(&shape, alpha)?);
    }
    let mut metadata = general(&shape.architecture, "adapter", name);
    let kind = GgufValue::String("lora".to_owned());
    metadata.push(("adapter.type".to_owned(), kind));
    put_f32(&mut metadata, "adapter.lora.alpha", f64::from(alpha));
    let described = tensors.iter().map(|(tensor, _)| GgufTensor {
        name: tensor.name.clone(),
        dtype: GgmlDType::F32,
        shape: tensor.shape.clone(),
    });
    let layout = GgufLayout::new(&metadata, described.collect())?;
    let summary = summary_of(&layout, Vec::new());
    let mut tensors = tensors.into_iter();
    write_file(layout, path, &mut |_| {}, || {
        tensors.next().context("fewer tensors than the layout has")
    })?;
    Ok(summary)
}

/// Returns the alpha of the file: that of the first module that has one, so that the B of an
/// adapter whose modules are all alike stay as they are. llama.cpp takes 0 for "not scaled".
fn common_alpha(modules: &[LoraModule]) -> f32 {
    let alphas = modules
        .iter()
        .map(|module| module.scale * module.rank as f32);
    let mut usable = alphas.filter(|alpha| *alpha != 0.0 && alpha.is_finite());
    usable.next().unwrap_or(1.0)
}

impl LoraModule {
    /// Returns the module's two tensors and the order of their rows in the file.
    fn tensors(
        &self,
        shape: &ModelShape,
        alpha: f32,
    ) -> anyhow::Result<[(StoredTensor, RowOrder); 2]> {
        let (rank, in_features, out_features) = (self.rank, self.in_features, self.out_features);
        let target = gguf_name(&format!("{}.weight", self.name));
        let known = target.and_then(|name| Some((shape.tensor_shape(&name)?, name)));
        let (wanted, target) = known
            .filter(|(wanted, _)| wanted.len() == 2)
            .with_context(|| format!("llama.cpp cannot adapt {}", self.name))?;
        ensure!(
            !(shape.tie_word_embeddings && target == "output.weight"),
            "{} is tied to the embedding, llama.cpp cannot adapt it alone: merge the adapter \
             instead (--gguf)",
            self.name
        );
        // PEFT's A and B of an embedding give the transposed change of its matrix.
        let is_embedding = target == "token_embd.weight";
        let found = match is_embedding {
            true => [in_features, out_features],
            false => [out_features, in_features],
        };
        ensure!(
            wanted == found
                && self.a.len() == rank * in_features
                && self.b.len() == out_features * rank,
            "{}: A of {} and B of {} numbers with rank {rank} adapt a matrix of {found:?}, the \
             base has {wanted:?}",
            self.name,
            self.a.len(),
            self.b.len()
        );
        // llama.cpp multiplies by alpha / rank, wanted is the module's own scale.
        let fold = self.scale * rank as f32 / alpha;
        let b: Vec<f32> = self.b.iter().map(|value| value * fold).collect();
        let a = match is_embedding {
            true => made_tensor(
                &format!("{target}.lora_a"),
                vec![in_features, rank],
                &transpose(&self.a, rank, in_features),
            ),
            false => made_tensor(
                &format!("{target}.lora_a"),
                vec![rank, in_features],
                &self.a,
            ),
        };
        let order = RowOrder::of(&shape.architecture, &target, out_features, shape.heads)?;
        let b = made_tensor(&format!("{target}.lora_b"), vec![out_features, rank], &b);
        Ok([(a, RowOrder::AsStored), (b, order)])
    }
}
