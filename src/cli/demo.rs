//! The small model that comes with lamina, for whoever names none. It is part of the program, and is written
//! to the user's cache once, where files can be mapped.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

macro_rules! shipped {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/demos/model/", $name)).as_slice())),*]
    };
}

/// The checkpoint's files.
static FILES: [(&str, &[u8]); 6] = shipped![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors"
];

/// A folder with the shipped checkpoint.
///
/// # Errors
/// [`Error::Io`] where it cannot be written.
pub(super) fn folder() -> Result<PathBuf> {
    let cache = dirs::cache_dir().unwrap_or_else(std::env::temp_dir).join("lamina");
    let folder = cache.join(format!("demo-model-{:016x}", key()));
    if !is_whole(&folder) {
        write(&cache, &folder)?;
    }
    Ok(folder)
}

/// Tells this model from those of other versions (FNV-1a, over what changes with every training).
fn key() -> u64 {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let sample = |bytes: &'static [u8]| bytes.iter().step_by(bytes.len().div_ceil(4096).max(1));
    FILES.iter().flat_map(|(_, bytes)| sample(bytes)).fold(0xcbf2_9ce4_8422_2325, mix)
}

fn is_whole(folder: &Path) -> bool {
    let same = |(name, bytes): &(&str, &[u8])| {
        std::fs::metadata(folder.join(name)).is_ok_and(|found| found.len() == bytes.len() as u64)
    };
    FILES.iter().all(same)
}

/// Writes a folder beside the one that is wanted and renames it: two processes may do so at once.
fn write(cache: &Path, folder: &Path) -> Result<()> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    };
    let part = cache.join(format!("demo-model-{}.part", std::process::id()));
    std::fs::create_dir_all(&part).map_err(io(&part))?;
    for (name, bytes) in FILES {
        let path = part.join(name);
        std::fs::write(&path, bytes).map_err(io(&path))?;
    }
    // A folder that is there and not whole was spoilt by somebody.
    if folder.exists() && !is_whole(folder) {
        std::fs::remove_dir_all(folder).map_err(io(folder))?;
    }
    if let Err(fault) = std::fs::rename(&part, folder) {
        let _ = std::fs::remove_dir_all(&part);
        if !is_whole(folder) {
            return Err(io(folder)(fault));
        }
    }
    Ok(())
}
