//! What `cuModuleLoadData` is given: a fat binary of nvcc, or PTX as text.
//!
//! A fat binary is a header and entries, each a kernel file for one architecture: machine code,
//! which cannot run here, or PTX. nvcc packs PTX unless it is told `--no-compress`.

use std::ffi::CStr;

use super::status::{Outcome, Status};

const MAGIC: u32 = 0xba55_ed50;
const KIND_PTX: u16 = 1;
/// The entry's flag for packed contents, and that for other packing since CUDA 12.8.
const PACKED: u64 = 0x2000 | 0x8000;

/// Returns the PTX of an image that fits a compute capability best: that of `sm_90a` on 9.0, else
/// of the newest architecture that is not newer.
///
/// # Errors
/// When the image is none, or has nothing that fits: the reason is printed.
///
/// # Safety
/// `image` must be what `cuModuleLoadData` asks for: a fat binary of the length in its header, or
/// text ended by 0.
pub unsafe fn find_ptx(image: *const u8, capability: (u32, u32)) -> Outcome<String> {
    if image.is_null() {
        return Err(Status::INVALID_VALUE);
    }
    // SAFETY: any image has four bytes or ends before with a 0, which is read no further than.
    let start = unsafe { CStr::from_ptr(image.cast()) }.to_bytes();
    if start.starts_with(&[0x7f]) {
        return Err(refuse("is machine code alone"));
    }
    // SAFETY: four bytes, as above: neither PTX nor a fat binary has fewer.
    let magic = unsafe { image.cast::<u32>().read_unaligned() };
    if magic != MAGIC {
        let text = str::from_utf8(start).map_err(|_| Status::INVALID_IMAGE)?;
        return match text.contains(".version") {
            true => Ok(text.to_owned()),
            false => Err(Status::INVALID_IMAGE),
        };
    }
    // SAFETY: the header is 16 bytes: magic, version and own length, and the entries' length.
    let (header_bytes, entries_bytes) = unsafe {
        (
            image.add(6).cast::<u16>().read_unaligned(),
            image.add(8).cast::<u64>().read_unaligned(),
        )
    };
    // SAFETY: as long as the header says.
    let entries = unsafe {
        std::slice::from_raw_parts(image.add(usize::from(header_bytes)), entries_bytes as usize)
    };
    best_ptx(entries, capability)
}

fn refuse(why: &str) -> Status {
    eprintln!(
        "emulated CUDA driver: an image {why}; nvcc must keep PTX and not pack it (--no-compress)"
    );
    Status::NO_BINARY_FOR_GPU
}

/// An entry: what it holds.
struct Entry<'a> {
    kind: u16,
    architecture: u32,
    is_packed: bool,
    contents: &'a [u8],
}

/// Takes the next entry off.
fn next_entry<'a>(rest: &mut &'a [u8]) -> Option<Entry<'a>> {
    let header: &[u8; 48] = rest.first_chunk()?;
    let short = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let word = |at: usize| u32::from(short(at)) | u32::from(short(at + 2)) << 16;
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    let (header_bytes, num_bytes) = (word(4) as usize, long(8) as usize);
    let end = header_bytes.checked_add(num_bytes)?;
    let contents = rest.get(header_bytes..end)?;
    *rest = &rest[end..];
    Some(Entry {
        kind: short(0),
        architecture: word(28),
        is_packed: long(40) & PACKED != 0,
        contents,
    })
}

fn best_ptx(mut rest: &[u8], (major, minor): (u32, u32)) -> Outcome<String> {
    let capability = 10 * major + minor;
    let mut best: Option<(u32, String)> = None;
    let mut is_packed = false;
    while let Some(entry) = next_entry(&mut rest) {
        if entry.kind != KIND_PTX || entry.architecture > capability {
            continue;
        }
        if entry.is_packed {
            is_packed = true;
            continue;
        }
        let end = entry
            .contents
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(entry.contents.len());
        let text = str::from_utf8(&entry.contents[..end]).map_err(|_| Status::INVALID_PTX)?;
        let is_specific = text.contains(&format!(".target sm_{}a", entry.architecture));
        if is_specific && entry.architecture != capability {
            continue;
        }
        let rank = 2 * entry.architecture + u32::from(is_specific);
        if best.as_ref().is_none_or(|(best, _)| rank > *best) {
            best = Some((rank, text.to_owned()));
        }
    }
    match (best, is_packed) {
        (Some((_, text)), _) => Ok(text),
        (None, true) => Err(refuse("has its PTX packed")),
        (None, false) => Err(refuse(&format!(
            "has no PTX for compute capability {major}.{minor}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u16, architecture: u32, flags: u64, contents: &str) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&64u32.to_le_bytes());
        bytes[8..16].copy_from_slice(&(contents.len() as u64 + 3).to_le_bytes());
        bytes[28..32].copy_from_slice(&architecture.to_le_bytes());
        bytes[40..48].copy_from_slice(&flags.to_le_bytes());
        bytes.extend(contents.as_bytes());
        bytes.extend([0; 3]);
        bytes
    }

    fn found(entries: &[Vec<u8>], capability: (u32, u32)) -> Outcome<String> {
        let entries = entries.concat();
        let mut image = MAGIC.to_le_bytes().to_vec();
        image.extend([1, 0, 16, 0]);
        image.extend((entries.len() as u64).to_le_bytes());
        image.extend(entries);
        // SAFETY: an image of that length.
        unsafe { find_ptx(image.as_ptr(), capability) }
    }

    #[test]
    fn the_newest_ptx_that_fits_is_taken() {
        let entries = [
            entry(2, 80, 0, "machine code"),
            entry(1, 80, 0, ".version 8.0 .target sm_80"),
            entry(1, 90, 0, ".version 8.0 .target sm_90a"),
            entry(1, 90, 0, ".version 8.0 .target sm_90"),
        ];
        let target = |capability| found(&entries, capability).map(|text| text[13..].to_owned());
        assert_eq!(target((8, 0)).as_deref(), Ok(".target sm_80"));
        assert_eq!(target((8, 9)).as_deref(), Ok(".target sm_80"));
        assert_eq!(target((9, 0)).as_deref(), Ok(".target sm_90a"));
        assert_eq!(target((10, 0)).as_deref(), Ok(".target sm_90"));
        assert_eq!(target((7, 5)), Err(Status::NO_BINARY_FOR_GPU));
    }

    #[test]
    fn packed_ptx_and_machine_code_are_refused() {
        assert_eq!(
            found(&[entry(1, 80, 0x2000, "x")], (8, 0)),
            Err(Status::NO_BINARY_FOR_GPU)
        );
        assert_eq!(
            found(&[entry(2, 80, 0, "x")], (8, 0)),
            Err(Status::NO_BINARY_FOR_GPU)
        );
    }

    #[test]
    fn plain_text_is_ptx() {
        let text = c".version 8.0";
        // SAFETY: a text ended by 0.
        let found = unsafe { find_ptx(text.as_ptr().cast(), (8, 0)) };
        assert_eq!(found.as_deref(), Ok(".version 8.0"));
    }
}
