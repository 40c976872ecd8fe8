//! Why adapters do not fit a base: every fault of a plan, found before a byte is written.

use std::fmt;
use std::path::PathBuf;

/// How many faults of one kind are shown.
const SHOWN: usize = 10;

/// One reason why an adapter cannot be folded in.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// `adapter_config.json` has a key that cannot be read.
    #[error("adapter_config.json: {key} {reason}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A kind of adapter that is not a sum of the base and a low-rank product.
    #[error("{what} cannot be merged: {advice}")]
    Refused {
        /// What was found.
        what: String,
        /// What to do.
        advice: &'static str,
    },
    /// A tensor that belongs to nothing in the base.
    #[error("{tensor} belongs to no tensor of the base model")]
    Unmatched {
        /// Name in the adapter.
        tensor: String,
    },
    /// A tensor of another shape than the base asks for.
    #[error("{tensor} has shape {found:?}, the base asks for {expected:?} (dimension {dim})")]
    Shape {
        /// Name in the adapter.
        tensor: String,
        /// By the base.
        expected: Vec<usize>,
        /// In the adapter.
        found: Vec<usize>,
        /// What the dimension that differs is: in, out, rank, ….
        dim: &'static str,
    },
    /// One half of a pair.
    #[error("module {module} has {found} without {missing}")]
    Unpaired {
        /// The module.
        module: String,
        /// What is there.
        found: &'static str,
        /// What is not.
        missing: &'static str,
    },
    /// The two halves or the configuration disagree on the rank.
    #[error("module {module}: lora_A has rank {a}, lora_B {b}, adapter_config.json says {config}")]
    Rank {
        /// The module.
        module: String,
        /// Rows of `A`.
        a: usize,
        /// Columns of `B`.
        b: usize,
        /// `r` or its `rank_pattern`.
        config: usize,
    },
    /// A tensor without elements.
    #[error(
        "{tensor} has shape {shape:?}: the weights were not gathered before saving \
         (DeepSpeed ZeRO-3: set stage3_gather_16bit_weights_on_model_save)"
    )]
    Empty {
        /// Name in the adapter.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor with a NaN or an infinity.
    #[error("{tensor} holds NaN or infinity: the training diverged or the file is damaged")]
    NotFinite {
        /// Name in the adapter.
        tensor: String,
    },
    /// All `B` are zero.
    #[error(
        "every lora_B is zero, so that merging changes nothing: an untrained adapter or an empty \
         ZeRO-3 save"
    )]
    AllZero,
    /// The adapter has no tensor.
    #[error("the adapter has no tensors")]
    NoTensors,
    /// A trained module for which the file has nothing.
    #[error("{key} names {target:?}, the file has no tensor for it")]
    MissingTarget {
        /// `target_modules` or `modules_to_save`.
        key: &'static str,
        /// The entry.
        target: String,
    },
    /// Two tensors that take each other's place.
    #[error("{tensor} is replaced twice, by {first} and by {second}")]
    ReplacedTwice {
        /// The base's tensor.
        tensor: String,
        /// By what.
        first: String,
        /// And by what.
        second: String,
    },
    /// A way of combining adapters that has no meaning.
    #[error("{what}: {advice}")]
    Combination {
        /// What was asked for.
        what: String,
        /// What to do.
        advice: &'static str,
    },
}

/// All faults of one merge, with what they point to.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFaults {
    /// The adapter's directory and what is wrong with it.
    pub faults: Vec<(PathBuf, Fault)>,
    /// What the faults together point to, one sentence each.
    pub hints: Vec<String>,
}

impl std::error::Error for AdapterFaults {}

impl fmt::Display for AdapterFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.faults.len();
        write!(f, "nothing was merged: {count} fault{}", plural(count))?;
        let mut adapter = None;
        let mut shown = Vec::new();
        for (dir, fault) in &self.faults {
            if adapter != Some(dir) {
                write_rest(f, &mut shown)?;
                write!(f, "\n{}:", dir.display())?;
                adapter = Some(dir);
            }
            let kind = std::mem::discriminant(fault);
            let entry = match shown.iter_mut().find(|(found, _)| *found == kind) {
                Some(entry) => entry,
                None => {
                    shown.push((kind, 0));
                    shown.last_mut().expect("one was pushed")
                }
            };
            entry.1 += 1;
            if entry.1 <= SHOWN {
                write!(f, "\n  - {fault}")?;
            }
        }
        write_rest(f, &mut shown)?;
        for hint in &self.hints {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

/// Says how many faults of each kind were left out, and starts counting anew.
fn write_rest(
    f: &mut fmt::Formatter<'_>,
    shown: &mut Vec<(std::mem::Discriminant<Fault>, usize)>,
) -> fmt::Result {
    for (_, count) in shown.drain(..) {
        if count > SHOWN {
            write!(f, "\n  - and {} more of this kind", count - SHOWN)?;
        }
    }
    Ok(())
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_faults_of_a_kind_are_counted_and_hints_come_last() {
        let unmatched = |i| Fault::Unmatched {
            tensor: format!("t{i}"),
        };
        let faults = AdapterFaults {
            faults: (0..12)
                .map(|i| (PathBuf::from("a"), unmatched(i)))
                .chain([(PathBuf::from("b"), Fault::AllZero)])
                .collect(),
            hints: vec!["look".to_owned()],
        };
        let text = faults.to_string();
        assert!(
            text.starts_with("nothing was merged: 13 faults\na:\n  - t0 "),
            "{text}"
        );
        assert!(text.contains("t9 ") && !text.contains("t10"), "{text}");
        assert!(text.contains("and 2 more of this kind"), "{text}");
        assert!(text.contains("\nb:\n  - every lora_B is zero"), "{text}");
        assert!(text.ends_with("hint: look"), "{text}");
    }
}
