//! Everything before the weights: data sets read, encoded and counted, and the plan made of them.
//!
//! `infold train --dry-run` stops after this.

use anyhow::Context;

use crate::models::ModelConfig;
use crate::text::{SupervisedExample, Tokenizer};

use super::files::available_memory;
use super::{Encoder, Plan, PlanInputs, TrainConfig, load_data, template_of_tokenizer};

/// What a run learns from, and its plan.
#[derive(Debug)]
pub struct Prepared {
    /// Training examples, in the order of the data.
    pub train: Vec<SupervisedExample>,
    /// Evaluation examples.
    pub eval: Vec<SupervisedExample>,
    /// What encoded them; its template is stored with the adapter.
    pub encoder: Encoder,
    /// What the run will do.
    pub plan: Plan,
}

/// Reads, encodes and counts the data of a run. `model_bytes` is the size of the base as stored.
///
/// # Errors
/// Data that can not be used, a template that is unknown, an adapter that does not fit the model.
pub fn prepare(
    config: &TrainConfig,
    model: &ModelConfig,
    model_bytes: u64,
    tokenizer: &Tokenizer,
) -> anyhow::Result<Prepared> {
    let fallback = template_of_tokenizer(tokenizer);
    let encoder = Encoder::new(&config.data, fallback, tokenizer)?;
    let data = load_data(&config.data.request)?;
    let (train, train_summary) = encoder
        .encode(tokenizer, &data.train)
        .context("encoding the training data")?;
    let (eval, eval_summary) = encoder
        .encode(tokenizer, &data.eval)
        .context("encoding the evaluation data")?;
    let plan = Plan::new(&PlanInputs {
        config,
        model,
        model_bytes,
        template: encoder.template(),
        reports: &data.reports,
        train: train_summary,
        eval: (!eval.is_empty()).then_some(eval_summary),
        world_size: config.batch.num_ranks,
        available_memory: available_memory(),
    })?;
    Ok(Prepared {
        train,
        eval,
        encoder,
        plan,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const ROOT: &str = env!("CARGO_MANIFEST_DIR");

    fn prepared(more: &[&str]) -> anyhow::Result<Prepared> {
        let model = format!("{ROOT}/tests/fixtures/tiny-qwen2");
        let mut arguments = vec![
            format!("model_name_or_path={model}"),
            format!("dataset_dir={ROOT}/data"),
            "dataset=persona".to_owned(),
            "output_dir=unused".to_owned(),
        ];
        arguments.extend(more.iter().map(|&word| word.to_owned()));
        let config = TrainConfig::from_arguments(&arguments, 1)?;
        let json = std::fs::read_to_string(format!("{model}/config.json"))?;
        let shape = ModelConfig::from_json(&serde_json::from_str(&json)?)?;
        let tokenizer = Tokenizer::from_dir(Path::new(&model))?;
        prepare(&config, &shape, 1 << 20, &tokenizer)
    }

    #[test]
    fn the_persona_data_are_encoded_counted_and_planned() {
        let prepared = prepared(&["template=qwen", "per_device_train_batch_size=4"]).unwrap();
        assert_eq!(prepared.train.len(), 125);
        assert_eq!(prepared.plan.counts.micro_batches_per_epoch, 32);
        assert_eq!(prepared.plan.counts.total_updates, 96);
        assert!(
            prepared
                .train
                .iter()
                .all(|example| example.num_learned() > 0)
        );
        let text = prepared.plan.to_string();
        assert!(
            text.contains("125 rows read, 125 kept, 0 dropped"),
            "{text}"
        );
        assert!(text.contains("qwen"), "{text}");
    }

    #[test]
    fn evaluation_rows_are_split_off_and_long_examples_cut() {
        let prepared = prepared(&["template=qwen", "val_size=0.2", "cutoff_len=24"]).unwrap();
        assert_eq!((prepared.train.len(), prepared.eval.len()), (100, 25));
        assert!(
            prepared
                .train
                .iter()
                .all(|example| example.input_ids.len() <= 24)
        );
        let text = prepared.plan.to_string();
        assert!(text.contains("cut to cutoff_len 24"), "{text}");
        assert!(text.contains("evaluation"), "{text}");
    }

    #[test]
    fn an_unknown_template_is_refused_before_data_are_read() {
        let error = prepared(&["template=qwen9", "dataset=gone"]).unwrap_err();
        assert!(format!("{error:#}").contains("qwen9"), "{error:#}");
    }
}
