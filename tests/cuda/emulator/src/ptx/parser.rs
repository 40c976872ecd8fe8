//! Reads PTX modules: variables, entry points, their parameters, registers and statements.

use std::collections::HashMap;
use std::sync::Arc;

use super::body::parse_body;
use super::lexer::{Token, tokenize};
use super::operand::{Space, parse_number};
use super::variables::Globals;
use super::{Kernel, Module, Param};

/// Reads tokens one after another.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a, 't> {
    tokens: &'t [Token<'a>],
    /// Index of the next token.
    pub at: usize,
}

impl<'a, 't> Cursor<'a, 't> {
    /// Begins at the first of `tokens`.
    pub(super) fn new(tokens: &'t [Token<'a>]) -> Self {
        Self { tokens, at: 0 }
    }
    /// Returns the next token's text, which is empty at the end.
    pub(super) fn peek(&self) -> &'a str {
        self.tokens.get(self.at).map_or("", |token| token.text)
    }
    /// Returns the text of the token after the next one.
    pub(super) fn peek_second(&self) -> &'a str {
        self.tokens.get(self.at + 1).map_or("", |token| token.text)
    }
    /// Returns the next token's line.
    pub(super) fn line(&self) -> u32 {
        self.tokens
            .get(self.at)
            .or(self.tokens.last())
            .map_or(0, |token| token.line)
    }
    /// Returns the next token's text and goes past it.
    pub(super) fn next(&mut self) -> &'a str {
        let text = self.peek();
        self.at += 1;
        text
    }
    /// Goes past the next token if it is `text`.
    pub(super) fn take(&mut self, text: &str) -> bool {
        let found = self.peek() == text;
        self.at += usize::from(found);
        found
    }
    /// Goes past the next token, which must be `text`.
    pub(super) fn expect(&mut self, text: &str) -> Result<(), String> {
        if self.take(text) {
            return Ok(());
        }
        Err(format!(
            "line {}: wanted `{text}`, found `{}`",
            self.line(),
            self.peek()
        ))
    }
    /// Reads a number.
    pub(super) fn number(&mut self) -> Result<u64, String> {
        let is_negative = self.take("-");
        let line = self.line();
        let text = self.next();
        let value = parse_number(text)
            .ok_or_else(|| format!("line {line}: wanted a number, found `{text}`"))?;
        Ok(if is_negative {
            value.wrapping_neg()
        } else {
            value
        })
    }
    /// Goes to the token after the `}` that belongs to the next `{`; returns what is between them.
    fn braces(&mut self) -> Result<&'t [Token<'a>], String> {
        let line = self.line();
        self.expect("{")?;
        let start = self.at;
        let mut depth = 1;
        while depth > 0 {
            match self.peek() {
                "{" => depth += 1,
                "}" => depth -= 1,
                "" => return Err(format!("line {line}: `{{` without end")),
                _ => {}
            }
            self.at += 1;
        }
        Ok(&self.tokens[start..self.at - 1])
    }
}

/// A declared variable.
#[derive(Debug, Clone)]
pub(super) struct Variable<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its alignment, bytes.
    pub align: usize,
    /// Its length, bytes; `None` for dynamic shared memory.
    pub num_bytes: Option<usize>,
    /// Initial bytes; the rest is zero.
    pub content: Vec<u8>,
}

/// Returns the bytes of a type such as `.b32`.
pub(super) fn type_bytes(name: &str) -> Option<usize> {
    match name.trim_start_matches('.') {
        "b8" | "u8" | "s8" => Some(1),
        "b16" | "u16" | "s16" | "f16" | "bf16" => Some(2),
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => Some(4),
        "b64" | "u64" | "s64" | "f64" => Some(8),
        "b128" => Some(16),
        _ => None,
    }
}

/// Reads a variable after its state space: alignment, type, name, dimensions, initial values.
pub(super) fn parse_variable<'a>(cursor: &mut Cursor<'a, '_>) -> Result<Variable<'a>, String> {
    let line = cursor.line();
    let (mut align, mut element, mut lanes) = (None, None, 1);
    while cursor.peek().starts_with('.') {
        match cursor.next() {
            ".align" => align = Some(cursor.number()? as usize),
            ".ptr" | ".global" | ".const" | ".shared" | ".local" => {}
            ".v2" => lanes = 2,
            ".v4" => lanes = 4,
            name => {
                element = Some(
                    type_bytes(name)
                        .ok_or_else(|| format!("line {line}: unknown type `{name}`"))?,
                )
            }
        }
    }
    let element = element.ok_or_else(|| format!("line {line}: a variable without type"))?;
    let name = cursor.next();
    let mut count = Some(lanes);
    while cursor.take("[") {
        if cursor.take("]") {
            count = None;
            continue;
        }
        let dim = cursor.number()? as usize;
        count = count.map(|count| count * dim);
        cursor.expect("]")?;
    }
    let mut content = Vec::new();
    if cursor.take("=") {
        parse_content(cursor, element, &mut content)?;
        count = count.or(Some(content.len() / element));
    }
    let num_bytes = count.map(|count| count * element);
    Ok(Variable {
        name,
        align: align.unwrap_or(element * lanes),
        num_bytes,
        content,
    })
}

/// Reads initial values: a number or braces with values.
fn parse_content(
    cursor: &mut Cursor<'_, '_>,
    element: usize,
    content: &mut Vec<u8>,
) -> Result<(), String> {
    if !cursor.take("{") {
        content.extend_from_slice(&cursor.number()?.to_le_bytes()[..element]);
        return Ok(());
    }
    while !cursor.take("}") {
        parse_content(cursor, element, content)?;
        cursor.take(",");
    }
    Ok(())
}

/// Reads a module.
///
/// # Errors
/// What is not known, with its line.
pub(super) fn parse_module(text: &str) -> Result<Module, String> {
    let tokens = tokenize(text)?;
    let source: Arc<str> = text.into();
    let mut cursor = Cursor::new(&tokens);
    let mut module = Module::default();
    let mut architecture = 0;
    let mut shared: HashMap<&str, Variable<'_>> = HashMap::new();
    let mut globals = Globals::default();
    loop {
        let line = cursor.line();
        match cursor.next() {
            "" => break,
            ".version" | ".address_size" => drop(cursor.next()),
            ".target" => {
                architecture =
                    parse_target(cursor.next()).map_err(|error| format!("line {line}: {error}"))?;
                while cursor.take(",") {
                    cursor.next();
                }
            }
            ".visible" | ".extern" | ".weak" | ".common" | ";" => {}
            ".file" => {
                while !cursor.peek().is_empty() && cursor.line() == line {
                    cursor.next();
                }
            }
            ".section" => {
                cursor.next();
                cursor.braces()?;
            }
            ".shared" => {
                let variable = parse_variable(&mut cursor)?;
                shared.insert(variable.name, variable);
            }
            ".global" | ".const" => globals.add(&parse_variable(&mut cursor)?),
            ".entry" => {
                let kernel = parse_entry(&mut cursor, architecture, &shared, &globals, &source)?;
                module.kernels.push(kernel);
            }
            other => {
                return Err(format!(
                    "line {line}: `{other}` is not known at the module's level"
                ));
            }
        }
    }
    Ok(module)
}

/// Returns 80 for `sm_80` and 90 for `sm_90a`.
fn parse_target(text: &str) -> Result<u32, String> {
    let digits: String = text
        .trim_start_matches("sm_")
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().map_err(|_| format!("`{text}` is no target"))
}

/// Reads an entry point after `.entry`.
fn parse_entry(
    cursor: &mut Cursor<'_, '_>,
    architecture: u32,
    shared: &HashMap<&str, Variable<'_>>,
    globals: &Globals,
    source: &Arc<str>,
) -> Result<Kernel, String> {
    let name = cursor.next();
    let (mut params, mut names, mut end) = (Vec::new(), HashMap::new(), 0_usize);
    if cursor.take("(") {
        while !cursor.take(")") {
            cursor.expect(".param")?;
            let variable = parse_variable(cursor)?;
            let num_bytes = variable.num_bytes.unwrap_or(0);
            let offset = end.next_multiple_of(variable.align);
            end = offset + num_bytes;
            params.push(Param { offset, num_bytes });
            names.insert(variable.name, (Space::Param, offset as u64));
            cursor.take(",");
        }
    }
    let mut cluster = None;
    while cursor.peek().starts_with('.') {
        let line = cursor.line();
        match cursor.next() {
            ".reqnctapercluster" => cluster = Some(parse_dims(cursor)?),
            ".maxntid" | ".reqntid" => drop(parse_dims(cursor)?),
            ".minnctapersm" | ".maxnctapersm" | ".maxnreg" | ".maxclusterrank" => {
                cursor.number()?;
            }
            ".explicitcluster" | ".noreturn" => {}
            ".pragma" => {
                cursor.next();
                cursor.expect(";")?;
            }
            other => {
                return Err(format!(
                    "line {line}: `{other}` is not known for an entry point"
                ));
            }
        }
    }
    let body = cursor.braces()?;
    let (program, static_shared_bytes) = parse_body(body, names, shared, globals, source)
        .map_err(|error| format!("kernel {name}: {error}"))?;
    Ok(Kernel {
        name: name.to_owned(),
        architecture,
        params,
        cluster,
        static_shared_bytes,
        program,
    })
}

/// Reads one to three numbers; those that are absent are 1.
fn parse_dims(cursor: &mut Cursor<'_, '_>) -> Result<[u32; 3], String> {
    let mut dims = [1; 3];
    for dim in &mut dims {
        *dim = cursor.number()? as u32;
        if !cursor.take(",") {
            break;
        }
    }
    Ok(dims)
}
