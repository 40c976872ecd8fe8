//! A GGUF file as a Hugging Face directory, for training and merging, which need float weights.
//!
//! Only what a GGUF file carries can be written: its weights widened and rounded to one dtype, a
//! configuration, a tokenizer and a chat template. A model that was quantised stays what
//! quantisation made of it.

use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Context, bail};
use candle_core::quantized::GgmlDType;
use serde_json::{Map, Value, json};

use super::args::{Files, MergeConfig, Task};
use super::output::{Existing, Staging};
use super::progress::Progress;
use super::{SPARE_BYTES, check_space, gigabytes};
use crate::weights::{
    self, Checkpoint, DequantizedCheckpoint, ShardPlan, TensorSource, TokenizerSource,
};

/// Writes the directory, or says what would be written.
///
/// # Errors
/// Wishes that need a directory to begin with; a model whose configuration or vocabulary has no
/// counterpart; a weight that the dtype cannot hold; a full disk. The output directory is then as
/// it was.
pub(super) fn run(config: &MergeConfig, base: Checkpoint) -> anyhow::Result<()> {
    check_wishes(config)?;
    let mut model_config = base.config().clone();
    let dtype = match config.options.dtype {
        Some(dtype) => dtype,
        None => match model_config["torch_dtype"].as_str() {
            Some("float32") => GgmlDType::F32,
            Some("bfloat16") => GgmlDType::BF16,
            _ => GgmlDType::F16,
        },
    };
    complete_config(&mut model_config, dtype)?;
    let mut files = vec![("config.json".to_owned(), format!("{model_config:#}\n"))];
    if let Some(generation_config) = base.generation_config() {
        let content = format!("{generation_config:#}\n");
        files.push(("generation_config.json".to_owned(), content));
    }
    if let TokenizerSource::Gguf(vocabulary) = base.tokenizer() {
        files.extend(vocabulary.to_files()?);
    }
    let path = base.path().to_owned();
    let source = DequantizedCheckpoint::new(Arc::new(base), dtype);
    let plan = ShardPlan::new(source.tensors()?, config.max_shard_size);
    let lengths = files.iter().map(|(_, content)| content.len() as u64);
    let size_bytes = plan.file_bytes() + lengths.sum::<u64>();
    if config.task == Task::DryRun {
        let mut out = std::io::stdout().lock();
        let tensors: usize = plan.shards.iter().map(|shard| shard.tensors.len()).sum();
        return writeln!(
            out,
            "{tensors} tensors would be written as {dtype:?} in {} files, {}, with {} other files",
            plan.shards.len(),
            gigabytes(size_bytes),
            files.len()
        )
        .context("print the plan");
    }

    let existing = match config.overwrite {
        true => Existing::Replace,
        false => Existing::Keep,
    };
    let staging = Staging::begin(&config.output, &[&path], existing)?;
    check_space(&config.output, staging.dir(), size_bytes + SPARE_BYTES)?;
    let unchanged = || {
        let output = config.output.display();
        format!("nothing was written, {output} is as it was before")
    };
    let progress = Progress::new(plan.file_bytes(), "writing");
    let on_bytes = &mut |bytes| progress.add(bytes);
    weights::write_shards(&plan, &source, staging.dir(), on_bytes).with_context(unchanged)?;
    if let Some((name, index)) = plan.index() {
        files.push((name.to_owned(), index));
    }
    for (name, content) in &files {
        staging.write(name, content.as_bytes())?;
    }
    staging.publish().with_context(unchanged)?;
    let seconds = progress.finish().as_secs_f64();
    writeln!(
        std::io::stdout().lock(),
        "{} written to {} as {dtype:?} in {seconds:.1} s",
        gigabytes(size_bytes),
        config.output.display()
    )
    .context("print the report")
}

/// Refuses what a merge can do and this cannot.
fn check_wishes(config: &MergeConfig) -> anyhow::Result<()> {
    let model = &config.model;
    let first = format!(
        "{model} is a GGUF file: write it as a directory first (infold merge --model {model} \
         --output DIRECTORY)"
    );
    if config.files != Files::Model(Vec::new()) {
        bail!("{first}, then give that directory with --gguf or --gguf-lora");
    }
    if config.task == Task::Check {
        bail!("{first}; --check compares merges of directories");
    }
    if config.prompts.template.is_some() || config.prompts.default_system.is_some() {
        bail!("{first}, then give that directory with --template or --default-system");
    }
    Ok(())
}

/// Turns the configuration that infold reads into the one that transformers reads.
fn complete_config(config: &mut Value, dtype: GgmlDType) -> anyhow::Result<()> {
    let config = config
        .as_object_mut()
        .context("the configuration is no object")?;
    // The name of a training run, which transformers would show as a path.
    config.remove("_name_or_path");
    if let Some(factors) = config.remove("rope_freq_factors") {
        let scaling = llama3_scaling(config, &factors).context(
            "its rope_freqs.weight is not a frequency scaling of Llama 3, config.json has no words \
             for it; take the Hugging Face directory that the file was made from",
        )?;
        config.insert("rope_scaling".to_owned(), scaling);
    }
    if let Some(scaling) = config
        .get_mut("rope_scaling")
        .and_then(Value::as_object_mut)
        && let Some(kind) = scaling.get("rope_type").cloned()
    {
        // Ollama reads `type`, newer transformers `rope_type`.
        scaling.insert("type".to_owned(), kind);
    }
    let name = weights::torch_dtype(dtype);
    config.insert("torch_dtype".to_owned(), name.into());
    Ok(())
}

/// Returns Llama 3's scaling if these are its divisors of the rotary frequencies: all models have
/// the same two bounds, the factor is the largest divisor, and any divisor between 1 and the factor
/// tells the original length.
fn llama3_scaling(config: &Map<String, Value>, divisors: &Value) -> Option<Value> {
    // Where no divisor lies between, any length that makes none will do; this is Llama's.
    const USUAL_LENGTH: f64 = 8192.0;
    let divisors: Vec<f64> = (divisors.as_array()?.iter())
        .map(Value::as_f64)
        .collect::<Option<_>>()?;
    let theta = config.get("rope_theta")?.as_f64()?;
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    let wavelength = |pair: usize| {
        let exponent = pair as f64 / divisors.len() as f64;
        2.0 * std::f64::consts::PI * theta.powf(exponent)
    };
    // 1 / factor of a frequency is kept below one turn, all of it above four, and between them
    // kept = (turns - 1) / 3 with 1 / divisor = (1 - kept) / factor + kept.
    let between = |divisor: &f64| *divisor > 1.001 && *divisor < 0.999 * factor;
    let length = divisors.iter().position(between).map(|pair| {
        let kept = (1.0 / divisors[pair] - 1.0 / factor) / (1.0 - 1.0 / factor);
        (wavelength(pair) * (1.0 + 3.0 * kept)).round()
    });
    let length = length.unwrap_or(USUAL_LENGTH);
    let fits = divisors.iter().enumerate().all(|(pair, divisor)| {
        let kept = ((length / wavelength(pair) - 1.0) / 3.0).clamp(0.0, 1.0);
        let wanted = 1.0 / ((1.0 - kept) / factor + kept);
        (divisor / wanted - 1.0).abs() < 1e-3
    });
    fits.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length as u64,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divisors(factor: f64) -> Value {
        let divisor = |pair: i32| {
            let wavelength = 2.0 * std::f64::consts::PI * 500_000_f64.powf(f64::from(pair) / 32.0);
            let turns = 8192.0 / wavelength;
            match turns {
                turns if turns < 1.0 => factor,
                turns if turns > 4.0 => 1.0,
                turns => {
                    let smooth = (turns - 1.0) / 3.0;
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            }
        };
        (0..32).map(|pair| divisor(pair) as f32).collect()
    }

    #[test]
    fn llama3s_divisors_become_its_scaling_and_others_are_refused() {
        let mut config = json!({"rope_theta": 500_000.0, "rope_freq_factors": divisors(32.0)});
        complete_config(&mut config, GgmlDType::BF16).unwrap();
        assert_eq!(config["rope_scaling"]["rope_type"], "llama3");
        assert_eq!(config["rope_scaling"]["type"], "llama3");
        assert_eq!(config["rope_scaling"]["factor"], 32.0);
        assert_eq!(config["torch_dtype"], "bfloat16");
        assert!(config.get("rope_freq_factors").is_none());
        assert_eq!(
            config["rope_scaling"]["original_max_position_embeddings"],
            8192
        );
        let mut other = json!({"rope_theta": 10_000.0, "rope_freq_factors": divisors(32.0)});
        let error = complete_config(&mut other, GgmlDType::F16).unwrap_err();
        assert!(error.to_string().contains("rope_freqs.weight"), "{error}");
    }
}
