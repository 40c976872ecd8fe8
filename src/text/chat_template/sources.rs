//! The chat templates that come with a model, and the choice among them.

use serde_json::Value;

/// Chat templates by name; `default` is the one used unless another fits better.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatTemplateSources {
    templates: Vec<(String, String)>,
}

impl ChatTemplateSources {
    /// Adds a template, replacing one of the same name.
    pub fn insert(&mut self, name: &str, template: String) {
        self.templates.retain(|(known, _)| known != name);
        self.templates.push((name.to_owned(), template));
    }

    /// Returns the template of this name.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.templates.iter().find(|(known, _)| known == name)?;
        Some(&found.1)
    }

    /// Returns whether the model came without a template.
    pub fn is_empty(&self) -> bool {
        self.templates.is_empty()
    }

    /// Returns the names, in the order of the model's files.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.templates.iter().map(|(name, _)| name.as_str())
    }

    /// Chooses as transformers does: `tool_use` when tools are given and it exists, else `default`.
    pub fn select(&self, tools: Option<&[Value]>) -> Option<&str> {
        let for_tools = tools.and_then(|_| self.get("tool_use"));
        for_tools.or_else(|| self.get("default"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tool_use_template_is_chosen_only_with_tools() {
        let mut sources = ChatTemplateSources::default();
        assert_eq!(sources.select(None), None);
        sources.insert("default", "plain".to_owned());
        assert_eq!(sources.select(Some(&[])), Some("plain"));
        sources.insert("tool_use", "tools".to_owned());
        assert_eq!(sources.select(Some(&[])), Some("tools"));
        assert_eq!(sources.select(None), Some("plain"));
    }
}
