//! What can not be said in a Modelfile, and what a Modelfile says wrong.

/// Errors of writing and reading a Modelfile. Lines count from 1.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModelfileError {
    /// A value that Ollama would take to end before its end.
    #[error(
        "{instruction} cannot hold {value:?}: in a Modelfile three double quotes before the end of \
         a line end the text, and nothing escapes them; write the quotes in another way"
    )]
    Unquotable {
        /// The instruction.
        instruction: &'static str,
        /// The text.
        value: String,
    },
    /// An instruction that there is not.
    #[error(
        "Modelfile, line {line}: {found:?} is no instruction; wanted one of FROM, LICENSE, \
         TEMPLATE, SYSTEM, ADAPTER, DRAFT, RENDERER, PARSER, PARAMETER, MESSAGE, REQUIRES"
    )]
    UnknownInstruction {
        /// Where.
        line: usize,
        /// What stands there.
        found: String,
    },
    /// A message by nobody.
    #[error("Modelfile, line {line}: MESSAGE by {found:?}; wanted system, user or assistant")]
    UnknownRole {
        /// Where.
        line: usize,
        /// What stands there.
        found: String,
    },
    /// A parameter that Ollama does not know.
    #[error("Modelfile, line {line}: Ollama has no parameter {found:?}; the nearest is {nearest}")]
    UnknownParameter {
        /// Where.
        line: usize,
        /// What stands there.
        found: String,
        /// The parameter most like it.
        nearest: &'static str,
    },
    /// A value of the wrong kind.
    #[error("Modelfile, line {line}: PARAMETER {name} is {found:?}; wanted {wanted}")]
    InvalidParameter {
        /// Where.
        line: usize,
        /// The parameter.
        name: String,
        /// Its value.
        found: String,
        /// The kind that it has to be.
        wanted: &'static str,
    },
    /// The file ends inside an instruction.
    #[error("Modelfile, line {line}: the file ends inside {instruction}: {missing} is missing")]
    UnexpectedEnd {
        /// Where.
        line: usize,
        /// The instruction, as far as read.
        instruction: String,
        /// What is missing.
        missing: &'static str,
    },
    /// There is no `FROM`.
    #[error("the Modelfile has no FROM line: it has to name a model, such as `FROM .`")]
    NoFrom,
}
