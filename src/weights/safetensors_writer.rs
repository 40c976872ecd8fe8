//! Writes the files of a [`ShardPlan`] in one pass, a few megabytes at a time.
//!
//! Three stages work at once: one fills buffers (reading and folding, on all cores), one writes
//! them past the page cache, one hashes them. The same few buffers go round; a tensor or a file
//! is never in memory.

use std::{
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread,
};

use sha2::{Digest, Sha256};

use super::{
    PlannedShard, ShardPlan, TensorInfo, TensorSource, WeightsError,
    direct_file::{ALIGNMENT, AlignedBuffer, DirectFile},
};

/// Bytes of a buffer; a row larger than this makes all buffers larger.
const BUFFER_BYTES: u64 = 8 << 20;

/// One is filled, one written, one hashed, and one is ready for whoever is first.
const NUM_BUFFERS: usize = 4;

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// Its name in the directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, in hexadecimal.
    pub sha256: String,
}

/// What goes from the stage that fills buffers to the others.
#[derive(Clone)]
enum Piece {
    /// The next file begins.
    Begin { name: String },
    /// Its next bytes.
    Data(Arc<Lent>),
    /// The file is complete.
    End,
}

/// A buffer that goes back when the last stage drops it.
struct Lent {
    /// There until then.
    buffer: Option<AlignedBuffer>,
    home: Sender<AlignedBuffer>,
}

impl Lent {
    fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], AlignedBuffer::filled)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(mut buffer) = self.buffer.take() {
            buffer.clear();
            // Nobody takes it any more when the work is over.
            let _ = self.home.send(buffer);
        }
    }
}

/// Writes all files of `plan` into the directory `dir`, with the tensors of `source`.
///
/// Every file is on the disk when this returns. `on_bytes` hears of every block written. The
/// files are not renamed into place: a caller that must not leave half a model writes into a
/// directory of its own.
///
/// # Errors
/// [`WeightsError::Write`] naming the file, or what `source` returns; the remaining files are
/// not begun.
pub fn write_shards(
    plan: &ShardPlan,
    source: &dyn TensorSource,
    dir: &Path,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<Vec<WrittenFile>, WeightsError> {
    thread::scope(|scope| {
        let (to_write, write_receiver) = sync_channel(NUM_BUFFERS);
        let (to_hash, hash_receiver) = sync_channel(NUM_BUFFERS);
        let filler = Filler::new(plan, [to_write, to_hash]);
        let filling = scope.spawn(move || beside_hashing(|| filler.fill(plan, source)));
        let hashing = scope.spawn(move || hash_pieces(&hash_receiver));
        let written = write_pieces(dir, write_receiver, on_bytes);
        let filled = filling
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let hashes = hashing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // A source that failed also ends the writer, so its error is the one to tell.
        filled?;
        let files = written?;
        Ok((files.into_iter().zip(hashes))
            .map(|((name, bytes), sha256)| WrittenFile {
                name,
                bytes,
                sha256,
            })
            .collect())
    })
}

/// Runs a stage on all cores but one: the hash of a file is one chain, which is the last to be
/// done if it has to share its core.
fn beside_hashing<T: Send>(stage: impl FnOnce() -> T + Send) -> T {
    let num_threads = rayon::current_num_threads().saturating_sub(1).max(1);
    match (rayon::ThreadPoolBuilder::new().num_threads(num_threads)).build() {
        Ok(pool) => pool.install(stage),
        // No more threads to be had: those of the program do it too.
        Err(_) => stage(),
    }
}

/// Why no more buffers are filled.
enum Stop {
    /// Because of an error that the writer tells itself.
    WriterGone,
    Source(WeightsError),
}

impl From<WeightsError> for Stop {
    fn from(error: WeightsError) -> Self {
        Self::Source(error)
    }
}

/// The stage that fills buffers.
struct Filler {
    /// The writer and the hasher.
    stages: [SyncSender<Piece>; 2],
    current: AlignedBuffer,
    /// Where buffers come back.
    empty: Receiver<AlignedBuffer>,
    home: Sender<AlignedBuffer>,
}

impl Filler {
    fn new(plan: &ShardPlan, stages: [SyncSender<Piece>; 2]) -> Self {
        let tensors = plan.shards.iter().flat_map(|shard| &shard.tensors);
        let row_bytes = tensors.map(|tensor| rows_of(tensor).1).max().unwrap_or(0);
        // No buffer is larger than what there is to write; beside a row, it holds what the one
        // before could not.
        let size = row_bytes.max(BUFFER_BYTES.min(plan.file_bytes()) as usize);
        let capacity = size.next_multiple_of(ALIGNMENT) + ALIGNMENT;
        let (home, empty) = channel();
        for _ in 1..NUM_BUFFERS {
            // The receiver is there.
            let _ = home.send(AlignedBuffer::new(capacity));
        }
        Self {
            stages,
            current: AlignedBuffer::new(capacity),
            empty,
            home,
        }
    }

    /// Makes every file. Ends early when nobody writes them any more.
    fn fill(mut self, plan: &ShardPlan, source: &dyn TensorSource) -> Result<(), WeightsError> {
        let result = (plan.shards.iter()).try_for_each(|shard| self.fill_shard(shard, source));
        match result {
            Err(Stop::Source(error)) => Err(error),
            Err(Stop::WriterGone) | Ok(()) => Ok(()),
        }
    }

    fn fill_shard(&mut self, shard: &PlannedShard, source: &dyn TensorSource) -> Result<(), Stop> {
        let name = shard.file_name.clone();
        self.send(&Piece::Begin { name })?;
        let header = shard.header();
        let mut rest = &header[..];
        while !rest.is_empty() {
            if self.current.free() == 0 {
                self.pass_on()?;
            }
            let (now, later) = rest.split_at(rest.len().min(self.current.free()));
            self.current.grow(now.len()).copy_from_slice(now);
            rest = later;
        }
        for tensor in &shard.tensors {
            let (num_rows, row_bytes) = rows_of(tensor);
            let mut start = 0;
            while start < num_rows {
                if self.current.free() < row_bytes {
                    self.pass_on()?;
                }
                let room = (self.current.free() / row_bytes.max(1)).max(1);
                let end = num_rows.min(start + room);
                let bytes = self.current.grow((end - start) * row_bytes);
                source.read_rows(&tensor.name, start..end, bytes)?;
                start = end;
            }
        }
        self.finish_file()
    }

    /// Sends the buffer on, and goes on in another with what it cannot take.
    fn pass_on(&mut self) -> Result<(), Stop> {
        // Buffers always come back: this stage holds a sender itself.
        let mut next = self.empty.recv().map_err(|_| Stop::WriterGone)?;
        self.current.carry_rest(&mut next);
        self.send_buffer(next)
    }

    /// Sends the last buffer of a file.
    fn finish_file(&mut self) -> Result<(), Stop> {
        let next = self.empty.recv().map_err(|_| Stop::WriterGone)?;
        self.send_buffer(next)?;
        self.send(&Piece::End)
    }

    fn send_buffer(&mut self, next: AlignedBuffer) -> Result<(), Stop> {
        let full = std::mem::replace(&mut self.current, next);
        self.send(&Piece::Data(Arc::new(Lent {
            buffer: Some(full),
            home: self.home.clone(),
        })))
    }

    fn send(&self, piece: &Piece) -> Result<(), Stop> {
        for stage in &self.stages {
            stage.send(piece.clone()).map_err(|_| Stop::WriterGone)?;
        }
        Ok(())
    }
}

/// Returns the number of rows of a tensor (of a vector, elements) and the bytes of each.
fn rows_of(tensor: &TensorInfo) -> (usize, usize) {
    let num_rows = tensor.shape.first().copied().unwrap_or(1);
    (num_rows, tensor.size_bytes() as usize / num_rows.max(1))
}

/// Writes pieces until there are no more; returns name and size of each file.
fn write_pieces(
    dir: &Path,
    pieces: Receiver<Piece>,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<Vec<(String, u64)>, WeightsError> {
    let mut files = Vec::new();
    thread::scope(|scope| {
        let mut syncing = Vec::new();
        let mut current = None;
        for piece in pieces {
            match piece {
                Piece::Begin { name } => {
                    current = Some((DirectFile::create_new(dir.join(&name))?, name));
                }
                Piece::Data(buffer) => {
                    if let (Some((file, _)), Some(buffer)) = (&mut current, &buffer.buffer) {
                        file.write(buffer)?;
                    }
                    on_bytes(buffer.bytes().len() as u64);
                }
                Piece::End => {
                    if let Some((file, name)) = current.take() {
                        files.push((name, file.written()));
                        // The disk may take its time while the next file is made.
                        syncing.push(scope.spawn(move || file.sync()));
                    }
                }
            }
        }
        for sync in syncing {
            sync.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok::<(), WeightsError>(())
    })?;
    Ok(files)
}

/// Returns the SHA-256 of each file.
fn hash_pieces(pieces: &Receiver<Piece>) -> Vec<String> {
    let mut hashes = Vec::new();
    let mut hasher = Sha256::new();
    for piece in pieces {
        match piece {
            Piece::Begin { .. } => {}
            Piece::Data(buffer) => hasher.update(buffer.bytes()),
            Piece::End => hashes.push(hex(&hasher.finalize_reset())),
        }
    }
    hashes
}

/// Returns bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;

    use super::*;
    use crate::weights::StoredTensor;

    /// Tensors whose bytes count up; one of them can fail.
    struct Counting {
        tensors: Vec<TensorInfo>,
        broken: Option<&'static str>,
    }

    impl Counting {
        fn new(shapes: &[&[usize]]) -> Self {
            let tensors = shapes.iter().enumerate().map(|(i, shape)| TensorInfo {
                name: format!("t{i}"),
                dtype: GgmlDType::BF16,
                shape: shape.to_vec(),
            });
            Self {
                tensors: tensors.collect(),
                broken: None,
            }
        }

        fn bytes(tensor: &TensorInfo) -> Vec<u8> {
            (0..tensor.size_bytes()).map(|i| (i % 251) as u8).collect()
        }
    }

    impl TensorSource for Counting {
        fn tensors(&self) -> Result<Vec<TensorInfo>, WeightsError> {
            Ok(self.tensors.clone())
        }

        fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
            let tensor = self
                .tensors
                .iter()
                .find(|tensor| tensor.name == name)
                .unwrap();
            if self.broken == Some(name) {
                return Err(WeightsError::NotFinite {
                    tensor: name.to_owned(),
                    dtype: "F16".to_owned(),
                });
            }
            Ok(StoredTensor {
                name: name.to_owned(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                data: Self::bytes(tensor).into(),
            })
        }
    }

    #[test]
    fn files_hold_header_and_tensors_and_are_hashed() {
        let dir = tempfile::tempdir().unwrap();
        // The middle one is more than two blocks.
        let source = Counting::new(&[&[3], &[5000, 2000], &[7, 2]]);
        let plan = ShardPlan::new(source.tensors().unwrap(), 100);
        let mut heard = 0;
        let files = write_shards(&plan, &source, dir.path(), &mut |bytes| heard += bytes).unwrap();
        assert_eq!(files.len(), 2);
        assert_eq!(heard, plan.file_bytes());
        for (file, shard) in files.iter().zip(&plan.shards) {
            let content = std::fs::read(dir.path().join(&file.name)).unwrap();
            let mut wanted = shard.header();
            for tensor in &shard.tensors {
                wanted.extend(Counting::bytes(tensor));
            }
            assert!(content == wanted, "{}", file.name);
            assert_eq!(file.bytes, content.len() as u64);
            assert_eq!(file.sha256, hex(&Sha256::digest(&content)));
        }
    }

    #[test]
    fn a_source_that_fails_is_told_and_stops_everything() {
        let dir = tempfile::tempdir().unwrap();
        let mut source = Counting::new(&[&[5000, 2000], &[2, 2], &[3, 3]]);
        source.broken = Some("t1");
        let plan = ShardPlan::new(source.tensors().unwrap(), 1);
        let error = write_shards(&plan, &source, dir.path(), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("t1"), "{error}");
        assert!(!dir.path().join(&plan.shards[2].file_name).exists());
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let source = Counting::new(&[&[5000, 2000]]);
        let plan = ShardPlan::new(source.tensors().unwrap(), 1);
        std::fs::write(dir.path().join("model.safetensors"), "here first").unwrap();
        let error = write_shards(&plan, &source, dir.path(), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
}
