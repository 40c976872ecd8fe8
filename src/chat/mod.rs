//! `infold chat`: a conversation in the terminal with any OpenAI-compatible server.
//!
//! Knows the API only as a client does: HTTP and server-sent events. `main.rs` starts a server in
//! this process when the user names a model instead of a URL.

mod sse;

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};

/// Talk to a server, or to a model started for the occasion
#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    /// Server to talk to, as http://localhost:8000 or localhost:8000, or a model to start: directory, GGUF file or hub id
    #[arg(value_name = "URL|MODEL", default_value = "http://localhost:8000")]
    pub target: String,

    /// Ask for this model of the server [default: its first]
    #[arg(long, alias = "model")]
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
    /// Returns the server's address, or `None` where the target is a model.
    pub fn server_url(&self) -> Option<String> {
        let target = &self.target;
        if target.starts_with("http://") || target.starts_with("https://") {
            return Some(target.clone());
        }
        let host = target
            .split_once('/')
            .map_or(target.as_str(), |(host, _)| host);
        let (name, port) = host.rsplit_once(':')?;
        let is_address = !name.is_empty() && port.parse::<u16>().is_ok();
        (is_address && !Path::new(target).exists()).then(|| format!("http://{target}"))
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
    let mut input = std::io::stdin().lock();
    loop {
        if terminal {
            write!(out, "{} ", prompt_mark(&out))?;
            out.flush()?;
        }
        let line = match read_line(&mut input).context("reading the terminal")? {
            Line::End => return Ok(()),
            Line::Text(line) => line,
            Line::NotUtf8 => {
                writeln!(
                    out,
                    "error: the line is not UTF-8 and was left out; type it again"
                )?;
                continue;
            }
        };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(()),
            "/clear" => messages.clone_from(&system),
            "/help" => writeln!(out, "/clear forgets, /exit ends.")?,
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

/// A line of the terminal.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Text(String),
    /// Bytes that are no text: the erase key takes one byte of a Chinese character where the
    /// terminal does not know that it is UTF-8.
    NotUtf8,
    End,
}

fn read_line(input: &mut impl BufRead) -> std::io::Result<Line> {
    let mut bytes = Vec::new();
    if input.read_until(b'\n', &mut bytes)? == 0 {
        return Ok(Line::End);
    }
    Ok(String::from_utf8(bytes).map_or(Line::NotUtf8, Line::Text))
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
        if response.status() == 401 {
            bail!("{url} wants a key: give --api-key or set INFOLD_API_KEY");
        }
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
        let answer = print_answer(BufReader::new(response.into_body().into_reader()), out);
        writeln!(out)?;
        answer
    }
}

/// Prints the text of a stream as it comes and returns it.
fn print_answer(stream: impl BufRead, out: &mut impl Write) -> anyhow::Result<String> {
    let mut answer = String::new();
    for line in stream.lines() {
        match sse::parse(&line.context("the stream broke off")?)? {
            sse::Event::Text(text) => {
                write!(out, "{text}")?;
                out.flush()?;
                answer.push_str(&text);
            }
            sse::Event::Other => {}
            sse::Event::Done => return Ok(answer),
        }
    }
    bail!("the stream ended before the answer did: has the server stopped?")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        chat: ChatArgs,
    }

    fn server_url(target: &str) -> Option<String> {
        Command::parse_from(["infold", target]).chat.server_url()
    }

    #[test]
    fn an_address_without_a_scheme_is_a_server() {
        for (target, url) in [
            ("http://h:1/v1", "http://h:1/v1"),
            ("https://h", "https://h"),
            ("localhost:6006", "http://localhost:6006"),
            ("10.0.0.1:80/v1", "http://10.0.0.1:80/v1"),
        ] {
            assert_eq!(server_url(target).as_deref(), Some(url));
        }
        for model in [
            "Qwen/Qwen2.5-0.5B",
            "model.gguf",
            "dir",
            "a:b",
            ":80",
            "h:70000",
            "/a:1",
        ] {
            assert_eq!(server_url(model), None, "{model}");
        }
    }

    #[test]
    fn a_line_that_is_not_utf8_does_not_end_the_conversation() {
        let mut input: &[u8] = b"a\n\xe4\xbd\nb";
        let lines: Vec<Line> = (0..4).map(|_| read_line(&mut input).unwrap()).collect();
        let text = |text: &str| Line::Text(text.to_owned());
        assert_eq!(lines, [text("a\n"), Line::NotUtf8, text("b"), Line::End]);
    }

    #[test]
    fn a_stream_that_ends_early_is_an_error() {
        let event = "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n";
        let whole = format!("{event}data: [DONE]\n\n");
        let mut out = Vec::new();
        assert_eq!(print_answer(whole.as_bytes(), &mut out).unwrap(), "Hi");
        let error = print_answer(event.as_bytes(), &mut out).unwrap_err();
        assert!(
            error.to_string().contains("before the answer did"),
            "{error}"
        );
        assert_eq!(out, b"HiHi");
    }
}
