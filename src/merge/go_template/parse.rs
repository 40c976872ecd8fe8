//! Text to tree.

use serde_json::Value;

use super::{Expression, Function, GoTemplateError, Node};

/// A piece of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    /// `.a.b`; `.` alone is an empty path.
    Path(Vec<String>),
    /// `$x.a.b`.
    Variable(String, Vec<String>),
    Str(String),
    Int(i64),
    Symbol(&'static str),
}

/// A template cut at its delimiters.
#[derive(Debug)]
enum Piece {
    Text(String),
    Action { offset: usize, tokens: Vec<Token> },
}

/// What ends a list of nodes.
#[derive(Debug, PartialEq, Eq)]
enum End {
    File,
    End,
    /// `else`, or `else if` with the tokens of its condition.
    Else(Option<Vec<Token>>),
}

pub(super) fn parse(source: &str) -> Result<Vec<Node>, GoTemplateError> {
    let mut parser = Parser {
        pieces: cut(source)?.into_iter(),
        source_len: source.len(),
    };
    match parser.nodes()? {
        (nodes, End::File) => Ok(nodes),
        (_, end) => Err(parser.error(format!("{end:?} without a beginning"))),
    }
}

/// Cuts a template into texts and actions, blanks trimmed where `{{-` and `-}}` ask for it.
fn cut(source: &str) -> Result<Vec<Piece>, GoTemplateError> {
    let mut pieces = Vec::new();
    let mut rest = source;
    let mut trims = false;
    loop {
        let (text, action) = match rest.split_once("{{") {
            Some((text, action)) => (text, Some(action)),
            None => (rest, None),
        };
        let mut text = if trims {
            text.trim_start_matches(BLANKS)
        } else {
            text
        };
        let Some(action) = action else {
            pieces.push(Piece::Text(text.to_owned()));
            return Ok(pieces);
        };
        let offset = source.len() - action.len();
        let inner = match action.strip_prefix('-').filter(|a| a.starts_with(BLANKS)) {
            Some(inner) => {
                text = text.trim_end_matches(BLANKS);
                inner
            }
            None => action,
        };
        pieces.push(Piece::Text(text.to_owned()));
        let (tokens, after) = lex(inner, offset, source.len())?;
        pieces.push(Piece::Action { offset, tokens });
        trims = after.starts_with('-');
        rest = &after[if trims { 3 } else { 2 }..];
    }
}

const BLANKS: [char; 4] = [' ', '\t', '\r', '\n'];

/// Reads the tokens of an action; returns them and the rest, which opens with `}}` or `-}}`.
fn lex(
    mut rest: &str,
    offset: usize,
    source_len: usize,
) -> Result<(Vec<Token>, &str), GoTemplateError> {
    let mut tokens = Vec::new();
    loop {
        let trimmed = rest.trim_start_matches(BLANKS);
        // A minus trims only behind a blank; before a digit it is a sign.
        if trimmed.starts_with("}}") || (trimmed.len() < rest.len() && trimmed.starts_with("-}}")) {
            return Ok((tokens, trimmed));
        }
        rest = trimmed;
        let at = source_len - rest.len().min(source_len);
        let error = |message: &str| GoTemplateError::Syntax {
            offset: at.max(offset),
            message: message.to_owned(),
        };
        let Some(first) = rest.chars().next() else {
            return Err(error("an action is not closed with }}"));
        };
        let (token, len) = match first {
            '"' => string_token(rest).ok_or_else(|| error("a string is not closed"))?,
            '.' => {
                let (path, len) = path(rest);
                (Token::Path(path), len)
            }
            '$' => {
                let name = word_len(&rest[1..]) + 1;
                let (path, len) = path(&rest[name..]);
                (Token::Variable(rest[..name].to_owned(), path), name + len)
            }
            '-' | '0'..='9' => {
                let len = 1 + rest[1..]
                    .find(|c: char| !c.is_ascii_digit())
                    .unwrap_or(rest.len() - 1);
                let number = rest[..len].parse();
                (
                    Token::Int(number.map_err(|_| error("a number was wanted"))?),
                    len,
                )
            }
            _ => match ["(", ")", ":=", "=", ","]
                .into_iter()
                .find(|s| rest.starts_with(s))
            {
                Some(symbol) => (Token::Symbol(symbol), symbol.len()),
                None => match word_len(rest) {
                    0 => return Err(error(&format!("{first:?} is not understood"))),
                    len => (Token::Word(rest[..len].to_owned()), len),
                },
            },
        };
        tokens.push(token);
        rest = &rest[len..];
    }
}

fn word_len(text: &str) -> usize {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    end.unwrap_or(text.len())
}

/// Reads `.a.b`.
fn path(text: &str) -> (Vec<String>, usize) {
    let mut names = Vec::new();
    let mut len = 0;
    while text[len..].starts_with('.') {
        let name = word_len(&text[len + 1..]);
        if name > 0 {
            names.push(text[len + 1..len + 1 + name].to_owned());
        }
        len += 1 + name;
    }
    (names, len)
}

/// Reads a string with the escapes that JSON has too.
fn string_token(text: &str) -> Option<(Token, usize)> {
    let mut strings = serde_json::Deserializer::from_str(text).into_iter::<String>();
    let value = strings.next()?.ok()?;
    Some((Token::Str(value), strings.byte_offset()))
}

struct Parser {
    pieces: std::vec::IntoIter<Piece>,
    source_len: usize,
}

impl Parser {
    fn error(&self, message: String) -> GoTemplateError {
        GoTemplateError::Syntax {
            offset: self.source_len,
            message,
        }
    }

    /// Reads nodes up to what ends them.
    fn nodes(&mut self) -> Result<(Vec<Node>, End), GoTemplateError> {
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.next() {
            let (offset, tokens) = match piece {
                Piece::Text(text) => {
                    nodes.push(Node::Text(text));
                    continue;
                }
                Piece::Action { offset, tokens } => (offset, tokens),
            };
            let keyword = match tokens.first() {
                Some(Token::Word(word)) => word.as_str(),
                _ => "",
            };
            match keyword {
                "end" => return Ok((nodes, End::End)),
                "else" => {
                    let is_if = tokens.get(1) == Some(&Token::Word("if".to_owned()));
                    let condition = is_if.then(|| tokens[2..].to_vec());
                    return Ok((nodes, End::Else(condition)));
                }
                "if" => {
                    let condition = expression(&tokens[1..], offset)?;
                    nodes.push(self.branches(condition, offset)?);
                }
                "range" => nodes.push(self.range(&tokens[1..], offset)?),
                _ => nodes.push(action(&tokens, offset)?),
            }
        }
        Ok((nodes, End::File))
    }

    fn branches(&mut self, condition: Expression, offset: usize) -> Result<Node, GoTemplateError> {
        let mut branches = Vec::new();
        let mut condition = Some(condition);
        loop {
            let (nodes, end) = self.nodes()?;
            let was_else = condition.is_none();
            branches.push((condition, nodes));
            condition = match end {
                End::End => return Ok(Node::If(branches)),
                End::Else(Some(tokens)) if !was_else => Some(expression(&tokens, offset)?),
                End::Else(None) if !was_else => None,
                end => return Err(self.error(format!("an if ends with {end:?}"))),
            };
        }
    }

    fn range(&mut self, tokens: &[Token], offset: usize) -> Result<Node, GoTemplateError> {
        let (index, item, list) = match tokens {
            [
                Token::Variable(index, _),
                Token::Symbol(","),
                Token::Variable(item, _),
                Token::Symbol(":="),
                list @ ..,
            ] => (Some(index.clone()), Some(item.clone()), list),
            [Token::Variable(item, _), Token::Symbol(":="), list @ ..] => {
                (None, Some(item.clone()), list)
            }
            list => (None, None, list),
        };
        let list = expression(list, offset)?;
        match self.nodes()? {
            (body, End::End) => Ok(Node::Range {
                index,
                item,
                list,
                body,
            }),
            (_, end) => Err(self.error(format!("a range ends with {end:?}"))),
        }
    }
}

fn action(tokens: &[Token], offset: usize) -> Result<Node, GoTemplateError> {
    let (name, declares, value) = match tokens {
        [Token::Variable(name, _), Token::Symbol(":="), value @ ..] => (name, true, value),
        [Token::Variable(name, _), Token::Symbol("="), value @ ..] => (name, false, value),
        _ => return Ok(Node::Print(expression(tokens, offset)?)),
    };
    Ok(Node::Assign {
        name: name.clone(),
        declares,
        value: expression(value, offset)?,
    })
}

/// Reads a whole list of tokens as one expression: an operand, or a function and its operands.
fn expression(tokens: &[Token], offset: usize) -> Result<Expression, GoTemplateError> {
    let error = |message: String| GoTemplateError::Syntax { offset, message };
    let (head, mut rest) = operand(tokens, offset)?;
    let Expression::Call {
        function,
        mut arguments,
    } = head
    else {
        return match rest {
            [] => Ok(head),
            _ => Err(error(format!("a value is followed by {rest:?}"))),
        };
    };
    while !rest.is_empty() {
        let (argument, after) = operand(rest, offset)?;
        arguments.push(argument);
        rest = after;
    }
    let (least, most) = match function {
        Function::Eq | Function::Ne | Function::Gt | Function::Lt => (2, 2),
        Function::Not | Function::Len => (1, 1),
        Function::And | Function::Or => (1, usize::MAX),
        Function::CurrentDate => (0, 0),
    };
    // An operand in parentheses is complete already.
    let complete = matches!(tokens.first(), Some(Token::Symbol("(")));
    if !complete && !(least..=most).contains(&arguments.len()) {
        return Err(error(format!(
            "{function:?} has {} arguments",
            arguments.len()
        )));
    }
    Ok(Expression::Call {
        function,
        arguments,
    })
}

/// Reads one operand; returns it and the rest.
fn operand(tokens: &[Token], offset: usize) -> Result<(Expression, &[Token]), GoTemplateError> {
    let error = |message: String| GoTemplateError::Syntax { offset, message };
    let (first, rest) = tokens
        .split_first()
        .ok_or_else(|| error("a value is missing".to_owned()))?;
    let value = match first {
        Token::Str(text) => Expression::Literal(Value::from(text.as_str())),
        Token::Int(number) => Expression::Literal(Value::from(*number)),
        Token::Path(path) => Expression::Field {
            variable: None,
            path: path.clone(),
        },
        Token::Variable(name, path) => Expression::Field {
            variable: Some(name.clone()),
            path: path.clone(),
        },
        Token::Symbol("(") => {
            let close = closing(rest).ok_or_else(|| error("a ( is not closed".to_owned()))?;
            return Ok((expression(&rest[..close], offset)?, &rest[close + 1..]));
        }
        Token::Symbol(symbol) => return Err(error(format!("{symbol:?} is not understood here"))),
        Token::Word(word) => word_value(word)
            .ok_or_else(|| error(format!("the function {word:?} is not known here")))?,
    };
    Ok((value, rest))
}

fn word_value(word: &str) -> Option<Expression> {
    let function = match word {
        "true" | "false" => return Some(Expression::Literal(Value::from(word == "true"))),
        "eq" => Function::Eq,
        "ne" => Function::Ne,
        "gt" => Function::Gt,
        "lt" => Function::Lt,
        "and" => Function::And,
        "or" => Function::Or,
        "not" => Function::Not,
        "len" => Function::Len,
        "currentDate" => Function::CurrentDate,
        _ => return None,
    };
    Some(Expression::Call {
        function,
        arguments: Vec::new(),
    })
}

/// Returns the place of the parenthesis that closes one opened before.
fn closing(tokens: &[Token]) -> Option<usize> {
    let mut depth = 0;
    tokens.iter().position(|token| {
        match token {
            Token::Symbol("(") => depth += 1,
            Token::Symbol(")") if depth == 0 => return true,
            Token::Symbol(")") => depth -= 1,
            _ => {}
        }
        false
    })
}
