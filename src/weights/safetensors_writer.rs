//! Writes the files of a [`ShardPlan`] in one pass, a block of rows at a time.
//!
//! Three stages work at once: one makes blocks (reading and folding, on all cores), one writes
//! them, one hashes them. A few blocks are in memory, never a tensor or a file.

use std::{
    fs::File,
    io::{self, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::{PlannedShard, ShardPlan, TensorSource, WeightsError};

/// Bytes of a block; a row larger than this is a block alone.
const BLOCK_BYTES: u64 = 8 << 20;

/// Blocks that may wait between two stages.
const BLOCKS_AHEAD: usize = 3;

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

/// What goes from the stage that makes blocks to the one that writes them.
enum Piece {
    /// The next file begins.
    Begin {
        name: String,
    },
    Block(Bytes),
    /// The file is complete.
    End,
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
        let (pieces, receiver) = sync_channel(BLOCKS_AHEAD);
        let (to_hash, hash_receiver) = sync_channel(BLOCKS_AHEAD);
        let maker = scope.spawn(move || make_pieces(plan, source, &pieces));
        let hasher = scope.spawn(move || hash_pieces(&hash_receiver));
        let written = write_pieces(dir, &receiver, &to_hash, on_bytes);
        // Both ends must be gone before their threads can be waited for.
        drop((receiver, to_hash));
        let made = maker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let hashes = hasher
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // A source that failed also ends the writer, so its error is the one to tell.
        made?;
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

/// Makes every block of every file. Ends early when nobody takes them any more.
fn make_pieces(
    plan: &ShardPlan,
    source: &dyn TensorSource,
    pieces: &SyncSender<Piece>,
) -> Result<(), WeightsError> {
    for shard in &plan.shards {
        let begin = Piece::Begin {
            name: shard.file_name.clone(),
        };
        if pieces.send(begin).is_err() || pieces.send(Piece::Block(shard.header().into())).is_err()
        {
            return Ok(());
        }
        for (name, rows) in blocks(shard) {
            let block = source.rows(name, rows)?.data;
            if pieces.send(Piece::Block(block)).is_err() {
                return Ok(());
            }
        }
        if pieces.send(Piece::End).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Returns the blocks of rows of a file, in order.
fn blocks(shard: &PlannedShard) -> impl Iterator<Item = (&str, Range<usize>)> {
    shard.tensors.iter().flat_map(|tensor| {
        let num_rows = tensor.shape.first().copied().unwrap_or(1);
        let row_bytes = tensor.size_bytes() / (num_rows.max(1) as u64);
        let rows = (BLOCK_BYTES / row_bytes.max(1)).max(1) as usize;
        (0..num_rows)
            .step_by(rows)
            .map(move |start| (&*tensor.name, start..(start + rows).min(num_rows)))
    })
}

/// Writes pieces until there are no more; returns name and size of each file.
fn write_pieces(
    dir: &Path,
    pieces: &Receiver<Piece>,
    to_hash: &SyncSender<Piece>,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<Vec<(String, u64)>, WeightsError> {
    let mut files = Vec::new();
    thread::scope(|scope| {
        let mut syncing = Vec::new();
        let mut current: Option<(File, PathBuf)> = None;
        for piece in pieces {
            match &piece {
                Piece::Begin { name } => {
                    let path = dir.join(name);
                    let file = File::create_new(&path).map_err(|source| at(&path, source))?;
                    files.push((name.clone(), 0));
                    current = Some((file, path));
                }
                Piece::Block(block) => {
                    if let (Some((file, path)), Some((_, bytes))) = (&mut current, files.last_mut())
                    {
                        file.write_all(block).map_err(|source| at(path, source))?;
                        *bytes += block.len() as u64;
                        on_bytes(block.len() as u64);
                    }
                }
                Piece::End => {
                    if let Some((file, path)) = current.take() {
                        // The disk may take its time while the next file is made.
                        syncing
                            .push(scope.spawn(move || {
                                file.sync_all().map_err(|source| at(&path, source))
                            }));
                    }
                }
            }
            // The hasher ends only when this sender is dropped.
            let _ = to_hash.send(piece);
        }
        for sync in syncing {
            sync.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok::<(), WeightsError>(())
    })?;
    Ok(files)
}

fn at(path: &Path, source: io::Error) -> WeightsError {
    WeightsError::Write {
        path: path.to_owned(),
        source,
    }
}

/// Returns the SHA-256 of each file.
fn hash_pieces(pieces: &Receiver<Piece>) -> Vec<String> {
    let mut hashes = Vec::new();
    let mut hasher = Sha256::new();
    for piece in pieces {
        match piece {
            Piece::Begin { .. } => {}
            Piece::Block(block) => hasher.update(&block),
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
    use crate::weights::{StoredTensor, TensorInfo};

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
