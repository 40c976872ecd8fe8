//! The verb `merge`: base and adapters into what other programs load.

mod modelfile;

pub use modelfile::{
    Instruction, Modelfile, ModelfileError, ModelfileInput, ModelfileStyle, lost_characters,
    modelfile, ollama_template, parse_modelfile, stop_tokens,
};
