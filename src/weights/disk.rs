//! What the standard library does not offer of file systems: free space, swapping directories.

use std::{io, path::Path};

/// Returns the bytes that this user may still write to the file system of `path`; `None` where
/// the system does not say.
pub fn free_bytes(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        use std::{ffi::CString, mem::MaybeUninit, os::unix::ffi::OsStrExt};

        let path = CString::new(path.as_os_str().as_bytes()).ok()?;
        let mut stats = MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: the path ends with a zero and `stats` has room for what is written.
        let status = unsafe { libc::statvfs(path.as_ptr(), stats.as_mut_ptr()) };
        if status != 0 {
            return None;
        }
        // SAFETY: the call succeeded, so that the structure is filled.
        let stats = unsafe { stats.assume_init() };
        // The widths of the fields differ between systems.
        #[expect(clippy::useless_conversion, reason = "u32 on some systems")]
        Some(u64::from(stats.f_bavail).saturating_mul(u64::from(stats.f_frsize)))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Swaps two directories in one step: at no time is either name missing.
///
/// # Errors
/// `Unsupported` where the system or the file system cannot do that.
pub fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use std::{ffi::CString, os::unix::ffi::OsStrExt};

        let c_path = |path: &Path| CString::new(path.as_os_str().as_bytes());
        let (a, b) = (c_path(a)?, c_path(b)?);
        // SAFETY: both paths end with a zero; nothing else is passed by pointer.
        let status = unsafe {
            libc::renameat2(
                libc::AT_FDCWD,
                a.as_ptr(),
                libc::AT_FDCWD,
                b.as_ptr(),
                libc::RENAME_EXCHANGE,
            )
        };
        if status == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EINVAL) => Err(io::ErrorKind::Unsupported.into()),
            _ => Err(error),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (a, b);
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_swap_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for (path, file) in [(&a, "was_a"), (&b, "was_b")] {
            std::fs::create_dir(path).unwrap();
            std::fs::write(path.join(file), "").unwrap();
        }
        match exchange(&a, &b) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                assert!(a.join("was_a").exists());
            }
            result => {
                result.unwrap();
                assert!(a.join("was_b").exists() && b.join("was_a").exists());
            }
        }
        assert!(exchange(&a, &dir.path().join("absent")).is_err());
    }

    #[test]
    fn the_temporary_directory_has_some_space() {
        let free = free_bytes(&std::env::temp_dir());
        assert!(free.is_none_or(|bytes| bytes > 0));
        assert_eq!(free_bytes(Path::new("/there/is/no/such/path")), None);
    }
}
