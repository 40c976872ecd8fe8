//! A failure on demand, to test what the program does when a rank fails: `INFOLD_FAULT`.
//!
//! Read once by [`super::EngineArgs::start`], and nowhere else. Unset, nothing of it runs.

use std::str::FromStr;

/// Which rank fails, when and how: `rank=1,step=20,kind=panic`, with several data-parallel
/// replicas also `replica=1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The replica, 0 where none is named.
    pub replica: usize,
    /// The rank of that replica: each has ranks from 0 on.
    pub rank: usize,
    /// The replica's step, counted from 1, that the rank does not run.
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

    /// Reads the settings in any order; all but the replica must be there.
    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || {
            format!(
                "must be like rank=1,step=20,kind=panic (or error, or stall; with replica=1 for \
                 another replica than 0), found \"{text}\""
            )
        };
        let (mut replica, mut rank, mut step, mut kind) = (Some(0), None, None, None);
        for setting in text.split(',') {
            match setting.trim().split_once('=').ok_or_else(refused)? {
                ("replica", value) => replica = value.parse().ok(),
                ("rank", value) => rank = value.parse().ok(),
                ("step", value) => step = value.parse().ok(),
                ("kind", "panic") => kind = Some(FaultKind::Panic),
                ("kind", "error") => kind = Some(FaultKind::Error),
                ("kind", "stall") => kind = Some(FaultKind::Stall),
                _ => return Err(refused()),
            }
        }
        match (replica, rank, step, kind) {
            (Some(replica), Some(rank), Some(step), Some(kind)) => Ok(Self {
                replica,
                rank,
                step,
                kind,
            }),
            _ => Err(refused()),
        }
    }
}

impl Fault {
    /// Fails as asked if `step` of `rank`, in the replica that was named, is the one.
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
            replica: 0,
            rank: 1,
            step: 20,
            kind: FaultKind::Stall,
        };
        assert_eq!("rank=1,step=20,kind=stall".parse(), Ok(fault));
        assert_eq!("kind=stall, step=20, rank=1".parse(), Ok(fault));
        let elsewhere = Fault {
            replica: 2,
            ..fault
        };
        assert_eq!("replica=2,rank=1,step=20,kind=stall".parse(), Ok(elsewhere));
        for wrong in [
            "",
            "rank=1,step=20",
            "rank=1,step=20,kind=x",
            "rank=-1,step=2,kind=panic",
            "rank=1,step=2,kind=panic,replica=x",
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
