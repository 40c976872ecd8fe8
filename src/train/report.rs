//! What a run writes about itself: `trainer_state.json`, `trainer_log.jsonl`, the results.
//!
//! Names and shapes are Hugging Face's `TrainerState` and LLaMA-Factory's log callback, so that
//! what plots theirs plots ours.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::TrainError;
use super::files::{pretty_json, write_atomically};

/// Name of the file with the state.
pub(super) const TRAINER_STATE: &str = "trainer_state.json";
const TRAINER_LOG: &str = "trainer_log.jsonl";

/// Numbers of a run that stay the same.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunFacts {
    /// Updates of the run.
    pub max_steps: u64,
    /// Epochs of the run.
    pub num_train_epochs: f64,
    /// Updates between two log entries.
    pub logging_steps: u64,
    /// Updates between two evaluations.
    pub eval_steps: Option<u64>,
    /// Updates between two checkpoints.
    pub save_steps: Option<u64>,
    /// Sequences of a micro-batch.
    pub train_batch_size: u64,
    /// Examples that all updates of the run go through.
    pub num_samples: f64,
    /// Parameters that multiply a token: all but the embedding, adapters included.
    pub num_flop_params: u64,
}

/// What a run has logged and reached.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainerState {
    /// Entries of losses, evaluations and the end, oldest first.
    pub log_history: Vec<Map<String, Value>>,
    /// Updates made.
    pub global_step: u64,
    /// Epochs made.
    pub epoch: f64,
    /// Tokens of the inputs so far, of all ranks.
    pub num_input_tokens_seen: u64,
    /// The best evaluation so far.
    pub best_metric: Option<f64>,
    /// Its checkpoint.
    pub best_model_checkpoint: Option<String>,
}

/// Rounds to 12 digits: a number then survives JSON readers that are off by the last bit, and a
/// resumed run writes what an uninterrupted one does.
pub(super) fn tidy(number: f64) -> f64 {
    format!("{number:.11e}").parse().unwrap_or(number)
}

/// Rounds to `digits` decimals.
pub(super) fn rounded(number: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (number * scale).round() / scale
}

fn tidy_all(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => {
            *value = json!(tidy(number.as_f64().unwrap_or(0.0)));
        }
        Value::Object(entries) => entries.values_mut().for_each(tidy_all),
        _ => {}
    }
}

impl TrainerState {
    /// Returns 6 x tokens x parameters, Hugging Face's estimate of the work done.
    pub fn total_flos(&self, facts: &RunFacts) -> f64 {
        6.0 * self.num_input_tokens_seen as f64 * facts.num_flop_params as f64
    }

    /// Writes `trainer_state.json` into a directory.
    ///
    /// # Errors
    /// [`TrainError::Io`] naming the file.
    pub fn write(&self, dir: &Path, facts: &RunFacts) -> Result<(), TrainError> {
        let state = json!({
            "best_metric": self.best_metric,
            "best_model_checkpoint": self.best_model_checkpoint,
            "epoch": self.epoch,
            "eval_steps": facts.eval_steps.unwrap_or(facts.logging_steps),
            "global_step": self.global_step,
            "is_hyper_param_search": false,
            "is_local_process_zero": true,
            "is_world_process_zero": true,
            "log_history": self.log_history,
            "logging_steps": facts.logging_steps,
            "max_steps": facts.max_steps,
            "num_input_tokens_seen": self.num_input_tokens_seen,
            "num_train_epochs": facts.num_train_epochs.ceil() as u64,
            "save_steps": facts.save_steps.unwrap_or(500),
            "stateful_callbacks": {},
            "total_flos": self.total_flos(facts),
            "train_batch_size": facts.train_batch_size,
            "trial_name": null,
            "trial_params": null,
        });
        write_atomically(&dir.join(TRAINER_STATE), pretty_json(&state, 2).as_bytes())
    }

    /// Reads `trainer_state.json` of a checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Io`] or [`TrainError::Checkpoint`] naming the file.
    pub fn read(dir: &Path) -> Result<Self, TrainError> {
        let path = dir.join(TRAINER_STATE);
        let text = std::fs::read_to_string(&path).map_err(TrainError::io(&path))?;
        let invalid = |what: String| TrainError::Checkpoint {
            path: path.clone(),
            what,
        };
        let mut state: Value = serde_json::from_str(&text).map_err(|e| invalid(e.to_string()))?;
        let mut log_history = Vec::new();
        for entry in state["log_history"].as_array_mut().into_iter().flatten() {
            tidy_all(entry);
            log_history.extend(entry.as_object().cloned());
        }
        let step = state["global_step"].as_u64();
        Ok(Self {
            log_history,
            global_step: step.ok_or_else(|| invalid("\"global_step\" is missing".to_owned()))?,
            epoch: tidy(state["epoch"].as_f64().unwrap_or(0.0)),
            num_input_tokens_seen: state["num_input_tokens_seen"].as_u64().unwrap_or(0),
            best_metric: state["best_metric"].as_f64().map(tidy),
            best_model_checkpoint: state["best_model_checkpoint"].as_str().map(str::to_owned),
        })
    }

    /// Returns the points `(step, value)` of one metric.
    pub fn curve(&self, metric: &str) -> Vec<(u64, f64)> {
        let point = |entry: &Map<String, Value>| {
            Some((entry.get("step")?.as_u64()?, entry.get(metric)?.as_f64()?))
        };
        self.log_history.iter().filter_map(point).collect()
    }
}

/// Returns h:mm:ss.
pub fn clock(duration: Duration) -> String {
    let secs = duration.as_secs();
    format!("{}:{:02}:{:02}", secs / 3600, secs / 60 % 60, secs % 60)
}

/// One line of `trainer_log.jsonl`.
pub(super) struct LogLine<'a> {
    /// The entry of the state's history.
    pub(super) entry: &'a Map<String, Value>,
    /// Time since this process began to train.
    pub(super) elapsed: Duration,
    /// Updates that this process made.
    pub(super) updates_here: u64,
    pub(super) total_steps: u64,
    /// Tokens per second, and tokens so far.
    pub(super) tokens: (f64, u64),
}

impl LogLine<'_> {
    /// Appends the line.
    ///
    /// # Errors
    /// [`TrainError::Io`] naming the file.
    pub(super) fn append(&self, dir: &Path) -> Result<(), TrainError> {
        let step = self.entry.get("step").and_then(Value::as_u64).unwrap_or(0);
        let per_update = self.elapsed.as_secs_f64() / self.updates_here.max(1) as f64;
        let left = self.total_steps.saturating_sub(step) as f64 * per_update;
        let mut line = Map::new();
        line.insert("current_steps".to_owned(), json!(step));
        line.insert("total_steps".to_owned(), json!(self.total_steps));
        for (name, metric) in [
            ("loss", "loss"),
            ("eval_loss", "eval_loss"),
            ("lr", "learning_rate"),
        ] {
            if let Some(value) = self.entry.get(metric) {
                line.insert(name.to_owned(), value.clone());
            }
        }
        line.insert(
            "epoch".to_owned(),
            self.entry.get("epoch").cloned().unwrap_or(Value::Null),
        );
        let percentage = 100.0 * step as f64 / self.total_steps.max(1) as f64;
        line.insert("percentage".to_owned(), json!(rounded(percentage, 2)));
        line.insert("elapsed_time".to_owned(), json!(clock(self.elapsed)));
        let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::ZERO);
        line.insert("remaining_time".to_owned(), json!(clock(left)));
        line.insert("throughput".to_owned(), json!(rounded(self.tokens.0, 2)));
        line.insert("total_tokens".to_owned(), json!(self.tokens.1));
        let path = dir.join(TRAINER_LOG);
        let append = || {
            let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
            writeln!(file, "{}", Value::Object(line))
        };
        append().map_err(TrainError::io(&path))
    }
}

/// Removes the log of an earlier run.
///
/// # Errors
/// [`TrainError::Io`] naming the file.
pub(super) fn remove_log(dir: &Path) -> Result<(), TrainError> {
    let path = dir.join(TRAINER_LOG);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(TrainError::io(&path)(error))
        }
        _ => Ok(()),
    }
}

/// Drops lines of the log beyond an update: a run goes on from there.
///
/// # Errors
/// [`TrainError::Io`] naming the file.
pub(super) fn cut_log(dir: &Path, global_step: u64) -> Result<(), TrainError> {
    let path = dir.join(TRAINER_LOG);
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Ok(());
    };
    let is_before = |line: &&str| {
        let line: Result<Value, _> = serde_json::from_str(line);
        line.is_ok_and(|line| {
            line["current_steps"]
                .as_u64()
                .is_some_and(|step| step <= global_step)
        })
    };
    let kept: String = text
        .lines()
        .filter(is_before)
        .flat_map(|line| [line, "\n"])
        .collect();
    write_atomically(&path, kept.as_bytes())
}

/// Returns the metrics at the end of training, sorted by name.
pub(super) fn train_metrics(
    state: &TrainerState,
    facts: &RunFacts,
    train_loss: f64,
    runtime: Duration,
) -> Map<String, Value> {
    let secs = runtime.as_secs_f64().max(1e-9);
    let metrics = json!({
        "epoch": state.epoch,
        "num_input_tokens_seen": state.num_input_tokens_seen,
        "total_flos": state.total_flos(facts),
        "train_loss": train_loss,
        "train_runtime": rounded(secs, 4),
        "train_samples_per_second": rounded(facts.num_samples / secs, 3),
        "train_steps_per_second": rounded(facts.max_steps as f64 / secs, 3),
    });
    match metrics {
        Value::Object(metrics) => metrics,
        _ => Map::new(),
    }
}

/// Reads `{split}_results.json`; none where it is not there or not whole.
pub(super) fn read_results(dir: &Path, split: &str) -> Option<Map<String, Value>> {
    let text = std::fs::read_to_string(dir.join(format!("{split}_results.json"))).ok()?;
    serde_json::from_str(&text).ok()
}

/// Writes `{split}_results.json` and adds the same metrics to `all_results.json`.
///
/// # Errors
/// [`TrainError::Io`] naming the file.
pub(super) fn write_results(
    dir: &Path,
    split: &str,
    metrics: &Map<String, Value>,
) -> Result<(), TrainError> {
    let text = |metrics: Map<String, Value>| pretty_json(&Value::Object(metrics), 4);
    let path = dir.join(format!("{split}_results.json"));
    write_atomically(&path, text(metrics.clone()).trim_end().as_bytes())?;
    let path = dir.join("all_results.json");
    let earlier = std::fs::read_to_string(&path).ok();
    let earlier = earlier.and_then(|text| serde_json::from_str::<Map<String, Value>>(&text).ok());
    let mut all = earlier.unwrap_or_default();
    all.extend(metrics.clone());
    let mut entries: Vec<_> = all.into_iter().collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    write_atomically(
        &path,
        text(entries.into_iter().collect()).trim_end().as_bytes(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_written_read_and_written_again_is_the_same_file() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let facts = RunFacts {
            max_steps: 480,
            num_train_epochs: 30.0,
            logging_steps: 10,
            num_flop_params: 7_090_804_224,
            ..RunFacts::default()
        };
        let entry = json!({"loss": 1.2286, "grad_norm": tidy(1.0 / 3.0), "learning_rate": tidy(5e-4 / 7.0), "step": 10});
        let state = TrainerState {
            log_history: vec![entry.as_object().unwrap().clone()],
            global_step: 10,
            epoch: tidy(10.0 / 16.0 / 3.0),
            num_input_tokens_seen: 5_924_192,
            best_metric: Some(tidy(0.1 + 0.2)),
            best_model_checkpoint: Some("out/checkpoint-10".to_owned()),
        };
        // The reference run's `total_flos`, 234733999 GF of 2^30, from its tokens.
        let gigaflos = (state.total_flos(&facts) / f64::from(1 << 30)) as u64;
        assert!(gigaflos.abs_diff(234_733_999) <= 1, "{gigaflos}");
        state.write(first.path(), &facts).unwrap();
        let read = TrainerState::read(first.path()).unwrap();
        assert_eq!(read, state);
        read.write(second.path(), &facts).unwrap();
        let text = |dir: &Path| std::fs::read_to_string(dir.join(TRAINER_STATE)).unwrap();
        assert_eq!(text(first.path()), text(second.path()));
        assert_eq!(read.curve("loss"), [(10, 1.2286)]);
    }

    #[test]
    fn a_log_that_goes_on_has_no_line_twice() {
        let dir = tempfile::tempdir().unwrap();
        let append = |step: u64| {
            let entry = json!({"loss": 2.0, "learning_rate": 1e-4, "epoch": 0.5, "step": step});
            let line = LogLine {
                entry: entry.as_object().unwrap(),
                elapsed: Duration::from_secs(62),
                updates_here: step,
                total_steps: 40,
                tokens: (123.456, 1000),
            };
            line.append(dir.path()).unwrap();
        };
        (1..=3).for_each(|i| append(10 * i));
        cut_log(dir.path(), 20).unwrap();
        append(30);
        let text = std::fs::read_to_string(dir.path().join(TRAINER_LOG)).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let steps: Vec<u64> = lines
            .iter()
            .map(|line| line["current_steps"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [10, 20, 30]);
        assert_eq!(lines[1]["elapsed_time"], "0:01:02");
        assert_eq!(lines[1]["remaining_time"], "0:01:02");
        assert_eq!(lines[1]["percentage"], 50.0);
    }

    #[test]
    fn all_results_keep_what_other_splits_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = |json: Value| json.as_object().unwrap().clone();
        write_results(dir.path(), "train", &metrics(json!({"train_loss": 1.5}))).unwrap();
        write_results(dir.path(), "eval", &metrics(json!({"eval_loss": 1.25}))).unwrap();
        let text = std::fs::read_to_string(dir.path().join("all_results.json")).unwrap();
        assert_eq!(
            text,
            "{\n    \"eval_loss\": 1.25,\n    \"train_loss\": 1.5\n}"
        );
    }
}
