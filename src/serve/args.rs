//! The flags of `infold serve`: vLLM's names, spellings and defaults.
//!
//! Flags that vLLM has and this server lacks never reach clap: [`super::flags`] takes them out
//! first, with a warning or an error. Values are checked here; what they mean together is
//! decided in [`super::state`] and [`super::load`].

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};

use crate::engine::{EngineArgs, parse_size};

/// Serve a model over the OpenAI-compatible HTTP API
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Model to serve: a directory, a GGUF file or a hub id such as Qwen/Qwen2.5-7B-Instruct
    #[arg(value_name = "MODEL", required_unless_present = "model_flag")]
    pub model_positional: Option<String>,

    /// Name the model by flag instead of by position [default: none]
    #[arg(
        long = "model",
        id = "model_flag",
        value_name = "MODEL",
        conflicts_with = "model_positional"
    )]
    pub model_flag: Option<String>,

    /// Fold these LoRA adapters, directories or hub ids, into the weights while loading, separated by commas [default: none]
    #[arg(long, value_name = "ADAPTER", value_delimiter = ',')]
    pub merge_adapter: Vec<String>,

    /// Accept these model names in requests; responses carry the first [default: MODEL as given]
    #[arg(long, num_args = 1.., value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub served_model_name: Vec<String>,

    /// Read the tokenizer from this directory [default: the model's]
    #[arg(long, value_name = "DIRECTORY")]
    pub tokenizer: Option<PathBuf>,

    /// Read flags from a YAML file, keys spelled as flags; the command line wins [default: none]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment here would become help text")]
    pub listen: ListenArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment here would become help text")]
    pub engine: EngineArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment here would become help text")]
    pub api: ApiArgs,
}

impl ServeArgs {
    /// Returns the model as the user wrote it; empty only if clap was bypassed.
    pub fn model(&self) -> &str {
        self.model_positional
            .as_deref()
            .or(self.model_flag.as_deref())
            .unwrap_or_default()
    }

    /// Returns the names that requests may use, the one for responses first.
    pub fn model_names(&self) -> Vec<String> {
        if self.served_model_name.is_empty() {
            vec![self.model().to_owned()]
        } else {
            self.served_model_name.clone()
        }
    }
}

/// Where the server listens and how it guards and ends connections.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Network")]
pub struct ListenArgs {
    /// Listen on this address [default: all interfaces]
    #[arg(long, value_name = "ADDRESS")]
    pub host: Option<String>,

    /// Listen on this TCP port; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,

    /// Listen on a unix socket instead of TCP [default: none]
    #[arg(long, value_name = "PATH", conflicts_with = "host")]
    pub uds: Option<PathBuf>,

    /// Require one of these bearer keys on /v1 [default: $INFOLD_API_KEY, else $VLLM_API_KEY, else none]
    #[arg(
        long,
        num_args = 1..,
        value_name = "KEY",
        hide_env_values = true,
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub api_key: Vec<String>,

    /// Allow these origins to call from a browser, as a JSON list
    #[arg(long, value_name = "JSON", default_value = r#"["*"]"#, value_parser = string_list)]
    pub allowed_origins: StringList,

    /// Allow these methods to call from a browser, as a JSON list
    #[arg(long, value_name = "JSON", default_value = r#"["*"]"#, value_parser = string_list)]
    pub allowed_methods: StringList,

    /// Allow these headers to call from a browser, as a JSON list
    #[arg(long, value_name = "JSON", default_value = r#"["*"]"#, value_parser = string_list)]
    pub allowed_headers: StringList,

    /// Allow browsers to send credentials [default: off]
    #[arg(long)]
    pub allow_credentials: bool,

    /// Return X-Request-Id with every response [default: off]
    #[arg(long)]
    pub enable_request_id_headers: bool,

    /// Refuse request bodies above this size
    #[arg(long, value_name = "SIZE", default_value = "32MiB", value_parser = parse_size)]
    pub max_body_size: usize,

    /// Let running requests finish for this many seconds after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub shutdown_timeout: u64,

    /// Leave out the log line of each request [default: off]
    #[arg(long, alias = "disable-uvicorn-access-log")]
    pub disable_access_log: bool,

    /// Log the rendered prompt and the parameters of each request [default: off]
    #[arg(long)]
    pub enable_log_requests: bool,

    /// Log at most this many characters of a prompt [default: all]
    #[arg(long, value_name = "CHARACTERS")]
    pub max_log_len: Option<usize>,

    /// Leave out the regular log line of throughput and queue length [default: off]
    #[arg(long)]
    pub disable_log_stats: bool,

    /// Write log lines in this form
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How requests become prompts and answers.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "API")]
pub struct ApiArgs {
    /// Take sampling defaults from the model (auto), from nowhere (vllm) or from this directory
    #[arg(long, value_name = "auto|vllm|DIRECTORY", default_value = "auto")]
    pub generation_config: String,

    /// Override single sampling defaults, as a JSON object [default: none]
    #[arg(long, value_name = "JSON", value_parser = parse_json_object)]
    pub override_generation_config: Option<JsonObject>,

    /// Render chats with this template: a name (chatml, qwen2.5, qwen3, llama3), a file or its text [default: the model's]
    #[arg(long, value_name = "NAME|FILE|TEXT")]
    pub chat_template: Option<String>,

    /// Give message content to the template in this form
    #[arg(long, value_enum, default_value_t = ContentFormat::Auto)]
    pub chat_template_content_format: ContentFormat,

    /// Allow requests to bring their own chat template [default: off]
    #[arg(long)]
    pub trust_request_chat_template: bool,

    /// Give these variables to the template unless a request sets them, as a JSON object [default: none]
    #[arg(long, value_name = "JSON", value_parser = parse_json_object)]
    pub default_chat_template_kwargs: Option<JsonObject>,

    /// Answer in this role
    #[arg(long, default_value = "assistant")]
    pub response_role: String,

    /// Return at most this many logprobs a token; -1 sets no limit
    #[arg(
        long,
        default_value_t = 20,
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(i64).range(-1..)
    )]
    pub max_logprobs: i64,

    /// Send this many tokens in a streamed chunk
    #[arg(long, value_name = "TOKENS", default_value_t = 1, value_parser = parse_positive)]
    pub stream_interval: usize,

    /// End every stream with a usage chunk [default: off]
    #[arg(long)]
    pub enable_force_include_usage: bool,

    /// Report cached prompt tokens in usage [default: off]
    #[arg(long)]
    pub enable_prompt_tokens_details: bool,

    /// Put token ids in place of texts into logprobs [default: off]
    #[arg(long)]
    pub return_tokens_as_token_ids: bool,
}

/// How message content reaches the chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ContentFormat {
    /// As text: no template served here needs parts.
    Auto,
    /// As text; parts are joined by line feeds.
    String,
    /// As a list of parts.
    Openai,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A JSON object given as a flag.
pub type JsonObject = serde_json::Map<String, serde_json::Value>;

/// A JSON list of strings given as a flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StringList(pub Vec<String>);

fn string_list(text: &str) -> Result<StringList, String> {
    serde_json::from_str(text)
        .map(StringList)
        .map_err(|error| format!("expected a JSON list of strings: {error}"))
}

fn parse_json_object(text: &str) -> Result<JsonObject, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

fn parse_positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1, got 0".to_owned()),
        Ok(value) => Ok(value),
        Err(_) => Err(format!("expected a whole number, got `{text}`")),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use crate::engine::{Dtype, KvCacheDtype, MaxModelLen, Quantization, SchedulingPolicy};

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn parse(arguments: &[&str]) -> Result<ServeArgs, clap::Error> {
        let program = std::iter::once("infold").chain(arguments.iter().copied());
        Command::try_parse_from(program).map(|command| command.serve)
    }

    #[test]
    fn the_command_of_the_issue_parses() {
        let line = "--model DIR --port 6006 --tensor-parallel-size 4 --served-model-name \
                    Qwen2.5-7B-sft --max-model-len 8192 --dtype half --host 0.0.0.0";
        let args = parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap();
        assert_eq!(args.model(), "DIR");
        assert_eq!(args.model_names(), ["Qwen2.5-7B-sft"]);
        assert_eq!(args.engine.dtype, Dtype::Float16);
        assert_eq!(args.engine.max_model_len, Some(MaxModelLen::Tokens(8192)));
        assert_eq!(args.listen.port, 6006);
    }

    #[test]
    fn the_defaults_are_those_of_vllm() {
        let args = parse(&["m"]).unwrap();
        assert_eq!(args.model_names(), ["m"]);
        assert_eq!(args.listen.port, 8000);
        assert_eq!(
            args.listen.allowed_origins,
            StringList(vec!["*".to_owned()])
        );
        assert_eq!(args.engine.block_size, 16);
        assert!(!args.engine.no_enable_prefix_caching);
        assert_eq!(args.engine.scheduling_policy, SchedulingPolicy::Fcfs);
        assert_eq!(args.api.max_logprobs, 20);
        assert_eq!(args.api.generation_config, "auto");
    }

    #[test]
    fn lengths_may_be_written_for_people() {
        let max_model_len = |text: &str| {
            parse(&["m", "--max-model-len", text]).map(|args| args.engine.max_model_len)
        };
        for (text, tokens) in [("1k", 1000), ("1K", 1024), ("25.6k", 25_600), ("7", 7)] {
            assert_eq!(
                max_model_len(text).unwrap(),
                Some(MaxModelLen::Tokens(tokens))
            );
        }
        for auto in ["auto", "-1"] {
            assert_eq!(max_model_len(auto).unwrap(), Some(MaxModelLen::Auto));
        }
        for wrong in [
            "",
            "k",
            "0",
            "1.5",
            "-2",
            "nan",
            "1e300k",
            "99999999999999999999",
        ] {
            assert!(max_model_len(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_may_be_written_for_people() {
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("1048576"), Ok(1 << 20));
        assert_eq!(parse_size("1.5GB"), Ok(1_500_000_000));
        assert!(parse_size("4 apples").is_err());
    }

    #[test]
    fn quantization_is_fp8_or_none() {
        let quantization =
            |text: &str| parse(&["m", "--quantization", text]).map(|args| args.engine.quantization);
        assert_eq!(
            parse(&["m"]).unwrap().engine.quantization,
            Quantization::None
        );
        assert_eq!(quantization("fp8").unwrap(), Quantization::Fp8);
        for as_stored in ["auto", "none", "None", "gguf"] {
            assert_eq!(quantization(as_stored).unwrap(), Quantization::None);
        }
        let refused = quantization("awq").unwrap_err().to_string();
        assert!(
            refused.contains("only fp8, auto, none, None, gguf"),
            "{refused}"
        );
    }

    #[test]
    fn types_of_the_kv_cache_have_vllms_names() {
        let dtype = |text: &str| {
            parse(&["m", "--kv-cache-dtype", text]).map(|args| args.engine.kv_cache_dtype)
        };
        assert_eq!(
            parse(&["m"]).unwrap().engine.kv_cache_dtype,
            KvCacheDtype::Auto
        );
        for (text, want) in [
            ("auto", KvCacheDtype::Auto),
            ("fp8", KvCacheDtype::Fp8),
            ("fp8_e4m3", KvCacheDtype::Fp8),
            ("float16", KvCacheDtype::F16),
            ("bfloat16", KvCacheDtype::Bf16),
            ("float32", KvCacheDtype::F32),
        ] {
            assert_eq!(dtype(text).unwrap(), want, "{text}");
        }
        for other in ["fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4", "FP8", ""] {
            let refused = dtype(other).unwrap_err().to_string();
            assert!(
                refused.contains(&format!("`{other}` is not built")) && refused.contains("use fp8"),
                "{refused}"
            );
        }
    }

    #[test]
    fn the_later_prefix_caching_flag_wins() {
        let off = ["m", "--no-enable-prefix-caching"];
        assert!(parse(&off).unwrap().engine.no_enable_prefix_caching);
        let back = ["m", "--no-enable-prefix-caching", "--enable-prefix-caching"];
        assert!(!parse(&back).unwrap().engine.no_enable_prefix_caching);
    }

    #[test]
    fn the_later_async_scheduling_flag_wins() {
        let (on, off) = ("--async-scheduling", "--no-async-scheduling");
        for (flags, want) in [
            (vec![], (false, false)),
            (vec![on, off], (false, true)),
            (vec![off, on], (true, false)),
        ] {
            let engine = parse(&[vec!["m"], flags].concat()).unwrap().engine;
            assert_eq!((engine.async_scheduling, engine.no_async_scheduling), want);
        }
    }

    #[test]
    fn the_help_names_chat_templates_that_there_are() {
        let help = Command::command().render_long_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        let names = help.split_once("with this template: a name (").unwrap().1;
        let names: Vec<&str> = names.split_once(')').unwrap().0.split(", ").collect();
        assert_eq!(names.len(), 4, "{names:?}");
        for name in names {
            assert!(crate::text::resolve_chat_template(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        // A shell expands a variable that is not set to an empty word.
        assert!(parse(&["m", "--api-key", ""]).is_err());
        assert!(parse(&["m", "--served-model-name", ""]).is_err());
        assert!(parse(&["m", "--max-logprobs", "-2"]).is_err());
        assert_eq!(
            parse(&["m", "--max-logprobs", "-1"])
                .unwrap()
                .api
                .max_logprobs,
            -1
        );
    }

    #[test]
    fn a_model_is_required_once() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["a", "--model", "b"]).is_err());
    }

    #[test]
    fn many_names_and_keys_may_follow_one_flag() {
        let args = parse(&["m", "--served-model-name", "a", "b", "--api-key", "x", "y"]).unwrap();
        assert_eq!(args.model_names(), ["a", "b"]);
        assert_eq!(args.listen.api_key, ["x", "y"]);
    }
}
