//! The variants that `lamina bench tune` measured on an adapter: one file for each, beside its pipelines.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::caps::Caps;
use super::kept;
use crate::error::{Error, Result};

/// What was measured of a kernel with one class of specs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuned {
    /// The kernel.
    pub kernel: String,
    /// The specs that it is taken for ([`Kernel::class`](crate::kernels::Kernel::class)).
    pub class: String,
    /// The variant that is taken.
    pub variant: String,
    /// The one that would be taken had nothing been measured.
    pub untuned: String,
    /// Each variant and its time over the untuned one's: of medians, the mean over the timed cases.
    pub shares: Vec<(String, f64)>,
    /// The day, as year-month-day.
    pub date: String,
}

impl Tuned {
    /// The reason for the variant, for `lamina info`.
    pub fn why(&self) -> String {
        let others: Vec<String> =
            self.others().iter().map(|(name, times)| format!("{name} takes {times:.2} times as long")).collect();
        format!("measured on this adapter by lamina bench tune, {}: {}", self.date, others.join(", "))
    }

    /// The other variants, and how many times as long they take.
    pub fn others(&self) -> Vec<(&str, f64)> {
        let (taken, others): (Vec<_>, Vec<_>) = self.shares.iter().partition(|(name, _)| *name == self.variant);
        let taken = taken.first().map_or(f64::NAN, |(_, share)| *share);
        others.iter().map(|(name, share)| (name.as_str(), share / taken)).collect()
    }
}

/// An adapter's file. Measured with another driver or by another lamina, it counts for nothing.
#[derive(PartialEq, Serialize, Deserialize)]
struct File {
    version: String,
    adapter: String,
    backend: String,
    driver: String,
    tuned: Vec<Tuned>,
}

impl File {
    fn of(caps: &Caps, tuned: Vec<Tuned>) -> File {
        let (adapter, backend, driver) = (caps.name.clone(), caps.backend.clone(), caps.driver.clone());
        File { version: env!("CARGO_PKG_VERSION").into(), adapter, backend, driver, tuned }
    }
}

/// What was measured on an adapter. A file that cannot be read is told to the log, and is as good as none.
pub fn load(caps: &Caps) -> Vec<Tuned> {
    kept::folder().map_or_else(Vec::new, |folder| read(&place(&folder, caps), caps))
}

/// Keeps what was measured on an adapter, in the place of what was known of the same kernels and classes.
/// Gives the file.
///
/// # Errors
/// [`Error::Io`] where it cannot be written, [`Error::Usage`] on a system without a cache folder.
pub fn save(caps: &Caps, tuned: &[Tuned]) -> Result<PathBuf> {
    let path = place(&folder()?, caps);
    write(&path, caps, tuned)?;
    Ok(path)
}

/// Removes what was measured on an adapter. Gives the file, and whether there was one.
///
/// # Errors
/// As [`save`].
pub fn forget(caps: &Caps) -> Result<(PathBuf, bool)> {
    let path = place(&folder()?, caps);
    match std::fs::remove_file(&path) {
        Ok(()) => Ok((path, true)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok((path, false)),
        Err(source) => Err(Error::Io { path, source }),
    }
}

fn folder() -> Result<PathBuf> {
    let none = || Error::Usage {
        what: "LAMINA_CACHE".into(),
        expected: "a folder, since this system has none for caches".into(),
        found: "nothing".into(),
    };
    kept::folder().ok_or_else(none)
}

/// An adapter's file: the names, as far as every file system takes them.
fn place(folder: &Path, caps: &Caps) -> PathBuf {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    let name: String = format!("{}_{}", caps.backend, caps.name).chars().map(plain).take(120).collect();
    folder.join(format!("tuned_{name}.json"))
}

fn read(path: &Path, caps: &Caps) -> Vec<Tuned> {
    let file = match std::fs::read(path) {
        Ok(text) => serde_json::from_slice::<File>(&text).map_err(|error| error.to_string()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
        Err(error) => Err(error.to_string()),
    };
    match file {
        Ok(mut file) => {
            let tuned = std::mem::take(&mut file.tuned);
            if file == File::of(caps, Vec::new()) {
                return tuned;
            }
            log::info!("{}: measured with another driver or lamina, ignored", path.display());
        }
        Err(error) => log::warn!(
            "{}: not what lamina bench tune writes, ignored ({error}); lamina bench tune measures anew",
            path.display()
        ),
    }
    Vec::new()
}

fn write(path: &Path, caps: &Caps, tuned: &[Tuned]) -> Result<()> {
    let mut all = read(path, caps);
    all.retain(|old| tuned.iter().all(|new| (&new.kernel, &new.class) != (&old.kernel, &old.class)));
    all.extend_from_slice(tuned);
    let text = serde_json::to_string_pretty(&File::of(caps, all)).expect("plain data becomes JSON");
    kept::write(path, text.as_bytes()).map_err(|source| Error::Io { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuned(kernel: &str, variant: &str) -> Tuned {
        let shares = [("portable", 1.0), ("subgroup", 0.8), ("narrow", 2.0)];
        Tuned {
            kernel: kernel.into(),
            class: "Spec".into(),
            variant: variant.into(),
            untuned: "portable".into(),
            shares: shares.map(|(name, share)| (name.to_string(), share)).into(),
            date: "2026-11-26".into(),
        }
    }

    /// A folder of its own, removed afterwards.
    fn in_a_folder(name: &str, test: impl FnOnce(&Path)) {
        let folder = std::env::temp_dir().join(format!("lamina-tuned-{name}-{}", std::process::id()));
        test(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_kept_is_read_again_and_replaced_class_by_class() {
        in_a_folder("kept", |folder| {
            let caps = Caps { name: "Radeon 780M (RADV)".into(), backend: "vulkan".into(), ..Caps::portable() };
            let path = place(folder, &caps);
            assert_eq!(path.file_name().unwrap(), "tuned_vulkan_radeon_780m__radv_.json");
            assert_eq!(read(&path, &caps), []);
            write(&path, &caps, &[tuned("gemv", "portable"), tuned("rms_norm", "subgroup")]).unwrap();
            write(&path, &caps, &[tuned("gemv", "narrow")]).unwrap();
            assert_eq!(read(&path, &caps), [tuned("rms_norm", "subgroup"), tuned("gemv", "narrow")]);
            assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1, "no part is left behind");
        });
    }

    #[test]
    fn another_driver_or_adapter_and_a_damaged_file_leave_nothing() {
        in_a_folder("stale", |folder| {
            let caps = Caps { driver: "580.1".into(), ..Caps::portable() };
            let path = place(folder, &caps);
            write(&path, &caps, &[tuned("gemv", "narrow")]).unwrap();
            let others = [
                Caps { driver: "580.2".into(), ..caps.clone() },
                Caps { name: "another".into(), ..caps.clone() },
                Caps { backend: "gl".into(), ..caps.clone() },
            ];
            assert!(others.iter().all(|other| read(&path, other).is_empty()));
            let whole = std::fs::read_to_string(&path).unwrap();
            for damaged in
                [&whole[..whole.len() / 2], &whole.replace(env!("CARGO_PKG_VERSION"), "0.0.0"), "", "{}", "[1]"]
            {
                std::fs::write(&path, damaged).unwrap();
                assert_eq!(read(&path, &caps), [], "{damaged}");
            }
            std::fs::write(&path, b"\xff\x00").unwrap();
            assert_eq!(read(&path, &caps), []);
            // What cannot be read does not keep new times from being kept.
            write(&path, &caps, &[tuned("gemv", "narrow")]).unwrap();
            assert_eq!(read(&path, &caps), [tuned("gemv", "narrow")]);
        });
    }

    #[test]
    fn the_reason_has_the_day_and_every_other_variant() {
        assert_eq!(
            tuned("gemv", "subgroup").why(),
            "measured on this adapter by lamina bench tune, 2026-11-26: portable takes 1.25 times as long, \
             narrow takes 2.50 times as long"
        );
    }
}
