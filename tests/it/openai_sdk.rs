//! The `async-openai` crate against the binary: what a Rust program that uses the OpenAI API sees.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessageArgs, ChatCompletionStreamOptions, CreateChatCompletionRequest,
    CreateChatCompletionRequestArgs, FinishReason,
};
use async_openai::types::completions::{CreateCompletionRequest, CreateCompletionRequestArgs};
use futures::StreamExt;

use crate::tiny_engine::fixtures;

const MODEL: &str = "tiny-sft";

/// A running `infold serve`; ends with the test.
struct Server {
    process: Child,
    port: u16,
}

impl Server {
    fn start() -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_infold"))
            .arg("serve")
            .arg(fixtures().join("tiny-qwen2"))
            .args([
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--served-model-name",
                MODEL,
            ])
            .args([
                "--max-model-len",
                "512",
                "--kv-cache-memory-bytes",
                "32MiB",
                "--generation-config",
                "vllm",
            ])
            .env("RUST_LOG", "info")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut log = Vec::new();
        // The line that says where it listens is the last before requests are answered.
        let port = lines.by_ref().map(Result::unwrap).find_map(|line| {
            let port = line.split_once("127.0.0.1:").and_then(|(_, rest)| {
                rest.split(|c: char| !c.is_ascii_digit())
                    .next()?
                    .parse()
                    .ok()
            });
            log.push(line);
            port
        });
        // Read to its end, or the server would stop at a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let port = port.unwrap_or_else(|| {
            panic!(
                "the server did not say where it listens:\n{}",
                log.join("\n")
            )
        });
        Self { process, port }
    }

    fn client(&self) -> Client<OpenAIConfig> {
        let base = format!("http://127.0.0.1:{}/v1", self.port);
        Client::with_config(OpenAIConfig::new().with_api_base(base).with_api_key("none"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A process that has ended already needs neither.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn chat_request(model: &str) -> CreateChatCompletionRequestArgs {
    let message = ChatCompletionRequestUserMessageArgs::default()
        .content("你是谁?")
        .build()
        .unwrap();
    let mut request = CreateChatCompletionRequestArgs::default();
    request
        .model(model)
        .messages([message.into()])
        .max_completion_tokens(12_u32)
        .temperature(0.0);
    request
}

fn chat(model: &str) -> CreateChatCompletionRequest {
    chat_request(model).build().unwrap()
}

fn completion(prompt: &str) -> CreateCompletionRequest {
    CreateCompletionRequestArgs::default()
        .model(MODEL)
        .prompt(prompt)
        .max_tokens(12_u32)
        .temperature(0.0)
        .build()
        .unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Returns what an error says, with the body of the response in whatever form the crate keeps it.
#[track_caller]
fn refusal<T>(result: Result<T, OpenAIError>) -> String {
    match result {
        Ok(_) => panic!("the request was not refused"),
        Err(error) => format!("{error:?}"),
    }
}

#[test]
fn models_are_listed_and_retrieved() {
    let server = Server::start();
    runtime().block_on(async {
        let client = server.client();
        let models = client.models().list().await.unwrap();
        assert_eq!(
            models
                .data
                .iter()
                .map(|model| model.id.as_str())
                .collect::<Vec<_>>(),
            [MODEL]
        );
        assert_eq!(
            client.models().retrieve(MODEL).await.unwrap().object,
            "model"
        );
    });
}

#[test]
fn a_streamed_chat_equals_the_whole_one() {
    let server = Server::start();
    runtime().block_on(async {
        let client = server.client();
        let whole = client.chat().create(chat(MODEL)).await.unwrap();
        assert_eq!(whole.model, MODEL);
        let want = whole.choices[0].message.content.clone().unwrap_or_default();

        let options = ChatCompletionStreamOptions {
            include_usage: Some(true),
            include_obfuscation: None,
        };
        let request = chat_request(MODEL).stream_options(options).build().unwrap();
        let mut stream = client.chat().create_stream(request).await.unwrap();
        let (mut text, mut finish, mut usage) = (String::new(), Vec::new(), None);
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.unwrap();
            assert!(usage.is_none(), "nothing follows the usage");
            usage = chunk.usage;
            for choice in chunk.choices {
                text.push_str(choice.delta.content.as_deref().unwrap_or_default());
                finish.extend(choice.finish_reason);
            }
        }
        assert_eq!(text, want);
        assert_eq!(usage, whole.usage);
        assert_eq!(
            finish,
            whole.choices[0]
                .finish_reason
                .into_iter()
                .collect::<Vec<_>>()
        );
        assert!(matches!(
            finish[..],
            [FinishReason::Length | FinishReason::Stop]
        ));
    });
}

#[test]
fn chat_logprobs_are_of_the_drawn_tokens() {
    let server = Server::start();
    runtime().block_on(async {
        let request = chat_request(MODEL)
            .logprobs(true)
            .top_logprobs(3_u8)
            .build()
            .unwrap();
        let answer = server.client().chat().create(request).await.unwrap();
        let logprobs = answer.choices[0].logprobs.clone().unwrap().content.unwrap();
        assert_eq!(
            logprobs.len() as u32,
            answer.usage.unwrap().completion_tokens
        );
        for entry in logprobs {
            assert_eq!(entry.top_logprobs.len(), 3);
            assert_eq!(
                (&entry.top_logprobs[0].token, entry.top_logprobs[0].logprob),
                (&entry.token, entry.logprob)
            );
        }
    });
}

#[test]
fn a_streamed_completion_equals_the_whole_one() {
    let server = Server::start();
    runtime().block_on(async {
        let client = server.client();
        let whole = client
            .completions()
            .create(completion("The river"))
            .await
            .unwrap();
        let mut stream = client
            .completions()
            .create_stream(completion("The river"))
            .await
            .unwrap();
        let mut text = String::new();
        while let Some(chunk) = stream.next().await {
            for choice in chunk.unwrap().choices {
                text.push_str(&choice.text);
            }
        }
        assert_eq!(text, whole.choices[0].text);
    });
}

#[test]
fn echo_returns_the_prompt_with_its_logprobs() {
    let server = Server::start();
    runtime().block_on(async {
        let request = CreateCompletionRequest {
            echo: Some(true),
            logprobs: Some(1),
            ..completion("The river")
        };
        let answer = server.client().completions().create(request).await.unwrap();
        let choice = &answer.choices[0];
        assert!(choice.text.starts_with("The river"), "{:?}", choice.text);
        let usage = answer.usage.unwrap();
        let logprobs = choice.logprobs.as_ref().unwrap();
        assert_eq!(
            logprobs.tokens.len() as u32,
            usage.prompt_tokens + usage.completion_tokens
        );
        assert_eq!(logprobs.token_logprobs[0], None);
    });
}

#[test]
fn errors_carry_the_servers_message() {
    let server = Server::start();
    runtime().block_on(async {
        let client = server.client();
        let unknown = refusal(client.chat().create(chat("gpt-4o")).await);
        assert!(
            unknown.contains("The model `gpt-4o` does not exist."),
            "{unknown}"
        );
        let hot = chat_request(MODEL).temperature(3.0).build().unwrap();
        let hot = refusal(client.chat().create(hot).await);
        assert!(hot.contains("temperature must be in [0, 2]"), "{hot}");
        let long = CreateCompletionRequest {
            max_tokens: Some(600),
            ..completion("The river")
        };
        let long = refusal(client.completions().create(long).await);
        assert!(
            long.contains("maximum context length is 512 tokens"),
            "{long}"
        );
        let missing = refusal(client.models().retrieve("gpt-4o").await);
        assert!(missing.contains("gpt-4o"), "{missing}");
        // The server goes on.
        client
            .completions()
            .create(completion("The river"))
            .await
            .unwrap();
    });
}
