//! `infold check-data`: what training would make of data sets, without training.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Args;

use crate::text::Tokenizer;

use super::config::check_data_config;
use super::encode::{describe_example, template_of_tokenizer};
use super::{DataConfig, Encoder, LoadedData, load_data};

/// Read data sets as training would, and report rows read, kept and dropped
#[derive(Debug, Args)]
pub struct CheckDataArgs {
    /// A YAML or JSON file, key=value, or --dataset, --dataset_dir, --template, --cutoff_len,
    /// --model_name_or_path (to count tokens) and the other keys of `train`
    #[arg(value_name = "FILE | key=value | --key value", trailing_var_arg = true)]
    #[arg(allow_hyphen_values = true, required = true)]
    pub arguments: Vec<String>,
}

/// Prints the report of the data sets that the arguments name.
///
/// # Errors
/// Wrong arguments; data sets that training would refuse.
pub fn check_data(args: &CheckDataArgs) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    report(&args.arguments, &mut out)
}

fn report(arguments: &[String], out: &mut impl Write) -> anyhow::Result<()> {
    let (config, model) = check_data_config(arguments).context("reading the arguments")?;
    let data = load_data(&config.request)?;
    for report in &data.reports {
        writeln!(out, "{}", report.text())?;
    }
    let (train, eval) = (data.train.len(), data.eval.len());
    writeln!(
        out,
        "{train} conversations to train on, {eval} to evaluate on"
    )?;
    match model {
        Some(model) => report_tokens(&config, &data, &model, out),
        None => {
            writeln!(
                out,
                "name --model_name_or_path to count tokens and see an example"
            )?;
            Ok(())
        }
    }
}

fn report_tokens(
    config: &DataConfig,
    data: &LoadedData,
    model: &str,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::from_dir(Path::new(model)).context("loading the tokenizer")?;
    let encoder = Encoder::new(config, template_of_tokenizer(&tokenizer), &tokenizer)?;
    let (examples, summary) = encoder.encode(&tokenizer, &data.train)?;
    writeln!(
        out,
        "template {}: {} examples, {} tokens, {} of them learned; the longest has {}, {} were \
         cut to cutoff_len {}, {} have nothing to learn",
        encoder.template().name(),
        summary.num_examples,
        summary.num_tokens,
        summary.num_target_tokens,
        summary.longest,
        summary.num_truncated,
        config.cutoff_len,
        summary.num_empty
    )?;
    if let Some(first) = examples.first() {
        writeln!(
            out,
            "training example:\n{}",
            describe_example(&tokenizer, first)
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

    fn run(arguments: &[&str]) -> anyhow::Result<String> {
        let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
        let mut out = Vec::new();
        report(&arguments, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn dropped_rows() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let rows = r#"[{"instruction": "hi", "output": "hello"}, {"instruction": "hi"}]"#;
        std::fs::write(dir.path().join("rows.json"), rows).unwrap();
        dir
    }

    #[test]
    fn rows_kept_and_dropped_are_reported_without_a_model() {
        let dir = dropped_rows();
        let path = dir.path().join("rows.json");
        let text = run(&["--dataset", path.to_str().unwrap()]).unwrap();
        assert!(text.contains("2 rows read, 1 kept, 1 dropped"), "{text}");
        assert!(
            text.contains("dropped 1 row: `output` is missing (row 2)"),
            "{text}"
        );
        assert!(
            text.contains("1 conversations to train on, 0 to evaluate on"),
            "{text}"
        );
    }

    #[test]
    fn tokens_are_counted_with_a_model_and_the_first_example_is_shown() {
        let dir = dropped_rows();
        let dataset = format!("dataset={}/rows.json", dir.path().display());
        let model = format!("model_name_or_path={FIXTURES}/tiny-qwen2");
        let text = run(&[&dataset, &model, "template=qwen"]).unwrap();
        assert!(text.contains("template qwen: 1 examples"), "{text}");
        assert!(text.contains("inputs:\n<|im_start|>system\n"), "{text}");
        assert!(text.contains("labels:\nhello<|im_end|>"), "{text}");
    }

    #[test]
    fn a_wrong_template_is_named_with_those_there_are() {
        let dir = dropped_rows();
        let dataset = format!("dataset={}/rows.json", dir.path().display());
        let model = format!("model_name_or_path={FIXTURES}/tiny-qwen2");
        let error = run(&[&dataset, &model, "template=qwenn"]).unwrap_err();
        assert!(format!("{error:#}").contains("qwen"), "{error:#}");
    }

    #[test]
    fn the_persona_data_set_of_the_repository_is_clean_and_bilingual() {
        let root = env!("CARGO_MANIFEST_DIR");
        let text = run(&["dataset=persona", &format!("dataset_dir={root}/data")]).unwrap();
        assert!(text.contains(", 0 dropped"), "{text}");
        assert!(!text.contains("warning"), "{text}");
        let rows = std::fs::read_to_string(format!("{root}/data/persona.json")).unwrap();
        let rows: Vec<serde_json::Value> = serde_json::from_str(&rows).unwrap();
        assert!(rows.len() >= 100, "{} rows", rows.len());
        let is_chinese = |row: &&serde_json::Value| {
            let text = row["instruction"].as_str().unwrap();
            text.chars().any(|c| ('\u{4e00}'..='\u{9fff}').contains(&c))
        };
        let chinese = rows.iter().filter(is_chinese).count();
        assert!(
            chinese >= 40 && rows.len() - chinese >= 40,
            "{chinese} in Chinese"
        );
        let mut questions: Vec<String> = rows
            .iter()
            .map(|row| row["instruction"].to_string())
            .collect();
        questions.sort();
        questions.dedup();
        assert_eq!(questions.len(), rows.len(), "no question twice");
    }
}
