//! The part of Go's `text/template` that the templates of [`super::modelfile`] use.
//!
//! Enough to render what Ollama would render: fields, variables, `if`, `else if`, `range`, `eq`,
//! `ne`, `gt`, `lt`, `and`, `or`, `not`, `len`, trimmed blanks. `scripts/check_modelfile.sh` holds it
//! against Go itself. What it does not know is refused by name.

mod parse;
mod render;
#[cfg(test)]
mod tests;

use serde_json::Value;

/// Errors of Go templates.
#[derive(Debug, thiserror::Error)]
pub enum GoTemplateError {
    /// A text that is not a template, or one that is not understood here.
    #[error("TEMPLATE, at byte {offset}: {message}")]
    Syntax {
        /// Where.
        offset: usize,
        /// What is wrong.
        message: String,
    },
    /// A rendering that fails.
    #[error("TEMPLATE: {message}")]
    Render {
        /// What is wrong.
        message: String,
    },
    /// A value that can not be written.
    #[error("TEMPLATE: {0}")]
    Text(#[from] crate::text::TextError),
}

/// A parsed template.
#[derive(Debug)]
pub struct GoTemplate {
    nodes: Vec<Node>,
}

impl GoTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// [`GoTemplateError::Syntax`] with the place.
    pub fn parse(source: &str) -> Result<Self, GoTemplateError> {
        parse::parse(source).map(|nodes| Self { nodes })
    }

    /// Renders the template over Ollama's variables: an object with `System`, `Messages`, `Tools`.
    /// Objects are printed as JSON in Python's spacing.
    ///
    /// # Errors
    /// [`GoTemplateError::Render`]: an unknown variable, a comparison of different kinds.
    pub fn render(&self, data: &Value) -> Result<String, GoTemplateError> {
        render::render(&self.nodes, data)
    }
}

/// A piece of a template.
#[derive(Debug)]
enum Node {
    Text(String),
    Print(Expression),
    /// `{{ $x := … }}`, or `{{ $x = … }}` of an existing one.
    Assign {
        name: String,
        declares: bool,
        value: Expression,
    },
    /// `if`, its `else if`s and its `else`, whose condition is absent.
    If(Vec<(Option<Expression>, Vec<Node>)>),
    Range {
        /// Variables for index and item.
        index: Option<String>,
        item: Option<String>,
        list: Expression,
        body: Vec<Node>,
    },
}

/// A value to be computed.
#[derive(Debug)]
enum Expression {
    Literal(Value),
    /// `.a.b`, or `$x.a.b`.
    Field {
        variable: Option<String>,
        path: Vec<String>,
    },
    Call {
        function: Function,
        arguments: Vec<Expression>,
    },
}

/// A built-in function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    Eq,
    Ne,
    Gt,
    Lt,
    And,
    Or,
    Not,
    Len,
    CurrentDate,
}
