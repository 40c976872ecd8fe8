//! Guesses what a misspelt word was meant to be, for texts such as "did you mean …?".

/// Returns the candidate that looks most like `word`; `None` without candidates.
///
/// How alike they are is not asked: a caller that lists all candidates anyway loses nothing by
/// naming one.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    (candidates.into_iter())
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .max_by(|(left, _), (right, _)| left.total_cmp(right))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_letter_is_seen_through() {
        let keys = ["export_size", "export_dir", "template"];
        assert_eq!(nearest("export_dri", keys), Some("export_dir"));
        assert_eq!(nearest("x", []), None);
    }
}
