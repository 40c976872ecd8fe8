//! What a run will do, said before anything is loaded: data, updates, learning rate, adapter,
//! memory, and what each key of the DeepSpeed configuration does.
//!
//! Everything is computed from the configuration, the model's `config.json` and the encoded data;
//! no weight is read.

mod memory;
mod numbers;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::models::ModelConfig;
use crate::text::TrainingTemplate;

use super::{
    DatasetReport, EncodeSummary, Linear, LoraLayout, LrSchedule, Packing, StepCounts, TrainConfig,
    TrainError, ZeroStage,
};

use super::modules::names;
use numbers::numbers;

pub use memory::MemoryPlan;

/// The learning rate at three points of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LearningRates {
    /// Of the first update.
    pub first: f64,
    /// The largest.
    pub peak: f64,
    /// Of the last update.
    pub last: f64,
}

impl LearningRates {
    /// Returns the rates of a run.
    fn of_run(schedule: &LrSchedule) -> Self {
        let rates = (0..schedule.total_steps).map(|update| schedule.at(update));
        Self {
            first: schedule.at(0),
            peak: rates.fold(0.0, f64::max),
            last: schedule.at(schedule.total_steps.saturating_sub(1)),
        }
    }
}

/// What a plan is made of.
#[derive(Clone, Copy)]
pub struct PlanInputs<'a> {
    /// Everything asked for.
    pub config: &'a TrainConfig,
    /// The shape of the base.
    pub model: &'a ModelConfig,
    /// Bytes of the base as stored.
    pub model_bytes: u64,
    /// The template with its system prompt as used.
    pub template: &'a TrainingTemplate,
    /// What became of the rows.
    pub reports: &'a [DatasetReport],
    /// The training examples.
    pub train: EncodeSummary,
    /// The evaluation examples, if there are any.
    pub eval: Option<EncodeSummary>,
    /// Data-parallel ranks.
    pub world_size: usize,
    /// Bytes of memory that the machine can still give, where it says so.
    pub available_memory: Option<u64>,
}

/// A run before it starts. Its `Display` is the table that is printed.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Micro-batches, updates, epochs.
    pub counts: StepCounts,
    /// The adapted linears.
    pub lora: LoraLayout,
    /// Parameters of the base.
    pub base_parameters: u64,
    /// The learning rate over time.
    pub learning_rates: LearningRates,
    /// Memory of one rank.
    pub memory: MemoryPlan,
    /// The printed lines: a label and its text.
    lines: Vec<(String, String)>,
}

impl Plan {
    /// Makes the plan of a run.
    ///
    /// # Errors
    /// [`TrainError::UnknownTarget`] when `lora_target` names no linear of the model,
    /// [`TrainError::InvalidOption`] when there is nothing to train on, [`TrainError::DeepSpeed`]
    /// when its schedule counts other steps than the run.
    pub fn new(inputs: &PlanInputs<'_>) -> Result<Self, TrainError> {
        let PlanInputs {
            config,
            model,
            train,
            world_size,
            ..
        } = *inputs;
        let counts = config.step_counts(train.num_examples, world_size);
        if counts.micro_batches_per_epoch == 0 {
            return Err(TrainError::InvalidOption {
                key: "dataset",
                wanted: "at least one example, or a full batch with dataloader_drop_last"
                    .to_owned(),
                found: match train.num_empty {
                    0 => format!("{} examples", train.num_examples),
                    empty => format!(
                        "{} examples: {empty} more have nothing to learn within cutoff_len {}",
                        train.num_examples, config.data.cutoff_len
                    ),
                },
            });
        }
        check_steps(config, &counts)?;
        let lora = LoraLayout::new(model, config.lora_options())?;
        let mut plan = Self {
            learning_rates: LearningRates::of_run(&config.lr_schedule(&counts)),
            base_parameters: base_parameters(model),
            memory: MemoryPlan::new(inputs, &lora),
            counts,
            lora,
            lines: Vec::new(),
        };
        plan.lines = plan.lines(inputs);
        Ok(plan)
    }

    fn lines(&self, inputs: &PlanInputs<'_>) -> Vec<(String, String)> {
        let config = inputs.config;
        let mut lines = Vec::new();
        let mut line = |label: &str, text: String| lines.push((label.to_owned(), text));
        line("model", self.model_line(inputs));
        line("adapter", self.adapter_line(config));
        for report in inputs.reports {
            line("data", report.text());
        }
        line("template", template_line(inputs));
        line("examples", summary(&inputs.train, config.data.cutoff_len));
        if let Some(eval) = &inputs.eval {
            line("evaluation", summary(eval, config.data.cutoff_len));
        }
        line("batches", batches(inputs));
        line("updates", self.updates_line());
        line("learning rate", self.learning_rate_line(config));
        line("numbers", numbers(config, &self.lora));
        line("memory", self.memory.to_string());
        if let Some(text) = self.gathering_line(inputs) {
            line("gathering", text);
        }
        for effect in config.deepspeed.iter().flat_map(|config| &config.effects) {
            let text = format!("{} = {}: {}", effect.key, effect.value, effect.effect);
            line("deepspeed", text);
        }
        for note in &config.notes {
            line("note", note.clone());
        }
        lines
    }

    fn model_line(&self, inputs: &PlanInputs<'_>) -> String {
        format!(
            "{}: {}, {} parameters, {}",
            inputs.config.model.model_name_or_path,
            inputs.model.architecture.name(),
            grouped(self.base_parameters),
            bytes(inputs.model_bytes)
        )
    }

    fn adapter_line(&self, config: &TrainConfig) -> String {
        let trainable = self.lora.num_params() as u64;
        let all = self.base_parameters + trainable;
        let lora = &config.lora;
        let whole = names(self.lora.whole().iter().map(|entry| entry.module));
        let whole = match &whole[..] {
            [] => String::new(),
            names => format!("; trained and saved whole: {}", names.join(", ")),
        };
        format!(
            "{} r {}, alpha {}, dropout {} on {}{}: {} tensors; trainable params: {} || all \
             params: {} || trainable%: {:.4}",
            if lora.use_dora { "DoRA" } else { "LoRA" },
            lora.lora_rank,
            lora.lora_alpha,
            lora.lora_dropout,
            self.lora.target_modules().join(", "),
            whole,
            self.lora.tensors().len(),
            grouped(trainable),
            grouped(all),
            100.0 * trainable as f64 / all as f64
        )
    }

    /// Returns what ZeRO-3 costs: each layer goes to every rank forward and backward.
    fn gathering_line(&self, inputs: &PlanInputs<'_>) -> Option<String> {
        let num_ranks = inputs.world_size as u64;
        if inputs.config.zero_stage() != ZeroStage::Three || num_ranks == 1 {
            return None;
        }
        let in_layers = layer_parameters(inputs.model) as f64 / self.base_parameters as f64;
        let missing = (num_ranks - 1) as f64 / num_ranks as f64;
        let layers = inputs.model_bytes as f64 * in_layers * missing;
        let update = 2 * memory::passes_per_update(inputs) as u64 * layers as u64;
        Some(format!(
            "{} of layers to each rank in every update, {} in the run; with ZeRO-2 the base stays \
             whole on each rank and nothing is gathered",
            bytes(update),
            bytes(update * self.counts.total_updates)
        ))
    }

    fn updates_line(&self) -> String {
        let counts = &self.counts;
        format!(
            "{} in all: {} epochs of {} updates ({} micro-batches on each rank)",
            grouped(counts.total_updates),
            counts.num_epochs,
            grouped(counts.updates_per_epoch),
            grouped(counts.micro_batches_per_epoch)
        )
    }

    fn learning_rate_line(&self, config: &TrainConfig) -> String {
        let rates = &self.learning_rates;
        let warmup = config.warmup_updates(&self.counts);
        format!(
            "{} at first, {} at most, {} at the end ({}, {} updates of warm-up)",
            rate(rates.first),
            rate(rates.peak),
            rate(rates.last),
            schedule_name(config),
            grouped(warmup)
        )
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.lines.iter().map(|(label, _)| label.len()).max();
        let width = width.unwrap_or(0);
        writeln!(f, "***** Plan *****")?;
        for (label, text) in &self.lines {
            let mut parts = text.lines();
            writeln!(f, "  {label:width$}  {}", parts.next().unwrap_or_default())?;
            for part in parts {
                writeln!(f, "  {:width$}  {part}", "")?;
            }
        }
        Ok(())
    }
}

fn check_steps(config: &TrainConfig, counts: &StepCounts) -> Result<(), TrainError> {
    let Some(deepspeed) = &config.deepspeed else {
        return Ok(());
    };
    let warmup = config.warmup_updates(counts);
    Ok(deepspeed.check_steps(warmup, counts.total_updates)?)
}

/// Returns the parameters of a model, a tied head counted once.
fn base_parameters(model: &ModelConfig) -> u64 {
    let table = model.vocab_size * model.hidden_size;
    let tables = if model.tie_word_embeddings { 1 } else { 2 };
    (tables * table + model.hidden_size) as u64 + layer_parameters(model)
}

/// Returns the parameters of all decoder layers.
fn layer_parameters(model: &ModelConfig) -> u64 {
    let heads = model.num_heads * model.head_dim;
    let kv_heads = model.num_kv_heads * model.head_dim;
    let linears = Linear::ALL.map(|linear| linear.shape(model).iter().product());
    let mut layer: usize = linears.iter().sum::<usize>() + 2 * model.hidden_size;
    if model.qkv_bias {
        layer += heads + 2 * kv_heads;
    }
    if model.o_bias {
        layer += model.hidden_size;
    }
    if model.mlp_bias {
        layer += 2 * model.intermediate_size + model.hidden_size;
    }
    if model.qk_norm {
        layer += 2 * model.head_dim;
    }
    (model.num_layers * layer) as u64
}

fn template_line(inputs: &PlanInputs<'_>) -> String {
    let template = inputs.template;
    match template.default_system() {
        "" => format!("{}, without a default system prompt", template.name()),
        system => format!("{}, default system prompt {system:?}", template.name()),
    }
}

fn summary(summary: &EncodeSummary, cutoff_len: usize) -> String {
    let mut text = format!(
        "{}, {} tokens, {} of them learned; the longest has {}",
        grouped(summary.num_examples as u64),
        grouped(summary.num_tokens as u64),
        grouped(summary.num_target_tokens as u64),
        grouped(summary.longest as u64)
    );
    if summary.num_truncated > 0 {
        let count = grouped(summary.num_truncated as u64);
        text.push_str(&format!("; {count} cut to cutoff_len {cutoff_len}"));
    }
    if summary.num_empty > 0 {
        let count = grouped(summary.num_empty as u64);
        text.push_str(&format!("; {count} more have nothing to learn"));
    }
    text
}

fn batches(inputs: &PlanInputs<'_>) -> String {
    let batch = &inputs.config.batch;
    let (size, accumulation) = (
        batch.per_device_train_batch_size,
        batch.gradient_accumulation_steps,
    );
    let ranks = inputs.world_size;
    let layout = match inputs.config.data.packing {
        Packing::Packed => "packed, without padding",
        Packing::Padded => "padded to the longest",
    };
    let plural = if ranks == 1 { "rank" } else { "ranks" };
    format!(
        "{size} examples x {accumulation} micro-batches x {ranks} {plural} = {} examples an \
         update; {layout}",
        grouped((size * accumulation * ranks) as u64)
    )
}

/// Returns a learning rate in three digits, as people write them: 5e-4, 1.23e-5, 0.
fn rate(rate: f64) -> String {
    if rate == 0.0 {
        return "0".to_owned();
    }
    let text = format!("{rate:.2e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let digits = digits.trim_end_matches('0').trim_end_matches('.');
    format!("{digits}e{exponent}")
}

fn schedule_name(config: &TrainConfig) -> String {
    match config.deepspeed_schedule() {
        Some(schedule) => format!("DeepSpeed's {}", schedule.name()),
        None => config.schedule.lr_scheduler_type.name().to_owned(),
    }
}

/// Returns a number with its thousands apart.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Returns a size in the unit that reads best.
fn bytes(size: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = size as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{size} bytes")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}
