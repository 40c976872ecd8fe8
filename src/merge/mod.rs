//! The verb `merge`: a base model and LoRA adapters into one model that other programs load.
//!
//! Plans by headers, then streams: [`MergedCheckpoint`] makes blocks of
//! rows on all cores, the writer puts them into shards laid out as `save_pretrained` does, all in
//! a directory aside that is renamed at the end. Called by `main.rs`.

mod args;
mod check;
mod companions;
mod default_system;
mod gguf;
mod go_template;
mod json_edit;
mod modelfile;
mod output;
mod progress;
mod prompt_check;
mod report;
mod settings;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use crate::weights::{
    self, Adapter, Checkpoint, HubOptions, MergedCheckpoint, ShardPlan, TensorSource, WrittenFile,
};

pub use args::{Accumulate, Dtype, MergeArgs, prepare_arguments};

use args::{MergeConfig, Task};
use companions::Companions;
use output::{Existing, Staging};
use progress::Progress;
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
    let job = Job::plan(&config)?;
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
    base_dir: PathBuf,
    merged: MergedCheckpoint,
    companions: Companions,
    plan: ShardPlan,
}

impl<'a> Job<'a> {
    fn plan(config: &'a MergeConfig) -> anyhow::Result<Self> {
        let mut hub = HubOptions::from_vars(|name| std::env::var(name).ok());
        hub.revision.clone_from(&config.revision);
        let base_dir = weights::resolve_model(&config.model, &hub)
            .with_context(|| format!("find the model {}", config.model))?;
        let base = Checkpoint::open(&base_dir)
            .with_context(|| format!("open the model {}", config.model))?;
        let folder = config.adapter_folder.as_deref();
        let adapters = (config.adapters.iter())
            .map(|(path, weight)| {
                let adapter = Adapter::open(path, folder)
                    .with_context(|| format!("open the adapter {}", path.display()))?;
                Ok((adapter, *weight))
            })
            .collect::<anyhow::Result<_>>()?;
        let merged = MergedCheckpoint::plan(Arc::new(base), adapters, config.options)?;
        let companions = Companions::of(&merged)?;
        let plan = ShardPlan::new(merged.tensors()?, config.max_shard_size);
        Ok(Self {
            config,
            base_dir,
            merged,
            companions,
            plan,
        })
    }

    /// Returns the bytes that the output takes on the disk, nearly.
    fn output_bytes(&self) -> u64 {
        self.plan.file_bytes() + self.companions.size_bytes() + SPARE_BYTES
    }

    fn write(&self) -> anyhow::Result<()> {
        let mut inputs: Vec<&Path> = vec![&self.base_dir];
        inputs.extend(self.merged.adapters().iter().map(Adapter::dir));
        let existing = if self.config.overwrite {
            Existing::Replace
        } else {
            Existing::Keep
        };
        let staging = Staging::begin(&self.config.output, &inputs, existing)?;
        self.check_space(staging.dir())?;

        let observed = Observed::new(&self.merged);
        let progress = Progress::new(self.plan.file_bytes(), "merging");
        let mut files = weights::write_shards(&self.plan, &observed, staging.dir(), &mut |bytes| {
            progress.add(bytes);
        })
        .with_context(|| self.nothing_changed())?;
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
        staging.publish().with_context(|| self.nothing_changed())?;
        self.print_result(&report, elapsed)
    }

    fn nothing_changed(&self) -> String {
        format!(
            "the merge failed, {} is as it was before",
            self.config.output.display()
        )
    }

    fn check_space(&self, dir: &Path) -> anyhow::Result<()> {
        let needed = self.output_bytes();
        match weights::free_bytes(dir) {
            Some(free) if free < needed => bail!(
                "{} needs {}, its disk has {} free",
                self.config.output.display(),
                gigabytes(needed),
                gigabytes(free)
            ),
            _ => Ok(()),
        }
    }

    fn print_result(&self, report: &Report, elapsed: Duration) -> anyhow::Result<()> {
        let bytes = self.plan.file_bytes();
        let speed = bytes as f64 / 1e6 / elapsed.as_secs_f64().max(1e-9);
        let mut out = std::io::stdout().lock();
        write!(out, "{}", report.to_table()).context("print the report")?;
        writeln!(
            out,
            "{} in {} files written to {} in {:.1} s ({speed:.0} MB/s)",
            gigabytes(bytes),
            self.plan.shards.len(),
            self.config.output.display(),
            elapsed.as_secs_f64(),
        )
        .context("print the report")
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
            for (name, content) in &self.companions.files {
                writeln!(out, "{name:<36} {:>13} {:>14} bytes", "", content.len())?;
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
            let megabytes = self.plan.file_bytes() as f64 / 1e6;
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
