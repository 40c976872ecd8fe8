//! Finds a model that is named rather than given: a local path, the Hugging Face cache, or the
//! hub, in this order. So are adapters found, see [`hub_adapter`](super::hub_adapter).
//!
//! The cache has the layout of `huggingface_hub`, so that models are shared with Python. A model
//! that is complete there is used without asking the hub.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use hf_hub::{Cache, Repo, RepoType};

use super::{
    WeightsError,
    checkpoint::has_extension,
    directory::{self, INDEX_FILE, SINGLE_FILE},
    download::Downloader,
    gguf_file,
};

/// Whether the hub may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// What is not in the cache is downloaded.
    Online,
    /// Only the cache is used.
    Offline,
}

/// Where models are looked for and kept.
#[derive(Clone)]
pub struct HubOptions {
    /// Base address of the hub, without a slash at the end.
    pub endpoint: String,
    /// The cache with the `models--owner--name` folders (`--download-dir`).
    pub cache_dir: PathBuf,
    /// Access token, for private and gated models.
    pub token: Option<String>,
    /// Branch, tag or commit; `main` if absent. A revision in the model's name wins.
    pub revision: Option<String>,
    /// Whether the hub may be asked.
    pub network: Network,
    /// Failures in a row after which a download is given up; it continues where it broke off.
    pub max_retries: u32,
    /// Pause before the first retry; doubles with each failure in a row.
    pub retry_delay: Duration,
}

impl HubOptions {
    /// Reads the settings of `huggingface_hub` with `var`, which looks up an environment
    /// variable: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN`, and the
    /// token file of `hf auth login`.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let is_set = |name| {
            var(name).is_some_and(|value| {
                matches!(
                    value.to_ascii_uppercase().as_str(),
                    "1" | "ON" | "YES" | "TRUE"
                )
            })
        };
        let home = var("HF_HOME").map_or_else(
            || {
                let user_cache = var("XDG_CACHE_HOME").map_or_else(
                    || PathBuf::from(var("HOME").unwrap_or_default()).join(".cache"),
                    PathBuf::from,
                );
                user_cache.join("huggingface")
            },
            PathBuf::from,
        );
        let token_path = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(token_path).ok());
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache_dir: var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: (token.as_deref().map(str::trim))
                .filter(|token| !token.is_empty())
                .map(str::to_owned),
            revision: None,
            network: if is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE") {
                Network::Offline
            } else {
                Network::Online
            },
            max_retries: 5,
            retry_delay: Duration::from_secs(1),
        }
    }
}

/// Returns the path of a model that [`Checkpoint::open`](super::Checkpoint::open) can open.
///
/// `spec` is a path, or a hub id `owner/name`, which may go on with `@revision` and, for one of
/// several GGUF files, `:file.gguf` or a part of its name such as `:Q4_K_M`. Downloads block the
/// thread and show progress bars when stderr is a terminal.
///
/// # Errors
/// [`WeightsError`]: neither path nor id, not cached while offline, refused by the hub, not
/// found there, no connection, disk full, nothing in the repository that infold can load.
pub fn resolve_model(spec: &str, options: &HubOptions) -> Result<PathBuf, WeightsError> {
    resolve(spec, options, complete_model, fetch_model)
}

/// Returns the path of what `spec` names: `complete` finds it in a snapshot of the cache, `fetch`
/// downloads it. Both are told the file that `spec` asks for.
pub(super) fn resolve(
    spec: &str,
    options: &HubOptions,
    complete: impl Fn(&Path, Option<&str>) -> Result<Option<PathBuf>, WeightsError>,
    fetch: impl Fn(&Downloader, Option<&str>) -> Result<PathBuf, WeightsError>,
) -> Result<PathBuf, WeightsError> {
    let path = Path::new(spec);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let id = HubId::parse(spec).ok_or_else(|| WeightsError::UnknownModel {
        spec: spec.to_owned(),
    })?;
    let revision = id.revision.or(options.revision.as_deref());
    let revision = revision.unwrap_or("main").to_owned();
    let repo = Repo::with_revision(id.repo.to_owned(), RepoType::Model, revision);
    let cache = Cache::new(options.cache_dir.clone());
    let wanted = id.file;
    if let Some(snapshot) = cached_snapshot(&cache, &repo)
        && let Some(found) = complete(&snapshot, wanted)?
    {
        return Ok(found);
    }
    if options.network == Network::Offline {
        return Err(WeightsError::NotCached {
            model: spec.to_owned(),
            cache: options.cache_dir.clone(),
        });
    }
    tracing::info!("{spec} is no path here: asking the hub for it");
    let downloader = Downloader::new(options, &cache, &repo)?;
    let found = fetch(&downloader, wanted)?;
    // Only now, so that the name never stands for a model that is half there.
    downloader.point_revision_here()?;
    Ok(found)
}

/// A hub id, taken apart.
#[derive(Debug, PartialEq)]
struct HubId<'a> {
    /// `owner/name`.
    repo: &'a str,
    revision: Option<&'a str>,
    file: Option<&'a str>,
}

impl<'a> HubId<'a> {
    fn parse(spec: &'a str) -> Option<Self> {
        let (rest, file) = match spec.split_once(':') {
            Some((rest, file)) => (rest, Some(file)),
            None => (spec, None),
        };
        let (repo, revision) = match rest.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (rest, None),
        };
        // Revision and file become parts of paths in the cache.
        let is_name = |name: &str| {
            stays_inside(name)
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        let (owner, name) = repo.split_once('/')?;
        let valid = is_name(owner)
            && is_name(name)
            && revision.is_none_or(stays_inside)
            && file.is_none_or(stays_inside);
        valid.then_some(Self {
            repo,
            revision,
            file,
        })
    }
}

/// Returns whether a path from outside leads to something below the folder it is joined to.
pub(super) fn stays_inside(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|component| matches!(component, Component::Normal(_)))
}

/// Returns the folder in the cache that holds the revision.
fn cached_snapshot(cache: &Cache, repo: &Repo) -> Option<PathBuf> {
    let folder = cache.path().join(repo.folder_name());
    let reference = std::fs::read_to_string(folder.join("refs").join(repo.revision()));
    // Python writes no reference for a revision that is a commit.
    let commit = reference.unwrap_or_else(|_| repo.revision().to_owned());
    let snapshot = folder.join("snapshots").join(commit.trim());
    snapshot.is_dir().then_some(snapshot)
}

/// Returns the model in a snapshot, or `None` if files of it are missing.
fn complete_model(snapshot: &Path, wanted: Option<&str>) -> Result<Option<PathBuf>, WeightsError> {
    let names = directory::file_names(snapshot)?;
    let has = |name: &str| snapshot.join(name).exists();
    if wanted.is_none()
        && names
            .iter()
            .any(|name| is_safetensors(name) || name == INDEX_FILE)
    {
        let weights_complete =
            has(SINGLE_FILE) || !has(INDEX_FILE) || directory::missing_shards(snapshot)?.is_empty();
        let tokenizer = ["tokenizer.json", "tokenizer.model", "vocab.json"];
        let complete = weights_complete && has("config.json") && tokenizer.into_iter().any(has);
        return Ok(complete.then(|| snapshot.to_owned()));
    }
    let files = match wanted {
        Some(file) if has_extension(Path::new(file), "gguf") => gguf_file::all_parts(file),
        // Which of several is meant is for the listing of the hub to say.
        _ => gguf_files(&names, wanted).unwrap_or_default(),
    };
    let complete = !files.is_empty() && files.iter().all(|name| has(name));
    Ok(complete.then(|| snapshot.join(&files[0])))
}

/// Downloads what is missing of a model and returns its folder or GGUF file; weights come last.
fn fetch_model(downloader: &Downloader, wanted: Option<&str>) -> Result<PathBuf, WeightsError> {
    let nothing = |reason| WeightsError::NothingToLoad {
        repo: downloader.repo_id().to_owned(),
        reason,
    };
    let names: Vec<String> = downloader.file_names().map(str::to_owned).collect();
    let has = |name: &str| names.iter().any(|found| found == name);
    let is_gguf = wanted.is_some() || !names.iter().any(|name| is_safetensors(name));
    if is_gguf {
        let files = gguf_files(&names, wanted).map_err(|files| WeightsError::WhichGguf {
            repo: downloader.repo_id().to_owned(),
            wanted: wanted.unwrap_or("any").to_owned(),
            files,
        })?;
        if files.is_empty() {
            return Err(nothing(if has("adapter_config.json") {
                "it is a LoRA adapter, give its base model"
            } else if names
                .iter()
                .any(|name| has_extension(Path::new(name), "bin"))
            {
                "its weights are pickled (.bin), infold loads safetensors and GGUF"
            } else {
                "it has neither safetensors nor GGUF files"
            }));
        }
        for file in &files {
            downloader.fetch(file)?;
        }
        return Ok(downloader.snapshot().join(&files[0]));
    }
    if !has("config.json") {
        return Err(nothing("it has no config.json"));
    }
    for name in names.iter().filter(|name| is_companion(name)) {
        downloader.fetch(name)?;
    }
    if has(SINGLE_FILE) {
        downloader.fetch(SINGLE_FILE)?;
    } else if has(INDEX_FILE) {
        downloader.fetch(INDEX_FILE)?;
        for shard in directory::missing_shards(&downloader.snapshot())? {
            downloader.fetch(&shard)?;
        }
    } else {
        for name in names.iter().filter(|name| is_safetensors(name)) {
            downloader.fetch(name)?;
        }
    }
    Ok(downloader.snapshot())
}

/// Returns whether a file holds weights of the model in a form that [`directory`] opens.
fn is_safetensors(name: &str) -> bool {
    directory::is_shard(name) && !name.contains('/')
}

/// Returns whether a file belongs to the configuration or the tokenizer.
pub(super) fn is_companion(name: &str) -> bool {
    const NAMES: [&str; 8] = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "vocab.json",
        "merges.txt",
    ];
    let is_tokenizer = name.starts_with("tokenizer")
        && !name.contains('/')
        && (name.ends_with(".json") || name.ends_with(".model"));
    is_tokenizer || NAMES.contains(&name)
}

/// Returns the GGUF file that is meant, all parts of it if it is split; nothing if there is none
/// at all, and all candidates as the error if it is not clear.
fn gguf_files(names: &[String], wanted: Option<&str>) -> Result<Vec<String>, Vec<String>> {
    let matches = |name: &str| match wanted {
        None => true,
        Some(wanted) => {
            name == wanted
                || (!has_extension(Path::new(wanted), "gguf")
                    && name
                        .to_ascii_lowercase()
                        .contains(&wanted.to_ascii_lowercase()))
        }
    };
    // By the first part: one entry for each model.
    let mut models: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let all = || {
        names
            .iter()
            .filter(|name| has_extension(Path::new(name), "gguf"))
    };
    for name in all() {
        let parts = gguf_file::all_parts(name);
        if parts.iter().any(|part| matches(part)) {
            models.insert(parts[0].clone(), parts);
        }
    }
    match models.len() {
        1 => Ok(models.into_values().next().unwrap_or_default()),
        0 if all().next().is_none() => Ok(Vec::new()),
        _ => Err(all().cloned().collect()),
    }
}
