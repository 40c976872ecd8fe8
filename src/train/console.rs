//! What a run shows in the terminal: Hugging Face's blocks, the log, and a progress bar.

use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use super::deepspeed::python;
use super::plan::grouped;
use super::report::rounded;
use super::{Prepared, TrainConfig, TrainEvent, TrainSummary, clock};

/// Shows the events of a run.
pub(super) struct Console {
    bar: ProgressBar,
    /// Lines of the block that opens a run.
    opening: Vec<String>,
    /// Tokens and seconds since the last line of the log.
    speed: Mutex<(u64, f64)>,
}

impl Console {
    /// Prepares the display; nothing is shown before the run begins.
    pub(super) fn new(config: &TrainConfig, prepared: &Prepared) -> Self {
        let counts = prepared.plan.counts;
        let batch = &config.batch;
        let (size, accumulation) = (
            batch.per_device_train_batch_size,
            batch.gradient_accumulation_steps,
        );
        let total = size * accumulation * batch.num_ranks;
        Self {
            bar: if config.output.disable_tqdm {
                ProgressBar::hidden()
            } else {
                ProgressBar::new(counts.total_updates)
            },
            opening: vec![
                "***** Running training *****".to_owned(),
                format!("  Num examples = {}", grouped(prepared.train.len() as u64)),
                format!("  Num Epochs = {}", grouped(counts.num_epochs)),
                format!("  Instantaneous batch size per device = {size}"),
                format!(
                    "  Total train batch size (w. parallel, distributed & accumulation) = {total}"
                ),
                format!("  Gradient Accumulation steps = {accumulation}"),
                format!(
                    "  Total optimization steps = {}",
                    grouped(counts.total_updates)
                ),
            ],
            speed: Mutex::new((0, 0.0)),
        }
    }

    /// Shows an event.
    pub(super) fn show(&self, event: &TrainEvent<'_>) {
        match event {
            TrainEvent::Begin {
                global_step,
                num_trainable,
                num_params,
                ..
            } => {
                let share = 100.0 * *num_trainable as f64 / (*num_params).max(1) as f64;
                let (trainable, all) = (grouped(*num_trainable), grouped(*num_params));
                self.line(&format!(
                    "trainable params: {trainable} || all params: {all} || trainable%: {share:.4}"
                ));
                for line in &self.opening {
                    self.line(line);
                }
                self.line(&format!("  Number of trainable parameters = {trainable}"));
                let style = "{wide_bar} {pos}/{len} {msg} eta {eta}";
                // The template is part of the program; should it not parse, a plain bar is shown.
                if let Ok(style) = ProgressStyle::with_template(style) {
                    self.bar.set_style(style);
                }
                self.bar.set_position(*global_step);
            }
            TrainEvent::Update {
                global_step,
                loss,
                learning_rate,
                num_tokens,
                elapsed,
                ..
            } => {
                let rate = *num_tokens as f64 / elapsed.as_secs_f64().max(1e-9);
                self.bar.set_message(format!(
                    "loss {loss:.4} lr {learning_rate:.2e} {rate:.0} tokens/s"
                ));
                self.bar.set_position(*global_step);
                if let Ok(mut speed) = self.speed.lock() {
                    speed.0 += num_tokens;
                    speed.1 += elapsed.as_secs_f64();
                }
            }
            TrainEvent::Log(entry) => self.line(&self.log_line(entry)),
            TrainEvent::Saved(path) => {
                self.line(&format!("Saving model checkpoint to {}", path.display()));
            }
            TrainEvent::Skipped {
                global_step,
                attempted,
                loss_scale,
                hysteresis_left,
            } => {
                // DeepSpeed's words.
                let what = if loss_scale < attempted {
                    format!("reducing to {loss_scale}")
                } else {
                    format!("which stays; overflows until it is halved: {hysteresis_left}")
                };
                self.line(&format!(
                    "OVERFLOW! Skipping step {global_step}. Attempted loss scale: {attempted}, {what}"
                ));
            }
            TrainEvent::EarlyStop {
                global_step,
                num_worse,
            } => self.line(&format!(
                "stopping at step {global_step}: {num_worse} evaluations were not better"
            )),
        }
    }

    /// Writes a log entry as one line, with the speed since the last one.
    fn log_line(&self, entry: &Map<String, Value>) -> String {
        let mut line = log_dict(entry);
        if let Ok(mut speed) = self.speed.lock()
            && speed.1 > 0.0
        {
            line.push_str(&format!("  {:.0} tokens/s", speed.0 as f64 / speed.1));
            *speed = (0, 0.0);
        }
        line
    }

    /// Shows a line above the bar; where there is no terminal the bar is silent, the line is not.
    fn line(&self, text: &str) {
        self.bar.suspend(|| {
            // A closed stdout is no reason to lose the training.
            let _ = writeln!(std::io::stdout().lock(), "{text}");
        });
    }

    /// Removes the bar and prints the metrics.
    ///
    /// # Errors
    /// Standard output that cannot be written.
    pub(super) fn finish(self, summary: &TrainSummary, dir: &Path) -> anyhow::Result<()> {
        self.bar.finish_and_clear();
        let mut out = std::io::stdout().lock();
        let mut print = || -> std::io::Result<()> {
            if summary.was_complete {
                let step = summary.global_step;
                writeln!(
                    out,
                    "nothing was left to do: step {step} is the last one; overwrite_output_dir \
                     starts anew"
                )?;
            }
            writeln!(out, "***** train metrics *****")?;
            for line in metric_lines(&summary.metrics) {
                writeln!(out, "{line}")?;
            }
            writeln!(out, "the adapter is in {}", dir.display())
        };
        print().context("print the result")
    }
}

/// Returns a log entry as Hugging Face's trainer prints it: what was measured, then the epoch. The
/// files have all digits and the step.
fn log_dict(entry: &Map<String, Value>) -> String {
    let place = |key: &str| match key {
        "loss" | "eval_loss" => 0,
        "grad_norm" => 1,
        "learning_rate" => 2,
        "epoch" => 4,
        _ => 3,
    };
    let is_shown = |(key, _): &(&String, &Value)| !["step", "total_flos"].contains(&key.as_str());
    let mut shown: Vec<(&String, &Value)> = entry.iter().filter(is_shown).collect();
    shown.sort_by_key(|(key, _)| place(key));
    let text = |(key, value): (&String, &Value)| {
        let value = match (key.as_str(), value.as_f64()) {
            ("learning_rate", Some(rate)) => {
                format!("{rate:.4e}").parse::<f64>().ok().map(Value::from)
            }
            ("epoch", Some(epoch)) => Some(rounded(epoch, 2).into()),
            (_, Some(number)) if value.is_f64() => Some(rounded(number, 4).into()),
            _ => None,
        }
        .unwrap_or_else(|| value.clone());
        format!("'{key}': {}", python(&value))
    };
    let entries: Vec<String> = shown.into_iter().map(text).collect();
    format!("{{{}}}", entries.join(", "))
}

/// Returns metrics as Hugging Face's trainer prints them: sorted, aligned, times on a clock.
fn metric_lines(metrics: &Map<String, Value>) -> Vec<String> {
    let mut metrics: Vec<(&String, String)> = metrics
        .iter()
        .map(|(key, value)| (key, metric_text(key, value)))
        .collect();
    metrics.sort();
    let width = |lengths: &mut dyn Iterator<Item = usize>| lengths.max().unwrap_or(0);
    let keys = width(&mut metrics.iter().map(|(key, _)| key.len()));
    let values = width(&mut metrics.iter().map(|(_, value)| value.len()));
    let line = |(key, value): &(&String, String)| format!("  {key:<keys$} = {value:>values$}");
    metrics.iter().map(line).collect()
}

fn metric_text(key: &str, value: &Value) -> String {
    match value.as_f64() {
        Some(seconds) if key.ends_with("_runtime") => {
            let hundredths = (seconds.fract() * 100.0) as u64;
            format!(
                "{}.{hundredths:02}",
                clock(Duration::from_secs_f64(seconds))
            )
        }
        // Floating-point operations in units of 2^30, which HF calls GF.
        Some(flos) if key == "total_flos" => format!("{}GF", flos as u64 >> 30),
        Some(number) if value.is_f64() => Value::from((number * 1e4).round() / 1e4).to_string(),
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn log_entries_read_as_hugging_faces() {
        let entry = json!({
            "epoch": 1.727_272_727_27, "grad_norm": 3.541_687_915_54, "loss": 8.8579,
            "learning_rate": 1.223_587_092_62e-5, "step": 5,
        });
        assert_eq!(
            log_dict(entry.as_object().unwrap()),
            "{'loss': 8.8579, 'grad_norm': 3.5417, 'learning_rate': 1.2236e-05, 'epoch': 1.73}"
        );
        let entry = json!({
            "epoch": 5.0, "num_input_tokens_seen": 23_700, "total_flos": 1.6e10,
            "train_loss": 8.654_597_400_59, "step": 15,
        });
        assert_eq!(
            log_dict(entry.as_object().unwrap()),
            "{'num_input_tokens_seen': 23700, 'train_loss': 8.6546, 'epoch': 5.0}"
        );
    }

    #[test]
    fn metrics_read_as_hugging_faces() {
        let metrics = json!({
            "train_runtime": 599.3832, "total_flos": 252_043_712_393_216_000u64,
            "epoch": 30.0, "train_loss": 1.673_612,
        });
        let want = [
            "  epoch         =        30.0",
            "  total_flos    = 234733999GF",
            "  train_loss    =      1.6736",
            "  train_runtime =  0:09:59.38",
        ];
        assert_eq!(metric_lines(metrics.as_object().unwrap()), want);
    }
}
