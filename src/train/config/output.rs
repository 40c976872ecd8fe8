//! The keys of logging, saving, evaluation and resuming.

use std::path::PathBuf;

use super::{ConfigError, Settings};

/// When something that repeats is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cadence {
    /// Never.
    Never,
    /// Every so many updates.
    Updates(u64),
    /// As often as this share of the run, between 0 and 1.
    Share(f64),
    /// At the end of each epoch.
    Epoch,
}

impl Cadence {
    /// Returns the updates between two times, of a run of `total` updates in epochs of
    /// `per_epoch`; nothing for never.
    pub fn interval(self, total: u64, per_epoch: u64) -> Option<u64> {
        match self {
            Self::Never => None,
            Self::Updates(updates) => Some(updates),
            Self::Share(share) => Some(((total as f64 * share).ceil() as u64).max(1)),
            Self::Epoch => Some(per_epoch),
        }
    }
}

/// Where a run goes on from (`resume_from_checkpoint`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// Not given: the newest checkpoint of `output_dir`, unless it is overwritten or has none.
    Automatic,
    /// `true`: the newest checkpoint of `output_dir`, which must have one.
    Newest,
    /// `false`: no checkpoint.
    Never,
    /// This checkpoint.
    From(PathBuf),
}

/// Logging, saving, evaluation and resuming.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputConfig {
    /// The folder of everything written.
    pub output_dir: PathBuf,
    /// Whether an earlier run there is ignored.
    pub overwrite_output_dir: bool,
    /// The checkpoint to go on from.
    pub resume_from_checkpoint: Resume,
    /// When the loss is logged.
    pub logging: Cadence,
    /// Whether the first update is logged too.
    pub logging_first_step: bool,
    /// When a checkpoint is written.
    pub save: Cadence,
    /// Checkpoints kept; absent means all.
    pub save_total_limit: Option<usize>,
    /// Whether checkpoints hold the adapter alone.
    pub save_only_model: bool,
    /// Whether the loss of the evaluation set is computed at the end.
    pub do_eval: bool,
    /// When the loss of the evaluation set is computed on the way.
    pub eval: Cadence,
    /// Epochs or updates without evaluation at the start.
    pub eval_delay: f64,
    /// Whether to evaluate before the first update.
    pub eval_on_start: bool,
    /// Whether the best checkpoint becomes the result.
    pub load_best_model_at_end: bool,
    /// The metric that is best.
    pub metric_for_best_model: Option<String>,
    /// Whether more of it is better.
    pub greater_is_better: Option<bool>,
    /// Evaluations without improvement before the run stops.
    pub early_stopping_steps: Option<u64>,
    /// Whether the loss curve is drawn.
    pub plot_loss: bool,
    /// Whether TensorBoard event files are written.
    pub tensorboard: bool,
    /// Where, if not in `output_dir/runs`.
    pub logging_dir: Option<PathBuf>,
    /// The name of the run.
    pub run_name: Option<String>,
    /// Whether tokens are counted in the log.
    pub include_num_input_tokens_seen: bool,
    /// Whether the progress bar is left out.
    pub disable_tqdm: bool,
}

impl OutputConfig {
    pub(super) fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        let output_dir = settings
            .opt_text("output_dir")?
            .ok_or(ConfigError::Missing {
                key: "output_dir",
                advice: "the folder for the adapter and its logs",
            })?;
        let logging = cadence(
            settings,
            "logging_strategy",
            "logging_steps",
            500.0,
            "steps",
        )?;
        let val_size = settings.opt_f64("val_size")?.unwrap_or(0.0);
        let has_eval_data = val_size > 0.0 || !settings.list("eval_dataset")?.is_empty();
        let eval_steps = settings.opt_f64("logging_steps")?.unwrap_or(500.0);
        let eval = cadence(settings, "eval_strategy", "eval_steps", eval_steps, "no")?;
        let path = |key| Ok::<_, ConfigError>(settings.opt_text(key)?.map(PathBuf::from));
        let config = Self {
            output_dir: PathBuf::from(output_dir),
            overwrite_output_dir: settings.bool("overwrite_output_dir", false)?,
            resume_from_checkpoint: resume(settings)?,
            logging,
            logging_first_step: settings.bool("logging_first_step", false)?,
            save: cadence(settings, "save_strategy", "save_steps", 500.0, "steps")?,
            save_total_limit: save_total_limit(settings)?,
            save_only_model: settings.bool("save_only_model", false)?,
            do_eval: eval != Cadence::Never || settings.bool("do_eval", false)?,
            eval,
            eval_delay: settings.f64_in("eval_delay", 0.0, 0.0..=f64::INFINITY)?,
            eval_on_start: settings.bool("eval_on_start", false)?,
            load_best_model_at_end: settings.bool("load_best_model_at_end", false)?,
            metric_for_best_model: settings.opt_text("metric_for_best_model")?,
            greater_is_better: settings.opt_bool("greater_is_better")?,
            early_stopping_steps: settings.opt_whole("early_stopping_steps", 1)?,
            plot_loss: settings.bool("plot_loss", false)?,
            tensorboard: tensorboard(settings)?,
            logging_dir: path("logging_dir")?,
            run_name: settings.opt_text("run_name")?,
            include_num_input_tokens_seen: settings.bool("include_num_input_tokens_seen", false)?
                || settings.bool("include_effective_tokens_per_second", false)?,
            disable_tqdm: settings.bool("disable_tqdm", false)?,
        };
        config.check(has_eval_data)?;
        Ok(config)
    }

    fn check(&self, has_eval_data: bool) -> Result<(), ConfigError> {
        let conflict = |what: &str| {
            Err(ConfigError::Conflict {
                what: what.to_owned(),
            })
        };
        if self.do_eval && !has_eval_data {
            return conflict(
                "Please specify dataset for evaluation: `do_eval` or `eval_strategy` is set, so \
                 set `val_size` or `eval_dataset`",
            );
        }
        if self.load_best_model_at_end
            && (self.eval == Cadence::Never || self.save == Cadence::Never)
        {
            return conflict(
                "`load_best_model_at_end` needs `eval_strategy` and `save_strategy` to be set",
            );
        }
        if self.early_stopping_steps.is_some() && self.eval == Cadence::Never {
            return conflict("`early_stopping_steps` needs `eval_strategy` to be set");
        }
        if self.eval_on_start && self.eval == Cadence::Never {
            return conflict("`eval_on_start` needs `eval_strategy` to be set");
        }
        match self.metric_for_best_model.as_deref() {
            None | Some("loss" | "eval_loss") => Ok(()),
            Some(other) => conflict(&format!(
                "`metric_for_best_model: {other}` is not computed; evaluation gives eval_loss"
            )),
        }
    }
}

fn cadence(
    settings: &Settings,
    strategy: &str,
    steps: &str,
    default_steps: f64,
    default_strategy: &str,
) -> Result<Cadence, ConfigError> {
    let given = settings.opt_text(strategy)?.map(|name| name.to_lowercase());
    match given.as_deref().unwrap_or(default_strategy) {
        // YAML reads a bare `no` as false.
        "no" | "false" => Ok(Cadence::Never),
        "epoch" => Ok(Cadence::Epoch),
        "steps" => {
            let every = settings.f64_in(steps, default_steps, 0.0..=1e15)?;
            match every {
                0.0 => Ok(Cadence::Never),
                share if share < 1.0 => Ok(Cadence::Share(share)),
                updates if updates.fract() == 0.0 => Ok(Cadence::Updates(updates as u64)),
                _ => Err(settings.invalid(steps, "a whole number, or a share below 1")),
            }
        }
        "best" => Err(settings.invalid(
            strategy,
            "no, steps or epoch; with load_best_model_at_end the best checkpoint is kept",
        )),
        _ => Err(settings.invalid(strategy, "no, steps or epoch")),
    }
}

/// Reads a path or a truth value; LLaMA-Factory's YAML reader takes yes, no, on and off as such.
fn resume(settings: &Settings) -> Result<Resume, ConfigError> {
    let Some(text) = settings.opt_text("resume_from_checkpoint")? else {
        return Ok(Resume::Automatic);
    };
    Ok(match text.to_lowercase().as_str() {
        "true" | "yes" | "on" => Resume::Newest,
        "false" | "no" | "off" => Resume::Never,
        _ => Resume::From(PathBuf::from(text)),
    })
}

/// Reads a limit; as in Hugging Face's trainer, zero or less is none.
fn save_total_limit(settings: &Settings) -> Result<Option<usize>, ConfigError> {
    let key = "save_total_limit";
    match settings.opt_f64(key)? {
        Some(limit) if limit.fract() != 0.0 || limit >= 9e15 => {
            Err(settings.invalid(key, "a whole number, 0 for no limit"))
        }
        limit => Ok(limit
            .filter(|limit| *limit > 0.0)
            .map(|limit| limit as usize)),
    }
}

fn tensorboard(settings: &Settings) -> Result<bool, ConfigError> {
    let names = settings.list("report_to")?;
    let known = |name: &String| matches!(name.as_str(), "none" | "tensorboard" | "all");
    if !names.iter().all(known) {
        return Err(settings.invalid(
            "report_to",
            "none or tensorboard (trainer_log.jsonl is always written)",
        ));
    }
    Ok(names.iter().any(|name| name == "tensorboard"))
}
