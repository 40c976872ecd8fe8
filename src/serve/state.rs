//! What every handler shares: the engine, the text tools, and the settings of the server.
//!
//! Built once from the flags and a [`LoadedModel`], read-only afterwards but for the counters
//! of [`Lifecycle`] and [`Metrics`].

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::engine::EngineHandle;
use crate::text::{ChatTemplate, Tokenizer};

use super::args::{ContentFormat, JsonObject, ServeArgs};
use super::defaults::SamplingDefaults;
use super::load::LoadedModel;
use super::metrics::Metrics;

/// State of a running server.
pub struct AppState {
    pub(super) engine: EngineHandle,
    pub(super) tokenizer: Tokenizer,
    pub(super) chat_template: Option<ChatTemplate>,
    pub(super) eos_token_ids: Vec<u32>,
    pub(super) sampling_defaults: SamplingDefaults,
    pub(super) model: ServedModel,
    pub(super) options: Options,
    pub(super) metrics: Metrics,
    pub(super) lifecycle: Lifecycle,
}

/// The model as `/v1/models` shows it.
#[derive(Debug, Clone)]
pub(super) struct ServedModel {
    /// Names that requests may use; never empty.
    pub(super) names: Vec<String>,
    /// Where the model was loaded from.
    pub(super) root: String,
    /// Start of the server in seconds of the unix epoch.
    pub(super) created: u64,
}

impl ServedModel {
    /// Returns the name that responses carry.
    pub(super) fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }
}

/// Settings of the API, from the flags.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) max_logprobs: i64,
    pub(super) stream_interval: usize,
    pub(super) force_include_usage: bool,
    pub(super) prompt_tokens_details: bool,
    pub(super) tokens_as_token_ids: bool,
    pub(super) trust_request_chat_template: bool,
    pub(super) content_format: ContentFormat,
    pub(super) chat_template_kwargs: JsonObject,
    pub(super) response_role: String,
    pub(super) log_requests: bool,
    pub(super) max_log_len: usize,
    pub(super) access_log: bool,
    pub(super) max_body_size: usize,
    pub(super) request_id_headers: bool,
    pub(super) api_keys: Vec<String>,
}

/// Whether the server takes requests, and how many it works on.
#[derive(Debug, Default)]
pub(super) struct Lifecycle {
    draining: AtomicBool,
    in_flight: AtomicUsize,
}

impl Lifecycle {
    /// Refuses new requests from now on.
    pub(super) fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Returns whether the server is about to end.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Returns the number of generation requests whose response has not been sent in full.
    pub(super) fn num_in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a generation request in.
    pub(super) fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts it out.
    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AppState {
    /// Puts the state together; `api_keys` come from flags and environment.
    ///
    /// # Errors
    /// A chat template, generation config or end-of-sequence id that can not be used.
    pub fn new(
        args: &ServeArgs,
        loaded: LoadedModel,
        api_keys: Vec<String>,
    ) -> anyhow::Result<Self> {
        let generation_config = loaded.generation_config.as_ref();
        let sampling_defaults = SamplingDefaults::load(&args.api, generation_config)?;
        let names = args.model_names();
        let model_name = names.first().map_or("", String::as_str);
        let metrics = Metrics::new(model_name, loaded.engine.info())?;
        Ok(Self {
            eos_token_ids: loaded.eos_token_ids(),
            chat_template: loaded.chat_template(args.api.chat_template.as_deref())?,
            engine: loaded.engine,
            tokenizer: loaded.tokenizer,
            sampling_defaults,
            model: ServedModel {
                names,
                root: loaded.root,
                created: unix_seconds(),
            },
            options: Options::new(args, api_keys),
            metrics,
            lifecycle: Lifecycle::default(),
        })
    }
}

impl Options {
    fn new(args: &ServeArgs, api_keys: Vec<String>) -> Self {
        let (api, listen) = (&args.api, &args.listen);
        Self {
            max_logprobs: api.max_logprobs,
            stream_interval: api.stream_interval,
            force_include_usage: api.enable_force_include_usage,
            prompt_tokens_details: api.enable_prompt_tokens_details,
            tokens_as_token_ids: api.return_tokens_as_token_ids,
            trust_request_chat_template: api.trust_request_chat_template,
            content_format: api.chat_template_content_format,
            chat_template_kwargs: api.default_chat_template_kwargs.clone().unwrap_or_default(),
            response_role: api.response_role.clone(),
            log_requests: listen.enable_log_requests,
            max_log_len: listen.max_log_len.unwrap_or(usize::MAX),
            access_log: !listen.disable_access_log,
            max_body_size: listen.max_body_size,
            request_id_headers: listen.enable_request_id_headers,
            api_keys,
        }
    }
}

/// Returns the present time in seconds of the unix epoch.
pub(super) fn unix_seconds() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    // A clock before 1970 is no reason to fail a request.
    since_epoch.map_or(0, |elapsed| elapsed.as_secs())
}
