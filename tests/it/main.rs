//! The one integration-test binary.

mod chat_templates;
