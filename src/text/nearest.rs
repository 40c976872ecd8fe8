//! Guesses what a misspelt word was meant to be, for texts such as "did you mean …?".

/// How alike (Jaro-Winkler, 0 to 1) a word and its likely misspelling are at least.
const LIKELY: f64 = 0.8;

/// Returns the candidate that looks most like `word`; `None` without candidates.
///
/// How alike they are is not asked: a caller that lists all candidates anyway loses nothing by
/// naming one.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    most_alike(word, candidates).map(|(_, candidate)| candidate)
}

/// Returns the candidate that `word` is likely a misspelling of.
pub fn likely<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let (likeness, candidate) = most_alike(word, candidates)?;
    (likeness > LIKELY).then_some(candidate)
}

fn most_alike<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<(f64, &'a str)> {
    (candidates.into_iter())
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .max_by(|(left, _), (right, _)| left.total_cmp(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_letter_is_seen_through() {
        let keys = ["export_size", "export_dir", "template"];
        assert_eq!(nearest("export_dri", keys), Some("export_dir"));
        assert_eq!(nearest("x", []), None);
        assert_eq!(likely("export_dri", keys), Some("export_dir"));
        assert_eq!(
            nearest("zzz", keys).map(|_| likely("zzz", keys)),
            Some(None)
        );
    }
}
