//! What became of the rows of a data set, for the plan, `check-data` and error texts.

use std::fmt::Write;
use std::path::PathBuf;

use super::file::RowId;

/// Rows named for each reason.
const MAX_NAMED_ROWS: usize = 5;

/// Rows dropped for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// Why, with the field.
    pub reason: String,
    /// Which, in order.
    pub rows: Vec<RowId>,
}

/// What became of the rows of one data set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DatasetReport {
    /// The data set.
    pub name: String,
    /// How its rows spell conversations.
    pub formatting: &'static str,
    /// The files read.
    pub files: Vec<PathBuf>,
    /// Rows in the files.
    pub num_rows: usize,
    /// Rows left by `num_samples` and `max_samples`.
    pub num_selected: usize,
    /// Rows that became conversations.
    pub num_kept: usize,
    /// The others.
    pub dropped: Vec<Dropped>,
    /// What looks like a mistake.
    pub warnings: Vec<String>,
}

impl DatasetReport {
    /// Counts a row that was dropped.
    pub(super) fn drop_row(&mut self, reason: String, row: RowId) {
        match self.dropped.iter_mut().find(|seen| seen.reason == reason) {
            Some(seen) => seen.rows.push(row),
            None => self.dropped.push(Dropped {
                reason,
                rows: vec![row],
            }),
        }
    }

    /// Returns the number of rows dropped.
    pub fn num_dropped(&self) -> usize {
        self.num_selected - self.num_kept
    }

    /// Returns one line for each reason: how many rows, why, and which first.
    pub fn reasons(&self) -> Vec<String> {
        let line = |dropped: &Dropped| {
            let count = dropped.rows.len();
            let noun = if count == 1 { "row" } else { "rows" };
            let named: Vec<String> = dropped.rows[..count.min(MAX_NAMED_ROWS)]
                .iter()
                .map(|row| self.row_name(*row))
                .collect();
            let more = if count > MAX_NAMED_ROWS { ", …" } else { "" };
            let (reason, rows) = (&dropped.reason, named.join(", "));
            format!("{count} {noun}: {reason} ({noun} {rows}{more})")
        };
        self.dropped.iter().map(line).collect()
    }

    /// Returns a row's number, with its file where there are several.
    fn row_name(&self, row: RowId) -> String {
        match self.files.get(row.file) {
            Some(file) if self.files.len() > 1 => {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                format!("{name}:{}", row.row)
            }
            _ => row.row.to_string(),
        }
    }

    /// Returns the report as text, one fact a line.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let files = match self.files.as_slice() {
            [file] => file.display().to_string(),
            files => format!("{} files", files.len()),
        };
        // Writing to a string can not fail.
        let _ = write!(
            text,
            "{} ({}, {files}): {} rows read",
            self.name, self.formatting, self.num_rows
        );
        if self.num_selected != self.num_rows {
            let _ = write!(text, ", {} selected", self.num_selected);
        }
        let _ = write!(
            text,
            ", {} kept, {} dropped",
            self.num_kept,
            self.num_dropped()
        );
        for reason in self.reasons() {
            let _ = write!(text, "\n  dropped {reason}");
        }
        for warning in &self.warnings {
            let _ = write!(text, "\n  warning: {warning}");
        }
        text
    }
}
