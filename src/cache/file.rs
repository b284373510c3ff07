//! State files: written beside their place and renamed, so that a crash leaves the old file or the new one.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::Cache;
use crate::error::{Error, Result, Status};

impl Cache {
    /// Writes the state to a file, which is replaced only when everything is on disk.
    pub fn save_file(&self, path: &Path) -> Result<()> {
        let temporary = temporary_path(path)?;
        let result =
            self.write_and_sync(&temporary).and_then(|()| fs::rename(&temporary, path).map_err(io_error(path)));
        if result.is_err() {
            // The first failure is the one to report.
            let _ = fs::remove_file(&temporary);
        }
        result
    }

    /// Reads a state that [`Cache::save_file`] wrote from a cache of the same recipe and sizes. On failure the cache is
    /// as it was.
    pub fn load_file(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(io_error(path))?;
        let metadata = file.metadata().map_err(io_error(path))?;
        if !metadata.is_file() {
            return Err(Error::new(Status::Io, format!("{} is not a file", path.display())));
        }
        let max = self.max_state_bytes();
        if metadata.len() > max as u64 {
            let text = format!("{} has {} bytes, a state of this cache at most {max}", path.display(), metadata.len());
            return Err(Error::new(Status::Format, text));
        }
        let mut bytes = Vec::new();
        super::memory::check_available(metadata.len() as usize)?;
        bytes.reserve_exact(metadata.len() as usize);
        // The file may grow while it is read; more than this would be refused anyway.
        file.take(max as u64 + 1).read_to_end(&mut bytes).map_err(io_error(path))?;
        self.load_memory(&bytes)
    }

    fn write_and_sync(&self, path: &Path) -> Result<()> {
        let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(io_error(path))?;
        let mut writer = BufWriter::with_capacity(1 << 16, file);
        self.save_to(&mut writer)?;
        writer.flush().map_err(io_error(path))?;
        writer.get_ref().sync_all().map_err(io_error(path))
    }
}

/// A name in the same folder, since a rename cannot cross file systems, that no other save uses.
fn temporary_path(path: &Path) -> Result<PathBuf> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().ok_or_else(|| Error::new(Status::Io, format!("{} names no file", path.display())))?;
    let mut temporary = OsString::from(name);
    temporary.push(format!(".{}-{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    Ok(path.with_file_name(temporary))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |error| Error::new(Status::Io, format!("{}: {error}", path.display()))
}
