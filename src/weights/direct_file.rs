//! A file that is written once, from front to back, past the page cache.
//!
//! Copying gigabytes into the page cache costs a core nearly as much as merging them, and
//! drives from it what other programs read. Where the file system has no direct writes, or does
//! not take these, they go through the page cache as usual.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::WeightsError;

/// What place and size of a direct write must be a multiple of, in memory and in the file.
/// Disks ask for 512 or 4096.
pub(super) const ALIGNMENT: usize = 4096;

/// Memory that a direct write can start from.
pub(super) struct AlignedBuffer {
    bytes: Vec<u8>,
    /// Where the first aligned byte is.
    start: usize,
    capacity: usize,
    len: usize,
}

impl AlignedBuffer {
    /// Makes an empty buffer for `capacity` bytes.
    pub(super) fn new(capacity: usize) -> Self {
        let bytes = vec![0; capacity + ALIGNMENT];
        let start = bytes.as_ptr().addr().next_multiple_of(ALIGNMENT) - bytes.as_ptr().addr();
        Self {
            bytes,
            start,
            capacity,
            len: 0,
        }
    }

    /// Returns what was put in.
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    /// Returns how many bytes more it takes.
    pub(super) fn free(&self) -> usize {
        self.capacity - self.len
    }

    /// Makes the next `size` bytes part of it, for the caller to fill.
    ///
    /// # Panics
    /// When there are not so many.
    pub(super) fn grow(&mut self, size: usize) -> &mut [u8] {
        assert!(size <= self.free(), "{size} bytes, {} free", self.free());
        let end = self.start + self.len;
        self.len += size;
        &mut self.bytes[end..end + size]
    }

    /// Moves what a direct write cannot take from the end of this buffer to `next`, an empty one.
    pub(super) fn carry_rest(&mut self, next: &mut Self) {
        let rest = self.len % ALIGNMENT;
        let aligned = self.len - rest;
        next.grow(rest).copy_from_slice(&self.filled()[aligned..]);
        self.len = aligned;
    }

    /// Empties it.
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }
}

/// A file that did not exist before.
pub(super) struct DirectFile {
    path: PathBuf,
    file: File,
    /// The same file, for as long as direct writes to it succeed.
    direct: Option<File>,
    written: u64,
}

impl DirectFile {
    /// Creates the file.
    ///
    /// # Errors
    /// [`WeightsError::Write`], also when it exists.
    pub(super) fn create_new(path: PathBuf) -> Result<Self, WeightsError> {
        let file = File::create_new(&path).map_err(|source| write_error(&path, source))?;
        Ok(Self {
            direct: open_direct(&path).ok(),
            path,
            file,
            written: 0,
        })
    }

    /// Returns the bytes written so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Appends the content of a buffer. Only the last may end unaligned.
    ///
    /// # Errors
    /// [`WeightsError::Write`].
    pub(super) fn write(&mut self, buffer: &AlignedBuffer) -> Result<(), WeightsError> {
        let bytes = buffer.filled();
        self.write_at_end(bytes)
            .map_err(|source| write_error(&self.path, source))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn write_at_end(&mut self, bytes: &[u8]) -> io::Result<()> {
        let is_aligned = bytes.len().is_multiple_of(ALIGNMENT);
        if let Some(direct) = self.direct.as_mut().filter(|_| is_aligned) {
            match direct.write_all(bytes) {
                // This disk wants another alignment, or took a part only: all of it again.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                result => return result,
            }
        }
        // Both know their own place in the file only.
        self.direct = None;
        io::Seek::seek(&mut self.file, io::SeekFrom::Start(self.written))?;
        self.file.write_all(bytes)
    }

    /// Waits until the file is on the disk.
    ///
    /// # Errors
    /// [`WeightsError::Write`].
    pub(super) fn sync(&self) -> Result<(), WeightsError> {
        (self.file.sync_all()).map_err(|source| write_error(&self.path, source))
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_path: &Path) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

fn write_error(path: &Path, source: io::Error) -> WeightsError {
    WeightsError::Write {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(bytes: &[u8]) -> AlignedBuffer {
        let mut buffer = AlignedBuffer::new(3 * ALIGNMENT);
        buffer.grow(bytes.len()).copy_from_slice(bytes);
        buffer
    }

    #[test]
    fn the_file_holds_all_buffers_whether_direct_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..2 * ALIGNMENT + 77).map(|i| (i % 251) as u8).collect();
        for direct in [true, false] {
            let path = dir.path().join(format!("direct_{direct}"));
            let mut file = DirectFile::create_new(path.clone()).unwrap();
            if !direct {
                file.direct = None;
            }
            let mut last = AlignedBuffer::new(3 * ALIGNMENT);
            let mut buffer = filled(&bytes);
            buffer.carry_rest(&mut last);
            assert_eq!(last.filled(), &bytes[2 * ALIGNMENT..]);
            file.write(&buffer).unwrap();
            file.write(&last).unwrap();
            file.sync().unwrap();
            assert_eq!(file.written(), bytes.len() as u64);
            assert!(std::fs::read(&path).unwrap() == bytes, "direct {direct}");
        }
    }

    #[test]
    fn buffers_are_aligned_and_used_again() {
        let mut buffer = filled(b"once");
        assert!(buffer.filled().as_ptr().addr().is_multiple_of(ALIGNMENT));
        assert_eq!(buffer.free(), 3 * ALIGNMENT - 4);
        buffer.clear();
        buffer.grow(5).copy_from_slice(b"again");
        assert_eq!(buffer.filled(), b"again");
    }

    #[test]
    fn a_file_that_exists_is_named_and_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, "here first").unwrap();
        let error = DirectFile::create_new(path.clone()).err().unwrap();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"here first");
    }
}
