//! How tensors are split into safetensors files: byte for byte what `save_pretrained` writes.
//!
//! The split is that of `huggingface_hub`'s `split_state_dict_into_shards_factory`, the header
//! and the order in a file are those of the `safetensors` crate, the index is what transformers
//! writes with Python's `json.dumps(indent=2, sort_keys=True)`.

use std::{collections::BTreeMap, fmt::Write};

use candle_core::quantized::GgmlDType;
use serde::Serialize;

use super::{
    TensorInfo,
    directory::{INDEX_FILE, SINGLE_FILE},
};

/// The header's length and the header are padded to multiples of this.
const ALIGNMENT: usize = 8;

/// One safetensors file to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedShard {
    /// `model.safetensors` or `model-0000i-of-0000n.safetensors`.
    pub file_name: String,
    /// Tensors in the order in which they lie in the file.
    pub tensors: Vec<TensorInfo>,
    /// Bytes of all tensors.
    pub data_bytes: u64,
}

/// The files of a checkpoint to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardPlan {
    /// In the order of their numbers.
    pub shards: Vec<PlannedShard>,
}

impl ShardPlan {
    /// Splits tensors, given in the order of the state dict, into files of at most
    /// `max_shard_size` bytes of data; a larger tensor gets a file of its own.
    pub fn new(tensors: Vec<TensorInfo>, max_shard_size: u64) -> Self {
        let mut shards: Vec<Vec<TensorInfo>> = Vec::new();
        let mut current: Vec<TensorInfo> = Vec::new();
        let mut current_bytes = 0;
        for tensor in tensors {
            let bytes = tensor.size_bytes();
            if bytes > max_shard_size {
                shards.push(vec![tensor]);
                continue;
            }
            if current_bytes + bytes > max_shard_size {
                shards.push(std::mem::take(&mut current));
                current_bytes = 0;
            }
            current_bytes += bytes;
            current.push(tensor);
        }
        if !current.is_empty() {
            shards.push(current);
        }
        let count = shards.len();
        let shards = shards
            .into_iter()
            .enumerate()
            .map(|(index, tensors)| PlannedShard::new(index + 1, count, tensors))
            .collect();
        Self { shards }
    }

    /// Returns the bytes of all tensors.
    pub fn data_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.data_bytes).sum()
    }

    /// Returns the bytes of all files, without the index.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(PlannedShard::file_bytes).sum()
    }

    /// Returns name and content of the index, if there is more than one file.
    pub fn index(&self) -> Option<(&'static str, String)> {
        if self.shards.len() < 2 {
            return None;
        }
        let weight_map: BTreeMap<&str, &str> = (self.shards.iter())
            .flat_map(|shard| {
                (shard.tensors.iter()).map(|tensor| (&*tensor.name, &*shard.file_name))
            })
            .collect();
        let mut json = format!(
            "{{\n  \"metadata\": {{\n    \"total_size\": {}\n  }},\n  \"weight_map\": {{",
            self.data_bytes()
        );
        for (i, (tensor, file)) in weight_map.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            // Writing to a string cannot fail.
            let _ = write!(json, "{comma}\n    {}: {}", quoted(tensor), quoted(file));
        }
        json.push_str("\n  }\n}\n");
        Some((INDEX_FILE, json))
    }
}

impl PlannedShard {
    fn new(number: usize, count: usize, mut tensors: Vec<TensorInfo>) -> Self {
        tensors.sort_by(|a, b| {
            (dtype_rank(b.dtype).cmp(&dtype_rank(a.dtype))).then_with(|| a.name.cmp(&b.name))
        });
        let file_name = if count == 1 {
            SINGLE_FILE.to_owned()
        } else {
            format!("model-{number:05}-of-{count:05}.safetensors")
        };
        Self {
            file_name,
            data_bytes: tensors.iter().map(TensorInfo::size_bytes).sum(),
            tensors,
        }
    }

    /// Returns the bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.header().len() as u64 + self.data_bytes
    }

    /// Returns all that stands before the tensors' bytes.
    pub(super) fn header(&self) -> Vec<u8> {
        /// A tensor in the header; the fields are written in this order.
        #[derive(Serialize)]
        struct Entry<'a> {
            dtype: &'a str,
            shape: &'a [usize],
            data_offsets: [u64; 2],
        }
        // Transformers refuses files without this entry.
        let mut json = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
        let mut offset = 0;
        for tensor in &self.tensors {
            let end = offset + tensor.size_bytes();
            let entry = Entry {
                dtype: dtype_name(tensor.dtype),
                shape: &tensor.shape,
                data_offsets: [offset, end],
            };
            let entry = serde_json::to_string(&entry).expect("strings and numbers are JSON");
            let _ = write!(json, ",{}:{entry}", json_string(&tensor.name));
            offset = end;
        }
        json.push('}');
        let length = json.len().next_multiple_of(ALIGNMENT);
        let mut header = (length as u64).to_le_bytes().to_vec();
        header.extend_from_slice(json.as_bytes());
        header.resize(ALIGNMENT + length, b' ');
        header
    }
}

/// Returns the place of a dtype in the order of the safetensors crate, which puts larger first.
fn dtype_rank(dtype: GgmlDType) -> u8 {
    match dtype {
        GgmlDType::F32 => 2,
        GgmlDType::BF16 => 1,
        _ => 0,
    }
}

fn dtype_name(dtype: GgmlDType) -> &'static str {
    match dtype {
        GgmlDType::F32 => "F32",
        GgmlDType::BF16 => "BF16",
        _ => "F16",
    }
}

/// Returns a JSON string as serde writes it.
fn json_string(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON")
}

/// Returns a JSON string as Python writes it, with everything beyond ASCII escaped.
fn quoted(text: &str) -> String {
    let mut quoted = String::new();
    for c in json_string(text).chars() {
        if c.is_ascii() {
            quoted.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(quoted, "\\u{unit:04x}");
            }
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::state_dict_order::sort_as_state_dict;

    struct Shape {
        hidden: usize,
        intermediate: usize,
        layers: usize,
        kv: usize,
        vocab: usize,
        tied: bool,
    }

    /// The tensors of a Qwen2 model in bf16.
    fn qwen2(shape: &Shape) -> Vec<TensorInfo> {
        let Shape {
            hidden,
            intermediate,
            layers,
            kv,
            vocab,
            tied,
        } = *shape;
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            tensors.push(TensorInfo {
                name,
                dtype: GgmlDType::BF16,
                shape: shape.to_vec(),
            });
        };
        add("model.embed_tokens.weight".to_owned(), &[vocab, hidden]);
        if !tied {
            add("lm_head.weight".to_owned(), &[vocab, hidden]);
        }
        add("model.norm.weight".to_owned(), &[hidden]);
        for layer in 0..layers {
            let at = |name: &str| format!("model.layers.{layer}.{name}");
            for (name, rows) in [("q", hidden), ("k", kv), ("v", kv)] {
                add(
                    at(&format!("self_attn.{name}_proj.weight")),
                    &[rows, hidden],
                );
                add(at(&format!("self_attn.{name}_proj.bias")), &[rows]);
            }
            add(at("self_attn.o_proj.weight"), &[hidden, hidden]);
            add(at("mlp.gate_proj.weight"), &[intermediate, hidden]);
            add(at("mlp.up_proj.weight"), &[intermediate, hidden]);
            add(at("mlp.down_proj.weight"), &[hidden, intermediate]);
            add(at("input_layernorm.weight"), &[hidden]);
            add(at("post_attention_layernorm.weight"), &[hidden]);
        }
        sort_as_state_dict(&mut tensors);
        tensors
    }

    const QWEN2_7B: Shape = Shape {
        hidden: 3584,
        intermediate: 18944,
        layers: 28,
        kv: 512,
        vocab: 152_064,
        tied: false,
    };

    #[test]
    fn the_7b_model_splits_as_on_the_hub() {
        let plan = ShardPlan::new(qwen2(&QWEN2_7B), 5_000_000_000);
        assert_eq!(plan.data_bytes(), 15_231_233_024);
        let found: Vec<_> = (plan.shards.iter())
            .map(|shard| (shard.tensors.len(), shard.data_bytes, shard.file_bytes()))
            .collect();
        assert_eq!(
            found,
            [
                (104, 4_877_648_896, 4_877_660_776),
                (122, 4_932_737_024, 4_932_751_008),
                (112, 4_330_852_352, 4_330_865_200),
                (1, 1_089_994_752, 1_089_994_880),
            ]
        );
        let (_, index) = plan.index().unwrap();
        assert!(index.contains(
            "\"model.layers.18.mlp.down_proj.weight\": \"model-00003-of-00004.safetensors\""
        ));
    }

    #[test]
    fn a_tensor_above_the_limit_gets_its_own_file_in_its_turn() {
        let plan = ShardPlan::new(qwen2(&QWEN2_7B), 2_000_000_000);
        let bytes: Vec<u64> = plan.shards.iter().map(|shard| shard.data_bytes).collect();
        assert_eq!(bytes[0], 1_886_420_992);
        assert_eq!(bytes[1..7], [1_864_462_336; 6]);
        assert_eq!(bytes[7..], [1_068_043_264, 1_089_994_752]);
        // 1 GB: the embedding (1.09 GB) is the first file, the head the last but one.
        let plan = ShardPlan::new(qwen2(&QWEN2_7B), 1_000_000_000);
        assert_eq!(plan.shards[0].tensors[0].name, "model.embed_tokens.weight");
        let last = plan.shards.len() - 1;
        assert_eq!(plan.shards[last - 1].tensors[0].name, "lm_head.weight");
    }

    #[test]
    fn tied_models_have_the_known_sizes() {
        let tied = |hidden, intermediate, layers, kv| Shape {
            hidden,
            intermediate,
            layers,
            kv,
            vocab: 151_936,
            tied: true,
        };
        for (shape, tensors, files) in [
            (tied(896, 4864, 24, 128), 290, vec![988_097_824]),
            (tied(1536, 8960, 28, 256), 338, vec![3_087_467_144]),
        ] {
            let plan = ShardPlan::new(qwen2(&shape), 5_000_000_000);
            assert_eq!(plan.shards[0].tensors.len(), tensors);
            let found: Vec<u64> = plan.shards.iter().map(PlannedShard::file_bytes).collect();
            assert_eq!(found, files);
            assert_eq!(plan.shards[0].file_name, "model.safetensors");
            assert_eq!(plan.index(), None);
        }
        let plan = ShardPlan::new(qwen2(&tied(2048, 11008, 36, 256)), 5_000_000_000);
        let bytes: Vec<u64> = plan.shards.iter().map(|shard| shard.data_bytes).collect();
        assert_eq!(bytes, [4_957_520_896, 1_214_356_480]);
    }

    #[test]
    fn the_header_is_that_of_the_safetensors_crate() {
        use safetensors::tensor::{Dtype, TensorView, serialize};
        let info = |name: &str, dtype, shape: &[usize]| TensorInfo {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
        };
        let tensors = vec![
            info("a\"ü.10", GgmlDType::BF16, &[2, 3]),
            info("z.2", GgmlDType::F16, &[]),
            info("b", GgmlDType::F32, &[1]),
            info("a.9", GgmlDType::BF16, &[0]),
        ];
        let data = [0; 12];
        let views = tensors.iter().map(|tensor| {
            let dtype = match tensor.dtype {
                GgmlDType::F32 => Dtype::F32,
                GgmlDType::F16 => Dtype::F16,
                _ => Dtype::BF16,
            };
            let data = &data[..tensor.size_bytes() as usize];
            (
                &tensor.name,
                TensorView::new(dtype, tensor.shape.clone(), data).unwrap(),
            )
        });
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let wanted = serialize(views, Some(metadata)).unwrap();
        let plan = ShardPlan::new(tensors.clone(), 1000);
        let mut found = plan.shards[0].header();
        found.resize(found.len() + plan.data_bytes() as usize, 0);
        assert_eq!(
            String::from_utf8_lossy(&found),
            String::from_utf8_lossy(&wanted)
        );
    }

    #[test]
    fn the_index_is_what_python_writes() {
        let info = |name: &str| TensorInfo {
            name: name.to_owned(),
            dtype: GgmlDType::F32,
            shape: vec![1],
        };
        let plan = ShardPlan::new(vec![info("b"), info("ä")], 4);
        let (name, json) = plan.index().unwrap();
        assert_eq!(name, "model.safetensors.index.json");
        assert_eq!(
            json,
            "{\n  \"metadata\": {\n    \"total_size\": 8\n  },\n  \"weight_map\": {\n    \
             \"b\": \"model-00001-of-00002.safetensors\",\n    \
             \"\\u00e4\": \"model-00002-of-00002.safetensors\"\n  }\n}\n"
        );
    }
}
