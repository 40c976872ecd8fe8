//! Ollama's Modelfile grammar, as its reader applies it.
//!
//! One character after another: an instruction is a word, then its value up to the end of the line,
//! or, when the value opens with `"` or `"""`, up to the first end of a line at which it also ends
//! with that. There are no escapes. Source of the rules: ollama `parser/parser.go`.

use super::ModelfileError;
use crate::text::nearest;

/// One instruction of a Modelfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instruction {
    /// `FROM value`.
    From(String),
    /// `PARAMETER name value`.
    Parameter {
        /// The parameter.
        name: String,
        /// Its value as written, without quotes.
        value: String,
    },
    /// `MESSAGE role content`.
    Message {
        /// `system`, `user` or `assistant`.
        role: String,
        /// What is said.
        content: String,
    },
    /// Any other: `TEMPLATE`, `SYSTEM`, `LICENSE`, ….
    Other {
        /// Its name in capitals.
        name: &'static str,
        /// Its value, without quotes.
        value: String,
    },
}

/// Instructions whose value is plain text.
const OTHERS: [&str; 8] = [
    "LICENSE", "TEMPLATE", "SYSTEM", "ADAPTER", "DRAFT", "RENDERER", "PARSER", "REQUIRES",
];
/// Parameters that are whole numbers.
const INTEGERS: [&str; 11] = [
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "draft_num_predict",
    "num_keep",
    "seed",
    "num_predict",
    "top_k",
    "repeat_last_n",
];
/// Parameters that are numbers.
const NUMBERS: [&str; 7] = [
    "top_p",
    "min_p",
    "typical_p",
    "temperature",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
];
/// Parameters that Ollama warns of and ignores.
const DEPRECATED: [&str; 9] = [
    "penalize_newline",
    "low_vram",
    "f16_kv",
    "logits_all",
    "vocab_only",
    "use_mlock",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
];

/// Reads a Modelfile as `ollama create` does.
///
/// # Errors
/// The first thing that Ollama would refuse, with its line.
pub fn parse_modelfile(text: &str) -> Result<Vec<Instruction>, ModelfileError> {
    let mut reader = Reader {
        rest: text.strip_prefix('\u{feff}').unwrap_or(text),
        line: 1,
    };
    let mut instructions = Vec::new();
    while reader.skip_to_instruction() {
        instructions.push(reader.instruction()?);
    }
    let is_from = |instruction: &Instruction| matches!(instruction, Instruction::From(_));
    if !instructions.iter().any(is_from) {
        return Err(ModelfileError::NoFrom);
    }
    Ok(instructions)
}

/// Returns the characters that Ollama drops: what is neither printable nor a space, tab or end of a
/// line. Each once, in order.
pub fn lost_characters(text: &str) -> Vec<char> {
    let mut lost = Vec::new();
    for character in text.strip_prefix('\u{feff}').unwrap_or(text).chars() {
        if !is_kept(character) && !lost.contains(&character) {
            lost.push(character);
        }
    }
    lost
}

/// Returns whether a quoted value is closed at the end of a line before its last one.
pub(super) fn ends_early(quoted: &str) -> bool {
    line_ends(quoted).any(|end| unquote(quoted[..end].trim()).is_some())
}

fn line_ends(text: &str) -> impl Iterator<Item = usize> {
    text.char_indices()
        .filter(|(_, character)| is_newline(*character))
        .map(|(index, _)| index)
}

struct Reader<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Reader<'a> {
    /// Moves to the next instruction, over blanks and comments; returns whether there is one.
    fn skip_to_instruction(&mut self) -> bool {
        loop {
            let blank = |character| is_newline(character) || is_space(character);
            self.take_while(blank);
            if !self.rest.starts_with('#') {
                return !self.rest.is_empty();
            }
            self.take_while(|character| !is_newline(character));
        }
    }

    fn instruction(&mut self) -> Result<Instruction, ModelfileError> {
        let line = self.line;
        let word = self.take_while(|character| !is_newline(character) && !is_space(character));
        // The first character is not looked at before it is dropped; any later one has to be a letter.
        let name = word.strip_prefix(|first| !is_kept(first)).unwrap_or(word);
        let name = name.to_ascii_uppercase();
        let others = OTHERS.into_iter().find(|other| *other == name);
        if others.is_none() && !["FROM", "PARAMETER", "MESSAGE"].contains(&name.as_str()) {
            return Err(ModelfileError::UnknownInstruction {
                line,
                found: word.to_owned(),
            });
        }
        self.take_space(&name)?;
        match (others, name.as_str()) {
            (Some(name), _) => Ok(Instruction::Other {
                name,
                value: self.value(name)?,
            }),
            (None, "FROM") => Ok(Instruction::From(self.value("FROM")?)),
            (None, "MESSAGE") => {
                let role = self.take_while(|character| character.is_ascii_alphabetic());
                if !["system", "user", "assistant"].contains(&role) {
                    return Err(ModelfileError::UnknownRole {
                        line,
                        found: role.to_owned(),
                    });
                }
                self.take_space("MESSAGE")?;
                Ok(Instruction::Message {
                    role: role.to_owned(),
                    content: self.value("MESSAGE")?,
                })
            }
            _ => self.parameter(line),
        }
    }

    fn parameter(&mut self, line: usize) -> Result<Instruction, ModelfileError> {
        let name = self
            .take_while(|character| character.is_ascii_alphanumeric() || character == '_')
            .to_owned();
        self.take_space("PARAMETER")?;
        let value = self.value("PARAMETER")?;
        check_parameter(line, &name, &value)?;
        Ok(Instruction::Parameter { name, value })
    }

    /// Takes the blank that has to stand before a value.
    fn take_space(&mut self, instruction: &str) -> Result<(), ModelfileError> {
        match self.rest.strip_prefix(is_space) {
            Some(rest) => {
                self.rest = rest;
                Ok(())
            }
            None => Err(self.unexpected_end(instruction, "a value")),
        }
    }

    /// Takes a value with the end of its line, and keeps what Ollama keeps of it.
    fn value(&mut self, instruction: &str) -> Result<String, ModelfileError> {
        let ends = line_ends(self.rest).chain([self.rest.len()]);
        for end in ends {
            let kept: String = self.rest[..end].chars().filter(|c| is_kept(*c)).collect();
            if let Some(value) = unquote(kept.trim()) {
                self.line += self.rest[..end].matches('\n').count();
                self.rest = &self.rest[end..];
                return Ok(value.to_owned());
            }
        }
        Err(self.unexpected_end(instruction, "a closing quote"))
    }

    fn take_while(&mut self, test: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|character| !test(character));
        let (taken, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.line += taken.matches('\n').count();
        self.rest = rest;
        taken
    }

    fn unexpected_end(&self, instruction: &str, missing: &'static str) -> ModelfileError {
        ModelfileError::UnexpectedEnd {
            line: self.line,
            instruction: instruction.to_owned(),
            missing,
        }
    }
}

/// Takes the quotes off a value; nothing if it is not closed yet.
fn unquote(value: &str) -> Option<&str> {
    for quote in ["\"\"\"", "\""] {
        if let Some(inner) = value.strip_prefix(quote) {
            return inner.strip_suffix(quote);
        }
    }
    Some(value)
}

fn check_parameter(line: usize, name: &str, value: &str) -> Result<(), ModelfileError> {
    let invalid = |wanted| ModelfileError::InvalidParameter {
        line,
        name: name.to_owned(),
        found: value.to_owned(),
        wanted,
    };
    if name == "stop" || DEPRECATED.contains(&name) {
        return Ok(());
    }
    if INTEGERS.contains(&name) {
        return value
            .parse::<i64>()
            .map(drop)
            .map_err(|_| invalid("a whole number"));
    }
    if NUMBERS.contains(&name) {
        return value
            .parse::<f32>()
            .map(drop)
            .map_err(|_| invalid("a number"));
    }
    if name == "use_mmap" {
        return value
            .parse::<bool>()
            .map(drop)
            .map_err(|_| invalid("true or false"));
    }
    let known = INTEGERS.iter().chain(&NUMBERS).chain(&["stop", "use_mmap"]);
    Err(ModelfileError::UnknownParameter {
        line,
        found: name.to_owned(),
        nearest: nearest(name, known.copied()).unwrap_or("stop"),
    })
}

fn is_newline(character: char) -> bool {
    matches!(character, '\n' | '\r')
}

fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t')
}

/// Returns whether Ollama keeps a character: Go's `strconv.IsPrint`, or a blank.
fn is_kept(character: char) -> bool {
    if is_newline(character) || is_space(character) {
        return true;
    }
    // Behind another character only what is unprintable is escaped, not combining marks.
    let text: String = ['a', character].iter().collect();
    character == '\\'
        || character == '"'
        || character == '\''
        || text.escape_debug().nth(1) != Some('\\')
}
