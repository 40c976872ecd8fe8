//! The command line before clap sees it: underscores, short forms, the YAML file, foreign flags.
//!
//! People paste commands made for vLLM. Flags that make no difference here are taken out with a
//! warning, flags that would change the answers are refused with a way out, so that nothing is
//! dropped in silence. Called by `main.rs` on the arguments after `serve`.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_norway::Value as Yaml;

use super::foreign_flags::{FOREIGN_FLAGS, Fate, Takes};

/// Arguments ready for clap, and what was left out of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PreparedArguments {
    /// The arguments without program name and verb.
    pub arguments: Vec<OsString>,
    /// One line for each flag that has no effect.
    pub warnings: Vec<String>,
}

/// Rewrites the arguments that follow `infold serve` into the form that clap knows.
///
/// Spells `--some_flag` as `--some-flag`, expands `-tp`, reads `--config FILE` (flags on the
/// command line win over the file's), and takes out vLLM's flags that have no meaning here.
///
/// # Errors
/// A flag that would change the answers and is not built, or a config file that can not be read.
pub fn prepare_arguments(
    arguments: impl IntoIterator<Item = OsString>,
) -> anyhow::Result<PreparedArguments> {
    let typed: Vec<OsString> = arguments.into_iter().map(spell_as_clap).collect();
    let mut all = typed.clone();
    if let Some(path) = value_of(&typed, "--config") {
        all.extend(arguments_of_file(&path.into(), &typed)?);
    }
    sort_out_foreign_flags(all)
}

/// vLLM's short forms of more than one letter, which clap can not take.
const SHORT_FORMS: &[(&str, &str)] = &[
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-dp", "--data-parallel-size"),
    ("-dpn", "--data-parallel-rank"),
    ("-dpr", "--data-parallel-start-rank"),
    ("-dpl", "--data-parallel-size-local"),
    ("-dpa", "--data-parallel-address"),
    ("-dpp", "--data-parallel-rpc-port"),
    ("-dpb", "--data-parallel-backend"),
    ("-dph", "--data-parallel-hybrid-lb"),
    ("-dpe", "--data-parallel-external-lb"),
    ("-dcp", "--decode-context-parallel-size"),
    ("-ep", "--enable-expert-parallel"),
    ("-q", "--quantization"),
    ("-sc", "--speculative-config"),
    ("-cc", "--compilation-config"),
    ("-n", "--nnodes"),
];

/// Spells one argument as clap expects it; values and positionals stay as they are.
fn spell_as_clap(argument: OsString) -> OsString {
    let Some(text) = argument.to_str() else {
        return argument;
    };
    let (name, value) = split_value(text);
    let long = SHORT_FORMS.iter().find(|(short, _)| *short == name);
    let name = match long {
        Some((_, long)) => (*long).to_owned(),
        None if name.starts_with("--") => name.replace('_', "-"),
        None => return argument,
    };
    match value {
        Some(value) => format!("{name}={value}").into(),
        None => name.into(),
    }
}

/// Splits `--flag=value`.
fn split_value(text: &str) -> (&str, Option<&str>) {
    match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    }
}

/// Returns the value of `flag`, given as `--flag=value` or as `--flag value`.
fn value_of(arguments: &[OsString], flag: &str) -> Option<OsString> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().unwrap_or_default();
        match split_value(text) {
            (name, Some(value)) if name == flag => return Some(value.into()),
            (name, None) if name == flag => return arguments.next().cloned(),
            _ => {}
        }
    }
    None
}

/// Turns a YAML mapping into flags, without those that were typed.
fn arguments_of_file(path: &PathBuf, typed: &[OsString]) -> anyhow::Result<Vec<OsString>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("read the config file {}", path.display()))?;
    let yaml: Yaml = serde_norway::from_str(&text)
        .with_context(|| format!("parse the config file {}", path.display()))?;
    let Yaml::Mapping(entries) = yaml else {
        bail!(
            "the config file {} is not a mapping of flags to values",
            path.display()
        );
    };
    let is_typed = |flag: &str| {
        let same = |argument: &OsString| argument.to_str().map(|text| split_value(text).0 == flag);
        typed.iter().any(|argument| same(argument) == Some(true))
    };
    // A positional model can only come first: every later bare word is some flag's value.
    let model_is_typed = is_typed("--model")
        || typed
            .first()
            .and_then(|first| first.to_str())
            .is_some_and(|first| !first.starts_with('-'));
    let mut arguments = Vec::new();
    for (key, value) in entries {
        let Yaml::String(key) = key else {
            bail!(
                "the config file {} has a key that is no string",
                path.display()
            );
        };
        let flag = format!("--{}", key.trim_start_matches('-').replace('_', "-"));
        let overruled =
            is_typed(&flag) || (key.starts_with("model") && key.len() == 5 && model_is_typed);
        if flag != "--config" && !overruled {
            push_yaml(&mut arguments, flag, value)
                .with_context(|| format!("key `{key}` of the config file {}", path.display()))?;
        }
    }
    Ok(arguments)
}

/// Writes one YAML entry as arguments: `true` is a switch, a list repeats, a mapping is JSON.
fn push_yaml(arguments: &mut Vec<OsString>, flag: String, value: Yaml) -> anyhow::Result<()> {
    match value {
        Yaml::Null => {}
        Yaml::Bool(true) => arguments.push(flag.into()),
        Yaml::Bool(false) => {
            // Only switches that are on by default have an off form; the others stay unset.
            match flag.as_str() {
                "--enable-prefix-caching" => arguments.push("--no-enable-prefix-caching".into()),
                "--async-scheduling" => arguments.push("--no-async-scheduling".into()),
                _ => {}
            }
        }
        Yaml::Sequence(values) if takes_json(&flag) => {
            arguments.push(format!("{flag}={}", serde_json::to_string(&values)?).into());
        }
        Yaml::Sequence(values) => {
            arguments.push(flag.into());
            for value in values {
                arguments.push(scalar(value)?.into());
            }
        }
        Yaml::Mapping(mapping) => {
            arguments.push(format!("{flag}={}", serde_json::to_string(&mapping)?).into());
        }
        other => arguments.push(format!("{flag}={}", scalar(other)?).into()),
    }
    Ok(())
}

/// Returns whether a flag's value is itself a JSON list.
fn takes_json(flag: &str) -> bool {
    flag.starts_with("--allowed-")
}

fn scalar(value: Yaml) -> anyhow::Result<String> {
    Ok(match value {
        Yaml::String(text) => text,
        Yaml::Number(number) => number.to_string(),
        Yaml::Bool(value) => value.to_string(),
        other => bail!("expected a plain value, got {other:?}"),
    })
}

/// Takes out the flags of [`FOREIGN_FLAGS`] with their values.
fn sort_out_foreign_flags(all: Vec<OsString>) -> anyhow::Result<PreparedArguments> {
    let mut prepared = PreparedArguments::default();
    let mut rest = all.iter().cloned().peekable();
    while let Some(argument) = rest.next() {
        let text = argument.to_str().unwrap_or_default();
        let (name, joined) = split_value(text);
        let Some((flag, takes, fate)) = FOREIGN_FLAGS.iter().find(|(flag, ..)| *flag == name)
        else {
            prepared.arguments.push(argument);
            continue;
        };
        let mut value = joined.map(str::to_owned);
        if joined.is_none() && *takes != Takes::Nothing {
            let is_value =
                |next: &OsString| !next.to_str().is_some_and(|next| next.starts_with("--"));
            value = rest
                .next_if(is_value)
                .map(|next| next.to_string_lossy().into_owned());
            while *takes == Takes::Many && rest.next_if(is_value).is_some() {}
        }
        match fate {
            Fate::Ignored(reason) => prepared
                .warnings
                .push(format!("{flag} has no effect: {reason}")),
            Fate::OnlyAs(accepted, _)
                if value
                    .as_deref()
                    .is_some_and(|value| accepted.contains(&value)) => {}
            Fate::OnlyAs(accepted, hint) => bail!(
                "{flag} {} is not supported (only {}): {hint}",
                value.unwrap_or_default(),
                accepted.join(", ")
            ),
            Fate::SameAs(other, _)
                if value.is_some()
                    && value.as_deref().map(OsString::from) == value_of(&all, other) => {}
            Fate::SameAs(other, hint) => bail!(
                "{flag} {} is not supported (only as {other}): {hint}",
                value.unwrap_or_default()
            ),
            Fate::Refused(hint) => bail!("{flag} is not supported: {hint}"),
        }
    }
    Ok(prepared)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepare(line: &str) -> anyhow::Result<PreparedArguments> {
        prepare_arguments(line.split_whitespace().map(OsString::from))
    }

    fn arguments(line: &str) -> Vec<OsString> {
        prepare(line).unwrap().arguments
    }

    #[test]
    fn underscores_and_short_forms_become_long_flags() {
        assert_eq!(
            arguments("my_model --max_model_len=8k -tp 4 --served-model-name a_b"),
            [
                "my_model",
                "--max-model-len=8k",
                "--tensor-parallel-size",
                "4",
                "--served-model-name",
                "a_b"
            ]
        );
    }

    #[test]
    fn replicas_are_all_here_behind_one_front_end() {
        let line = "m -dp 2 --data-parallel-size-local=2 -dpr 0 -dpb ray -dpa 10.0.0.1";
        let prepared = prepare(line).unwrap();
        assert_eq!(prepared.arguments, ["m", "--data-parallel-size", "2"]);
        insta::assert_snapshot!(prepared.warnings.join("\n"), @r"
        --data-parallel-backend has no effect: all replicas are threads of this process
        --data-parallel-address has no effect: all replicas are threads of this process
        ");
        let message = |line: &str| prepare(line).unwrap_err().to_string();
        insta::assert_snapshot!(message("m -dp 4 -dpl 2"), @"--data-parallel-size-local 2 is not supported (only as --data-parallel-size): all --data-parallel-size replicas run in this process behind one front end; leave it out, or run one server for each replica");
        for line in [
            "m -dpl 1",
            "m -dpl",
            "m -dp 2 -dph",
            "m -dp 2 -dpe",
            "m -dpn 0",
            "m -dpr 1",
        ] {
            let message = message(line);
            assert!(
                message.contains("behind one front end"),
                "{line}: {message}"
            );
        }
    }

    #[test]
    fn flags_without_meaning_leave_a_warning() {
        let prepared =
            prepare("m --swap-space 4 --enforce-eager --port 1 --trust_remote_code").unwrap();
        assert_eq!(prepared.arguments, ["m", "--enforce-eager", "--port", "1"]);
        insta::assert_snapshot!(prepared.warnings.join("\n"), @r"
        --swap-space has no effect: vLLM removed it too
        --trust-remote-code has no effect: no Python code runs here
        ");
    }

    #[test]
    fn flags_that_would_change_answers_are_refused_with_a_way_out() {
        let message = |line: &str| prepare(line).unwrap_err().to_string();
        insta::assert_snapshot!(message("m --tokenizer-mode slow"), @"--tokenizer-mode slow is not supported (only auto, hf, fast): only tokenizer.json and GGUF vocabularies are read");
        insta::assert_snapshot!(message("m --lora-modules a=b c=d"), @"--lora-modules is not supported: merge the adapter into the model first");
        assert!(
            prepare("m --config-format auto -pp 1")
                .unwrap()
                .warnings
                .is_empty()
        );
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serve.yaml");
        std::fs::write(
            &path,
            "model: other\nport: 12\nserved_model_name: [a, b]\nenable_prefix_caching: false\nasync-scheduling: false\n\
             allowed-origins: [x]\noverride-generation-config: {top_k: 3}\nswap-space: 1\n\
             dtype: half\n",
        )
        .unwrap();
        let prepared = prepare(&format!("m --port 99 --config {}", path.display())).unwrap();
        let path = path.to_str().unwrap();
        assert_eq!(
            prepared.arguments,
            [
                "m",
                "--port",
                "99",
                "--config",
                path,
                "--served-model-name",
                "a",
                "b",
                "--no-enable-prefix-caching",
                "--no-async-scheduling",
                "--allowed-origins=[\"x\"]",
                "--override-generation-config={\"top_k\":3}",
                "--dtype=half",
            ]
        );
        assert_eq!(prepared.warnings.len(), 1);
    }

    #[test]
    fn a_broken_file_is_named() {
        let error = prepare("m --config /nowhere/serve.yaml").unwrap_err();
        assert!(format!("{error:#}").contains("/nowhere/serve.yaml"));
    }
}
