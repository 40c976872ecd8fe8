//! What a run shows in the terminal: Hugging Face's blocks, the log, and a progress bar.

use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use super::{Plan, TrainConfig, TrainEvent, TrainSummary};

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
    pub(super) fn new(config: &TrainConfig, plan: &Plan) -> Self {
        let counts = plan.counts;
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
                format!("  Num Epochs = {}", counts.num_epochs),
                format!("  Instantaneous batch size per device = {size}"),
                format!(
                    "  Total train batch size (w. parallel, distributed & accumulation) = {total}"
                ),
                format!("  Gradient Accumulation steps = {accumulation}"),
                format!("  Total optimization steps = {}", counts.total_updates),
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
                self.line(&format!(
                    "trainable params: {num_trainable} || all params: {num_params} || trainable%: \
                     {share:.4}"
                ));
                for line in &self.opening {
                    self.line(line);
                }
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
        let mut line = Value::Object(entry.clone()).to_string();
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
            for (key, value) in &summary.metrics {
                writeln!(out, "  {key:<25} = {value}")?;
            }
            writeln!(out, "the adapter is in {}", dir.display())
        };
        print().context("print the result")
    }
}
