//! The verb `merge`: a base model and LoRA adapters into one model that other programs load.
//!
//! Plans by headers, then streams: [`MergedCheckpoint`] makes blocks of
//! rows on all cores, the writer puts them into shards laid out as `save_pretrained` does, all in
//! a directory aside that is renamed at the end. Called by `main.rs`.

mod args;
mod check;
mod companions;
mod default_system;
mod from_gguf;
pub mod gguf;
mod gguf_files;
mod go_template;
mod json_edit;
mod modelfile;
mod output;
mod progress;
mod prompt_check;
mod prompts;
mod report;
mod settings;

use std::fmt::Display;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use crate::weights::{
    self, Adapter, Checkpoint, Format, HubOptions, MergedCheckpoint, ShardPlan, TensorSource,
    WrittenFile,
};

pub use args::{Accumulate, Dtype, MergeArgs, ModelfileChoice, prepare_arguments};
pub use default_system::{
    DefaultSystem, DefaultSystemError, default_system_of, set_default_system,
};
pub use go_template::{GoTemplate, GoTemplateError};
pub use modelfile::{
    Instruction, Modelfile, ModelfileError, ModelfileInput, ModelfileStyle, lost_characters,
    modelfile, ollama_template, parse_modelfile, stop_tokens,
};
pub use prompt_check::{
    PromptCheckError, PromptCheckInput, PromptDifference, PromptReport, PromptSource, check_prompts,
};

use args::{Files, MergeConfig, Task};
use companions::Companions;
use gguf_files::GgufFile;
use output::{Existing, Staging};
use progress::Progress;
use prompts::OllamaSource;
use report::{Counts, Observed, REPORT_FILE, Report};

/// Space that is asked for beyond the files themselves, in bytes.
const SPARE_BYTES: u64 = 16 << 20;

/// Merges, or says what a merge would do, or compares.
///
/// # Errors
/// What is wrong with the settings, the inputs or the output directory; a failed comparison. The
/// output directory is then as it was.
pub fn run(args: &MergeArgs) -> anyhow::Result<()> {
    let config = MergeConfig::from_args(args)?;
    let mut hub = HubOptions::from_vars(|name| std::env::var(name).ok());
    hub.revision.clone_from(&config.revision);
    let base = weights::open_model(&config.model, &hub)
        .with_context(|| format!("open the model {}", config.model))?;
    if base.format() == Format::Gguf && config.adapters.is_empty() {
        return from_gguf::run(&config, base);
    }
    let job = Job::plan(&config, base, &hub)?;
    for warning in config.warnings.iter().chain(job.merged.warnings()) {
        tracing::warn!("{warning}");
    }
    match config.task {
        Task::Write => job.write(),
        Task::DryRun => job.describe(),
        Task::Check => job.check(),
    }
}

/// A planned merge.
struct Job<'a> {
    config: &'a MergeConfig,
    merged: MergedCheckpoint,
    companions: Companions,
    /// How the prompts of training and serving compare.
    prompts: Option<PromptReport>,
    /// The shards; without content if only GGUF files are written.
    plan: ShardPlan,
    gguf: Vec<GgufFile>,
}

impl<'a> Job<'a> {
    fn plan(config: &'a MergeConfig, base: Checkpoint, hub: &HubOptions) -> anyhow::Result<Self> {
        let folder = config.adapter_folder.as_deref();
        let adapters = (config.adapters.iter())
            .map(|(name, weight)| {
                let adapter = weights::open_adapter(name, folder, hub)
                    .with_context(|| format!("open the adapter {name}"))?;
                Ok((adapter, *weight))
            })
            .collect::<anyhow::Result<_>>()?;
        let merged = MergedCheckpoint::plan(Arc::new(base), adapters, config.options)?;
        let mut companions = Companions::of(&merged)?;
        let base_path = merged.base().path();
        let base_path = std::path::absolute(base_path).unwrap_or_else(|_| base_path.to_owned());
        let base_path = base_path.display().to_string();
        let (types, tensors, from) = match &config.files {
            Files::Model(types) => (&types[..], merged.tensors()?, ".".to_owned()),
            Files::Gguf(types) => {
                let first = types
                    .first()
                    .map(|file_type| gguf_files::file_name(*file_type));
                (
                    &types[..],
                    Vec::new(),
                    format!("./{}", first.unwrap_or_default()),
                )
            }
            Files::GgufLora => (&[][..], Vec::new(), base_path),
        };
        let lora_file = format!("./{}", gguf_files::LORA_FILE);
        let source = OllamaSource {
            from: &from,
            adapter: (config.files == Files::GgufLora).then_some(&lora_file[..]),
        };
        let prompts = prompts::complete(&mut companions, &merged, &config.prompts, source)?;
        let name = config
            .output
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let gguf = gguf_files::plan(&merged, &companions, types, &name.unwrap_or_default())?;
        if !matches!(config.files, Files::Model(_)) {
            // A GGUF file holds the rest itself.
            companions
                .files
                .retain(|name, _| name == prompts::MODELFILE);
        }
        let plan = ShardPlan::new(tensors, config.max_shard_size);
        Ok(Self {
            config,
            merged,
            companions,
            prompts,
            plan,
            gguf,
        })
    }

    /// Returns the bytes that the output takes on the disk, nearly.
    fn output_bytes(&self) -> u64 {
        self.weight_bytes() + self.companions.size_bytes() + SPARE_BYTES
    }

    /// Returns the bytes of shards and GGUF files.
    fn weight_bytes(&self) -> u64 {
        let gguf = self.gguf.iter().map(|file| file.plan.size_bytes());
        self.plan.file_bytes() + gguf.sum::<u64>()
    }

    fn write(mut self) -> anyhow::Result<()> {
        let mut inputs = vec![self.merged.base().path()];
        inputs.extend(self.merged.adapters().iter().map(Adapter::dir));
        let existing = if self.config.overwrite {
            Existing::Replace
        } else {
            Existing::Keep
        };
        let staging = Staging::begin(&self.config.output, &inputs, existing)?;
        check_space(&self.config.output, staging.dir(), self.output_bytes())?;

        let needed = self.output_bytes();
        let output = self.config.output.display();
        let done =
            (self.write_into(staging)).map_err(|error| nothing_changed(error, &output, needed))?;
        self.print_result(&done)
    }

    /// Writes all files and shows the directory under its name.
    fn write_into(&mut self, staging: Staging) -> anyhow::Result<Done> {
        let observed = Observed::new(&self.merged);
        let mut weight_bytes = self.weight_bytes();
        let progress = Progress::new(weight_bytes, "merging");
        let mut files =
            weights::write_shards(&self.plan, &observed, staging.dir(), &mut |bytes| {
                progress.add(bytes);
            })?;
        let mut notes = Vec::new();
        for file in std::mem::take(&mut self.gguf) {
            let (written, summary) =
                gguf_files::write(file, &self.merged, staging.dir(), &progress)?;
            notes.push(format!("{}: {summary}", written.name));
            files.push(written);
        }
        if let (Files::GgufLora, [(_, weight)]) = (&self.config.files, &self.config.adapters[..]) {
            let file = gguf_files::write_lora(&self.merged, *weight, staging.dir())?;
            weight_bytes += file.bytes;
            files.push(file);
        }
        let elapsed = progress.finish();

        if let Some((name, index)) = self.plan.index() {
            files.push(write_small(&staging, name, index.as_bytes())?);
        }
        for (name, content) in &self.companions.files {
            files.push(write_small(&staging, name, content)?);
        }
        let report = Report {
            config: self.config,
            merged: &self.merged,
            counts: Counts::of(&self.merged)?,
            kinds: observed.kinds(),
            changes: &self.companions.changes,
            files: &files,
        };
        staging.write(REPORT_FILE, report.to_json().as_bytes())?;
        staging.publish()?;
        Ok(Done {
            table: report.to_table(),
            notes,
            weight_bytes,
            elapsed,
        })
    }

    fn print_result(&self, done: &Done) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        let mut print = || -> std::io::Result<()> {
            if self.config.files != Files::GgufLora {
                write!(out, "{}", done.table)?;
            }
            for note in &done.notes {
                writeln!(out, "{note}")?;
            }
            if let Some(prompts) = &self.prompts {
                writeln!(out, "prompts: {prompts}")?;
            }
            let seconds = done.elapsed.as_secs_f64();
            writeln!(
                out,
                "{} of weights written to {} in {seconds:.1} s ({:.0} MB/s)",
                gigabytes(done.weight_bytes),
                self.config.output.display(),
                done.weight_bytes as f64 / 1e6 / seconds.max(1e-9),
            )
        };
        print().context("print the report")
    }

    /// Says what would be written, and what it would take.
    fn describe(&self) -> anyhow::Result<()> {
        let counts = Counts::of(&self.merged)?;
        let mut out = std::io::stdout().lock();
        let mut describe = || -> std::io::Result<()> {
            for shard in &self.plan.shards {
                writeln!(
                    out,
                    "{:<36} {:>5} tensors {:>14} bytes",
                    shard.file_name,
                    shard.tensors.len(),
                    shard.file_bytes()
                )?;
            }
            for file in &self.gguf {
                let (name, bytes) = (&file.name, file.plan.size_bytes());
                writeln!(out, "{name:<36} {:>13} {bytes:>14} bytes", "")?;
                writeln!(out, "  {}", file.plan.summary())?;
            }
            for (name, content) in &self.companions.files {
                writeln!(out, "{name:<36} {:>13} {:>14} bytes", "", content.len())?;
            }
            if let Some(prompts) = &self.prompts {
                writeln!(out, "prompts: {prompts}")?;
            }
            for change in &self.companions.changes {
                writeln!(out, "changed: {change}")?;
            }
            writeln!(
                out,
                "{} tensors would be merged, {} copied",
                counts.merged, counts.copied
            )?;
            let output = std::path::absolute(&self.config.output)?;
            let existing = output.ancestors().find(|path| path.exists());
            let free = existing.and_then(weights::free_bytes);
            writeln!(
                out,
                "disk: {} needed, {} free; memory: below 0.5 GB beside the adapters",
                gigabytes(self.output_bytes()),
                free.map_or_else(|| "an unknown amount".to_owned(), gigabytes)
            )?;
            let megabytes = self.weight_bytes() as f64 / 1e6;
            writeln!(
                out,
                "time: {:.0} s on a disk that writes 200 MB/s, {:.0} s at 1 GB/s",
                (megabytes / 200.0).ceil(),
                (megabytes / 1000.0).ceil()
            )
        };
        describe().context("print the plan")
    }

    /// Compares the output directory with what would be written.
    fn check(&self) -> anyhow::Result<()> {
        let progress = Progress::new(self.plan.data_bytes(), "checking");
        let output = &self.config.output;
        let (count, shown) = check::differences(
            &self.merged,
            &self.companions,
            &self.plan,
            output,
            &progress,
        )
        .with_context(|| format!("compare {}", output.display()))?;
        progress.finish();
        if count > 0 {
            bail!(
                "{} is not what this merge writes, {count} differences:\n  {}",
                output.display(),
                shown.join("\n  ")
            );
        }
        let tensors = self.merged.tensors()?.len();
        writeln!(
            std::io::stdout().lock(),
            "{} is what this merge writes: {tensors} tensors and {} other files agree",
            output.display(),
            self.companions.files.len()
        )
        .context("print the result")
    }
}

/// What is told of a merge that is done.
struct Done {
    table: String,
    notes: Vec<String>,
    weight_bytes: u64,
    elapsed: Duration,
}

/// Adds to an error that it did no harm, and to that of a full disk what would be enough.
fn nothing_changed(error: anyhow::Error, output: &dyn Display, needed: u64) -> anyhow::Error {
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        (cause.downcast_ref::<std::io::Error>())
            .is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull)
    };
    let advice = match error.chain().any(is_full) {
        true => format!(
            "; it needs {} on a disk that is full now",
            gigabytes(needed)
        ),
        false => String::new(),
    };
    error.context(format!(
        "the merge failed, {output} is as it was before{advice}"
    ))
}

/// Refuses to begin what the disk cannot take; `dir` is a directory on it.
fn check_space(output: &Path, dir: &Path, needed: u64) -> anyhow::Result<()> {
    match weights::free_bytes(dir) {
        Some(free) if free < needed => bail!(
            "{} needs {}, its disk has {} free",
            output.display(),
            gigabytes(needed),
            gigabytes(free)
        ),
        _ => Ok(()),
    }
}

fn write_small(staging: &Staging, name: &str, content: &[u8]) -> anyhow::Result<WrittenFile> {
    staging.write(name, content)?;
    Ok(WrittenFile {
        name: name.to_owned(),
        bytes: content.len() as u64,
        sha256: weights::hex(&Sha256::digest(content)),
    })
}

fn gigabytes(bytes: u64) -> String {
    if bytes < 100_000_000 {
        format!("{:.1} MB", bytes as f64 / 1e6)
    } else {
        format!("{:.2} GB", bytes as f64 / 1e9)
    }
}
