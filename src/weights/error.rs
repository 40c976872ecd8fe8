//! The one error type of `weights`: which file, which tensor, what was expected and found.

use std::{io, path::PathBuf};

use super::AdapterFaults;

/// Everything that can be wrong with a checkpoint or with fetching one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file could not be opened, read or mapped.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A JSON file (configuration, index or safetensors header) does not parse.
    #[error("{} is not valid JSON of its kind", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A directory lacks something a checkpoint needs.
    #[error("{} is not a model directory: {missing}", path.display())]
    NotACheckpoint {
        /// The directory.
        path: PathBuf,
        /// What is missing and what to do about it.
        missing: &'static str,
    },
    /// A directory holds a PEFT adapter and no base model.
    #[error(
        "{} holds a LoRA adapter for {base_model}, not a whole model: give the base model, \
         or a checkpoint into which the adapter was merged (PEFT: `merge_and_unload`)", path.display()
    )]
    AdapterOnly {
        /// The directory.
        path: PathBuf,
        /// `base_model_name_or_path` of its `adapter_config.json`.
        base_model: String,
    },
    /// A directory does not hold a LoRA adapter that can be read.
    #[error("{} is not a LoRA adapter: {problem}", path.display())]
    NotAnAdapter {
        /// The directory.
        path: PathBuf,
        /// What is missing and what to do about it.
        problem: String,
    },
    /// Adapters do not fit a base.
    #[error(transparent)]
    AdapterFaults(#[from] AdapterFaults),
    /// A base into which no adapter can be folded.
    #[error("{} cannot take adapters: {reason}", path.display())]
    NotABase {
        /// The checkpoint.
        path: PathBuf,
        /// Why, and what to do about it.
        reason: String,
    },
    /// A merged weight is no number, or too large for its dtype.
    #[error(
        "{tensor}: a merged weight is NaN or too large for {dtype} (choose --dtype bfloat16 or \
         float32; if that fails too, the adapter or the base is damaged)"
    )]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The dtype of the output.
        dtype: String,
    },
    /// Quantised blocks that do not make the tensor that the header describes.
    #[error("{tensor}: its quantised blocks cannot be widened")]
    Dequantize {
        /// The tensor.
        tensor: String,
        /// What does not fit.
        source: Box<candle_core::Error>,
    },
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Disk full, no permission, ….
        source: io::Error,
    },
    /// A directory holds several GGUF files that are not the parts of one.
    #[error("{} holds several GGUF files ({}): name one of them", path.display(), files.join(", "))]
    SeveralGguf {
        /// The directory.
        path: PathBuf,
        /// The file names.
        files: Vec<String>,
    },
    /// The length that a safetensors file states for its header does not fit in the file.
    #[error(
        "{} is truncated or not safetensors: its header says {header_bytes} bytes, \
         the file has {file_bytes}", path.display()
    )]
    HeaderTooLong {
        /// The file.
        path: PathBuf,
        /// Header length as stated.
        header_bytes: u64,
        /// Size of the whole file.
        file_bytes: u64,
    },
    /// A tensor's bytes lie (partly) behind the end of the file.
    #[error(
        "{} is truncated: tensor {tensor} ends at byte {expected_bytes}, \
         the file has {found_bytes} bytes", path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The size that the file must have at least.
        expected_bytes: u64,
        /// The size that it has.
        found_bytes: u64,
    },
    /// A tensor's shape and dtype need another number of bytes than its offsets span.
    #[error(
        "{}: tensor {tensor} of {dtype} {shape:?} needs {expected_bytes} bytes, \
         its offsets span {found_bytes}", path.display()
    )]
    TensorSize {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype as the file spells it.
        dtype: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes by shape and dtype.
        expected_bytes: u64,
        /// Bytes between its offsets.
        found_bytes: u64,
    },
    /// A tensor does not begin where the one before it ends.
    #[error(
        "{}: tensor {tensor} begins at data offset {found}, the tensors before it end at \
         {expected} (tensors must neither overlap nor leave gaps)", path.display()
    )]
    TensorOffset {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where the tensors before it end.
        expected: u64,
        /// Where it begins.
        found: u64,
    },
    /// A file is longer than its tensors.
    #[error(
        "{} has {found_bytes} bytes, its tensors end at byte {expected_bytes}", path.display()
    )]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Where the last tensor ends.
        expected_bytes: u64,
        /// The size of the file.
        found_bytes: u64,
    },
    /// Two tensors have one name.
    #[error("tensor {tensor} is both in {} and in {}", first.display(), second.display())]
    DuplicateTensor {
        /// The name.
        tensor: String,
        /// The file that was read first.
        first: PathBuf,
        /// The file that repeats it (may be the same).
        second: PathBuf,
    },
    /// An index names a shard that is not there.
    #[error(
        "{} puts tensor {tensor} into {shard:?}, which is missing: the download is incomplete",
        index.display()
    )]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// A tensor that the shard should hold.
        tensor: String,
        /// The file name as the index spells it.
        shard: String,
    },
    /// An index names a tensor that its shard does not hold.
    #[error("{} puts tensor {tensor} into {shard:?}, which does not hold it", index.display())]
    NotInShard {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file name.
        shard: String,
    },
    /// A GGUF file breaks the format.
    #[error("{} is not a valid GGUF file: {reason} (byte {offset})", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes.
        offset: u64,
        /// What was wanted and what was got.
        reason: String,
    },
    /// GGUF metadata lacks a key or has it with another type.
    #[error("{}: metadata key {key} {reason}", path.display())]
    GgufMetadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A GGUF file holds a model of another family.
    #[error(
        "{} holds a model of architecture {architecture:?}, supported are llama, qwen2 and qwen3",
        path.display()
    )]
    Architecture {
        /// The file.
        path: PathBuf,
        /// `general.architecture`.
        architecture: String,
    },
    /// The checkpoint has no such tensor.
    #[error("{} has no tensor {tensor}", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// A tensor is stored in a type that infold does not read.
    #[error(
        "{}: tensor {tensor} is stored as {dtype}, supported are {supported}", path.display()
    )]
    UnsupportedDtype {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type as the format spells it.
        dtype: String,
        /// The types that can be read from this format.
        supported: &'static str,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("tensor {tensor} has shape {found:?}, the configuration asks for {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// By the configuration.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },
    /// A shard asks for something outside the tensor.
    #[error("tensor {tensor} of shape {shape:?} has no range {start}..{end} in dimension {dim}")]
    OutOfRange {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The dimension.
        dim: usize,
        /// First element wanted.
        start: usize,
        /// One past the last element wanted.
        end: usize,
    },
    /// A dimension cannot be cut evenly into so many shards.
    #[error("tensor {tensor}: dimension {dim} of {size} cannot be cut into {world_size} shards")]
    UnevenShard {
        /// The tensor.
        tensor: String,
        /// The dimension.
        dim: usize,
        /// Its size.
        size: usize,
        /// Number of shards.
        world_size: usize,
    },
    /// A cut through the columns of a quantised tensor would split a block.
    #[error(
        "tensor {tensor} is quantised as {dtype} in blocks of {block_size}: columns \
         {start}..{end} would split a block (choose another --tensor-parallel-size)"
    )]
    SplitBlock {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
        /// Weights in a block.
        block_size: usize,
        /// First column wanted.
        start: usize,
        /// One past the last column wanted.
        end: usize,
    },
    /// A tensor holds a value that the type to be written cannot express.
    #[error(
        "tensor {tensor} holds {value}, which cannot be stored as {dtype} ({limit}): the weights \
         are damaged, or need a file of a wider type"
    )]
    Unrepresentable {
        /// The tensor, by its name in the file that is written.
        tensor: String,
        /// The value.
        value: f32,
        /// The type.
        dtype: String,
        /// What the type can hold.
        limit: &'static str,
    },
    /// A tensor that is to be encoded in another type is not stored as plain numbers.
    #[error(
        "tensor {tensor} is stored as {dtype}; only F32, F16 and BF16 can be converted: give the \
         unquantised model"
    )]
    NotFloat {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// Rows that do not divide into the blocks of a type were to be stored in it.
    #[error("tensor {tensor}: rows of {columns} do not divide into {dtype} blocks of {block_size}")]
    UnevenBlocks {
        /// The tensor.
        tensor: String,
        /// Elements of a row.
        columns: usize,
        /// The type.
        dtype: String,
        /// Elements of a block.
        block_size: usize,
    },
    /// A GGUF file was given other tensor data than was announced in its header.
    #[error("{}: {reason}", path.display())]
    GgufData {
        /// The file.
        path: PathBuf,
        /// What was announced and what came.
        reason: String,
    },
    /// A model is neither a path nor a hub id.
    #[error("there is no file or directory {spec:?}, and it is not a hub id (owner/name)")]
    UnknownModel {
        /// What was given.
        spec: String,
    },
    /// A hub model is not in the cache and the hub may not be asked.
    #[error(
        "{model} is not (completely) in the cache {}, and HF_HUB_OFFLINE forbids to download it",
        cache.display()
    )]
    NotCached {
        /// What was given.
        model: String,
        /// The cache that was searched.
        cache: PathBuf,
    },
    /// A repository has nothing that infold can load.
    #[error("{repo} cannot be loaded: {reason}")]
    NothingToLoad {
        /// `owner/name`.
        repo: String,
        /// Why.
        reason: &'static str,
    },
    /// A repository has several GGUF files and it is not clear which one is meant.
    #[error("{repo} does not have one GGUF file {wanted:?}: add \":FILE\", one of {}", files.join(", "))]
    WhichGguf {
        /// `owner/name`.
        repo: String,
        /// The file or part of a name that was asked for.
        wanted: String,
        /// The files there are.
        files: Vec<String>,
    },
    /// The hub refuses access.
    #[error("the hub refuses access to {repo} (status {status}): {advice}")]
    HubDenied {
        /// `owner/name`.
        repo: String,
        /// HTTP status.
        status: u16,
        /// What to do.
        advice: &'static str,
    },
    /// The hub does not have what was asked for.
    #[error("the hub does not have {repo} at this revision, or not {what}")]
    HubNotFound {
        /// `owner/name`.
        repo: String,
        /// The file.
        what: String,
    },
    /// The hub answered with another error.
    #[error("the hub answered with status {status} when asked for {what} of {repo}")]
    HubStatus {
        /// `owner/name`.
        repo: String,
        /// The file.
        what: String,
        /// HTTP status.
        status: u16,
    },
    /// The hub could not be reached, or the transfer kept breaking off.
    #[error(
        "{repo} is no path here, and {what} cannot be had from the hub at {endpoint} (HF_ENDPOINT \
         names a mirror)"
    )]
    HubUnreachable {
        /// Address of the hub.
        endpoint: String,
        /// `owner/name`.
        repo: String,
        /// The file.
        what: String,
        /// What went wrong last.
        source: Box<hf_hub::api::sync::ApiError>,
    },
    /// A download could not be written.
    #[error("cannot store {what} below {} (--download-dir, HF_HOME)", path.display())]
    HubDisk {
        /// The file.
        what: String,
        /// The cache.
        path: PathBuf,
        /// Disk full, no permission, …
        source: io::Error,
    },
    /// Another process is downloading the same file.
    #[error("another process is downloading this model, its lock is {}", path.display())]
    HubLocked {
        /// The lock file.
        path: PathBuf,
    },
}

impl WeightsError {
    /// Returns whether the user can mend this (another path, file, flag or token), as opposed to
    /// a failure of the machine or of the hub.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ),
            Self::HubStatus { .. }
            | Self::HubUnreachable { .. }
            | Self::HubDisk { .. }
            | Self::GgufData { .. }
            | Self::Write { .. } => false,
            _ => true,
        }
    }
}
