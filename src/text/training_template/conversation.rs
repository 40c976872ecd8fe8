//! A conversation to learn from: text, not yet tokens.

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool.
    Observation,
    /// The model's call of tools: JSON, `{"name": …, "arguments": …}` or a list of such.
    Function,
}

/// One turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// Makes a turn.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
        }
    }
}

/// Turns that alternate between a question or a result of a tool and the model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The system prompt; absent or empty means the template's default.
    pub system: Option<String>,
    /// Descriptions of tools, the text of a JSON list; absent or empty means none.
    pub tools: Option<String>,
    /// The turns.
    pub messages: Vec<Message>,
}
