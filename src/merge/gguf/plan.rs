//! From the headers of a checkpoint to the layout of a GGUF file, and from there to the file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use candle_core::quantized::GgmlDType;
use serde_json::Value;

use crate::text::GgufVocabulary;
use crate::weights::{
    GgufLayout, GgufTensor, GgufWriter, RowEncoder, RowOrder, StoredTensor, TensorInfo,
    TensorSource, gguf_name,
};

use super::recipe::matrix_type;
use super::shape::ModelShape;
use super::{GgufOptions, GgufSummary, metadata};

/// Llama 3's divisors of the rotary frequencies, which GGUF holds as a tensor.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// A GGUF file that is decided but not written.
#[derive(Debug)]
pub struct GgufPlan {
    layout: GgufLayout,
    /// Where each tensor of the layout comes from, in its order.
    origins: Vec<Origin>,
    fallbacks: Vec<String>,
}

#[derive(Debug)]
enum Origin {
    /// A tensor of the source, by its Hugging Face name.
    Source { hf_name: String, order: RowOrder },
    /// A tensor that is made here.
    Made(StoredTensor),
}

impl GgufPlan {
    /// Decides names, types, order and sizes of all tensors from headers alone, and checks that
    /// tensors, configuration and vocabulary fit each other.
    ///
    /// # Errors
    /// What does not fit, with names, the shape wanted and the shape found.
    pub fn new(
        source: &dyn TensorSource,
        config: &Value,
        vocabulary: &GgufVocabulary,
        options: &GgufOptions,
    ) -> anyhow::Result<Self> {
        let shape = ModelShape::from_config(config)?;
        check_vocabulary(vocabulary, &shape)?;
        let named = name_tensors(source.tensors()?, &shape)?;
        check_complete(&named, &shape)?;

        let mut tensors = Vec::new();
        let mut origins = Vec::new();
        let mut fallbacks = Vec::new();
        for (place, info) in named {
            let name = place.gguf_name;
            let dtype = match info.shape.as_slice() {
                [_, columns] => {
                    let (wanted, dtype) = matrix_type(options.file_type, &name, *columns, &shape);
                    if wanted != dtype {
                        fallbacks.push(name.clone());
                    }
                    dtype
                }
                // Norms and biases are few, and read as they are.
                _ => GgmlDType::F32,
            };
            let rows = info.shape.first().copied().unwrap_or(0);
            origins.push(Origin::Source {
                order: RowOrder::of(&shape.architecture, &name, rows, shape.heads)?,
                hf_name: info.name,
            });
            tensors.push(GgufTensor {
                name,
                dtype,
                shape: info.shape,
            });
        }
        if let Some(factors) = shape.rope_factors() {
            let tensor = made_tensor(ROPE_FREQS, vec![factors.len()], &factors);
            tensors.push(GgufTensor {
                name: tensor.name.clone(),
                dtype: GgmlDType::F32,
                shape: tensor.shape.clone(),
            });
            origins.push(Origin::Made(tensor));
        }
        let metadata = metadata::of_model(&shape, vocabulary, options);
        let layout = GgufLayout::new(&metadata, tensors)?;
        Ok(Self {
            layout,
            origins,
            fallbacks,
        })
    }

    /// Returns the exact size of the file.
    pub fn size_bytes(&self) -> u64 {
        self.layout.file_bytes()
    }

    /// Returns what writing will report.
    pub fn summary(&self) -> GgufSummary {
        summary_of(&self.layout, self.fallbacks.clone())
    }

    /// Writes the file, one tensor of `source` at a time; `progress` is told the bytes of tensor
    /// data as they are written.
    ///
    /// # Errors
    /// A tensor that cannot be read, made or encoded; a file that cannot be written. Nothing stays
    /// under `path` then, or what was there before.
    pub fn write(
        self,
        source: &dyn TensorSource,
        path: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> anyhow::Result<GgufSummary> {
        let summary = self.summary();
        let mut origins = self.origins.into_iter();
        write_file(self.layout, path, progress, || match origins.next() {
            Some(Origin::Source { hf_name, order }) => Ok((source.tensor(&hf_name)?, order)),
            Some(Origin::Made(tensor)) => Ok((tensor, RowOrder::AsStored)),
            None => bail!("fewer tensors than the layout has"),
        })?;
        Ok(summary)
    }
}

/// Writes a file of the layout with the tensors that `next` returns one after the other.
pub(super) fn write_file(
    layout: GgufLayout,
    path: &Path,
    progress: &mut dyn FnMut(u64),
    mut next: impl FnMut() -> anyhow::Result<(StoredTensor, RowOrder)>,
) -> anyhow::Result<()> {
    let tensors: Vec<GgufTensor> = layout.tensors().map(|(tensor, _)| tensor.clone()).collect();
    let mut writer = GgufWriter::create(path, layout)?;
    for GgufTensor { name, dtype, shape } in tensors {
        let (tensor, order) = next()?;
        tensor.expect_shape(&shape)?;
        let encoder = RowEncoder {
            name: &name,
            tensor: &tensor,
            dtype,
            order,
        };
        encoder
            .encode(&mut |bytes| {
                writer.write(bytes)?;
                progress(bytes.len() as u64);
                Ok(())
            })
            .with_context(|| format!("writing tensor {name} of {}", path.display()))?;
    }
    writer.finish()?;
    Ok(())
}

/// Sums a layout up.
pub(super) fn summary_of(layout: &GgufLayout, fallbacks: Vec<String>) -> GgufSummary {
    let mut types = BTreeMap::<String, usize>::new();
    for (tensor, _) in layout.tensors() {
        *types.entry(type_name(tensor.dtype)).or_default() += 1;
    }
    GgufSummary {
        file_bytes: layout.file_bytes(),
        tensor_bytes: layout.tensor_bytes(),
        types: types.into_iter().collect(),
        fallbacks,
    }
}

/// Returns ggml's name of a type.
fn type_name(dtype: GgmlDType) -> String {
    match dtype {
        GgmlDType::Q4K => "Q4_K".to_owned(),
        GgmlDType::Q5K => "Q5_K".to_owned(),
        GgmlDType::Q6K => "Q6_K".to_owned(),
        other => format!("{other:?}"),
    }
}

/// Makes an f32 tensor of values.
pub(super) fn made_tensor(name: &str, shape: Vec<usize>, values: &[f32]) -> StoredTensor {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    StoredTensor {
        name: name.to_owned(),
        dtype: GgmlDType::F32,
        shape,
        data: bytes.into(),
    }
}

/// The place of a tensor in the file: embedding, layers in order, final norm, head.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    section: u8,
    layer: usize,
    gguf_name: String,
}

impl Place {
    fn of(gguf_name: String) -> Self {
        let layer = gguf_name
            .strip_prefix("blk.")
            .and_then(|rest| rest.split_once('.')?.0.parse().ok());
        let section = match (layer, gguf_name.as_str()) {
            (Some(_), _) => 1,
            (None, name) if name.starts_with("token_embd") => 0,
            (None, name) if name.starts_with("output_norm") => 2,
            (None, _) => 3,
        };
        Self {
            section,
            layer: layer.unwrap_or(0),
            gguf_name,
        }
    }
}

/// Gives the tensors their names and order, and leaves out those that GGUF does not hold.
fn name_tensors(
    tensors: Vec<TensorInfo>,
    shape: &ModelShape,
) -> anyhow::Result<BTreeMap<Place, TensorInfo>> {
    let mut named = BTreeMap::new();
    let mut unknown = Vec::new();
    for info in tensors {
        // Old checkpoints store the rotary frequencies, which follow from the configuration; a
        // head beside tied embeddings is not used by transformers either.
        let unused = info.name.ends_with("rotary_emb.inv_freq")
            || (shape.tie_word_embeddings && info.name == "lm_head.weight");
        if unused {
            continue;
        }
        let place = gguf_name(&info.name).and_then(|name| {
            let wanted = shape.tensor_shape(&name)?;
            Some((name, wanted))
        });
        let Some((name, wanted)) = place else {
            unknown.push(info.name);
            continue;
        };
        ensure!(
            info.shape == wanted,
            "tensor {} has shape {:?}, config.json asks for {wanted:?}",
            info.name,
            info.shape
        );
        named.insert(Place::of(name), info);
    }
    if !unknown.is_empty() {
        let more = unknown.len().saturating_sub(5);
        unknown.truncate(5);
        bail!(
            "llama.cpp has no name for these tensors of a {} model: {}{}",
            shape.architecture,
            unknown.join(", "),
            if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            }
        );
    }
    Ok(named)
}

/// Refuses a checkpoint that lacks what llama.cpp needs to load the file.
fn check_complete(named: &BTreeMap<Place, TensorInfo>, shape: &ModelShape) -> anyhow::Result<()> {
    let mut parts = vec![
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    if shape.architecture == "qwen3" {
        parts.extend(["attn_q_norm", "attn_k_norm"]);
    }
    let mut wanted = vec![
        "token_embd.weight".to_owned(),
        "output_norm.weight".to_owned(),
    ];
    if !shape.tie_word_embeddings {
        wanted.push("output.weight".to_owned());
    }
    for layer in 0..shape.num_layers {
        wanted.extend(
            parts
                .iter()
                .map(|part| format!("blk.{layer}.{part}.weight")),
        );
        if shape.architecture == "qwen2" {
            let biases = ["attn_q", "attn_k", "attn_v"];
            wanted.extend(biases.map(|part| format!("blk.{layer}.{part}.bias")));
        }
    }
    let found: BTreeSet<&str> = named.keys().map(|place| place.gguf_name.as_str()).collect();
    if let Some(missing) = wanted.iter().find(|name| !found.contains(name.as_str())) {
        bail!("the checkpoint has no tensor for {missing}, which llama.cpp needs");
    }
    let beyond = named.keys().find(|place| place.layer >= shape.num_layers);
    if let Some(place) = beyond {
        bail!(
            "the checkpoint has {}, config.json says num_hidden_layers {}",
            place.gguf_name,
            shape.num_layers
        );
    }
    Ok(())
}

fn check_vocabulary(vocabulary: &GgufVocabulary, shape: &ModelShape) -> anyhow::Result<()> {
    let num_tokens = vocabulary.tokens.len();
    ensure!(
        num_tokens == shape.vocab_size,
        "the vocabulary has {num_tokens} tokens, config.json says vocab_size {}: llama.cpp wants \
         one token for every row of the embedding",
        shape.vocab_size
    );
    ensure!(
        vocabulary.token_types.len() == num_tokens,
        "the vocabulary has {num_tokens} tokens but {} token types",
        vocabulary.token_types.len()
    );
    Ok(())
}
