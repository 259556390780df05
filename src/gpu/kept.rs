//! What lamina keeps from one run to the next: files in one folder.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The folder: what `LAMINA_CACHE` names, else lamina's part of the system's cache; none in a browser.
pub fn folder() -> Option<PathBuf> {
    let named = std::env::var_os("LAMINA_CACHE").filter(|folder| !folder.is_empty());
    named.map(PathBuf::from).or_else(|| Some(dirs::cache_dir()?.join("lamina")))
}

/// Writes a file as a whole: others may write it or read it at the same time.
pub fn write(path: &Path, data: &[u8]) -> std::io::Result<()> {
    static PART: AtomicU64 = AtomicU64::new(0);
    std::fs::create_dir_all(path.parent().expect("what is kept is a file in a folder"))?;
    let part = format!("{}-{}", std::process::id(), PART.fetch_add(1, Ordering::Relaxed));
    let part = path.with_extension(part);
    std::fs::write(&part, data)?;
    std::fs::rename(&part, path)
}
