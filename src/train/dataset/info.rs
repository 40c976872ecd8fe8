//! `dataset_info.json`: what a data set is called, where its rows are, and what its columns mean.
//!
//! The format is LLaMA-Factory's. A name that is no key of the file but a path of one is taken as
//! a data set of its own, whose columns are told from its first row.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::text::likely;

use super::DataError;
use super::encoding::decode_utf8;

/// How rows spell conversations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Formatting {
    /// Instruction, input, output, and history as pairs.
    Alpaca,
    /// A list of turns whose roles alternate.
    Sharegpt,
    /// Messages as in OpenAI's chat API, with `tool_calls`.
    Openai,
}

/// The column of each part of a row; absent parts are not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Columns {
    /// The request.
    pub(super) prompt: Option<String>,
    /// What the request is about, put below it.
    pub(super) query: Option<String>,
    /// The answer.
    pub(super) response: Option<String>,
    /// Earlier turns, as pairs.
    pub(super) history: Option<String>,
    /// The turns.
    pub(super) messages: Option<String>,
    /// The system prompt.
    pub(super) system: Option<String>,
    /// Descriptions of tools.
    pub(super) tools: Option<String>,
    /// Images, videos and audio, none of which are learned from.
    pub(super) media: Vec<String>,
}

/// The keys of a turn and the names of the roles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tags {
    /// The key of the role.
    pub(super) role: String,
    /// The key of the text.
    pub(super) content: String,
    /// The person.
    pub(super) user: String,
    /// The model.
    pub(super) assistant: String,
    /// The result of a tool.
    pub(super) observation: String,
    /// The call of a tool.
    pub(super) function: String,
    /// The system prompt, as a first turn; absent when no turn is one.
    pub(super) system: Option<String>,
}

/// One data set, described.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DatasetSpec {
    /// Its name.
    pub(super) name: String,
    /// The file or directory of its rows.
    pub(super) path: PathBuf,
    /// How rows spell conversations.
    pub(super) formatting: Formatting,
    /// Where the parts are.
    pub(super) columns: Columns,
    /// How turns are written.
    pub(super) tags: Tags,
    /// Rows to draw at random; absent means all, in order.
    pub(super) num_samples: Option<usize>,
    /// Whether the columns were guessed, because a file was named instead of a data set.
    pub(super) guessed: bool,
}

const KNOWN_KEYS: &[&str] = &[
    "file_name",
    "formatting",
    "ranking",
    "columns",
    "tags",
    "num_samples",
    "split",
    "subset",
    "folder",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
];
const REMOTE_KEYS: &[&str] = &[
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
];
const COLUMN_KEYS: &[&str] = &[
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos",
    "audios", "chosen", "rejected", "kto_tag",
];
const TAG_KEYS: &[&str] = &[
    "role_tag",
    "content_tag",
    "user_tag",
    "assistant_tag",
    "observation_tag",
    "function_tag",
    "system_tag",
];

impl Formatting {
    /// Returns its name in `dataset_info.json`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
            Self::Openai => "openai",
        }
    }

    /// Returns the columns of a data set that names none.
    pub(super) fn default_columns(self) -> Columns {
        let some = |name: &str| Some(name.to_owned());
        let messages = match self {
            Self::Openai => "messages",
            Self::Alpaca | Self::Sharegpt => "conversations",
        };
        Columns {
            prompt: some("instruction"),
            query: some("input"),
            response: some("output"),
            history: None,
            messages: some(messages),
            system: None,
            tools: None,
            media: Vec::new(),
        }
    }

    /// Returns the tags of a data set that names none.
    pub(super) fn default_tags(self) -> Tags {
        let [role, content, user, assistant, observation, function] = match self {
            Self::Openai => ["role", "content", "user", "assistant", "tool", "function"],
            Self::Alpaca | Self::Sharegpt => [
                "from",
                "value",
                "human",
                "gpt",
                "observation",
                "function_call",
            ],
        }
        .map(str::to_owned);
        Tags {
            role,
            content,
            user,
            assistant,
            observation,
            function,
            system: Some("system".to_owned()),
        }
    }
}

/// Finds the data sets called `names` in `dataset_dir`, in order.
///
/// # Errors
/// [`DataError`] when `dataset_info.json` is absent or not JSON, has no such key, or describes
/// something that is not read.
pub(super) fn find_datasets(
    names: &[String],
    dataset_dir: &Path,
) -> Result<Vec<DatasetSpec>, DataError> {
    let mut info = None;
    let mut specs = Vec::with_capacity(names.len());
    for name in names {
        let file = direct_file(name, dataset_dir);
        if let Some(path) = &file
            && looks_like_path(name)
        {
            specs.push(bare_file(name, path));
            continue;
        }
        let info = match &info {
            Some(info) => info,
            None => match Info::read(dataset_dir) {
                Ok(read) => info.insert(read),
                // Who names a file needs no dataset_info.json.
                Err(DataError::OpenInfo { .. }) if looks_like_path(name) => {
                    return Err(file_not_found(name));
                }
                Err(error) => return Err(error),
            },
        };
        match (info.entries.get(name), file) {
            (Some(entry), _) => specs.push(info.spec(name, entry, dataset_dir)?),
            (None, Some(path)) => specs.push(bare_file(name, &path)),
            (None, None) if looks_like_path(name) => {
                return Err(file_not_found(name));
            }
            (None, None) => return Err(info.undefined(name)),
        }
    }
    Ok(specs)
}

fn file_not_found(name: &str) -> DataError {
    DataError::FileNotFound {
        name: name.to_owned(),
        path: absolute(Path::new(name)),
    }
}

fn looks_like_path(name: &str) -> bool {
    name.contains('/') || Path::new(name).extension().is_some()
}

/// Returns the file that a name is the path of, from here or from `dataset_dir`.
fn direct_file(name: &str, dataset_dir: &Path) -> Option<PathBuf> {
    [PathBuf::from(name), dataset_dir.join(name)]
        .into_iter()
        .find(|path| path.is_file() || (name.contains('/') && path.is_dir()))
}

fn bare_file(name: &str, path: &Path) -> DatasetSpec {
    DatasetSpec {
        name: name.to_owned(),
        path: path.to_owned(),
        formatting: Formatting::Alpaca,
        columns: Formatting::Alpaca.default_columns(),
        tags: Formatting::Alpaca.default_tags(),
        num_samples: None,
        guessed: true,
    }
}

pub(super) fn absolute(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    // `a/./b` would be printed as it was typed.
    absolute.components().collect()
}

/// A parsed `dataset_info.json`.
struct Info {
    path: PathBuf,
    entries: BTreeMap<String, Value>,
}

impl Info {
    fn read(dataset_dir: &Path) -> Result<Self, DataError> {
        let path = absolute(&dataset_dir.join("dataset_info.json"));
        let bytes = fs::read(&path).map_err(|source| DataError::OpenInfo {
            path: path.clone(),
            source,
        })?;
        match serde_json::from_str(&decode_utf8(&path, bytes)?) {
            Ok(entries) => Ok(Self { path, entries }),
            Err(source) => Err(DataError::InfoJson { path, source }),
        }
    }

    fn undefined(&self, name: &str) -> DataError {
        let keys: Vec<&str> = self.entries.keys().map(String::as_str).collect();
        let suggestion = likely(name, keys.iter().copied())
            .map(|near| format!("did you mean \"{near}\"? Or "))
            .unwrap_or_default();
        DataError::Undefined {
            name: name.to_owned(),
            path: self.path.clone(),
            keys: if keys.is_empty() {
                "no data set".to_owned()
            } else {
                keys.join(", ")
            },
            suggestion,
        }
    }

    fn wrong(&self, name: &str, what: String) -> DataError {
        DataError::InfoEntry {
            path: self.path.clone(),
            name: name.to_owned(),
            what,
        }
    }

    fn spec(
        &self,
        name: &str,
        entry: &Value,
        dataset_dir: &Path,
    ) -> Result<DatasetSpec, DataError> {
        let wrong = |what: String| self.wrong(name, what);
        let entry = entry
            .as_object()
            .ok_or_else(|| wrong(format!("an object is wanted, found {entry}")))?;
        check_keys(entry, KNOWN_KEYS, "").map_err(wrong)?;
        let Some(file_name) = text(entry, "file_name").map_err(wrong)? else {
            let remote = REMOTE_KEYS.iter().find(|key| entry.contains_key(**key));
            return Err(wrong(match remote {
                Some(key) => format!(
                    "it is downloaded by `{key}`, which is not built; download the file and \
                     set `file_name`"
                ),
                None => "`file_name` is missing".to_owned(),
            }));
        };
        let formatting = formatting(entry).map_err(wrong)?;
        let columns = object(entry, "columns").map_err(wrong)?;
        check_stage(name, entry, columns)?;
        let columns = match columns {
            Some(columns) => named_columns(columns).map_err(wrong)?,
            None => formatting.default_columns(),
        };
        let tags = match object(entry, "tags").map_err(wrong)? {
            Some(tags) => named_tags(tags, formatting).map_err(wrong)?,
            None => formatting.default_tags(),
        };
        let num_samples = match entry.get("num_samples") {
            None | Some(Value::Null) => None,
            Some(value) => Some(value.as_u64().filter(|&n| n > 0).ok_or_else(|| {
                wrong(format!(
                    "`num_samples` must be a positive number, found {value}"
                ))
            })? as usize),
        };
        Ok(DatasetSpec {
            name: name.to_owned(),
            path: dataset_dir.join(file_name),
            formatting,
            columns,
            tags,
            num_samples,
            guessed: false,
        })
    }
}

fn formatting(entry: &Map<String, Value>) -> Result<Formatting, String> {
    match text(entry, "formatting")? {
        None | Some("alpaca") => Ok(Formatting::Alpaca),
        Some("sharegpt") => Ok(Formatting::Sharegpt),
        Some("openai") => Ok(Formatting::Openai),
        Some(other) => Err(format!(
            "`formatting` must be alpaca, sharegpt or openai, found \"{other}\""
        )),
    }
}

fn check_stage(
    name: &str,
    entry: &Map<String, Value>,
    columns: Option<&Map<String, Value>>,
) -> Result<(), DataError> {
    let has = |key: &str| columns.is_some_and(|columns| columns.contains_key(key));
    let kind = if entry.get("ranking").and_then(Value::as_bool) == Some(true) {
        "ranking (preference)"
    } else if has("kto_tag") {
        "KTO"
    } else {
        return Ok(());
    };
    Err(DataError::WrongStage {
        name: name.to_owned(),
        kind,
    })
}

/// Columns as named; what is not named is not read, as in LLaMA-Factory.
fn named_columns(columns: &Map<String, Value>) -> Result<Columns, String> {
    check_keys(columns, COLUMN_KEYS, "columns.")?;
    let column = |key: &str| text(columns, key).map(|name| name.map(str::to_owned));
    let media = ["images", "videos", "audios"]
        .into_iter()
        .filter_map(|key| column(key).transpose())
        .collect::<Result<_, _>>()?;
    Ok(Columns {
        prompt: column("prompt")?,
        query: column("query")?,
        response: column("response")?,
        history: column("history")?,
        messages: column("messages")?,
        system: column("system")?,
        tools: column("tools")?,
        media,
    })
}

/// Tags as named; LLaMA-Factory reads none that are not, which could never work, so those keep
/// their defaults here.
fn named_tags(tags: &Map<String, Value>, formatting: Formatting) -> Result<Tags, String> {
    check_keys(tags, TAG_KEYS, "tags.")?;
    let defaults = formatting.default_tags();
    let tag = |key: &str, default: String| {
        text(tags, key).map(|name| name.map_or(default, str::to_owned))
    };
    Ok(Tags {
        role: tag("role_tag", defaults.role)?,
        content: tag("content_tag", defaults.content)?,
        user: tag("user_tag", defaults.user)?,
        assistant: tag("assistant_tag", defaults.assistant)?,
        observation: tag("observation_tag", defaults.observation)?,
        function: tag("function_tag", defaults.function)?,
        system: text(tags, "system_tag")?.map(str::to_owned),
    })
}

fn text<'a>(entry: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, String> {
    match entry.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(format!("`{key}` must be a string, found {other}")),
    }
}

fn object<'a>(
    entry: &'a Map<String, Value>,
    key: &str,
) -> Result<Option<&'a Map<String, Value>>, String> {
    match entry.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(other) => Err(format!("`{key}` must be an object, found {other}")),
    }
}

fn check_keys(entry: &Map<String, Value>, known: &[&str], prefix: &str) -> Result<(), String> {
    match entry.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(match likely(key, known.iter().copied()) {
            Some(near) => format!("unknown key `{prefix}{key}`; did you mean `{near}`?"),
            None => format!(
                "unknown key `{prefix}{key}`; there are {}",
                known.join(", ")
            ),
        }),
    }
}
