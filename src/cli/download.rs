//! What a download needs beside the hub's own library: it ends where the server falls silent, and what came is what
//! was to come.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hf_hub::api::Progress;
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// When something was heard last.
#[derive(Clone)]
pub(super) struct Heard(Arc<Mutex<Instant>>);

impl Heard {
    fn now(&self) {
        *self.0.lock().expect("a plain store") = Instant::now();
    }

    fn ago(&self) -> Duration {
        self.0.lock().expect("a plain store").elapsed()
    }

    /// A bar that is drawn on a terminal alone, and notes what comes.
    pub fn bar(&self) -> impl Progress {
        Bar { bar: ProgressBar::new(0), heard: self.clone() }
    }
}

struct Bar {
    bar: ProgressBar,
    heard: Heard,
}

impl Progress for Bar {
    fn init(&mut self, size: usize, name: &str) {
        self.heard.now();
        Progress::init(&mut self.bar, size, name);
    }

    fn update(&mut self, size: usize) {
        self.heard.now();
        Progress::update(&mut self.bar, size);
    }

    fn finish(&mut self) {
        self.heard.now();
        Progress::finish(&mut self.bar);
    }
}

/// What `work` gives, on a thread of its own; `None` once nothing was heard for `silence`. The library below waits
/// without end, and cannot be told not to: the thread is left.
pub(super) fn watched<T: Send + 'static>(
    silence: Duration,
    work: impl FnOnce(&Heard) -> T + Send + 'static,
) -> Option<T> {
    let heard = Heard(Arc::new(Mutex::new(Instant::now())));
    let (done, result) = mpsc::channel();
    let worker = heard.clone();
    std::thread::spawn(move || done.send(work(&worker)));
    loop {
        match result.recv_timeout(silence.saturating_sub(heard.ago()).max(Duration::from_millis(10))) {
            Ok(result) => return Some(result),
            Err(RecvTimeoutError::Timeout) if heard.ago() < silence => {}
            Err(_) => return None,
        }
    }
}

/// Holds a file of the hub's cache against its name there, which for large files is their SHA-256; what differs is
/// removed.
///
/// # Errors
/// [`Error::Invalid`] where it differs, [`Error::Io`].
pub(super) fn verify(file: &Path, heard: &Heard) -> Result<()> {
    let io = |source| Error::Io { path: file.into(), source };
    let blob = file.canonicalize().map_err(io)?;
    let expected = blob.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    if expected.len() != 64 || !expected.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(()); // a small file: git's own hash
    }
    let (mut hash, mut part, mut open) = (Sha256::new(), vec![0; 1 << 20], File::open(&blob).map_err(io)?);
    loop {
        let read = open.read(&mut part).map_err(io)?;
        if read == 0 {
            break;
        }
        hash.update(&part[..read]);
        heard.now();
    }
    let found = format!("{:x}", hash.finalize());
    if found == expected {
        return Ok(());
    }
    drop(open);
    std::fs::remove_file(file).and_then(|()| std::fs::remove_file(&blob)).map_err(io)?;
    let what = "its SHA-256, as it was downloaded (removed; another try downloads it anew)".into();
    Err(Error::Invalid { file: file.into(), what, expected, found })
}
