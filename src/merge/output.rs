//! The output directory: made aside, shown at once or never.
//!
//! Everything is written to `.NAME.infold-tmp-PID` beside the target and renamed when it is
//! complete and on the disk. A lock file beside it is held as long as the run lives, so that the
//! next run knows what a killed one left, and removes it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::weights;

/// What to do about an output directory that has something in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Existing {
    /// Refuse.
    Keep,
    /// Replace it as a whole.
    Replace,
}

/// What the name of the lock file has in addition to that of the directory.
const LOCK_SUFFIX: &str = ".lock";

/// A directory that is being written.
#[derive(Debug)]
pub(super) struct Staging {
    dir: PathBuf,
    target: PathBuf,
    lock_path: PathBuf,
    /// Closing the file gives the lock back.
    _lock: File,
}

impl Staging {
    /// Checks the target and makes the directory aside.
    ///
    /// `inputs` are directories that must not be touched.
    ///
    /// # Errors
    /// A target that is an input, or that has content and may not be replaced; no permission.
    pub(super) fn begin(
        target: &Path,
        inputs: &[&Path],
        existing: Existing,
    ) -> anyhow::Result<Self> {
        let target = resolve(target)?;
        check_inputs(&target, inputs)?;
        let (parent, name) = split(&target)?;
        fs::create_dir_all(&parent)
            .with_context(|| format!("create {} for the output directory", parent.display()))?;
        remove_leftovers(&parent, &name, &target);
        check_target(&target, existing)?;
        let dir_name = format!(".{name}.infold-tmp-{}", std::process::id());
        let lock_path = parent.join(format!("{dir_name}{LOCK_SUFFIX}"));
        let lock = File::create(&lock_path)
            .with_context(|| format!("create a file in {}", parent.display()))?;
        lock.try_lock()
            .with_context(|| format!("lock {}", lock_path.display()))?;
        let dir = parent.join(dir_name);
        let staging = Self {
            dir,
            target,
            lock_path,
            _lock: lock,
        };
        fs::create_dir(&staging.dir)
            .with_context(|| format!("create {}", staging.dir.display()))?;
        Ok(staging)
    }

    /// Returns where to write.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes one whole file.
    ///
    /// # Errors
    /// A full disk, no permission.
    pub(super) fn write(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        let write = || -> io::Result<()> {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut file = File::create_new(&path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().with_context(|| format!("write {}", path.display()))
    }

    /// Shows the directory under its name, in the place of what was there.
    ///
    /// # Errors
    /// What the file system says; then nothing has changed.
    pub(super) fn publish(self) -> anyhow::Result<()> {
        sync_dir(&self.dir).with_context(|| format!("sync {}", self.dir.display()))?;
        let (parent, name) = split(&self.target)?;
        let old = parent.join(format!(".{name}.infold-old-{}", std::process::id()));
        self.swap(&old).with_context(|| {
            format!("rename {} to {}", self.dir.display(), self.target.display())
        })?;
        sync_dir(&parent).with_context(|| format!("sync {}", parent.display()))?;
        if old.exists() {
            fs::remove_dir_all(&old).with_context(|| {
                format!(
                    "the new model is in {}, but the old one cannot be removed from {}",
                    self.target.display(),
                    old.display()
                )
            })?;
        }
        Ok(())
    }

    /// Puts the directory in the target's place, and what was there into `old`.
    fn swap(&self, old: &Path) -> io::Result<()> {
        let is_occupied = match fs::read_dir(&self.target) {
            Ok(mut entries) => entries.next().is_some(),
            Err(_) => false,
        };
        if !is_occupied {
            return fs::rename(&self.dir, &self.target);
        }
        match weights::exchange(&self.dir, &self.target) {
            Ok(()) => fs::rename(&self.dir, old),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                // Two steps: a kill between them leaves the old model aside, and the next run
                // puts it back.
                fs::rename(&self.target, old)?;
                fs::rename(&self.dir, &self.target)
                    .inspect_err(|_| drop(fs::rename(old, &self.target)))
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Published, the directory has another name. On the way out of an error that one is told,
        // a second one here cannot be.
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Has a directory's entries written to the disk.
fn sync_dir(dir: &Path) -> io::Result<()> {
    // Where directories cannot be opened as files there is nothing to do.
    match File::open(dir) {
        Ok(dir) => dir.sync_all(),
        Err(_) => Ok(()),
    }
}

/// Returns the target without links, also when it does not exist yet.
fn resolve(target: &Path) -> anyhow::Result<PathBuf> {
    if let Ok(resolved) = fs::canonicalize(target) {
        return Ok(resolved);
    }
    let absolute = std::path::absolute(target)
        .with_context(|| format!("find the output directory {}", target.display()))?;
    // Links in the part that exists count too when it is compared with the inputs.
    let existing = absolute.ancestors().find(|path| path.exists());
    Ok(
        match existing.and_then(|path| Some((path, fs::canonicalize(path).ok()?))) {
            Some((path, resolved)) => match absolute.strip_prefix(path) {
                Ok(rest) => resolved.join(rest),
                Err(_) => absolute,
            },
            None => absolute,
        },
    )
}

fn split(target: &Path) -> anyhow::Result<(PathBuf, String)> {
    match (target.parent(), target.file_name()) {
        (Some(parent), Some(name)) => Ok((parent.to_owned(), name.to_string_lossy().into_owned())),
        _ => bail!("the output directory {} has no name", target.display()),
    }
}

fn check_inputs(target: &Path, inputs: &[&Path]) -> anyhow::Result<()> {
    for input in inputs {
        let Ok(resolved) = fs::canonicalize(input) else {
            continue;
        };
        if resolved == target {
            bail!(
                "the output directory {} is also an input: choose another --output",
                target.display()
            );
        }
        if resolved.starts_with(target) {
            bail!(
                "the input {} lies in the output directory {}: choose another --output",
                resolved.display(),
                target.display()
            );
        }
    }
    Ok(())
}

fn check_target(target: &Path, existing: Existing) -> anyhow::Result<()> {
    let entries = match fs::read_dir(target) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => bail!(
            "the output {} is a file, not a directory: choose another --output",
            target.display()
        ),
        Err(error) => {
            return Err(error).with_context(|| format!("look into {}", target.display()));
        }
    };
    let mut looks_like_a_model = false;
    let mut is_empty = true;
    for entry in entries {
        let entry = entry.with_context(|| format!("look into {}", target.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        is_empty = false;
        looks_like_a_model |= name == "config.json" || name.ends_with(".gguf");
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if existing == Existing::Replace && is_dir && name != "additional_chat_templates" {
            bail!(
                "{} has a subdirectory {name}, --overwrite replaces only directories of a model: \
                 choose another --output, or remove it yourself",
                target.display()
            );
        }
    }
    if is_empty {
        return Ok(());
    }
    match existing {
        Existing::Keep => bail!(
            "the output directory {} is not empty: choose another, or give --overwrite to replace \
             it",
            target.display()
        ),
        Existing::Replace if !looks_like_a_model => bail!(
            "{} does not look like a model (no config.json), --overwrite replaces only \
             directories of a model: choose another --output, or remove it yourself",
            target.display()
        ),
        Existing::Replace => Ok(()),
    }
}

/// Removes what killed runs left beside the target.
fn remove_leftovers(parent: &Path, name: &str, target: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    let (temporary, old) = (
        format!(".{name}.infold-tmp-"),
        format!(".{name}.infold-old-"),
    );
    for entry in entries.flatten() {
        let file_name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        if file_name.starts_with(&old) {
            let result = if target.exists() {
                fs::remove_dir_all(&path)
            } else {
                fs::rename(&path, target)
            };
            tracing::info!(path = %path.display(), ok = result.is_ok(), "tidied up after a killed run");
        } else if file_name.starts_with(&temporary) {
            let dir = parent.join(file_name.trim_end_matches(LOCK_SUFFIX));
            let lock_path = parent.join(format!(
                "{}{LOCK_SUFFIX}",
                file_name.trim_end_matches(LOCK_SUFFIX)
            ));
            // Held until it is removed: whoever comes in between must not take it for free.
            let lock = File::open(&lock_path);
            if lock.as_ref().is_ok_and(|lock| lock.try_lock().is_err()) {
                tracing::warn!(path = %dir.display(), "another run writes to the same output");
                continue;
            }
            let ok = !dir.exists() || fs::remove_dir_all(&dir).is_ok();
            let _ = fs::remove_file(&lock_path);
            tracing::info!(path = %dir.display(), ok, "removed what a killed run left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_target_appears_only_when_it_is_published() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("new/out");
        let staging = Staging::begin(&target, &[], Existing::Keep).unwrap();
        staging.write("config.json", b"{}").unwrap();
        assert!(!target.exists());
        staging.publish().unwrap();
        assert_eq!(names(&target), ["config.json"]);
        assert_eq!(names(&dir.path().join("new")), ["out"]);
    }

    #[test]
    fn an_error_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::begin(&dir.path().join("out"), &[], Existing::Keep).unwrap();
        staging.write("half", b"x").unwrap();
        drop(staging);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_model_is_replaced_as_a_whole_and_only_on_request() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("config.json"), "old").unwrap();
        fs::write(target.join("model-00001-of-00002.safetensors"), "old").unwrap();
        let error = Staging::begin(&target, &[], Existing::Keep).unwrap_err();
        assert!(error.to_string().contains("--overwrite"), "{error}");
        let staging = Staging::begin(&target, &[], Existing::Replace).unwrap();
        staging.write("config.json", b"new").unwrap();
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"old");
        staging.publish().unwrap();
        assert_eq!(names(&target), ["config.json"]);
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn overwrite_spares_what_is_no_model() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "").unwrap();
        assert!(Staging::begin(dir.path(), &[], Existing::Replace).is_err());
        fs::write(dir.path().join("config.json"), "").unwrap();
        fs::create_dir(dir.path().join("photos")).unwrap();
        let error = Staging::begin(dir.path(), &[], Existing::Replace).unwrap_err();
        assert!(error.to_string().contains("photos"), "{error}");
    }

    #[test]
    fn a_file_is_no_output_directory() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "mine").unwrap();
        for existing in [Existing::Keep, Existing::Replace] {
            let error = Staging::begin(&file, &[], existing).unwrap_err();
            assert!(error.to_string().contains("is a file"), "{error}");
        }
        assert_eq!(names(dir.path()), ["file"]);
    }

    #[test]
    fn inputs_are_never_the_output() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::create_dir(&base).unwrap();
        for target in [base.clone(), dir.path().to_owned()] {
            let error = Staging::begin(&target, &[&base], Existing::Replace).unwrap_err();
            assert!(
                error.to_string().contains("choose another --output"),
                "{error}"
            );
        }
        #[cfg(unix)]
        {
            let link = dir.path().join("link");
            std::os::unix::fs::symlink(&base, &link).unwrap();
            assert!(Staging::begin(&link, &[&base], Existing::Replace).is_err());
        }
    }

    #[test]
    fn the_next_run_tidies_up_after_a_killed_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        // Killed while writing: the lock file is there, nobody holds it.
        let left = dir.path().join(".out.infold-tmp-1");
        fs::create_dir(&left).unwrap();
        let lock_path = dir.path().join(".out.infold-tmp-1.lock");
        fs::write(&lock_path, "").unwrap();
        fs::write(left.join("model.safetensors"), "half").unwrap();
        // Killed between two renames: the old model is aside.
        let old = dir.path().join(".out.infold-old-1");
        fs::create_dir(&old).unwrap();
        fs::write(old.join("config.json"), "old").unwrap();
        let running = Staging::begin(&dir.path().join("other"), &[], Existing::Keep).unwrap();
        let staging = Staging::begin(&target, &[], Existing::Replace).unwrap();
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"old");
        assert!(!left.exists() && !old.exists() && !lock_path.exists());
        assert!(running.dir().exists());
        drop(staging);
        assert!(target.exists());
    }

    #[test]
    fn two_runs_do_not_remove_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let running = dir.path().join(".out.infold-tmp-1");
        fs::create_dir(&running).unwrap();
        let lock = File::create(dir.path().join(".out.infold-tmp-1.lock")).unwrap();
        lock.try_lock().unwrap();
        let _second = Staging::begin(&dir.path().join("out"), &[], Existing::Keep).unwrap();
        assert!(running.exists());
    }
}
