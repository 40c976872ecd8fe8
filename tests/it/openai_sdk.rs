//! The `async-openai` crate against the binary: what a Rust program that uses the OpenAI API sees.

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessageArgs, ChatCompletionStreamOptions, CreateChatCompletionRequest,
    CreateChatCompletionRequestArgs, FinishReason,
};
use async_openai::types::completions::{CreateCompletionRequest, CreateCompletionRequestArgs};
use futures::StreamExt;

use crate::server::{MODEL, Server};

fn start() -> Server {
    Server::start(&[], &[])
}

fn client(server: &Server) -> Client<OpenAIConfig> {
    let config = OpenAIConfig::new().with_api_base(server.url("/v1"));
    Client::with_config(config.with_api_key("none"))
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
    let server = start();
    runtime().block_on(async {
        let client = client(&server);
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
    let server = start();
    runtime().block_on(async {
        let client = client(&server);
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
    let server = start();
    runtime().block_on(async {
        let request = chat_request(MODEL)
            .logprobs(true)
            .top_logprobs(3_u8)
            .build()
            .unwrap();
        let answer = client(&server).chat().create(request).await.unwrap();
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
    let server = start();
    runtime().block_on(async {
        let client = client(&server);
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
    let server = start();
    runtime().block_on(async {
        let request = CreateCompletionRequest {
            echo: Some(true),
            logprobs: Some(1),
            ..completion("The river")
        };
        let answer = client(&server).completions().create(request).await.unwrap();
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
    let server = start();
    runtime().block_on(async {
        let client = client(&server);
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
