//! A conversation to learn from, as a data set gives it: text, not yet tokens.

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool.
    Observation,
    /// The model's call of a tool, as JSON.
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

/// One row of a data set: turns that alternate and end with the model's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// The system prompt; absent means the template's default.
    pub system: Option<String>,
    /// Descriptions of tools, a JSON list.
    pub tools: Option<String>,
    /// The turns.
    pub messages: Vec<Message>,
}
