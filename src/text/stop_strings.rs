//! Stop strings found across token borders.
//!
//! An Aho-Corasick automaton walks over the generated text once, whatever the number of stop
//! strings. Its state says how long the longest suffix of the text is that may still become a stop
//! string; exactly that much is held back. The match that is complete first wins, among those
//! complete at the same byte the one that starts first, as when vLLM checks after every character.

use std::collections::HashMap;
use std::sync::Arc;

use aho_corasick::Anchored;
use aho_corasick::automaton::{Automaton, StateID};
use aho_corasick::nfa::noncontiguous::NFA;

use super::TextError;

/// Whether the text of a request ends before or after the stop string that ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IncludeStopString {
    /// The stop string is part of the output.
    Yes,
    /// The output ends where the stop string begins.
    No,
}

/// What one more piece of text means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that is safe to send: no part of it belongs to a stop string that matches later.
    pub emit: String,
    /// Index of the stop string that ended the text, if one did. Nothing may be pushed after it.
    pub stopped: Option<usize>,
}

/// The stop strings of one sequence and the text held back for them. A clone shares what was
/// prepared, which may take megabytes.
#[derive(Debug, Clone)]
pub struct StopStrings {
    matcher: Option<Matcher>,
    include: IncludeStopString,
    held_back: String,
}

impl StopStrings {
    /// Prepares the search for `stop`, in the order in which [`StopOutcome::stopped`] counts.
    ///
    /// # Errors
    /// An empty stop string, or more text than an automaton holds (2³¹ states).
    pub fn new(stop: Vec<String>, include: IncludeStopString) -> Result<Self, TextError> {
        if let Some(index) = stop.iter().position(String::is_empty) {
            return Err(TextError::EmptyStopString { index });
        }
        let matcher = if stop.is_empty() {
            None
        } else {
            Some(Matcher::new(&stop)?)
        };
        Ok(Self {
            matcher,
            include,
            held_back: String::new(),
        })
    }

    /// Takes the next piece of generated text and returns what may be sent.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        let Some(matcher) = &mut self.matcher else {
            return StopOutcome {
                emit: text.to_owned(),
                stopped: None,
            };
        };
        let found = matcher.advance(text);
        let before = self.held_back.len();
        let mut all = std::mem::take(&mut self.held_back);
        all.push_str(text);
        let Some(found) = found else {
            let keep_from = all.len() - matcher.depth();
            self.held_back = all.split_off(keep_from);
            return StopOutcome {
                emit: all,
                stopped: None,
            };
        };
        let end = before + found.end;
        all.truncate(match self.include {
            IncludeStopString::Yes => end,
            IncludeStopString::No => end - found.len,
        });
        StopOutcome {
            emit: all,
            stopped: Some(found.index),
        }
    }

    /// Returns the text still held back; the sequence ended for another reason.
    pub fn finish(&mut self) -> String {
        if let Some(matcher) = &mut self.matcher {
            matcher.state = matcher.start;
        }
        std::mem::take(&mut self.held_back)
    }
}

/// Where a stop string was found in a piece of text.
struct Found {
    index: usize,
    /// Bytes of the piece up to the end of the match.
    end: usize,
    /// Bytes of the stop string.
    len: usize,
}

#[derive(Debug, Clone)]
struct Matcher {
    automaton: Arc<NFA>,
    /// Bytes of the longest stop string prefix that the text ends with, for each state.
    depths: Arc<HashMap<StateID, usize>>,
    start: StateID,
    state: StateID,
}

impl Matcher {
    fn new(stop: &[String]) -> Result<Self, TextError> {
        let automaton = NFA::new(stop).map_err(|source| TextError::StopStrings { source })?;
        let start = automaton
            .start_state(Anchored::No)
            .expect("the automaton is built for unanchored searches");
        // From the start, the state after a prefix of a stop string is the node of that prefix.
        let mut depths = HashMap::from([(start, 0)]);
        for pattern in stop {
            let mut state = start;
            for (position, &byte) in pattern.as_bytes().iter().enumerate() {
                state = automaton.next_state(Anchored::No, state, byte);
                depths.insert(state, position + 1);
            }
        }
        Ok(Self {
            automaton: Arc::new(automaton),
            depths: Arc::new(depths),
            start,
            state: start,
        })
    }

    fn advance(&mut self, text: &str) -> Option<Found> {
        for (position, &byte) in text.as_bytes().iter().enumerate() {
            self.state = self.automaton.next_state(Anchored::No, self.state, byte);
            if self.automaton.is_match(self.state) {
                return Some(self.found_at(position + 1));
            }
        }
        None
    }

    /// Picks, among the stop strings that end here, the longest and of equals the first.
    fn found_at(&self, end: usize) -> Found {
        let mut found = Found {
            index: 0,
            end,
            len: 0,
        };
        for nth in 0..self.automaton.match_len(self.state) {
            let pattern = self.automaton.match_pattern(self.state, nth);
            let len = self.automaton.pattern_len(pattern);
            if len > found.len || (len == found.len && pattern.as_usize() < found.index) {
                found.len = len;
                found.index = pattern.as_usize();
            }
        }
        found
    }

    fn depth(&self) -> usize {
        self.depths.get(&self.state).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(
        stop: &[&str],
        include: IncludeStopString,
        pieces: &[&str],
    ) -> (Vec<String>, Option<usize>) {
        let stop = stop.iter().map(ToString::to_string).collect();
        let mut stop_strings = StopStrings::new(stop, include).unwrap();
        let mut emitted = Vec::new();
        for piece in pieces {
            let outcome = stop_strings.push(piece);
            emitted.push(outcome.emit);
            if outcome.stopped.is_some() {
                return (emitted, outcome.stopped);
            }
        }
        emitted.push(stop_strings.finish());
        (emitted, None)
    }

    #[test]
    fn clones_hold_back_text_of_their_own() {
        let mut one = StopStrings::new(vec!["ab".to_owned()], IncludeStopString::No).unwrap();
        let mut other = one.clone();
        assert_eq!(one.push("xa").emit, "x");
        assert_eq!(other.push("b").stopped, None);
        assert_eq!(one.push("b").stopped, Some(0));
    }

    #[test]
    fn stop_string_over_three_pieces_is_not_leaked() {
        let (emitted, stopped) = run(&["</s>"], IncludeStopString::No, &["one <", "/s", "> two"]);
        assert_eq!(emitted, ["one ", "", ""]);
        assert_eq!(stopped, Some(0));
    }

    #[test]
    fn stop_string_is_kept_when_included() {
        let (emitted, stopped) = run(&["\n\n"], IncludeStopString::Yes, &["a\n", "\nb"]);
        assert_eq!(emitted.concat(), "a\n\n");
        assert_eq!(stopped, Some(0));
    }

    #[test]
    fn held_back_text_is_released_when_it_can_not_match() {
        let (emitted, stopped) = run(&["abcd"], IncludeStopString::No, &["xab", "cab", "y"]);
        assert_eq!(emitted, ["x", "abc", "aby", ""]);
        assert_eq!(stopped, None);
    }

    #[test]
    fn finish_releases_a_partial_match() {
        let (emitted, _) = run(&["stop"], IncludeStopString::No, &["no st"]);
        assert_eq!(emitted, ["no ", "st"]);
    }

    #[test]
    fn match_that_is_complete_first_wins_then_the_longest() {
        assert_eq!(
            run(&["abcd", "bc"], IncludeStopString::No, &["abcd"]).1,
            Some(1)
        );
        let (emitted, stopped) = run(&["bc", "abc"], IncludeStopString::No, &["xabc"]);
        assert_eq!((emitted.concat().as_str(), stopped), ("x", Some(1)));
        assert_eq!(run(&["b", "b"], IncludeStopString::No, &["ab"]).1, Some(0));
    }

    #[test]
    fn empty_stop_string_is_refused() {
        let stop = vec!["a".to_owned(), String::new()];
        let error = StopStrings::new(stop, IncludeStopString::No).unwrap_err();
        assert!(matches!(error, TextError::EmptyStopString { index: 1 }));
        assert!(error.is_user_error());
    }

    #[test]
    fn ten_thousand_stop_strings_are_searched_at_once() {
        let stop: Vec<String> = (0..10_000).map(|i| format!("<stop number {i}>")).collect();
        let mut stop_strings = StopStrings::new(stop, IncludeStopString::No).unwrap();
        for _ in 0..1000 {
            assert_eq!(stop_strings.push("text <stop number 1").stopped, None);
        }
        let outcome = stop_strings.push("234>");
        assert_eq!(outcome.stopped, Some(1234));
    }

    /// The definition: the first end of any stop string, then the earliest start, then list order.
    fn naive(stop: &[String], include: IncludeStopString, text: &str) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let hits = stop
                .iter()
                .enumerate()
                .filter(|(_, s)| text.as_bytes()[..end].ends_with(s.as_bytes()));
            if let Some((index, hit)) =
                hits.min_by_key(|(index, s)| (std::cmp::Reverse(s.len()), *index))
            {
                let cut = match include {
                    IncludeStopString::Yes => end,
                    IncludeStopString::No => end - hit.len(),
                };
                return (text[..cut].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn any_cut_of_the_text_gives_what_the_definition_gives(
            stop in prop::collection::vec("[ab好]{1,4}", 0..5),
            pieces in prop::collection::vec("[ab好😀]{0,3}", 0..12),
            include in prop_oneof![Just(IncludeStopString::Yes), Just(IncludeStopString::No)],
        ) {
            let (want, want_index) = naive(&stop, include, &pieces.concat());
            let mut stop_strings = StopStrings::new(stop, include).unwrap();
            let mut got = String::new();
            let mut got_index = None;
            for piece in &pieces {
                let outcome = stop_strings.push(piece);
                got.push_str(&outcome.emit);
                prop_assert!(want.starts_with(&got), "leaked {got:?}, wanted {want:?}");
                if outcome.stopped.is_some() {
                    got_index = outcome.stopped;
                    break;
                }
            }
            if got_index.is_none() {
                got.push_str(&stop_strings.finish());
            }
            prop_assert_eq!((got, got_index), (want, want_index));
        }
    }
}
