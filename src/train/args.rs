//! The command line of `infold train`: LLaMA-Factory's keys, taken as they come.
//!
//! clap sees one list of words; what they mean is `config`'s business, because the keys are
//! LLaMA-Factory's, may come from files, and follow Hugging Face's argument parser, not clap's.

use clap::Args;

use super::{ConfigError, TrainConfig};

/// Train a LoRA adapter by supervised fine-tuning
///
/// Takes LLaMA-Factory's configuration files and flags: `infold train FILE.yaml [key=value …]`,
/// `infold train --stage sft --dataset persona …`, with underscores or dashes.
#[derive(Debug, Args)]
#[command(after_long_help = KEYS)]
pub struct TrainArgs {
    /// A YAML or JSON file, key=value over it, or --key value; the last of duplicates wins
    #[arg(value_name = "FILE | key=value | --key value", trailing_var_arg = true)]
    #[arg(allow_hyphen_values = true, required = true)]
    pub arguments: Vec<String>,
}

impl TrainArgs {
    /// Reads and checks the configuration, on a machine with `num_devices` devices.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key, what was found, and what to do.
    pub fn config(&self, num_devices: usize) -> Result<TrainConfig, ConfigError> {
        TrainConfig::from_arguments(&self.arguments, num_devices)
    }
}

/// The keys that most runs set.
const KEYS: &str = "\
Keys (all of LLaMA-Factory's are known; these matter most):
  model_name_or_path     Set the base model: a folder or a hub id [required]
  output_dir             Set the folder of the adapter, its logs and checkpoints [required]
  dataset                Name data sets of dataset_info.json, or files, with commas [required]
  dataset_dir            Set the folder of dataset_info.json [default: data]
  template               Set the prompt template, such as qwen or llama3 [default: by tokenizer]
  default_system         Replace the template's system prompt [default: the template's]
  cutoff_len             Cut examples to this many tokens [default: 2048]
  max_samples            Take the first rows of each data set [default: all]
  val_size               Split off rows for evaluation, a share or a count [default: 0]
  lora_rank              Set r [default: 8]
  lora_alpha             Set alpha [default: 2 x lora_rank]
  lora_dropout           Set the dropout of the adapter's input [default: 0]
  lora_target            Name the linears with commas, or all [default: all]
  additional_target      Name modules to train and save whole: embed_tokens,lm_head [default: none]
  use_dora               Train the norms of the weights' rows apart [default: false]
  num_train_epochs       Set the passes over the data [default: 3]
  max_steps              Set the updates instead [default: by epochs]
  per_device_train_batch_size  Set the examples of a micro-batch [default: 8]
  gradient_accumulation_steps  Set the micro-batches of an update [default: 1]
  learning_rate          Set the peak [default: 5e-5]
  lr_scheduler_type      Set the curve: linear, cosine, constant, ... [default: linear]
  warmup_ratio           Set the warm-up as a share of the run [default: 0]
  bf16, fp16             Round and save as such a run does, the plan says how [default: f32]
  deepspeed              Read a DeepSpeed configuration [default: none]
  logging_steps          Log every so many updates [default: 500]
  save_steps             Write a checkpoint every so many updates [default: 500]
  plot_loss              Draw training_loss.png [default: false]
  overwrite_output_dir   Start anew where an earlier run was [default: false, resume]
  resume_from_checkpoint  Go on from the newest checkpoint (true), none (false) or a path

Keys of infold:
  dry_run                Print the plan and stop [default: false]
  num_ranks              Set the ranks [default: one for each device]
  recompute              Recompute in the backward pass: auto, none, mlp, full [default: auto]
  max_dropped_ratio      Stop when a larger share of rows is unusable [default: 0.5]
  prefer_hf_scheduler    Keep lr_scheduler_type over DeepSpeed's scheduler [default: false]";

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        train: TrainArgs,
    }

    fn parse(arguments: &[&str]) -> Vec<String> {
        let words = ["train"].iter().chain(arguments);
        Cli::try_parse_from(words).unwrap().train.arguments
    }

    #[test]
    fn words_pass_through_clap_untouched() {
        for words in [
            &["--stage", "sft", "--do_train", "True", "--max_steps", "-1"][..],
            &["run.yaml", "lora_rank=4", "--plot_loss"],
            &["--lora-dropout=0.1", "--dry-run"],
        ] {
            assert_eq!(parse(words), words);
        }
    }

    #[test]
    fn a_dry_run_is_a_flag_like_the_others() {
        let arguments = TrainArgs {
            arguments: parse(&[
                "--model_name_or_path",
                "m",
                "--dataset",
                "d",
                "--output_dir",
                "o",
                "--dry-run",
            ]),
        };
        assert!(arguments.config(1).unwrap().dry_run);
    }

    #[test]
    fn every_key_of_the_help_is_known() {
        for line in KEYS.lines().filter(|line| line.starts_with("  ")) {
            for key in line.split_whitespace().take_while(|word| {
                word.trim_end_matches(',')
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            }) {
                let key = key.trim_end_matches(',');
                assert!(super::super::config::is_known(key), "{key}");
            }
        }
    }
}
