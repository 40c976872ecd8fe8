//! `Checkpoint` on directories and GGUF files: written by other people's code (the `safetensors`
//! crate, candle's GGUF writer), then read back whole, damaged, or as noise.

mod damage;
mod directory;
mod gguf;

use std::path::{Path, PathBuf};

use infold::weights::{Checkpoint, WeightsError};
use safetensors::{Dtype, tensor::TensorView};

/// A directory that is removed with its files.
struct Directory(tempfile::TempDir);

impl Directory {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let directory = tempfile::tempdir().expect("the system has a temporary directory");
        for (name, content) in files {
            std::fs::write(directory.path().join(name), content).expect("it is writable");
        }
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    fn error(&self) -> WeightsError {
        Checkpoint::open(self.path()).expect_err("it must be refused")
    }
}

/// A safetensors file of bf16 tensors that count up from 0.
fn shard(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let data: Vec<(&str, &[usize], Vec<u8>)> = (tensors.iter())
        .map(|&(name, shape)| {
            let values = 0..shape.iter().product::<usize>();
            let bytes = values.flat_map(|value| half::bf16::from_f64(value as f64).to_le_bytes());
            (name, shape, bytes.collect())
        })
        .collect();
    let views = data.iter().map(|(name, shape, data)| {
        let view = TensorView::new(Dtype::BF16, shape.to_vec(), data);
        (name, view.expect("size and shape agree"))
    });
    safetensors::serialize(views, None).expect("it serialises")
}

/// A safetensors file with this header and so many bytes of data.
fn raw_safetensors(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_bytes, 0);
    file
}

const CONFIG: (&str, &[u8]) = ("config.json", br#"{"model_type": "qwen2"}"#);

fn model_with(file: &[u8]) -> Directory {
    Directory::new(&[CONFIG, ("model.safetensors", file)])
}
