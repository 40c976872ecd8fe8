//! The GGUF files of a merge: planned with it, written beside the shards or instead of them.

use std::path::Path;

use anyhow::{Context, ensure};
use sha2::{Digest, Sha256};

use super::companions::Companions;
use super::gguf::{GgufFileType, GgufOptions, GgufPlan, GgufSummary, LoraModule, export_gguf_lora};
use super::progress::Progress;
use crate::text::GgufVocabulary;
use crate::weights::{self, MergedCheckpoint, ModelSource, WrittenFile};

/// Name of the adapter's file.
pub(super) const LORA_FILE: &str = "lora.gguf";

/// A GGUF file that is decided but not written.
#[derive(Debug)]
pub(super) struct GgufFile {
    /// Its name in the output directory.
    pub(super) name: String,
    pub(super) plan: GgufPlan,
}

/// Plans a file for each type.
///
/// # Errors
/// A model or tokenizer that GGUF or llama.cpp does not know.
pub(super) fn plan(
    merged: &MergedCheckpoint,
    companions: &Companions,
    types: &[GgufFileType],
    model_name: &str,
) -> anyhow::Result<Vec<GgufFile>> {
    if types.is_empty() {
        return Ok(Vec::new());
    }
    let dir = &companions.tokenizer_dir;
    let mut vocabulary = GgufVocabulary::from_dir(dir, merged.config())
        .with_context(|| format!("read the tokenizer of {}", dir.display()))?;
    if let Some(template) = companions.chat_template() {
        vocabulary.chat_template = Some(template.to_owned());
    }
    vocabulary.eos = companions.eos_token_id.or(vocabulary.eos);
    let files = types.iter().map(|file_type| {
        let options = GgufOptions {
            file_type: *file_type,
            name: Some(model_name.to_owned()),
        };
        Ok(GgufFile {
            name: file_name(*file_type),
            plan: GgufPlan::new(merged, merged.config(), &vocabulary, &options)?,
        })
    });
    files.collect()
}

/// Returns the name of the file of a type.
pub(super) fn file_name(file_type: GgufFileType) -> String {
    format!("model-{}.gguf", file_type.name().to_ascii_uppercase())
}

/// Writes a planned file into `dir` and hashes it.
///
/// # Errors
/// Weights that do not fit the type, a full disk.
pub(super) fn write(
    file: GgufFile,
    merged: &MergedCheckpoint,
    dir: &Path,
    progress: &Progress,
) -> anyhow::Result<(WrittenFile, GgufSummary)> {
    let path = dir.join(&file.name);
    let summary = file
        .plan
        .write(merged, &path, &mut |bytes| progress.add(bytes))
        .with_context(|| format!("write {}", file.name))?;
    Ok((written(&path, file.name)?, summary))
}

/// Writes the only adapter of `merged` into `dir`.
///
/// # Errors
/// An adapter that is more than low-rank pairs, or that llama.cpp cannot put on this base.
pub(super) fn write_lora(
    merged: &MergedCheckpoint,
    weight: f32,
    dir: &Path,
) -> anyhow::Result<WrittenFile> {
    let adapter = merged.adapters().first().context("there is no adapter")?;
    let more: Vec<&str> = adapter.has_more().take(10).collect();
    ensure!(
        more.is_empty(),
        "llama.cpp's adapters hold low-rank pairs only, this one has more ({}): merge it instead \
         (--gguf)",
        more.join(", ")
    );
    let modules = adapter.modules()?;
    let modules = (modules.iter())
        .map(|module| {
            let (a, b) = (&module.a, &module.b);
            Ok(LoraModule {
                name: module.module.clone(),
                rank: a.shape[0],
                in_features: a.shape[1],
                out_features: b.shape[0],
                a: a.to_f32()?,
                b: b.to_f32()?,
                scale: module.scaling as f32 * weight,
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let path = dir.join(LORA_FILE);
    export_gguf_lora(&modules, merged.config(), None, &path)?;
    written(&path, LORA_FILE.to_owned())
}

fn written(path: &Path, name: String) -> anyhow::Result<WrittenFile> {
    let hash = || -> std::io::Result<(u64, String)> {
        let mut hasher = Sha256::new();
        let bytes = std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
        Ok((bytes, weights::hex(&hasher.finalize())))
    };
    let (bytes, sha256) = hash().with_context(|| format!("read {} again", path.display()))?;
    Ok(WrittenFile {
        name,
        bytes,
        sha256,
    })
}
