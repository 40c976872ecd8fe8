//! Flags of vLLM that this server does not have, and what becomes of each.
//!
//! Read by [`super::flags`] only. A flag that makes no difference to the answers is ignored with
//! a reason; one that would is refused with a way out.

/// What becomes of a flag that clap does not know.
pub(super) enum Fate {
    /// No effect and no difference: the flag goes, with a warning.
    Ignored(&'static str),
    /// These values mean what this server does anyway; any other is refused with the hint.
    OnlyAs(&'static [&'static str], &'static str),
    /// Accepted where it repeats the value of that flag; any other is refused with the hint.
    SameAs(&'static str, &'static str),
    /// Refused with the hint.
    Refused(&'static str),
}

/// How many arguments follow a flag.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Takes {
    /// A switch.
    Nothing,
    /// One value.
    One,
    /// Values up to the next flag.
    Many,
}

use Fate::{Ignored, OnlyAs, Refused, SameAs};
use Takes::{Many, Nothing, One};

const CPU: &str = "the CPU engine has no such setting";
const ALWAYS: &str = "this server always works so";
const REMOVED: &str = "vLLM removed it too";
const NO_PYTHON: &str = "no Python code runs here";
const ONE_ENGINE: &str = "use --tensor-parallel-size, --data-parallel-size or several servers";
const REPLICAS_HERE: &str = "all replicas are threads of this process";
const ONE_FRONT_END: &str = "all --data-parallel-size replicas run in this process behind one front end; leave \
     it out, or run one server for each replica";
const NO_SPECULATION: &str = "speculative decoding is not built";
const NO_LORA: &str = "merge the adapter into the model first";
const NO_TOOLS: &str = "tool calls are not built; serve without the flag";
const NO_REASONING: &str = "reasoning stays in the content; serve without the flag";
const NO_TLS: &str = "put a reverse proxy such as nginx or caddy in front for TLS";
const TEXT_ONLY: &str = "only text models that generate are served";

/// Each flag with the number of its values.
pub(super) const FOREIGN_FLAGS: &[(&str, Takes, Fate)] = &[
    ("--swap-space", One, Ignored(REMOVED)),
    (
        "--disable-log-requests",
        Nothing,
        Ignored("prompts are logged only with --enable-log-requests"),
    ),
    (
        "--no-enable-log-requests",
        Nothing,
        Ignored("prompts are logged only with --enable-log-requests"),
    ),
    ("--trust-remote-code", Nothing, Ignored(NO_PYTHON)),
    ("--use-v2-block-manager", Nothing, Ignored(REMOVED)),
    ("--num-scheduler-steps", One, Ignored(REMOVED)),
    ("--multi-step-stream-outputs", One, Ignored(REMOVED)),
    ("--num-lookahead-slots", One, Ignored(REMOVED)),
    (
        "--preemption-mode",
        One,
        Ignored("preempted sequences are recomputed"),
    ),
    ("--guided-decoding-backend", One, Ignored(REMOVED)),
    (
        "--distributed-executor-backend",
        One,
        Ignored("ranks are threads of this process"),
    ),
    (
        "--worker-use-ray",
        Nothing,
        Ignored("ranks are threads of this process"),
    ),
    ("--uvicorn-log-level", One, Ignored("set RUST_LOG instead")),
    ("--cpu-offload-gb", One, Ignored(CPU)),
    (
        "--max-parallel-loading-workers",
        One,
        Ignored("weights are memory-mapped"),
    ),
    ("--no-enforce-eager", Nothing, Ignored(CPU)),
    ("--cuda-graph-sizes", Many, Ignored(CPU)),
    ("--max-seq-len-to-capture", One, Ignored(REMOVED)),
    ("--compilation-config", One, Ignored(CPU)),
    ("--optimization-level", One, Ignored(CPU)),
    ("--enable-chunked-prefill", Nothing, Ignored(ALWAYS)),
    (
        "--no-enable-chunked-prefill",
        Nothing,
        Ignored("prompts are always computed in chunks; answers are the same"),
    ),
    (
        "--long-prefill-token-threshold",
        One,
        Ignored("the token budget of a step is shared by arrival"),
    ),
    (
        "--max-num-partial-prefills",
        One,
        Ignored("the token budget of a step is shared by arrival"),
    ),
    (
        "--max-long-partial-prefills",
        One,
        Ignored("the token budget of a step is shared by arrival"),
    ),
    (
        "--prefix-caching-hash-algo",
        One,
        Ignored("one hash is built in"),
    ),
    (
        "--calculate-kv-scales",
        Nothing,
        Refused(
            "--kv-cache-dtype fp8 stores keys and values without scales; serve without the flag",
        ),
    ),
    ("--attention-backend", One, Ignored(CPU)),
    (
        "--enable-server-load-tracking",
        Nothing,
        Ignored("/load is always there"),
    ),
    (
        "--enable-tokenizer-info-endpoint",
        Nothing,
        Ignored("the endpoint is not built"),
    ),
    (
        "--disable-fastapi-docs",
        Nothing,
        Ignored("only /openapi.json is served"),
    ),
    (
        "--disable-frontend-multiprocessing",
        Nothing,
        Ignored("one process serves all"),
    ),
    ("--api-server-count", One, Ignored("one process serves all")),
    (
        "--root-path",
        One,
        Ignored("routes are served without a prefix"),
    ),
    (
        "--h11-max-incomplete-event-size",
        One,
        Ignored("header limits are built in"),
    ),
    (
        "--h11-max-header-count",
        One,
        Ignored("header limits are built in"),
    ),
    (
        "--log-config-file",
        One,
        Ignored("set RUST_LOG and --log-format instead"),
    ),
    (
        "--otlp-traces-endpoint",
        One,
        Ignored("no traces are exported"),
    ),
    (
        "--collect-detailed-traces",
        Many,
        Ignored("no traces are exported"),
    ),
    (
        "--show-hidden-metrics-for-version",
        One,
        Ignored("no metric is hidden"),
    ),
    (
        "--ignore-patterns",
        Many,
        Ignored("only files of known names are fetched"),
    ),
    (
        "--use-tqdm-on-load",
        Nothing,
        Ignored("progress bars are shown on terminals"),
    ),
    (
        "--hf-overrides",
        One,
        Refused("edit the model's config.json instead"),
    ),
    (
        "--rope-scaling",
        One,
        Refused("edit rope_scaling in the model's config.json instead"),
    ),
    (
        "--rope-theta",
        One,
        Refused("edit rope_theta in the model's config.json instead"),
    ),
    (
        "--hf-config-path",
        One,
        Refused("put config.json beside the weights"),
    ),
    (
        "--config-format",
        One,
        OnlyAs(&["auto", "hf"], "only Hugging Face configs are read"),
    ),
    (
        "--model-impl",
        One,
        OnlyAs(&["auto", "vllm"], "models are built in"),
    ),
    (
        "--tokenizer-mode",
        One,
        OnlyAs(
            &["auto", "hf", "fast"],
            "only tokenizer.json and GGUF vocabularies are read",
        ),
    ),
    (
        "--tokenizer-revision",
        One,
        Refused("give a directory with --tokenizer instead"),
    ),
    (
        "--skip-tokenizer-init",
        Nothing,
        Refused("the API needs the tokenizer"),
    ),
    ("--runner", One, OnlyAs(&["auto", "generate"], TEXT_ONLY)),
    ("--task", One, OnlyAs(&["auto", "generate"], TEXT_ONLY)),
    ("--convert", One, OnlyAs(&["auto", "none"], TEXT_ONLY)),
    (
        "--logprobs-mode",
        One,
        OnlyAs(&["raw_logprobs"], "logprobs are those of the raw logits"),
    ),
    ("--pipeline-parallel-size", One, OnlyAs(&["1"], ONE_ENGINE)),
    ("--data-parallel-rank", One, Refused(ONE_FRONT_END)),
    (
        "--data-parallel-start-rank",
        One,
        OnlyAs(&["0"], ONE_FRONT_END),
    ),
    (
        "--data-parallel-size-local",
        One,
        SameAs("--data-parallel-size", ONE_FRONT_END),
    ),
    ("--data-parallel-address", One, Ignored(REPLICAS_HERE)),
    ("--data-parallel-rpc-port", One, Ignored(REPLICAS_HERE)),
    ("--data-parallel-backend", One, Ignored(REPLICAS_HERE)),
    ("--data-parallel-hybrid-lb", Nothing, Refused(ONE_FRONT_END)),
    (
        "--data-parallel-external-lb",
        Nothing,
        Refused(ONE_FRONT_END),
    ),
    (
        "--data-parallel-multi-port-external-lb",
        Nothing,
        Refused(ONE_FRONT_END),
    ),
    (
        "--decode-context-parallel-size",
        One,
        OnlyAs(&["1"], ONE_ENGINE),
    ),
    (
        "--enable-expert-parallel",
        Nothing,
        Refused("mixtures of experts are not built"),
    ),
    ("--nnodes", One, OnlyAs(&["1"], ONE_ENGINE)),
    ("--speculative-config", One, Refused(NO_SPECULATION)),
    ("--speculative-model", One, Refused(NO_SPECULATION)),
    ("--num-speculative-tokens", One, Refused(NO_SPECULATION)),
    ("--enable-lora", Nothing, Refused(NO_LORA)),
    ("--lora-modules", Many, Refused(NO_LORA)),
    ("--max-lora-rank", One, Refused(NO_LORA)),
    ("--max-loras", One, Refused(NO_LORA)),
    ("--max-cpu-loras", One, Refused(NO_LORA)),
    ("--fully-sharded-loras", Nothing, Refused(NO_LORA)),
    ("--enable-auto-tool-choice", Nothing, Refused(NO_TOOLS)),
    ("--tool-call-parser", One, Refused(NO_TOOLS)),
    ("--tool-parser-plugin", One, Refused(NO_TOOLS)),
    ("--tool-server", One, Refused(NO_TOOLS)),
    ("--reasoning-parser", One, Refused(NO_REASONING)),
    ("--enable-reasoning", Nothing, Refused(NO_REASONING)),
    (
        "--structured-outputs-config",
        One,
        Refused("structured output is not built"),
    ),
    ("--logits-processors", Many, Refused(NO_PYTHON)),
    ("--logits-processor-pattern", One, Refused(NO_PYTHON)),
    ("--middleware", One, Refused(NO_PYTHON)),
    (
        "--kv-transfer-config",
        One,
        Refused("KV transfer is not built"),
    ),
    (
        "--kv-offloading-size",
        One,
        Refused("the KV cache stays in memory; set --kv-cache-memory-bytes"),
    ),
    ("--limit-mm-per-prompt", One, Refused(TEXT_ONLY)),
    ("--prompt-adapter", Many, Refused(NO_LORA)),
    (
        "--disable-sliding-window",
        Nothing,
        Refused("limit --max-model-len to the window instead"),
    ),
    ("--ssl-keyfile", One, Refused(NO_TLS)),
    ("--ssl-certfile", One, Refused(NO_TLS)),
    ("--ssl-ca-certs", One, Refused(NO_TLS)),
    ("--ssl-cert-reqs", One, Refused(NO_TLS)),
    ("--enable-ssl-refresh", Nothing, Refused(NO_TLS)),
];
