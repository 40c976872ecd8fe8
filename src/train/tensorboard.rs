//! TensorBoard's event files: the same numbers as the log, for `tensorboard --logdir`.
//!
//! A file is a sequence of TFRecords: length, checksum of the length, content, checksum of the
//! content. The content is an `Event` of TensorBoard's `event.proto` in protobuf's wire format,
//! of which four fields are enough.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::TrainError;

/// What tells readers that this is an event file.
const VERSION: &[u8] = b"brain.Event:2";

/// Wire types of protobuf.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

/// An event file that grows.
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`TrainError::Io`] naming the file.
    pub(super) fn create(dir: &Path) -> Result<Self, TrainError> {
        let seconds = now();
        let name = format!(
            "events.out.tfevents.{}.{}.infold",
            seconds as u64,
            std::process::id()
        );
        let path = dir.join(name);
        let open = || {
            std::fs::create_dir_all(dir)?;
            OpenOptions::new().create(true).append(true).open(&path)
        };
        let file = open().map_err(TrainError::io(&path))?;
        let mut events = Self { path, file };
        events.append(&event(seconds, 0, 3, VERSION))?;
        Ok(events)
    }

    /// Appends the numbers of a log entry, under the names that Hugging Face's callback gives
    /// them: `train/loss`, `eval/loss`, ….
    ///
    /// # Errors
    /// [`TrainError::Io`] naming the file.
    pub(super) fn log(&mut self, entry: &Map<String, Value>) -> Result<(), TrainError> {
        let step = entry.get("step").and_then(Value::as_u64).unwrap_or(0);
        let mut summary = Vec::new();
        for (key, value) in entry.iter().filter(|(key, _)| *key != "step") {
            let Some(number) = value.as_f64() else {
                continue;
            };
            let tag = match key.strip_prefix("eval_") {
                Some(rest) => format!("eval/{rest}"),
                None => format!("train/{key}"),
            };
            let mut scalar = Vec::new();
            put_bytes(&mut scalar, 1, tag.as_bytes());
            put_key(&mut scalar, 2, FIXED32);
            scalar.extend_from_slice(&(number as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &scalar);
        }
        self.append(&event(now(), step, 5, &summary))
    }

    fn append(&mut self, content: &[u8]) -> Result<(), TrainError> {
        let length = (content.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(content.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc32c(&length).to_le_bytes());
        record.extend_from_slice(content);
        record.extend_from_slice(&masked_crc32c(content).to_le_bytes());
        let written = self.file.write_all(&record);
        written.map_err(TrainError::io(&self.path))
    }
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |time| time.as_secs_f64())
}

/// Returns an `Event`: time, step, and a field of bytes.
fn event(seconds: f64, step: u64, field: u64, content: &[u8]) -> Vec<u8> {
    let mut event = Vec::new();
    put_key(&mut event, 1, FIXED64);
    event.extend_from_slice(&seconds.to_le_bytes());
    put_key(&mut event, 2, VARINT);
    put_varint(&mut event, step);
    put_bytes(&mut event, field, content);
    event
}

fn put_key(to: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(to, field << 3 | wire_type);
}

fn put_bytes(to: &mut Vec<u8>, field: u64, content: &[u8]) {
    put_key(to, field, BYTES);
    put_varint(to, content.len() as u64);
    to.extend_from_slice(content);
}

/// Seven bits a byte, the lowest first; the eighth says that more follow.
fn put_varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

/// CRC-32C (Castagnoli), rotated and shifted as TFRecord wants it, so that checksums of content
/// that holds checksums stay apart.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    let crc = !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    });
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn checksums_are_castagnolis() {
        // RFC 3720, B.4: 32 bytes of zeros, and of ones.
        let unmasked = |bytes: &[u8]| {
            masked_crc32c(bytes)
                .wrapping_sub(0xa282_ead8)
                .rotate_left(15)
        };
        assert_eq!(unmasked(&[0; 32]), 0x8a91_36aa);
        assert_eq!(unmasked(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn records_hold_events_in_wire_format() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(&dir.path().join("runs")).unwrap();
        let entry = json!({"step": 300, "loss": 0.5, "eval_loss": 2.0, "note": "text"});
        events.log(entry.as_object().unwrap()).unwrap();
        let content = std::fs::read(&events.path).unwrap();
        let mut records = Vec::new();
        let mut rest = &content[..];
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let crc = u32::from_le_bytes(rest[8..12].try_into().unwrap());
            assert_eq!(crc, masked_crc32c(&rest[..8]));
            let record = &rest[12..12 + length];
            let crc = u32::from_le_bytes(rest[12 + length..16 + length].try_into().unwrap());
            assert_eq!(crc, masked_crc32c(record));
            records.push(record);
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 2);
        assert_eq!(records[0][9..], [&[0x10, 0, 0x1a, 13], VERSION].concat());
        let mut summary = vec![0x10, 0xac, 0x02, 0x2a, 0, 0x0a, 17, 0x0a, 10];
        summary.extend_from_slice(b"train/loss\x15");
        summary.extend_from_slice(&0.5f32.to_le_bytes());
        summary.extend_from_slice(&[0x0a, 16, 0x0a, 9]);
        summary.extend_from_slice(b"eval/loss\x15");
        summary.extend_from_slice(&2f32.to_le_bytes());
        summary[4] = (summary.len() - 5) as u8;
        assert_eq!(records[1][9..], summary);
    }
}
