//! A failure on demand, to test what the program does when a rank fails: `INFOLD_FAULT`.
//!
//! Read once by [`super::EngineArgs::start`], and nowhere else. Unset, nothing of it runs.

use std::str::FromStr;

/// Which rank fails, when and how: `rank=1,step=20,kind=panic`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The rank.
    pub rank: usize,
    /// The engine's step, counted from 1, that it does not run.
    pub step: u64,
    /// What happens.
    pub kind: FaultKind,
}

/// What a rank does instead of its step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// It panics.
    Panic,
    /// Its step returns an error, as after a fault of its GPU.
    Error,
    /// It does nothing any more, and does not end.
    Stall,
}

/// The variable that holds a fault.
pub const FAULT_VARIABLE: &str = "INFOLD_FAULT";

impl FromStr for Fault {
    type Err = String;

    /// Reads the three settings in any order; all must be there.
    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || {
            format!("must be like rank=1,step=20,kind=panic (or error, or stall), found \"{text}\"")
        };
        let (mut rank, mut step, mut kind) = (None, None, None);
        for setting in text.split(',') {
            match setting.trim().split_once('=').ok_or_else(refused)? {
                ("rank", value) => rank = value.parse().ok(),
                ("step", value) => step = value.parse().ok(),
                ("kind", "panic") => kind = Some(FaultKind::Panic),
                ("kind", "error") => kind = Some(FaultKind::Error),
                ("kind", "stall") => kind = Some(FaultKind::Stall),
                _ => return Err(refused()),
            }
        }
        match (rank, step, kind) {
            (Some(rank), Some(step), Some(kind)) => Ok(Self { rank, step, kind }),
            _ => Err(refused()),
        }
    }
}

impl Fault {
    /// Fails as asked if `step` of `rank` is the one.
    ///
    /// # Errors
    /// The one that was asked for.
    ///
    /// # Panics
    /// When that was asked for.
    pub(super) fn strike(self, rank: usize, step: u64) -> candle_core::Result<()> {
        if (self.rank, self.step) != (rank, step) {
            return Ok(());
        }
        match self.kind {
            FaultKind::Panic => panic!("{FAULT_VARIABLE} asked for it"),
            FaultKind::Error => candle_core::bail!("{FAULT_VARIABLE} asked for it"),
            FaultKind::Stall => loop {
                std::thread::park();
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_read_whole_or_refused() {
        let fault = Fault {
            rank: 1,
            step: 20,
            kind: FaultKind::Stall,
        };
        assert_eq!("rank=1,step=20,kind=stall".parse(), Ok(fault));
        assert_eq!("kind=stall, step=20, rank=1".parse(), Ok(fault));
        for wrong in [
            "",
            "rank=1,step=20",
            "rank=1,step=20,kind=x",
            "rank=-1,step=2,kind=panic",
            "1",
        ] {
            let error = wrong.parse::<Fault>().unwrap_err();
            assert!(error.ends_with(&format!("found \"{wrong}\"")), "{error}");
        }
    }

    #[test]
    fn only_the_named_rank_and_step_fail() {
        let fault: Fault = "rank=1,step=20,kind=error".parse().unwrap();
        assert!(fault.strike(0, 20).is_ok() && fault.strike(1, 19).is_ok());
        assert!(fault.strike(1, 20).is_err());
    }
}
