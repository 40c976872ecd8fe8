//! The flags of `infold merge`, and how they meet the keys of a LLaMA-Factory file.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use candle_core::quantized::GgmlDType;
use clap::{Args, ValueEnum};

use super::gguf::GgufFileType;
use super::prompts::PromptOptions;
use super::settings::{self, Settings};
use crate::weights::{self, MergeOptions};

/// Fold LoRA adapters into the weights of their base model
#[derive(Debug, Clone, Default, Args)]
pub struct MergeArgs {
    /// Read LLaMA-Factory's export keys from this YAML or JSON file, and set single keys after it
    #[arg(value_name = "FILE|KEY=VALUE")]
    pub settings: Vec<String>,

    /// Fold into this model: a directory or a hub id [default: none]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// Fold in these adapters, directories or hub ids, in this order, separated by commas [default: none]
    #[arg(long, value_name = "ADAPTER", value_delimiter = ',')]
    pub adapter: Vec<String>,

    /// Weight the adapters with these factors [default: 1 each]
    #[arg(
        long,
        value_name = "NUMBER",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    pub adapter_weight: Vec<f32>,

    /// Look for each adapter in this subdirectory of its directory [default: none]
    #[arg(long, value_name = "NAME")]
    pub adapter_folder: Option<String>,

    /// Write the merged model to this directory [default: none]
    #[arg(long, short, value_name = "DIRECTORY")]
    pub output: Option<PathBuf>,

    /// Start a new file above this size: 5GB (10⁹ bytes each), 500MB, or bytes [default: 5GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_shard_size)]
    pub max_shard_size: Option<u64>,

    /// Round once after all adapters (fp32), or after each one as LLaMA-Factory does [default: fp32]
    #[arg(long, value_enum)]
    pub accumulate: Option<Accumulate>,

    /// Store all weights as this type [default: auto, as in the model]
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,

    /// Take the model for one trained with this template (qwen, qwen@0.9.2, qwen3, llama3, chatml, …) [default: as the adapter says, else by the model's tokens]
    #[arg(long, value_name = "NAME")]
    pub template: Option<String>,

    /// Give conversations without a system prompt this one: in chat template, Modelfile and record [default: as it is]
    #[arg(long, value_name = "TEXT")]
    pub default_system: Option<String>,

    /// Write a Modelfile for Ollama in this style [default: complete]
    #[arg(long, value_enum)]
    pub modelfile: Option<ModelfileChoice>,

    /// Write GGUF files of these types too, separated by commas [default: none]
    #[arg(long, value_enum, value_name = "TYPE", value_delimiter = ',')]
    pub gguf: Vec<GgufFileType>,

    /// Write the GGUF files without the safetensors [default: off]
    #[arg(long)]
    pub gguf_only: bool,

    /// Write nothing but the adapter as lora.gguf and a Modelfile that puts it on the model [default: off]
    #[arg(long, conflicts_with_all = ["gguf", "gguf_only", "check"])]
    pub gguf_lora: bool,

    /// Replace an output directory that holds a model [default: off]
    #[arg(long)]
    pub overwrite: bool,

    /// Show what would be done, and write nothing [default: off]
    #[arg(long)]
    pub dry_run: bool,

    /// Compare an existing output directory with what would be written [default: off]
    #[arg(long, conflicts_with = "dry_run")]
    pub check: bool,

    /// Take this branch, tag or commit of a hub model [default: main]
    #[arg(long)]
    pub revision: Option<String>,
}

/// When sums are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accumulate {
    /// Once, after all adapters.
    Fp32,
    /// After each adapter.
    Llamafactory,
}

/// Which Modelfile is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModelfileChoice {
    /// With tools, all stop words and the model's sampling parameters.
    Complete,
    /// LLaMA-Factory's, byte for byte.
    Llamafactory,
    /// None.
    None,
}

/// The type of the stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// As in the model.
    Auto,
    /// 32 bits.
    #[value(alias = "fp32")]
    Float32,
    /// 16 bits with 5 of exponent.
    #[value(alias = "half", alias = "fp16")]
    Float16,
    /// 16 bits with 8 of exponent.
    #[value(alias = "bf16")]
    Bfloat16,
}

impl Dtype {
    fn stored(self) -> Option<GgmlDType> {
        match self {
            Self::Auto => None,
            Self::Float32 => Some(GgmlDType::F32),
            Self::Float16 => Some(GgmlDType::F16),
            Self::Bfloat16 => Some(GgmlDType::BF16),
        }
    }
}

/// What to do with the merged model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Write it.
    Write,
    /// Say what would be written.
    DryRun,
    /// Compare it with what is there.
    Check,
}

/// Which files hold the weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Files {
    /// Shards of safetensors, and GGUF files of these types.
    Model(Vec<GgufFileType>),
    /// GGUF files of these types alone.
    Gguf(Vec<GgufFileType>),
    /// The adapter as a GGUF file.
    GgufLora,
}

/// All that a merge is asked to do, checked.
#[derive(Debug, Clone)]
pub(super) struct MergeConfig {
    pub(super) model: String,
    /// Directories or hub ids with their weights, in order.
    pub(super) adapters: Vec<(String, f32)>,
    pub(super) adapter_folder: Option<String>,
    pub(super) output: PathBuf,
    pub(super) max_shard_size: u64,
    pub(super) options: MergeOptions,
    pub(super) prompts: PromptOptions,
    pub(super) files: Files,
    pub(super) overwrite: bool,
    pub(super) task: Task,
    pub(super) revision: Option<String>,
    /// What in the settings has no effect, one sentence each.
    pub(super) warnings: Vec<String>,
}

/// As transformers 4.
const DEFAULT_SHARD_SIZE: u64 = 5_000_000_000;

impl MergeConfig {
    /// Puts flags over the keys of the file.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown key, a missing model or output directory.
    pub(super) fn from_args(args: &MergeArgs) -> anyhow::Result<Self> {
        let settings = Settings::read(&args.settings)?;
        let files = Files::of(args, &settings)?;
        let model = args.model.clone().or(settings.model).context(
            "no model is given: set --model (model_name_or_path) to a directory or a hub id",
        )?;
        let output = args
            .output
            .clone()
            .or(settings.output)
            .context("no output directory is given: set --output (export_dir)")?;
        let adapters = if args.adapter.is_empty() {
            settings.adapters
        } else {
            settings::adapter_list(args.adapter.iter().map(String::as_str))
        };
        let weights = if args.adapter_weight.is_empty() {
            settings.adapter_weights
        } else {
            args.adapter_weight.clone()
        };
        if !weights.is_empty() && weights.len() != adapters.len() {
            bail!(
                "--adapter-weight has {} numbers for {} adapters: give one for each",
                weights.len(),
                adapters.len()
            );
        }
        let weight_of = |i: usize| weights.get(i).copied().unwrap_or(1.0);
        let accumulate = args.accumulate.or(settings.accumulate);
        if (args.check || settings.check) && files != Files::Model(Vec::new()) {
            bail!("--check compares safetensors: leave --gguf, --gguf-only and --gguf-lora out");
        }
        if files == Files::GgufLora && adapters.len() != 1 {
            bail!(
                "--gguf-lora needs exactly one adapter, {} are given",
                adapters.len()
            );
        }
        Ok(Self {
            model,
            adapters: (adapters.into_iter().enumerate())
                .map(|(i, adapter)| (adapter, weight_of(i)))
                .collect(),
            adapter_folder: args.adapter_folder.clone().or(settings.adapter_folder),
            output,
            max_shard_size: (args.max_shard_size.or(settings.max_shard_size))
                .unwrap_or(DEFAULT_SHARD_SIZE),
            options: MergeOptions {
                accumulate: match accumulate.unwrap_or(Accumulate::Fp32) {
                    Accumulate::Fp32 => weights::Accumulate::Fp32,
                    Accumulate::Llamafactory => weights::Accumulate::LlamaFactory,
                },
                dtype: (args.dtype.or(settings.dtype)).and_then(Dtype::stored),
            },
            prompts: PromptOptions {
                template: args.template.clone().or(settings.template),
                default_system: args.default_system.clone().or(settings.default_system),
                modelfile: (args.modelfile.or(settings.modelfile))
                    .unwrap_or(ModelfileChoice::Complete),
            },
            files,
            overwrite: args.overwrite || settings.overwrite,
            task: match (
                args.dry_run || settings.dry_run,
                args.check || settings.check,
            ) {
                (true, true) => bail!("--dry-run and --check exclude each other: give one"),
                (true, false) => Task::DryRun,
                (false, true) => Task::Check,
                (false, false) => Task::Write,
            },
            revision: args.revision.clone(),
            warnings: settings.warnings,
        })
    }
}

impl Files {
    fn of(args: &MergeArgs, settings: &Settings) -> anyhow::Result<Self> {
        let types = if args.gguf.is_empty() {
            &settings.gguf
        } else {
            &args.gguf
        };
        let mut gguf = Vec::new();
        for file_type in types {
            if !gguf.contains(file_type) {
                gguf.push(*file_type);
            }
        }
        let gguf_only = args.gguf_only || settings.gguf_only;
        match (args.gguf_lora || settings.gguf_lora, gguf_only) {
            (true, false) if gguf.is_empty() => Ok(Self::GgufLora),
            (true, _) => bail!("--gguf-lora writes the adapter alone: leave --gguf out"),
            (false, true) if gguf.is_empty() => {
                bail!("--gguf-only needs --gguf with the types to write, such as q4_k_m")
            }
            (false, true) => Ok(Self::Gguf(gguf)),
            (false, false) => Ok(Self::Model(gguf)),
        }
    }
}

/// Rewrites the arguments after `infold merge`: LLaMA-Factory's keys given as flags, such as
/// `--export_dir DIR`, become `export_dir=DIR`.
pub fn prepare_arguments(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut prepared = Vec::new();
    let mut arguments = arguments.into_iter().peekable();
    while let Some(argument) = arguments.next() {
        let flag = (argument.to_str()).and_then(|text| text.strip_prefix("--"));
        let (name, value) = match flag.map(|flag| flag.split_once('=')) {
            Some(Some((name, value))) => (name.replace('-', "_"), Some(value.to_owned())),
            Some(None) => (flag.unwrap_or_default().replace('-', "_"), None),
            None => {
                prepared.push(argument);
                continue;
            }
        };
        if !settings::is_llamafactory_key(&name) {
            // Clap's own flags, also in LLaMA-Factory's spelling with underscores.
            let dashed = format!("--{}", name.replace('_', "-"));
            prepared.push(match value {
                Some(value) => format!("{dashed}={value}").into(),
                None => dashed.into(),
            });
            continue;
        }
        let is_value = |next: &OsString| !next.to_string_lossy().starts_with("--");
        let value = value.or_else(|| {
            let next = arguments.next_if(is_value)?;
            Some(next.to_string_lossy().into_owned())
        });
        prepared.push(format!("{name}={}", value.as_deref().unwrap_or("true")).into());
    }
    prepared
}

/// Reads a size as transformers does: decimal units, a plain number is bytes.
pub(super) fn parse_shard_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected a size such as 5GB, 500MB or a number of bytes, got {text:?}");
    let trimmed = text.trim().to_ascii_uppercase();
    let units = [("KB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)];
    let (number, unit) = units
        .iter()
        .find_map(|(name, bytes)| Some((trimmed.strip_suffix(name)?, *bytes)))
        .unwrap_or((&trimmed, 1.0));
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * unit;
    if bytes.is_finite() && bytes >= 1.0 {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_decimal_as_in_transformers() {
        for (text, bytes) in [
            ("5GB", 5_000_000_000),
            ("500mb", 500_000_000),
            (" 0.2MB ", 200_000),
            ("131072", 131_072),
        ] {
            assert_eq!(parse_shard_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "GB", "-1GB", "0", "5 apples", "nan", "inf"] {
            assert!(parse_shard_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_of_llamafactory_may_be_flags() {
        let line = "x.yaml --export_dir out --export-size=2 --trust_remote_code --max_shard_size 5GB \
                    --overwrite --adapter-name-or-path a,b";
        let arguments = prepare_arguments(line.split_whitespace().map(OsString::from));
        let arguments: Vec<_> = arguments.iter().map(|a| a.to_str().unwrap()).collect();
        assert_eq!(
            arguments,
            [
                "x.yaml",
                "export_dir=out",
                "export_size=2",
                "trust_remote_code=true",
                "--max-shard-size",
                "5GB",
                "--overwrite",
                "adapter_name_or_path=a,b"
            ]
        );
    }

    #[test]
    fn the_first_weight_may_be_negative() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            merge: MergeArgs,
        }
        let line = "infold --adapter a,b --adapter-weight -0.5,1 --overwrite";
        let Line { merge } = clap::Parser::parse_from(line.split(' '));
        assert_eq!(merge.adapter_weight, [-0.5, 1.0]);
        assert!(merge.overwrite);
    }

    #[test]
    fn flags_win_over_the_file_and_weights_are_counted() {
        let args = |adapter_weight: &[f32]| MergeArgs {
            settings: vec![
                "model_name_or_path=m".to_owned(),
                "adapter_name_or_path= a/ ,b,".to_owned(),
                "export_dir=out".to_owned(),
                "export_size=2".to_owned(),
            ],
            max_shard_size: Some(7),
            adapter_weight: adapter_weight.to_vec(),
            ..MergeArgs::default()
        };
        let config = MergeConfig::from_args(&args(&[0.5, -1.0])).unwrap();
        assert_eq!(config.max_shard_size, 7);
        let wanted = [("a/".to_owned(), 0.5), ("b".to_owned(), -1.0)];
        assert_eq!(config.adapters, wanted);
        let error = MergeConfig::from_args(&args(&[1.0])).unwrap_err();
        assert!(
            error.to_string().contains("1 numbers for 2 adapters"),
            "{error}"
        );
    }

    #[test]
    fn what_is_missing_is_named_in_both_spellings() {
        let error = MergeConfig::from_args(&MergeArgs::default()).unwrap_err();
        assert!(
            error.to_string().contains("--model (model_name_or_path)"),
            "{error}"
        );
    }
}
