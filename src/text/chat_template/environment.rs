//! The Jinja environment in which transformers renders chat templates.
//!
//! `minijinja` with the settings, globals, filters and tests of transformers'
//! `chat_template_utils.py` and of Jinja2 where the engine's own differ, and with limits: a template
//! comes with a downloaded model or a request and must not be able to hang or fill the server.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

use super::methods::{self, Ends};
use super::python::{self, JsonStyle};
use super::strftime;

/// Work that one rendering may do: about this many steps, or 64 times as many bytes moved.
const MAX_FUEL: u64 = 10_000_000;
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
    environment.set_fuel(Some(MAX_FUEL));
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
    environment.add_test("sequence", is_sequence);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    Ok(environment)
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
