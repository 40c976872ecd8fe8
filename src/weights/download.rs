//! Downloads files of one hub repository into the Hugging Face cache.
//!
//! The transfer, the cache layout and its locks are the `hf-hub` crate's. Around it stands what
//! that lacks: a listing with sizes, resuming after every failure from the bytes that are on
//! disk (its own retry restarts at 0 when a resumed download fails before its first byte), a
//! check of the size, and errors that say what to do.

use std::{
    cell::Cell,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        Progress,
        sync::{Api, ApiBuilder, ApiError, ApiRepo},
    },
};
use indicatif::{HumanBytes, ProgressBar, ProgressFinish};
use serde::Deserialize;

use super::{
    WeightsError,
    hub::{HubOptions, stays_inside},
};

/// The longest wait for the listing of a repository.
const LISTING_TIMEOUT: Duration = Duration::from_secs(30);

/// One revision of a repository, pinned to the commit that it meant when asked.
pub(super) struct Downloader<'a> {
    options: &'a HubOptions,
    cache: &'a Cache,
    /// The repository at the revision the user named.
    named: &'a Repo,
    repo_id: String,
    /// The repository at the commit, so that all files are of one state.
    pinned: Repo,
    api: Api,
    listing: Listing,
}

/// What the hub says about a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

impl<'a> Downloader<'a> {
    /// Asks the hub for the listing of `repo`.
    ///
    /// # Errors
    /// As [`resolve_model`](super::resolve_model), for what concerns the hub.
    pub(super) fn new(
        options: &'a HubOptions,
        cache: &'a Cache,
        repo: &'a Repo,
    ) -> Result<Self, WeightsError> {
        let repo_id = repo.url();
        let context = Context {
            options,
            repo_id: &repo_id,
            what: "the list of its files",
        };
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(options.endpoint.clone())
            .with_token(options.token.clone())
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| context.explain(error))?;
        let listing = context.retry(|_| read_listing(&api.repo(repo.clone())))?;
        if !listing.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            // It becomes a folder's name.
            return Err(context.explain(ApiError::InvalidHeader("sha")));
        }
        Ok(Self {
            options,
            cache,
            named: repo,
            pinned: Repo::with_revision(repo_id.clone(), RepoType::Model, listing.sha.clone()),
            repo_id,
            api,
            listing,
        })
    }

    /// Returns `owner/name`.
    pub(super) fn repo_id(&self) -> &str {
        &self.repo_id
    }

    /// Returns the names of all files of the repository.
    pub(super) fn file_names(&self) -> impl Iterator<Item = &str> {
        self.listing
            .siblings
            .iter()
            .map(|sibling| sibling.rfilename.as_str())
    }

    /// Returns the folder in which the files of this commit appear.
    pub(super) fn snapshot(&self) -> PathBuf {
        let cached = self.cache.repo(self.pinned.clone());
        cached.pointer_path(&self.listing.sha)
    }

    /// Makes the revision that the user named mean this commit in the cache.
    pub(super) fn point_revision_here(&self) -> Result<(), WeightsError> {
        let cached = self.cache.repo(self.named.clone());
        cached
            .create_ref(&self.listing.sha)
            .map_err(|source| WeightsError::Io {
                path: self.options.cache_dir.clone(),
                source,
            })
    }

    /// Downloads one file, unless it is there already, and checks its size.
    ///
    /// # Errors
    /// As [`resolve_model`](super::resolve_model), for what concerns the hub.
    pub(super) fn fetch(&self, name: &str) -> Result<(), WeightsError> {
        let listed = (self.listing.siblings.iter()).find(|file| file.rfilename == name);
        let size = listed.and_then(|file| file.size);
        let context = Context {
            options: self.options,
            repo_id: &self.repo_id,
            what: name,
        };
        // Names come from the hub and become paths in the cache.
        if !stays_inside(name) {
            return Err(context.explain(ApiError::InvalidHeader("rfilename")));
        }
        if has_size(&self.snapshot().join(name), size) {
            return Ok(());
        }
        match size {
            // The hub cannot serve the range by which hf-hub asks for the size of a file.
            Some(0) => return Ok(()),
            Some(size) => tracing::info!("downloading {name} ({})", HumanBytes(size)),
            None => tracing::info!("downloading {name}"),
        }
        let repo = self.api.repo(self.pinned.clone());
        context.retry(|received| {
            let result = repo.download_with_progress(name, Meter::new(received));
            match result {
                Ok(path) if has_size(&path, size) => Ok(()),
                Ok(path) => {
                    discard(&path);
                    Err(ApiError::InvalidResume)
                }
                Err(error) => {
                    if matches!(error, ApiError::InvalidResume) || status_of(&error) == Some(416) {
                        self.discard_part(&repo.url(name));
                    }
                    Err(error)
                }
            }
        })
    }

    /// Removes the beginning of a download that the hub cannot continue.
    fn discard_part(&self, url: &str) {
        if let Ok(metadata) = self.api.metadata(url) {
            let blob = self.cache.repo(self.pinned.clone());
            let part = blob.blob_path(metadata.etag()).with_extension("part");
            // If it stays, the next attempt fails in the same way and says so.
            let _ = std::fs::remove_file(part);
        }
    }
}

fn read_listing(repo: &ApiRepo) -> Result<Listing, ApiError> {
    let request = repo
        .info_request()
        .query("blobs", "true")
        .config()
        .timeout_global(Some(LISTING_TIMEOUT))
        .build();
    let mut response = request.call().map_err(Box::new)?;
    Ok(response.body_mut().read_json().map_err(Box::new)?)
}

/// Returns whether the file exists with `size` bytes (with any, if `size` is not known).
fn has_size(path: &Path, size: Option<u64>) -> bool {
    let found = std::fs::metadata(path).map(|metadata| metadata.len());
    found.is_ok_and(|found| size.is_none_or(|size| size == found))
}

/// Removes a file of a snapshot and the blob it points to.
fn discard(path: &Path) {
    // If either stays, the size is found wrong again.
    if let Ok(blob) = path.canonicalize() {
        let _ = std::fs::remove_file(blob);
    }
    let _ = std::fs::remove_file(path);
}

/// What is being done, for retries and errors.
struct Context<'a> {
    options: &'a HubOptions,
    repo_id: &'a str,
    what: &'a str,
}

impl Context<'_> {
    /// Repeats `attempt` while it fails in a way that may pass; it counts the bytes it received,
    /// and a failure after some bytes counts as the first.
    fn retry<T>(
        &self,
        attempt: impl Fn(&Cell<u64>) -> Result<T, ApiError>,
    ) -> Result<T, WeightsError> {
        let mut failures = 0;
        loop {
            let received = Cell::new(0);
            let error = match attempt(&received) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if received.get() > 0 {
                failures = 0;
            }
            if failures >= self.options.max_retries || !may_pass(&error) {
                return Err(self.explain(error));
            }
            let delay = self.options.retry_delay * 2_u32.pow(failures.min(5));
            failures += 1;
            tracing::warn!(
                "{}: {error}, retry {failures} of {} in {delay:?}",
                self.what,
                self.options.max_retries
            );
            std::thread::sleep(delay);
        }
    }

    /// Says what an error means for the user.
    fn explain(&self, error: ApiError) -> WeightsError {
        let repo = self.repo_id.to_owned();
        match (status_of(&error), &error) {
            (Some(status @ (401 | 403)), _) => WeightsError::HubDenied {
                repo,
                status,
                advice: if self.options.token.is_some() {
                    "the account of the token in HF_TOKEN has no access: accept the model's \
                     terms on its page, or use another token"
                } else {
                    "it does not exist, is private or gated: for access set HF_TOKEN"
                },
            },
            (Some(404), _) => WeightsError::HubNotFound {
                repo,
                what: self.what.to_owned(),
            },
            (Some(status), _) => WeightsError::HubStatus {
                repo,
                what: self.what.to_owned(),
                status,
            },
            (None, ApiError::LockAcquisition(path)) => {
                WeightsError::HubLocked { path: path.clone() }
            }
            (None, ApiError::IoError(source)) if is_local(source.kind()) => match error {
                ApiError::IoError(source) => WeightsError::HubDisk {
                    what: self.what.to_owned(),
                    path: self.options.cache_dir.clone(),
                    source,
                },
                error => self.unreachable(error),
            },
            (None, _) => self.unreachable(error),
        }
    }

    fn unreachable(&self, error: ApiError) -> WeightsError {
        WeightsError::HubUnreachable {
            endpoint: self.options.endpoint.clone(),
            repo: self.repo_id.to_owned(),
            what: self.what.to_owned(),
            source: Box::new(error),
        }
    }
}

fn status_of(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

/// Returns whether an I/O error is of this machine's disk rather than of the connection.
fn is_local(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::NotFound
            | ErrorKind::NotADirectory
            | ErrorKind::AlreadyExists
    )
}

/// Returns whether trying again can help.
fn may_pass(error: &ApiError) -> bool {
    if let Some(status) = status_of(error) {
        // 416: the part on disk was no beginning of the file and has been removed.
        return matches!(status, 408 | 416 | 429 | 500..);
    }
    match error {
        ApiError::IoError(error) => !is_local(error.kind()),
        ApiError::InvalidResume => true,
        ApiError::RequestError(error) => match &**error {
            ureq::Error::Io(error) => error.kind() != ErrorKind::ConnectionRefused,
            ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => true,
            _ => false,
        },
        _ => false,
    }
}

/// Shows a progress bar (on terminals) and counts the bytes that came over the network.
struct Meter<'a> {
    bar: ProgressBar,
    received: &'a Cell<u64>,
    /// hf-hub first reports the bytes that were on disk already.
    resumed: bool,
}

impl<'a> Meter<'a> {
    fn new(received: &'a Cell<u64>) -> Self {
        Self {
            bar: ProgressBar::new(0).with_finish(ProgressFinish::Abandon),
            received,
            resumed: false,
        }
    }
}

impl Progress for Meter<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.resumed = false;
        Progress::init(&mut self.bar, size, filename);
    }

    fn update(&mut self, size: usize) {
        if self.resumed {
            self.received.set(self.received.get() + size as u64);
        }
        self.resumed = true;
        Progress::update(&mut self.bar, size);
    }

    fn finish(&mut self) {
        Progress::finish(&mut self.bar);
    }
}
