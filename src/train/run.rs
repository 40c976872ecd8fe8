//! `infold train`: from the command line to an adapter.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io::Write as _;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};

use super::adapter_in::adopt_options;
use super::console::Console;
use super::manifest::manifest_of;
use super::{
    AdapterFiles, BatchPlace, Cadence, Duration, Evaluation, Layout, OutputConfig, OutputPlan,
    Packing, Prepared, Ranks, Resume, RunLength, Sampler, Start, TrainArgs, TrainBatch,
    TrainConfig, TrainSetup, collate, describe_example, list_checkpoints, prepare, train,
};
use crate::kernels::keep_freed_memory;
use crate::models::ModelConfig;
use crate::text::{SupervisedExample, TEMPLATE_RECORD_FILE, TemplateRecord, Tokenizer};
use crate::weights::{self, Adapter, Format, HubOptions, ModelSource};

/// Files of a tokenizer, which go beside the adapter as LLaMA-Factory puts them there.
const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// Files of weights, over which a run does not write unasked; LLaMA-Factory looks for the same.
const WEIGHTS_FILES: &[&str] = &[
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// Trains, or says what training would do.
///
/// # Errors
/// A wrong configuration, data or model, found before any weight is read; a disk that is full, a
/// loss that is not finite. Checkpoints written until then stay.
pub fn run(args: &TrainArgs) -> anyhow::Result<()> {
    let mut config = args.config(1)?;
    for note in &config.notes {
        tracing::info!("{note}");
    }
    check_built(&config)?;
    let hub = HubOptions::from_vars(|name| std::env::var(name).ok());
    let Opened {
        model,
        dir,
        adapter,
    } = open(&config, hub)?;
    let adapter = adopt(&mut config, adapter)?;
    let shape = ModelConfig::from_json(model.config())
        .with_context(|| format!("read the configuration of {}", dir.display()))?;
    let tokenizer = Tokenizer::from_dir(&dir)
        .with_context(|| format!("read the tokenizer of {}", dir.display()))?;
    let prepared = prepare(&config, &shape, model.size_bytes(), &tokenizer)?;
    print_plan(&config, &prepared, &tokenizer)?;
    if config.dry_run {
        return Ok(());
    }
    let start = choose_start(&config, adapter, prepared.plan.counts.total_updates)?;
    let files = adapter_files(&config, &prepared, &dir)?;
    let job = Job {
        config: &config,
        prepared: &prepared,
        sampler: config.sampler(prepared.train.len(), config.batch.num_ranks),
        layout: layout(&config, &tokenizer),
        orders: Mutex::new(HashMap::new()),
    };
    let console = Console::new(&config, &prepared);
    keep_freed_memory();
    let summary = job.train(&*model, &shape, files, start, &console)?;
    console.finish(&summary, &config.output.output_dir)
}

/// Refuses what the configuration can ask for and the trainer does not do.
fn check_built(config: &TrainConfig) -> anyhow::Result<()> {
    let output = &config.output;
    if !config.do_train {
        bail!("do_train is false and there is nothing else to do: set do_train to true");
    }
    let metric = output.metric_for_best_model.as_deref().unwrap_or("loss");
    if !["loss", "eval_loss"].contains(&metric) || output.greater_is_better == Some(true) {
        bail!("metric_for_best_model is {metric}: the best model is the one with the lowest loss");
    }
    Ok(())
}

/// What a run is made from.
struct Opened {
    /// The base, with the adapters that are merged before training.
    model: Arc<dyn ModelSource>,
    /// Where the base lies.
    dir: PathBuf,
    /// The adapter that training goes on from.
    adapter: Option<Adapter>,
}

/// Opens the base and the adapters: paths as they are, hub ids with the settings of `hub`.
fn open(config: &TrainConfig, mut hub: HubOptions) -> anyhow::Result<Opened> {
    let name = &config.model.model_name_or_path;
    hub.revision.clone_from(&config.model.model_revision);
    let base = weights::open_model(name, &hub)
        .with_context(|| format!("open model_name_or_path {name}"))?;
    let dir = base.path().to_owned();
    if base.format() == Format::Gguf {
        bail!(
            "{path} is a GGUF file: training starts from a Hugging Face directory (safetensors), so \
             that the adapter fits what it is merged into; infold merge --model {path} --output \
             DIRECTORY makes one",
            path = dir.display()
        );
    }
    let (last, merged) = match config.model.adapter_name_or_path.split_last() {
        Some((last, before)) if !config.model.create_new_adapter => (Some(last), before),
        _ => (None, &config.model.adapter_name_or_path[..]),
    };
    let open_last = |spec: &String| {
        weights::open_adapter(spec, None, &hub)
            .with_context(|| format!("open adapter_name_or_path {spec}"))
    };
    let adapter = last.map(open_last).transpose()?;
    let model = weights::open_with_adapters(Arc::new(base), merged, &hub)
        .context("fold adapter_name_or_path into the model")?;
    Ok(Opened {
        model,
        dir,
        adapter,
    })
}

/// Gives the run the options of the adapter that it goes on from, and returns where that lies.
fn adopt(config: &mut TrainConfig, adapter: Option<Adapter>) -> anyhow::Result<Option<PathBuf>> {
    let Some(adapter) = adapter else {
        return Ok(None);
    };
    let notes = adopt_options(&mut config.lora, &adapter)
        .context("go on from the last of adapter_name_or_path")?;
    for note in &notes {
        tracing::info!("{note}");
    }
    config.notes.extend(notes);
    Ok(Some(adapter.dir().to_owned()))
}

fn print_plan(
    config: &TrainConfig,
    prepared: &Prepared,
    tokenizer: &Tokenizer,
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut print = || -> std::io::Result<()> {
        if let Some(first) = prepared.train.first() {
            writeln!(
                out,
                "training example:\n{}\n",
                describe_example(tokenizer, first)
            )?;
        }
        write!(out, "{}", prepared.plan)?;
        if config.dry_run {
            writeln!(out, "dry run: nothing was loaded, nothing was written")?;
        }
        out.flush()
    };
    print().context("print the plan")
}

/// Decides whether the run begins anew, with the weights of `adapter` if there is one, or goes on
/// from a checkpoint, and says so.
fn choose_start(
    config: &TrainConfig,
    adapter: Option<PathBuf>,
    total_updates: u64,
) -> anyhow::Result<Start> {
    let output = &config.output;
    let newest = list_checkpoints(&output.output_dir).pop();
    match (&output.resume_from_checkpoint, newest) {
        (Resume::From(dir), _) => {
            tracing::info!("resuming from {}", dir.display());
            return Ok(Start::Checkpoint(dir.clone()));
        }
        (Resume::Newest, Some((step, dir))) => {
            tracing::info!(
                "resuming at step {step} of {total_updates} from {} (resume_from_checkpoint: \
                 true){}",
                dir.display(),
                if output.overwrite_output_dir {
                    "; overwrite_output_dir has no effect"
                } else {
                    ""
                }
            );
            return Ok(Start::Checkpoint(dir));
        }
        (Resume::Newest, None) => bail!(
            "resume_from_checkpoint is true, but output_dir {} holds no checkpoint to go on from: \
             leave the key out to start anew, or set it to the path of a checkpoint-N",
            output.output_dir.display()
        ),
        (Resume::Automatic, Some((step, dir))) if !output.overwrite_output_dir => {
            tracing::info!(
                "resuming at step {step} of {total_updates} because {} is there; \
                 overwrite_output_dir starts anew",
                dir.display()
            );
            return Ok(Start::Checkpoint(dir));
        }
        (Resume::Automatic | Resume::Never, _) => check_replaceable(output)?,
    }
    Ok(adapter.map_or(Start::Fresh, Start::Adapter))
}

/// Refuses an output directory whose content a run from the start would replace unasked.
fn check_replaceable(output: &OutputConfig) -> anyhow::Result<()> {
    let dir = output.output_dir.display();
    let newest = list_checkpoints(&output.output_dir).pop();
    let weights = (WEIGHTS_FILES.iter()).find(|name| output.output_dir.join(name).is_file());
    match (output.overwrite_output_dir, newest, weights) {
        (true, ..) | (false, None, None) => Ok(()),
        (false, Some((_, checkpoint)), _) => bail!(
            "Output directory already exists and is not empty: {} is there, and \
             resume_from_checkpoint is false. Leave the key out to go on from it, set \
             `overwrite_output_dir` to remove it, or choose another output_dir",
            checkpoint.display()
        ),
        (false, None, Some(name)) => bail!(
            "Output directory already exists and is not empty: {dir} holds {name} and no \
             checkpoint to go on from. Please set `overwrite_output_dir`, or choose another \
             output_dir"
        ),
    }
}

/// Returns the checkpoints that a run removes when it begins, and says so: a later run would
/// otherwise take one of them for its own. A run that goes on from a checkpoint removes none.
fn replaced(output: &OutputConfig, start: &Start) -> Vec<PathBuf> {
    if !output.overwrite_output_dir || matches!(start, Start::Checkpoint(_)) {
        return Vec::new();
    }
    let checkpoints = list_checkpoints(&output.output_dir).into_iter();
    let dirs: Vec<PathBuf> = checkpoints.map(|(_, dir)| dir).collect();
    for dir in &dirs {
        tracing::info!(
            "{} goes when training begins (overwrite_output_dir)",
            dir.display()
        );
    }
    dirs
}

/// Collects what goes beside the adapter's weights: the tokenizer, and what the prompts were.
fn adapter_files(
    config: &TrainConfig,
    prepared: &Prepared,
    dir: &Path,
) -> anyhow::Result<AdapterFiles> {
    let mut companions = Vec::new();
    for name in TOKENIZER_FILES {
        let path = dir.join(name);
        if path.is_file() {
            let content =
                std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            companions.push(((*name).to_owned(), content));
        }
    }
    let record = TemplateRecord::new(prepared.encoder.template());
    let record = serde_json::to_string_pretty(&record).context("write the template's record")?;
    companions.push((TEMPLATE_RECORD_FILE.to_owned(), record.into_bytes()));
    Ok(AdapterFiles {
        base_model_name_or_path: config.model.model_name_or_path.clone(),
        companions,
    })
}

fn layout(config: &TrainConfig, tokenizer: &Tokenizer) -> Layout {
    match config.data.packing {
        Packing::Packed => Layout::Packed,
        Packing::Padded => {
            let mut named = tokenizer.named_tokens().iter();
            let padding = named.rfind(|token| token.name == "pad_token");
            let padding = padding.or(tokenizer.eos_token());
            let id = padding.and_then(|token| tokenizer.token_id(&token.content));
            Layout::Padded {
                pad_token_id: id.unwrap_or(0),
            }
        }
    }
}

/// Micro-batches of one rank in one epoch, as indices of examples.
type EpochOrder = Arc<Vec<Vec<usize>>>;

/// A prepared run.
struct Job<'a> {
    config: &'a TrainConfig,
    prepared: &'a Prepared,
    sampler: Sampler,
    layout: Layout,
    /// By epoch and rank: a sampler gives a whole epoch at a time.
    orders: Mutex<HashMap<(u64, usize), EpochOrder>>,
}

impl Job<'_> {
    fn train(
        &self,
        model: &dyn ModelSource,
        shape: &ModelConfig,
        files: AdapterFiles,
        start: Start,
        console: &Console,
    ) -> anyhow::Result<super::TrainSummary> {
        let (config, counts) = (self.config, self.prepared.plan.counts);
        let batches = |place: BatchPlace| Ok(self.batch(place));
        let eval_size = config.batch.per_device_eval_batch_size;
        let eval = &self.prepared.eval;
        let eval_batches = |place: BatchPlace| Ok(self.eval_batch(place, eval_size));
        let (total, per_epoch) = (counts.total_updates, counts.updates_per_epoch);
        // With `do_eval` alone the last update is evaluated, as the trainer always does it.
        let at_end = config.output.do_eval.then_some(total.max(1));
        let every = config.output.eval.interval(total, per_epoch).or(at_end);
        let evaluation = every.filter(|_| !eval.is_empty()).map(|every| Evaluation {
            batches: &eval_batches,
            num_batches: eval.len().div_ceil(eval_size) as u64,
            num_examples: eval.len() as u64,
            every,
            delay: self.eval_delay(per_epoch),
            on_start: config.output.eval_on_start,
            early_stopping: config.output.early_stopping_steps,
            load_best_model_at_end: config.output.load_best_model_at_end,
        });
        let length = |example: &SupervisedExample| example.input_ids.len();
        let longest = (self.prepared.train.iter().chain(eval).map(length)).max();
        let setup = TrainSetup {
            source: model,
            config: shape,
            lora: config.lora_options(),
            optimizer: config.adamw_options(),
            schedule: config.lr_schedule(&counts),
            loss_scale: config.loss_scale(),
            recompute: self.prepared.plan.memory.recompute,
            neftune_noise_alpha: config.optimizer.neftune_noise_alpha.unwrap_or(0.0),
            seed: config.seed,
            length: RunLength {
                micro_batches_per_epoch: counts.micro_batches_per_epoch,
                accumulation: config.batch.gradient_accumulation_steps as u64,
                total_updates: total,
                num_train_epochs: counts.num_epochs as f64,
            },
            // Rows are filled up to a multiple of eight where they are padded.
            max_positions: longest.unwrap_or(1).next_multiple_of(8),
            max_tokens_per_pass: config.max_tokens_per_pass(),
            batches: &batches,
            evaluation,
            output: self.output_plan(total, per_epoch, &start),
            ranks: self.ranks(),
            files,
            manifest: manifest_of(self.config, self.prepared),
            start,
        };
        Ok(train(&setup, &|event| console.show(event))?)
    }

    /// Returns the updates before the first evaluation: `eval_delay` is in epochs where
    /// evaluations are.
    fn eval_delay(&self, updates_per_epoch: u64) -> u64 {
        let output = &self.config.output;
        let unit = match output.eval {
            Cadence::Epoch => updates_per_epoch as f64,
            _ => 1.0,
        };
        (output.eval_delay * unit).ceil() as u64
    }

    fn batch(&self, place: BatchPlace) -> TrainBatch {
        let key = (place.epoch, place.rank);
        let order = {
            let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
            // Epochs that are over are not needed again.
            orders.retain(|(epoch, _), _| epoch + 1 >= place.epoch);
            let order = orders.entry(key);
            Arc::clone(order.or_insert_with(|| Arc::new(self.sampler.epoch(key.0, key.1))))
        };
        let indices = order.get(place.index as usize);
        let indices = indices.map_or(&[][..], Vec::as_slice);
        collate(&self.prepared.train, indices, self.layout)
    }

    fn eval_batch(&self, place: BatchPlace, size: usize) -> TrainBatch {
        let first = place.index as usize * size;
        let last = (first + size).min(self.prepared.eval.len());
        let indices: Vec<usize> = (first..last).collect();
        collate(&self.prepared.eval, &indices, self.layout)
    }

    fn output_plan(&self, total: u64, per_epoch: u64, start: &Start) -> OutputPlan {
        let output = &self.config.output;
        OutputPlan {
            output_dir: output.output_dir.clone(),
            replaced: replaced(output, start),
            logging_steps: output
                .logging
                .interval(total, per_epoch)
                .unwrap_or(u64::MAX),
            logging_first_step: output.logging_first_step,
            save_steps: output.save.interval(total, per_epoch),
            save_total_limit: output.save_total_limit,
            save_only_model: output.save_only_model,
            plot_loss: output.plot_loss,
            tensorboard_dir: output.tensorboard.then(|| {
                let dir = output.logging_dir.clone();
                dir.unwrap_or_else(|| output.output_dir.join("runs"))
            }),
            train_batch_size: self.config.batch.per_device_train_batch_size as u64,
            num_samples: self.num_samples(),
        }
    }

    /// Returns the examples of all updates, as Hugging Face counts them.
    fn num_samples(&self) -> f64 {
        let batch = &self.config.batch;
        match batch.duration {
            Duration::Epochs(epochs) => self.prepared.train.len() as f64 * epochs,
            Duration::Updates(updates) => {
                let per_update = batch.per_device_train_batch_size
                    * batch.gradient_accumulation_steps
                    * batch.num_ranks;
                updates as f64 * per_update as f64
            }
        }
    }

    fn ranks(&self) -> Ranks {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let num_ranks = self.config.batch.num_ranks;
        Ranks {
            num_ranks,
            threads_per_rank: (cores / num_ranks).max(1),
            zero_stage: self.config.zero_stage(),
        }
    }
}
