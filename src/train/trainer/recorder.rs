//! What rank 0 does besides training: history, logs, checkpoints, results.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::super::TrainError;
use super::super::adapter_out::{ADAPTER_MODEL, write_adapter};
use super::super::checkpoint::{
    self, CheckpointContext, Progress as Carried, Snapshot, checkpoint_dir,
};
use super::super::lora::LoraLayout;
use super::super::plot::plot_losses;
use super::super::report::{
    LogLine, RunFacts, TrainerState, cut_log, read_results, remove_log, rounded, tidy,
    train_metrics, write_results,
};
use super::super::tensorboard::EventFile;
use super::setup::{Progress, TrainEvent, TrainSetup};

/// One update in numbers.
pub(super) struct UpdateReport {
    pub(super) loss: f64,
    pub(super) grad_norm: f64,
    pub(super) learning_rate: f64,
    pub(super) num_tokens: u64,
    pub(super) elapsed: Duration,
}

/// The files of a run, and who is told.
pub(super) struct Recorder<'a> {
    setup: &'a TrainSetup<'a>,
    layout: &'a LoraLayout,
    progress: &'a Progress<'a>,
    facts: RunFacts,
    started: Instant,
    /// Updates and tokens when this process began.
    first_step: u64,
    first_tokens: u64,
    num_params: u64,
    /// TensorBoard's file, begun with the first entry.
    events: Option<EventFile>,
}

impl<'a> Recorder<'a> {
    /// Prepares the directory for a run that begins at `state`.
    pub(super) fn new(
        setup: &'a TrainSetup<'a>,
        layout: &'a LoraLayout,
        progress: &'a Progress<'a>,
        state: &TrainerState,
    ) -> Result<Self, TrainError> {
        let output = &setup.output;
        let tensors = setup.source.tensors()?;
        let size = |shape: &[usize]| shape.iter().map(|&size| size as u64).product::<u64>();
        let base: u64 = tensors.iter().map(|tensor| size(&tensor.shape)).sum();
        let embedding = (setup.config.vocab_size * setup.config.hidden_size) as u64;
        let num_params = base + layout.num_params() as u64;
        Ok(Self {
            setup,
            layout,
            progress,
            facts: RunFacts {
                max_steps: setup.length.total_updates,
                num_train_epochs: setup.length.num_train_epochs,
                logging_steps: output.logging_steps,
                eval_steps: setup.evaluation.as_ref().map(|evaluation| evaluation.every),
                save_steps: output.save_steps,
                train_batch_size: output.train_batch_size,
                num_samples: output.num_samples,
                num_flop_params: num_params.saturating_sub(embedding),
            },
            started: Instant::now(),
            first_step: state.global_step,
            first_tokens: state.num_input_tokens_seen,
            num_params,
            events: None,
        })
    }

    /// Returns all parameters, trainable ones included.
    pub(super) fn num_params(&self) -> u64 {
        self.num_params
    }

    /// Returns the place of the checkpoint of an update.
    pub(super) fn checkpoint_dir(&self, global_step: u64) -> PathBuf {
        checkpoint_dir(&self.setup.output.output_dir, global_step)
    }

    /// Says whether the losses since the last entry are logged after this update.
    pub(super) fn is_log_step(&self, global_step: u64) -> bool {
        let output = &self.setup.output;
        global_step.is_multiple_of(output.logging_steps)
            || (output.logging_first_step && global_step == 1)
    }

    /// Says whether a checkpoint is written after this update.
    pub(super) fn is_save_step(&self, global_step: u64, is_last: bool) -> bool {
        let every = self.setup.output.save_steps;
        every.is_some_and(|every| is_last || global_step.is_multiple_of(every))
    }

    /// Tells of an update and logs it when it is time.
    pub(super) fn update(
        &mut self,
        state: &mut TrainerState,
        carried: &mut Carried,
        report: &UpdateReport,
    ) -> Result<(), TrainError> {
        if state.global_step == self.first_step + 1 {
            cut_log(&self.setup.output.output_dir, self.first_step)?;
        }
        (self.progress)(&TrainEvent::Update {
            global_step: state.global_step,
            loss: report.loss,
            grad_norm: report.grad_norm,
            learning_rate: report.learning_rate,
            num_tokens: report.num_tokens,
            elapsed: report.elapsed,
        });
        if !self.is_log_step(state.global_step) {
            return Ok(());
        }
        let loss = carried.window_sum / carried.window_len.max(1) as f64;
        (carried.window_sum, carried.window_len) = (0.0, 0);
        self.log(
            state,
            json!({
                "epoch": state.epoch,
                "grad_norm": tidy(report.grad_norm),
                "learning_rate": tidy(report.learning_rate),
                "loss": rounded(loss, 4),
                "step": state.global_step,
            }),
        )
    }

    /// Makes room for an entry before the first update.
    pub(super) fn begin_log(&self) -> Result<(), TrainError> {
        remove_log(&self.setup.output.output_dir)
    }

    /// Logs an evaluation.
    pub(super) fn evaluated(
        &mut self,
        state: &mut TrainerState,
        eval_loss: f64,
        elapsed: Duration,
    ) -> Result<(), TrainError> {
        let secs = elapsed.as_secs_f64().max(1e-9);
        let evaluation = self.setup.evaluation.as_ref();
        let (num_examples, num_batches) = evaluation.map_or((0, 0), |evaluation| {
            (evaluation.num_examples, evaluation.num_batches)
        });
        let metrics = json!({
            "epoch": state.epoch,
            "eval_loss": tidy(eval_loss),
            "eval_runtime": rounded(secs, 4),
            "eval_samples_per_second": rounded(num_examples as f64 / secs, 3),
            "eval_steps_per_second": rounded(num_batches as f64 / secs, 3),
        });
        let mut entry = metrics.clone();
        entry["step"] = json!(state.global_step);
        self.log(state, entry)?;
        let metrics = metrics.as_object().cloned().unwrap_or_default();
        write_results(&self.setup.output.output_dir, "eval", &metrics)
    }

    /// Tells that the run stops early.
    pub(super) fn early_stop(&self, global_step: u64, num_worse: u64) {
        (self.progress)(&TrainEvent::EarlyStop {
            global_step,
            num_worse,
        });
    }

    fn log(&mut self, state: &mut TrainerState, entry: Value) -> Result<(), TrainError> {
        let entry = entry.as_object().cloned().unwrap_or_default();
        let elapsed = self.started.elapsed();
        let tokens = state.num_input_tokens_seen;
        let throughput = (tokens - self.first_tokens) as f64 / elapsed.as_secs_f64().max(1e-9);
        let line = LogLine {
            entry: &entry,
            elapsed,
            updates_here: state.global_step - self.first_step,
            total_steps: self.facts.max_steps,
            tokens: (throughput, tokens),
        };
        line.append(&self.setup.output.output_dir)?;
        self.log_events(&entry)?;
        (self.progress)(&TrainEvent::Log(&entry));
        state.log_history.push(entry);
        Ok(())
    }

    fn log_events(&mut self, entry: &Map<String, Value>) -> Result<(), TrainError> {
        let Some(dir) = &self.setup.output.tensorboard_dir else {
            return Ok(());
        };
        let events = match &mut self.events {
            Some(events) => events,
            none => none.insert(EventFile::create(dir)?),
        };
        events.log(entry)
    }

    /// Writes a checkpoint and removes those beyond the limit.
    pub(super) fn save(&self, snapshot: &Snapshot) -> Result<(), TrainError> {
        let output = &self.setup.output;
        let context = CheckpointContext {
            layout: self.layout,
            files: &self.setup.files,
            manifest: &self.setup.manifest,
            facts: &self.facts,
            save_only_model: output.save_only_model,
        };
        let place = checkpoint::save(&output.output_dir, context, snapshot)?;
        if let Some(limit) = output.save_total_limit {
            let best = snapshot.state.best_model_checkpoint.as_deref();
            checkpoint::rotate(&output.output_dir, limit, best)?;
        }
        (self.progress)(&TrainEvent::Saved(&place));
        Ok(())
    }

    /// Returns the metrics of a run that was finished before and whose results are there, which
    /// are worth more than those of a run without an update.
    pub(super) fn finished(
        &self,
        state: &TrainerState,
    ) -> Result<Option<Map<String, Value>>, TrainError> {
        let output = &self.setup.output;
        let dir = &output.output_dir;
        let (Ok(there), Some(metrics)) = (TrainerState::read(dir), read_results(dir, "train"))
        else {
            return Ok(None);
        };
        let is_end = |entry: &Map<String, Value>| entry.contains_key("train_loss");
        let is_whole = there.global_step == state.global_step
            && there.log_history.last().is_some_and(is_end)
            && dir.join(ADAPTER_MODEL).is_file();
        if is_whole && output.plot_loss {
            plot_losses(dir, &there)?;
        }
        Ok(is_whole.then_some(metrics))
    }

    /// Writes the adapter and the results, and returns the metrics.
    pub(super) fn finish(
        &mut self,
        state: &mut TrainerState,
        params: &[f32],
        train_loss: f64,
    ) -> Result<Map<String, Value>, TrainError> {
        let output = &self.setup.output;
        let dir = &output.output_dir;
        let metrics = train_metrics(state, &self.facts, tidy(train_loss), self.started.elapsed());
        write_adapter(dir, self.layout, params, &self.setup.files)?;
        let is_end = |entry: &Map<String, Value>| entry.contains_key("train_loss");
        if !state.log_history.last().is_some_and(is_end) {
            let mut entry = metrics.clone();
            entry.insert("step".to_owned(), json!(state.global_step));
            self.log(state, entry.into())?;
        }
        state.write(dir, &self.facts)?;
        write_results(dir, "train", &metrics)?;
        if output.plot_loss {
            plot_losses(dir, state)?;
        }
        Ok(metrics)
    }
}
