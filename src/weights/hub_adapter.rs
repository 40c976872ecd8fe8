//! Finds an adapter that is named rather than given, as [`hub`](super::hub) does models.

use std::path::{Path, PathBuf};

use super::{
    HubOptions, WeightsError,
    adapter::{CONFIG_FILE, TENSORS_FILE},
    download::Downloader,
    hub::{is_companion, resolve, stays_inside},
};

/// Returns the directory of a PEFT adapter, which [`Adapter::open`](super::Adapter::open) opens
/// with the same `subfolder`.
///
/// `spec` is a path, or a hub id `owner/name`, which may go on with `@revision`. Beside the
/// adapter come its tokenizer and what else infold wrote for it. The rest is as with
/// [`resolve_model`](super::resolve_model).
///
/// # Errors
/// As `resolve_model`; [`WeightsError::NothingToLoad`] for a repository without an adapter.
pub fn resolve_adapter(
    spec: &str,
    subfolder: Option<&str>,
    options: &HubOptions,
) -> Result<PathBuf, WeightsError> {
    let folder = Folder::new(subfolder);
    resolve(
        spec,
        options,
        |snapshot, _| Ok(folder.complete_adapter(snapshot)),
        |downloader, wanted| folder.fetch(downloader, wanted),
    )
}

/// Where in a repository the adapter lies: nothing, or a path that ends with a slash.
struct Folder(String);

impl Folder {
    fn new(subfolder: Option<&str>) -> Self {
        let path = subfolder.unwrap_or_default().trim_matches('/');
        Self(match stays_inside(path) {
            true => format!("{path}/"),
            false => String::new(),
        })
    }

    fn file(&self, name: &str) -> String {
        format!("{}{name}", self.0)
    }

    /// Returns the snapshot if the adapter is in it.
    fn complete_adapter(&self, snapshot: &Path) -> Option<PathBuf> {
        let has = |name| snapshot.join(self.file(name)).exists();
        (has(CONFIG_FILE) && has(TENSORS_FILE)).then(|| snapshot.to_owned())
    }

    /// Downloads what is missing of an adapter; its weights come last.
    fn fetch(
        &self,
        downloader: &Downloader,
        wanted: Option<&str>,
    ) -> Result<PathBuf, WeightsError> {
        let has = |name| {
            downloader
                .file_names()
                .any(|found| found == self.file(name))
        };
        let problem = if wanted.is_some() {
            Some("an adapter is a directory, leave the file after \":\" out")
        } else if !has(CONFIG_FILE) {
            Some("it has no adapter_config.json, is it an adapter, in which folder?")
        } else if has("adapter_model.bin") && !has(TENSORS_FILE) {
            Some("its weights are pickled (.bin), infold loads adapter_model.safetensors")
        } else if !has(TENSORS_FILE) {
            Some("it has no adapter_model.safetensors")
        } else {
            None
        };
        if let Some(reason) = problem {
            return Err(WeightsError::NothingToLoad {
                repo: downloader.repo_id().to_owned(),
                reason,
            });
        }
        for name in downloader.file_names() {
            if name.strip_prefix(&self.0).is_some_and(is_beside_adapter) {
                downloader.fetch(name)?;
            }
        }
        downloader.fetch(&self.file(TENSORS_FILE))?;
        Ok(downloader.snapshot())
    }
}

/// Returns whether a file in the adapter's folder tells more about it.
fn is_beside_adapter(name: &str) -> bool {
    name == CONFIG_FILE || name == "training_template.json" || is_companion(name)
}
