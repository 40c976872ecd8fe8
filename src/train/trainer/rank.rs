//! The loop of one rank.

use std::sync::Arc;
use std::time::Instant;

use crate::distributed::Comm;
use crate::kernels::Kernels;

use super::super::TrainError;
use super::super::adapter_out::read_adapter;
use super::super::checkpoint::{self, Progress as Carried, Snapshot};
use super::super::forward_backward::{
    LoraTensors, StepOptions, TrainBatch, evaluate, forward_backward, mix,
};
use super::super::lora::LoraLayout;
use super::super::model::FrozenModel;
use super::super::optimizer::LossScaler;
use super::super::report::{TrainerState, tidy};
use super::super::zero::{Trainable, ZeroStage};
use super::recorder::{Recorder, UpdateReport};
use super::setup::{BatchPlace, Progress, Start, TrainEvent, TrainSetup, TrainSummary};

fn collective(error: candle_core::Error) -> TrainError {
    TrainError::kernel("exchange between ranks")(error)
}

/// Runs one rank to the end; the second group gathers layers of a divided base.
pub(super) fn run(
    setup: &TrainSetup<'_>,
    layout: &LoraLayout,
    (comm, gathering): (Comm, Comm),
    progress: &Progress<'_>,
) -> Result<TrainSummary, TrainError> {
    let kernels = Kernels::cpu(setup.ranks.threads_per_rank)
        .map_err(TrainError::kernel("start of the kernels"))?;
    let (source, config, max_positions) = (setup.source, setup.config, setup.max_positions);
    let model = match setup.ranks.zero_stage {
        ZeroStage::Three => {
            FrozenModel::load_sharded(source, config, &kernels, max_positions, gathering)?
        }
        _ => FrozenModel::load(source, config, &kernels, max_positions)?,
    };
    let mut rank = Rank::begin(setup, layout, comm, (kernels, model))?;
    let mut recorder = Recorder::new(setup, layout, progress, &rank.snapshot_state())?;
    let first_step = rank.state.global_step;
    if !setup.output.replaced.is_empty() {
        // Other ranks may still read one of them.
        rank.comm.barrier().map_err(collective)?;
    }
    if rank.comm.rank() == 0 {
        for dir in &setup.output.replaced {
            std::fs::remove_dir_all(dir).map_err(TrainError::io(dir))?;
        }
        progress(&TrainEvent::Begin {
            global_step: first_step,
            total_updates: setup.length.total_updates,
            num_trainable: layout.num_params() as u64,
            num_params: recorder.num_params(),
        });
    }
    if first_step == 0 {
        rank.evaluate_on_start(&mut recorder)?;
    }
    let mut stops = false;
    while rank.state.global_step < setup.length.total_updates && !stops {
        let report = rank.update(progress)?;
        stops = rank.record(&mut recorder, &report)?;
    }
    rank.finish(recorder, first_step >= setup.length.total_updates)
}

/// One rank with everything it owns.
struct Rank<'a> {
    setup: &'a TrainSetup<'a>,
    layout: &'a LoraLayout,
    comm: Comm,
    kernels: Kernels,
    model: FrozenModel,
    trainable: Trainable,
    scaler: Option<LossScaler>,
    carried: Carried,
    state: TrainerState,
}

impl<'a> Rank<'a> {
    fn begin(
        setup: &'a TrainSetup<'a>,
        layout: &'a LoraLayout,
        comm: Comm,
        (kernels, model): (Kernels, FrozenModel),
    ) -> Result<Self, TrainError> {
        let snapshot = match &setup.start {
            Start::Checkpoint(dir) => Some(checkpoint::load(dir, layout, &setup.manifest)?),
            Start::Fresh | Start::Adapter(_) => None,
        };
        let (params, moments, carried, state) = match (snapshot, &setup.start) {
            (Some(snapshot), _) => {
                let Snapshot {
                    params,
                    moments,
                    progress,
                    state,
                } = snapshot;
                (params, Some(moments), progress, state)
            }
            (None, Start::Adapter(dir)) => (
                read_adapter(dir, layout)?,
                None,
                Carried::default(),
                TrainerState::default(),
            ),
            (None, _) => {
                let mut params = layout.init(setup.seed);
                layout.copy_base(&mut params, setup.source, setup.config, &kernels)?;
                (params, None, Carried::default(), TrainerState::default())
            }
        };
        let stage = setup.ranks.zero_stage;
        let mut trainable = Trainable::new(stage, &comm, layout, params, setup.optimizer);
        if let Some((first, second)) = moments {
            trainable.set_moments(&first, &second, carried.num_updates);
        }
        let mut scaler = setup.loss_scale.map(LossScaler::new);
        if let Some(scaler) = &mut scaler {
            carried.restore_scaler(scaler);
        }
        Ok(Self {
            setup,
            layout,
            comm,
            kernels,
            model,
            trainable,
            scaler,
            carried,
            state,
        })
    }

    fn snapshot_state(&self) -> TrainerState {
        self.state.clone()
    }

    /// Returns this rank's micro-batches of the next update.
    fn next_batches(&self) -> Result<Vec<TrainBatch>, TrainError> {
        let length = &self.setup.length;
        let update = self.state.global_step;
        let epoch = update / length.updates_per_epoch();
        let first = update % length.updates_per_epoch() * length.accumulation;
        let end = (first + length.accumulation).min(length.micro_batches_per_epoch);
        let rank = self.comm.rank();
        let batch = |index| (self.setup.batches)(BatchPlace { epoch, index, rank });
        (first..end)
            .map(|index| batch(index).map_err(TrainError::Data))
            .collect()
    }

    /// Makes one update on all ranks.
    fn update(&mut self, progress: &Progress<'_>) -> Result<UpdateReport, TrainError> {
        let start = Instant::now();
        let batches = self.next_batches()?;
        let count = |size: fn(&TrainBatch) -> usize| batches.iter().map(size).sum::<usize>() as f64;
        let counts = [
            count(TrainBatch::num_targets),
            count(TrainBatch::num_tokens),
        ];
        let counts = self.comm.all_reduce_f64(&counts).map_err(collective)?;
        let [num_targets, num_tokens] = [counts[0], counts[1]];
        // The gradient of the mean over all target tokens; an update without any changes nothing
        // but what its moments carry.
        let weight = 1.0 / num_targets.max(1.0);
        let loss_scale = self.scaler.as_ref().map_or(1.0, LossScaler::scale);
        let (loss, gradients, bad_rows) =
            self.accumulate(&batches, (weight * loss_scale) as f32)?;
        let reduced = self
            .trainable
            .reduce(&self.comm, gradients, (1.0 / loss_scale) as f32)
            .map_err(collective)?;
        let loss = self.comm.all_reduce_f64(&[loss]).map_err(collective)?[0] * weight;
        let (step, grad_norm) = (self.state.global_step + 1, reduced.norm);
        let learning_rate = self.setup.schedule.at(self.carried.num_updates);
        let overflows = self.scaler.is_some() && loss.is_finite() && reduced.overflows_f16;
        if overflows {
            self.skip(step, progress)?;
        } else if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(self.not_finite(step, (loss, grad_norm), bad_rows, &batches)?);
        } else {
            self.trainable
                .update(&self.comm, reduced, learning_rate)
                .map_err(collective)?;
            self.carried.num_updates += 1;
            if let Some(scaler) = &mut self.scaler {
                scaler.applied();
            }
        }
        self.state.global_step = step;
        let length = &self.setup.length;
        let (per_epoch, update) = (length.updates_per_epoch(), step - 1);
        let done =
            ((update % per_epoch + 1) * length.accumulation).min(length.micro_batches_per_epoch);
        let share = done as f64 / length.micro_batches_per_epoch as f64;
        self.state.epoch = tidy((update / per_epoch) as f64 + share);
        self.state.num_input_tokens_seen += num_tokens as u64;
        self.carried.loss_sum += loss;
        self.carried.window_sum += loss;
        self.carried.window_len += 1;
        Ok(UpdateReport {
            loss,
            grad_norm,
            learning_rate,
            num_tokens: num_tokens as u64,
            elapsed: start.elapsed(),
        })
    }

    /// Returns the parameters as a pass reads them.
    fn trained(&self) -> Result<LoraTensors<'a>, TrainError> {
        LoraTensors::new(&self.kernels, self.layout, &self.trainable.params)
    }

    /// Runs the micro-batches: the sum of losses, the gradients, and rows without finite losses.
    fn accumulate(
        &self,
        batches: &[TrainBatch],
        weight: f32,
    ) -> Result<(f64, Vec<f32>, Vec<u64>), TrainError> {
        let lora = self.trained()?;
        let mut gradients = vec![0f32; self.layout.num_params()];
        let (mut loss, mut bad_rows) = (0.0, Vec::new());
        let step_key = mix(self.setup.seed, self.state.global_step + 1);
        let rank_key = mix(step_key, self.comm.rank() as u64 + 1);
        let passes = fuse(batches, self.setup.max_tokens_per_pass);
        let beyond = self.passes_beyond(passes.len() as u64)?;
        for (index, pass) in (1..).zip(&passes) {
            let options = StepOptions {
                recompute: self.setup.recompute,
                neftune_noise_alpha: self.setup.neftune_noise_alpha,
                noise_key: mix(rank_key, index),
            };
            let pass_loss = forward_backward(
                &self.kernels,
                &self.model,
                &lora,
                pass,
                (options, weight),
                &mut gradients,
            )?;
            if !pass_loss.is_finite() {
                bad_rows.extend_from_slice(&pass.rows);
            }
            loss += pass_loss;
        }
        let lowest = self.layout.lowest_layer(self.setup.config.num_layers);
        self.follow(beyond, Some(lowest))?;
        Ok((loss, gradients, bad_rows))
    }

    /// Returns how many passes some other rank makes beyond this rank's `num_passes`, where the
    /// base is divided. Asked before the first: a rank in its last pass needs the others' pieces.
    fn passes_beyond(&self, num_passes: u64) -> Result<u64, TrainError> {
        if self.setup.ranks.zero_stage != ZeroStage::Three {
            return Ok(0);
        }
        let passes = self
            .comm
            .all_gather_u64(&[num_passes])
            .map_err(collective)?;
        let most = passes.into_iter().flatten().max().unwrap_or(num_passes);
        Ok(most - num_passes)
    }

    /// Takes part in passes that other ranks make.
    fn follow(&self, num_passes: u64, lowest: Option<usize>) -> Result<(), TrainError> {
        for _ in 0..num_passes {
            self.model.follow(lowest).map_err(collective)?;
        }
        Ok(())
    }

    fn skip(&mut self, step: u64, progress: &Progress<'_>) -> Result<(), TrainError> {
        let Some(scaler) = &mut self.scaler else {
            return Ok(());
        };
        let attempted = scaler.scale();
        scaler.overflowed(step)?;
        if self.comm.rank() == 0 {
            progress(&TrainEvent::Skipped {
                global_step: step,
                attempted,
                loss_scale: scaler.scale(),
                hysteresis_left: scaler.hysteresis_left,
            });
        }
        Ok(())
    }

    /// Returns the error of an update that is not finite, with the rows of all ranks.
    fn not_finite(
        &self,
        step: u64,
        (loss, grad_norm): (f64, f64),
        bad_rows: Vec<u64>,
        batches: &[TrainBatch],
    ) -> Result<TrainError, TrainError> {
        // Where losses are finite, the gradients of any row may be at fault.
        let rows = match loss.is_finite() {
            true => batches
                .iter()
                .flat_map(|batch| batch.rows.clone())
                .collect(),
            false => bad_rows,
        };
        let rows = self.comm.all_gather_u64(&rows).map_err(collective)?;
        let mut rows = rows.concat();
        rows.sort_unstable();
        rows.dedup();
        let (quantity, value) = match loss.is_finite() {
            true => ("the gradient norm", grad_norm),
            false => ("the loss", loss),
        };
        Ok(TrainError::NonFinite {
            quantity,
            value,
            step,
            rows,
        })
    }

    /// Evaluates the adapters as they are before the first update, for the log alone.
    fn evaluate_on_start(&mut self, recorder: &mut Recorder<'_>) -> Result<(), TrainError> {
        if !self.setup.evaluation.as_ref().is_some_and(|e| e.on_start) {
            return Ok(());
        }
        let started = Instant::now();
        let eval_loss = self.evaluate()?;
        if self.comm.rank() == 0 {
            recorder.begin_log()?;
            recorder.evaluated(&mut self.state, eval_loss, started.elapsed())?;
        }
        Ok(())
    }

    /// Logs, evaluates and saves where it is time; says whether the run shall stop.
    fn record(
        &mut self,
        recorder: &mut Recorder<'_>,
        report: &UpdateReport,
    ) -> Result<bool, TrainError> {
        let is_main = self.comm.rank() == 0;
        if is_main {
            recorder.update(&mut self.state, &mut self.carried, report)?;
        } else if recorder.is_log_step(self.state.global_step) {
            (self.carried.window_sum, self.carried.window_len) = (0.0, 0);
        }
        let is_last = self.state.global_step >= self.setup.length.total_updates;
        let (mut stops, mut saves_best) = (false, false);
        if let Some(evaluation) = &self.setup.evaluation
            && (is_last
                || self.state.global_step >= evaluation.delay
                    && self.state.global_step.is_multiple_of(evaluation.every))
        {
            let started = Instant::now();
            let eval_loss = self.evaluate()?;
            let is_better = self.state.best_metric.is_none_or(|best| eval_loss < best);
            if is_better {
                self.carried.num_worse = 0;
                saves_best = evaluation.load_best_model_at_end;
                self.state.best_metric = Some(tidy(eval_loss));
                let dir = recorder.checkpoint_dir(self.state.global_step);
                self.state.best_model_checkpoint = Some(dir.to_string_lossy().into_owned());
            } else {
                self.carried.num_worse += 1;
            }
            if is_main {
                recorder.evaluated(&mut self.state, eval_loss, started.elapsed())?;
            }
            let patience = evaluation.early_stopping.unwrap_or(u64::MAX);
            stops = self.carried.num_worse >= patience;
            if stops && is_main {
                recorder.early_stop(self.state.global_step, self.carried.num_worse);
            }
        }
        if saves_best || recorder.is_save_step(self.state.global_step, is_last || stops) {
            self.save(recorder)?;
        }
        Ok(stops)
    }

    /// Refuses to write parameters that are no numbers: an update may overflow where its gradients
    /// did not.
    fn check_finite(&self) -> Result<(), TrainError> {
        match self.trainable.params.iter().all(|value| value.is_finite()) {
            true => Ok(()),
            false => Err(TrainError::Diverged {
                step: self.state.global_step,
            }),
        }
    }

    fn save(&mut self, recorder: &mut Recorder<'_>) -> Result<(), TrainError> {
        self.check_finite()?;
        let moments = match self.setup.output.save_only_model {
            true => Default::default(),
            false => (self.trainable.gather_moments(&self.comm)).map_err(collective)?,
        };
        if let Some(scaler) = &self.scaler {
            self.carried.set_scaler(scaler);
        }
        if self.comm.rank() == 0 {
            recorder.save(&Snapshot {
                params: self.trainable.params.to_vec(),
                moments,
                progress: self.carried.clone(),
                state: self.state.clone(),
            })?;
        }
        // Nobody goes on before the checkpoint is there: a rank that fails next loses nothing.
        self.comm.barrier().map_err(collective)
    }

    /// Returns the mean loss over the target tokens of the evaluation set.
    fn evaluate(&self) -> Result<f64, TrainError> {
        let Some(evaluation) = &self.setup.evaluation else {
            return Ok(0.0);
        };
        let lora = self.trained()?;
        let (mut loss, mut num_targets) = (0.0, 0);
        let world_size = self.comm.world_size();
        let own = (self.comm.rank() as u64..evaluation.num_batches).step_by(world_size);
        let beyond = self.passes_beyond(own.clone().count() as u64)?;
        for index in own {
            let place = BatchPlace {
                epoch: 0,
                index,
                rank: 0,
            };
            let batch = (evaluation.batches)(place).map_err(TrainError::Data)?;
            loss += evaluate(&self.kernels, &self.model, &lora, &batch)?;
            num_targets += batch.num_targets();
        }
        self.follow(beyond, None)?;
        let sums = [loss, num_targets as f64];
        let sums = self.comm.all_reduce_f64(&sums).map_err(collective)?;
        Ok(sums[0] / sums[1].max(1.0))
    }

    /// Writes the results.
    fn finish(
        mut self,
        mut recorder: Recorder<'_>,
        was_complete: bool,
    ) -> Result<TrainSummary, TrainError> {
        let loads_best = |evaluation: &super::Evaluation<'_>| evaluation.load_best_model_at_end;
        if self.setup.evaluation.as_ref().is_some_and(loads_best)
            && let Some(best) = &self.state.best_model_checkpoint
        {
            self.trainable.params = Arc::new(read_adapter(best.as_ref(), self.layout)?);
        }
        self.check_finite()?;
        let train_loss = self.carried.loss_sum / self.state.global_step.max(1) as f64;
        let metrics = match self.comm.rank() {
            0 if was_complete && let Some(metrics) = recorder.finished(&self.state)? => metrics,
            0 => recorder.finish(&mut self.state, &self.trainable.params, train_loss)?,
            _ => serde_json::Map::new(),
        };
        Ok(TrainSummary {
            global_step: self.state.global_step,
            was_complete,
            train_loss,
            metrics,
            params: Arc::unwrap_or_clone(self.trainable.params),
        })
    }
}

/// Joins micro-batches one after another while they have at most `max_tokens` together.
fn fuse(batches: &[TrainBatch], max_tokens: usize) -> Vec<TrainBatch> {
    let mut passes: Vec<TrainBatch> = Vec::new();
    for batch in batches {
        match passes.last_mut() {
            Some(last) if last.num_tokens() + batch.num_tokens() <= max_tokens => {
                last.append(batch)
            }
            _ => passes.push(batch.clone()),
        }
    }
    passes
}
