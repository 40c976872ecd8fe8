//! Starts engines on the tiny checkpoints of `tests/fixtures` and collects what they answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use infold::engine::{
    Engine, EngineError, EngineHandle, EngineOptions, FinishReason, GenerateRequest, KvCacheDtype,
    SamplingParams, TokenEvent, TokenLogprobs, TokenStream,
};
use infold::weights::Checkpoint;

/// Everything an engine said about one request.
#[derive(Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) num_cached_tokens: usize,
    pub(crate) prompt: Option<Vec<Option<TokenLogprobs>>>,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) finish: FinishReason,
}

impl Answer {
    /// Returns the number of prompt tokens that logprobs were reported for.
    pub(crate) fn prompt_len(&self) -> usize {
        self.prompt.as_ref().map_or(0, Vec::len)
    }
}

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// One thread, f32 keys and values: what the goldens are compared with.
pub(crate) fn options() -> EngineOptions {
    EngineOptions {
        num_threads: Some(1),
        kv_cache_dtype: KvCacheDtype::F32,
        kv_cache_memory_bytes: Some(32 << 20),
        ..EngineOptions::default()
    }
}

pub(crate) fn start(model: &Path, options: &EngineOptions) -> EngineHandle {
    Engine::start(Arc::new(Checkpoint::open(model).unwrap()), options).unwrap()
}

pub(crate) fn start_fixture(model: &str, options: &EngineOptions) -> EngineHandle {
    start(&fixtures().join(model), options)
}

pub(crate) fn try_start_fixture(
    model: &str,
    options: &EngineOptions,
) -> Result<EngineHandle, EngineError> {
    Engine::start(
        Arc::new(Checkpoint::open(&fixtures().join(model)).unwrap()),
        options,
    )
}

pub(crate) fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        max_tokens,
        ignore_eos: true,
        logprobs: Some(5),
        ..SamplingParams::default()
    }
}

pub(crate) fn submit(
    engine: &EngineHandle,
    prompt: &[u32],
    sampling_params: SamplingParams,
) -> TokenStream {
    engine
        .submit(GenerateRequest {
            request_id: "golden".to_owned(),
            prompt_token_ids: prompt.to_vec(),
            sampling_params,
            priority: 0,
        })
        .unwrap()
}

pub(crate) fn collect(mut stream: TokenStream) -> Answer {
    let (mut num_cached_tokens, mut prompt) = (0, None);
    let (mut token_ids, mut all_logprobs) = (Vec::new(), Vec::new());
    loop {
        let finished = match stream.next_blocking().expect("the engine has ended") {
            TokenEvent::Prompt {
                num_cached_tokens: cached,
                logprobs,
                finish,
                ..
            } => {
                (num_cached_tokens, prompt) = (cached, logprobs);
                finish
            }
            TokenEvent::Token {
                token_id,
                logprobs,
                finish,
            } => {
                token_ids.push(token_id);
                all_logprobs.extend(logprobs);
                finish
            }
            TokenEvent::Failed { message } => panic!("the request failed: {message}"),
        };
        if let Some(finish) = finished {
            return Answer {
                num_cached_tokens,
                prompt,
                token_ids,
                logprobs: all_logprobs,
                finish,
            };
        }
    }
}

pub(crate) fn run(
    engine: &EngineHandle,
    prompt: &[u32],
    sampling_params: SamplingParams,
) -> Answer {
    collect(submit(engine, prompt, sampling_params))
}

/// Submits all prompts before it reads the first answer, so they share steps.
pub(crate) fn run_together(
    engine: &EngineHandle,
    prompts: &[Vec<u32>],
    sampling_params: &SamplingParams,
) -> Vec<Answer> {
    let streams: Vec<_> = prompts
        .iter()
        .map(|prompt| submit(engine, prompt, sampling_params.clone()))
        .collect();
    streams.into_iter().map(collect).collect()
}

#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let worst = (0..got.len()).max_by(|&a, &b| {
        (got[a] - want[a])
            .abs()
            .total_cmp(&(got[b] - want[b]).abs())
    });
    if let Some(worst) = worst {
        let (got, want) = (got[worst], want[worst]);
        // Written so that a NaN fails.
        assert!(
            (got - want).abs() <= tolerance,
            "{what}: at {worst} got {got}, want {want}"
        );
    }
}

pub(crate) fn values(logprobs: &[TokenLogprobs]) -> Vec<f32> {
    logprobs.iter().map(|entry| entry.logprob).collect()
}

/// Asserts equal tokens and logprobs within `tolerance`, the alternatives included.
#[track_caller]
pub(crate) fn assert_same(what: &str, got: &Answer, want: &Answer, tolerance: f32) {
    assert_eq!(got.token_ids, want.token_ids, "{what}: tokens");
    assert_close(
        what,
        &values(&got.logprobs),
        &values(&want.logprobs),
        tolerance,
    );
    let (Some(got), Some(want)) = (&got.prompt, &want.prompt) else {
        assert_eq!(
            got.prompt, want.prompt,
            "{what}: only one has prompt logprobs"
        );
        return;
    };
    let flat = |prompt: &[Option<TokenLogprobs>]| -> Vec<f32> {
        prompt.iter().flatten().map(|entry| entry.logprob).collect()
    };
    assert_close(
        &format!("{what}: prompt"),
        &flat(got),
        &flat(want),
        tolerance,
    );
}
