//! What an adapter keeps about the prompts that it was trained on.
//!
//! `train` writes it beside the adapter and `merge` reads it, so that an exported model is served
//! with the prompts that it knows.

use serde::{Deserialize, Serialize};

use super::{Thinking, ThoughtHistory, TrainingTemplate};
use crate::text::TextError;

/// Name of the file beside the adapter.
pub const TEMPLATE_RECORD_FILE: &str = "training_template.json";

/// A training template by name, with all that was changed of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRecord {
    /// Name of the template.
    pub template: String,
    /// System prompt of a conversation without one; empty for none.
    pub default_system: String,
    /// What was done with thoughts; absent for a template without reasoning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thinking: Option<Thinking>,
    /// Whether thoughts of earlier answers were kept.
    pub thought_history: ThoughtHistory,
}

impl TemplateRecord {
    /// Returns the record of a template.
    pub fn new(template: &TrainingTemplate) -> Self {
        Self {
            template: template.name().to_owned(),
            default_system: template.default_system().to_owned(),
            thinking: template.thinking(),
            thought_history: template.thought_history(),
        }
    }

    /// Returns the template that the record stands for.
    ///
    /// # Errors
    /// [`TextError::UnknownTrainingTemplate`].
    pub fn to_template(&self) -> Result<TrainingTemplate, TextError> {
        let template =
            TrainingTemplate::named(&self.template)?.with_default_system(&self.default_system);
        Ok(match self.thinking {
            Some(thinking) => template.with_thinking(thinking, self.thought_history),
            None => template,
        })
    }
}
