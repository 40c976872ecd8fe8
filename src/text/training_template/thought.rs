//! The thoughts of reasoning models inside answers.

/// Begins a thought.
pub(super) const OPEN: &str = "<think>\n";
/// Ends a thought.
pub(super) const CLOSE: &str = "\n</think>\n\n";
/// What stands for a thought where there is none.
pub(super) const EMPTY: &str = "<think>\n\n</think>\n\n";

/// Returns the text without its thoughts and the line breaks that are then in front.
pub(super) fn remove(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((start, end)) = find(rest) {
        kept.push_str(&rest[..start]);
        rest = &rest[end..];
    }
    kept.push_str(rest);
    kept.trim_start_matches('\n').to_owned()
}

/// Returns where the first thought begins and ends, its words included.
pub(super) fn find(text: &str) -> Option<(usize, usize)> {
    find_between(text, OPEN, CLOSE)
}

/// Returns where the first text from `open` to the next `close` begins and ends.
pub(super) fn find_between(text: &str, open: &str, close: &str) -> Option<(usize, usize)> {
    let start = text.find(open)?;
    let inner = start + open.len();
    let end = inner + text[inner..].find(close)? + close.len();
    Some((start, end))
}

/// Returns whether an answer has a thought or a part of one.
pub(super) fn has_thought(text: &str) -> bool {
    text.contains(OPEN.trim()) || text.contains(CLOSE.trim())
}
