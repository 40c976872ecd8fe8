//! A progress bar with bytes per second and remaining time; silent where there is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How far a pass over all weights is.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Begins a pass over so many bytes.
    pub(super) fn new(total_bytes: u64, what: &'static str) -> Self {
        let bar = ProgressBar::new(total_bytes).with_message(what);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
        // The template is part of the program; should it not parse, a plain bar is shown.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// Counts bytes that are done.
    pub(super) fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// Removes the bar; returns how long the pass took.
    pub(super) fn finish(self) -> Duration {
        let elapsed = self.0.elapsed();
        self.0.finish_and_clear();
        elapsed
    }
}
