//! The verb `merge`: base and adapters into what other programs load.

mod default_system;
mod go_template;
mod modelfile;
mod prompt_check;

pub use default_system::{
    DefaultSystem, DefaultSystemError, default_system_of, set_default_system,
};
pub use go_template::{GoTemplate, GoTemplateError};
pub use modelfile::{
    Instruction, Modelfile, ModelfileError, ModelfileInput, ModelfileStyle, lost_characters,
    modelfile, ollama_template, parse_modelfile, stop_tokens,
};
pub use prompt_check::{
    PromptCheckError, PromptCheckInput, PromptDifference, PromptReport, PromptSource, check_prompts,
};
