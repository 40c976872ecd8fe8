//! `infold chat`: a conversation in the terminal with any OpenAI-compatible server.
//!
//! Knows the API only as a client does: HTTP and server-sent events. `main.rs` starts a server in
//! this process when the user names a model instead of a URL.

mod sse;

use std::io::{BufRead, BufReader, IsTerminal, Write};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};

/// Talk to a server, or to a model started for the occasion
#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    /// Server to talk to, as http://localhost:8000, or a model to start: directory, GGUF file or hub id
    #[arg(value_name = "URL|MODEL", default_value = "http://localhost:8000")]
    pub target: String,

    /// Ask for this model of the server [default: its first]
    #[arg(long)]
    served_model_name: Option<String>,

    /// Begin with this system prompt [default: none]
    #[arg(long)]
    system: Option<String>,

    /// Draw with this temperature [default: the model's]
    #[arg(long)]
    temperature: Option<f32>,

    /// Limit each answer to this many tokens [default: the server's]
    #[arg(long)]
    max_tokens: Option<u32>,

    /// Send this bearer key [default: $INFOLD_API_KEY, else none]
    #[arg(long, env = "INFOLD_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

impl ChatArgs {
    /// Returns whether the target is a server's address.
    pub fn is_url(&self) -> bool {
        self.target.starts_with("http://") || self.target.starts_with("https://")
    }
}

/// A conversation with one server.
struct Client {
    agent: ureq::Agent,
    base_url: String,
    api_key: Option<String>,
    model: String,
}

/// Reads lines from the terminal and prints the answers until the end of input or `/exit`.
///
/// # Errors
/// When the server can not be reached at the start; later errors are printed and the
/// conversation goes on.
pub fn run(args: &ChatArgs, base_url: &str) -> anyhow::Result<()> {
    let client = Client::connect(args, base_url)?;
    let terminal = std::io::stdin().is_terminal();
    let mut out = std::io::stdout().lock();
    if terminal {
        writeln!(
            out,
            "{} at {base_url}. /clear forgets, /exit ends.",
            client.model
        )?;
    }
    let system: Vec<Value> = args
        .system
        .iter()
        .map(|text| json!({"role": "system", "content": text}))
        .collect();
    let mut messages = system.clone();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            write!(out, "{} ", prompt_mark(&out))?;
            out.flush()?;
        }
        let Some(line) = lines.next() else {
            return Ok(());
        };
        let line = line.context("reading the terminal")?;
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(()),
            "/clear" => messages.clone_from(&system),
            text => {
                messages.push(json!({"role": "user", "content": text}));
                match client.answer(args, &messages, &mut out) {
                    Ok(answer) => messages.push(json!({"role": "assistant", "content": answer})),
                    Err(error) => {
                        // The question that failed would stand unanswered in the next prompt.
                        messages.pop();
                        writeln!(out, "error: {error:#}")?;
                    }
                }
            }
        }
    }
}

fn prompt_mark(out: &impl IsTerminal) -> &'static str {
    if out.is_terminal() {
        "\x1b[1;36m>\x1b[0m"
    } else {
        ">"
    }
}

impl Client {
    fn connect(args: &ChatArgs, base_url: &str) -> anyhow::Result<Self> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build();
        let mut client = Self {
            agent: config.into(),
            base_url: base_url
                .trim_end_matches('/')
                .trim_end_matches("/v1")
                .to_owned(),
            api_key: args.api_key.clone(),
            model: String::new(),
        };
        client.model = match &args.served_model_name {
            Some(name) => name.clone(),
            None => client.first_model()?,
        };
        Ok(client)
    }

    fn first_model(&self) -> anyhow::Result<String> {
        let url = format!("{}/v1/models", self.base_url);
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.api_key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = request.call().with_context(|| {
            format!(
                "no server answers at {}; start one with `infold serve MODEL`",
                self.base_url
            )
        })?;
        let body: Value = response
            .body_mut()
            .read_json()
            .with_context(|| format!("reading {url}"))?;
        match body["data"][0]["id"].as_str() {
            Some(model) => Ok(model.to_owned()),
            None => bail!("{url} lists no model: {body}"),
        }
    }

    /// Streams the answer to `messages` into `out` and returns it.
    fn answer(
        &self,
        args: &ChatArgs,
        messages: &[Value],
        out: &mut impl Write,
    ) -> anyhow::Result<String> {
        let mut body = json!({"model": self.model, "messages": messages, "stream": true});
        if let Some(temperature) = args.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(max_tokens) = args.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        let mut request = self
            .agent
            .post(format!("{}/v1/chat/completions", self.base_url));
        if let Some(key) = &self.api_key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = request
            .send_json(&body)
            .context("the server does not answer")?;
        if !response.status().is_success() {
            let status = response.status();
            bail!(
                "{status}: {}",
                sse::error_message(&response.body_mut().read_to_string()?)
            );
        }
        let mut answer = String::new();
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            match sse::parse(&line.context("the stream broke off")?)? {
                sse::Event::Text(text) => {
                    write!(out, "{text}")?;
                    out.flush()?;
                    answer.push_str(&text);
                }
                sse::Event::Other => {}
                sse::Event::Done => break,
            }
        }
        writeln!(out)?;
        Ok(answer)
    }
}
