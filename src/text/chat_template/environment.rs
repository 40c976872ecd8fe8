//! The Jinja environment in which transformers renders chat templates.
//!
//! `minijinja` with the settings, globals, filters and tests of transformers'
//! `chat_template_utils.py` and of Jinja2 where the engine's own differ, and with limits: a template
//! comes with a downloaded model or a request and must not be able to hang or fill the server.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, filters};
use serde_json::{Map, Value as Json};

use super::methods::{self, Ends};
use super::python::{self, JsonStyle};
use super::strftime;

/// Work that any rendering may do: about this many steps, or 64 times as many bytes moved.
const BASE_FUEL: u64 = 1_000_000;
/// Further steps a message; the built-in templates take 50 to 150.
const FUEL_PER_MESSAGE: u64 = 300;
/// Nesting of values that this much stack holds is more than any fuel pays for.
const STACK_BYTES: usize = 512 << 20;
/// Nesting of macro calls and recursive loops; the stack of a server thread holds it in any build.
const MAX_RECURSION: usize = 100;

/// What `raise_exception` said, as the source of the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Builds the environment.
///
/// # Errors
/// None in practice; the delimiters are Jinja's own.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_formatter(write_value);
    environment.set_unknown_method_callback(methods::call);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| {
        strftime::strftime(format, strftime::now())
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| python::to_str(value));
    environment.add_filter("trim", trim);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    environment.add_test("sequence", is_sequence);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    Ok(environment)
}

/// Renders a template within the limits, which grow with the input.
///
/// A thread of its own has the stack that dropping and printing deeply nested values takes: a few
/// thousand steps build a value that would overflow a server thread's. Starting it costs about as
/// much as rendering a short chat, some 30 µs.
pub(super) fn render(
    environment: &Environment<'static>,
    name: &str,
    variables: Map<String, Json>,
) -> Result<String, Error> {
    let messages = variables.get("messages").and_then(Json::as_array);
    let num_messages = messages.map_or(0, Vec::len) as u64;
    let text_bytes: u64 = variables.values().map(text_bytes).sum();
    let mut environment = environment.clone();
    // Each byte of the input may be moved about 16 times.
    environment.set_fuel(Some(
        BASE_FUEL + FUEL_PER_MESSAGE * num_messages + text_bytes / 4,
    ));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        let running = thread.spawn_scoped(scope, move || {
            environment
                .get_template(name)?
                .render(Value::from(Serde(variables)))
        });
        let running = running.map_err(|source| {
            Error::new(ErrorKind::InvalidOperation, "cannot start a thread").with_source(source)
        })?;
        running
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Returns the bytes of all strings in a value.
fn text_bytes(value: &Json) -> u64 {
    match value {
        Json::String(text) => text.len() as u64,
        Json::Array(items) => items.iter().map(text_bytes).sum(),
        Json::Object(fields) => fields.values().map(text_bytes).sum(),
        Json::Null | Json::Bool(_) | Json::Number(_) => 0,
    }
}

/// Prints what stands in `{{ … }}`.
fn write_value(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) => out.write_str(text),
        None => {
            let text = python::to_str(value)?;
            state.consume_fuel(text.len() as u64)?;
            out.write_str(&text)
        }
    };
    written
        .map_err(|source| Error::new(ErrorKind::WriteFailure, "cannot write").with_source(source))
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = python::to_str(message)?;
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Raised(message)))
}

fn trim(text: &Value, characters: Option<&str>) -> Result<String, Error> {
    let text = python::to_str(text)?;
    Ok(methods::strip(&text, characters, Ends::Both).to_owned())
}

/// Jinja2's filter: what is no number is the default.
fn int(
    state: &State,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let default = match default {
        Some(default) => default,
        None => kwargs
            .get::<Option<Value>>("default")?
            .unwrap_or(Value::from(0)),
    };
    let number = filters::int(state, value, Some(default.clone()), base, kwargs);
    Ok(number.unwrap_or(default))
}

/// The same for floats.
fn float(
    state: &State,
    value: &Value,
    default: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let default = match default {
        Some(default) => default,
        None => kwargs
            .get::<Option<Value>>("default")?
            .unwrap_or(Value::from(0.0)),
    };
    let number = filters::float(state, value, Some(default.clone()), kwargs);
    Ok(number.unwrap_or(default))
}

/// Jinja2's test: whatever has a length and can be indexed, strings and maps included.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined()
        || matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::String | ValueKind::Map
        )
}

/// transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(
    state: &State,
    value: &Value,
    args: Rest<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let option = |position: usize, name: &str| match args.get(position) {
        Some(value) => Ok(value.clone()),
        None => Ok::<_, Error>(
            kwargs
                .get::<Option<Value>>(name)?
                .unwrap_or(Value::from(())),
        ),
    };
    let ensure_ascii = option(0, "ensure_ascii")?.is_true();
    let indent = indent_text(&option(1, "indent")?)?;
    let separators = option(2, "separators")?;
    let sort_keys = option(3, "sort_keys")?.is_true();
    kwargs.assert_all_used()?;
    let (item_separator, key_separator) = if separators.is_none() {
        let item = if indent.is_some() { "," } else { ", " };
        (item.to_owned(), ": ".to_owned())
    } else {
        let text = |index| python::to_str(&separators.get_item_by_index(index)?);
        (text(0)?, text(1)?)
    };
    let style = JsonStyle {
        indent,
        item_separator,
        key_separator,
        sort_keys,
        ensure_ascii,
    };
    let json = python::to_json(value, &style)?;
    state.consume_fuel(json.len() as u64 / 8)?;
    Ok(json)
}

/// Python's `indent`: a number of spaces or the text itself.
fn indent_text(indent: &Value) -> Result<Option<String>, Error> {
    if indent.is_none() || indent.is_undefined() {
        return Ok(None);
    }
    if let Some(text) = indent.as_str() {
        return Ok(Some(text.to_owned()));
    }
    let width = i64::try_from(indent.clone())?.clamp(0, 100);
    Ok(Some(" ".repeat(width as usize)))
}
