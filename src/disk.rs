//! A checkpoint's files. Natively they are the system's, mapped into memory; in a browser those that the page
//! has handed over (see `web`), of which each tensor is read when it is asked for.

use std::io;
use std::path::Path;

#[cfg(not(target_arch = "wasm32"))]
pub use native::{Bytes, is_file, names, read};
#[cfg(target_arch = "wasm32")]
pub use page::{Bytes, is_file, names, put, read, remove};

/// The text of a file.
///
/// # Errors
/// As [`read`], and what is no UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|fault| io::Error::new(io::ErrorKind::InvalidData, fault))
}

#[cfg(not(target_arch = "wasm32"))]
mod native {
    use std::borrow::Cow;
    use std::fs::File;
    use std::io;
    use std::ops::Range;
    use std::path::Path;
    use std::sync::Arc;

    use memmap2::Mmap;

    /// All bytes of a file.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(path: &Path) -> io::Result<Vec<u8>> {
        std::fs::read(path)
    }

    /// Whether there is such a file.
    pub fn is_file(path: &Path) -> bool {
        path.is_file()
    }

    /// The names in a folder.
    ///
    /// # Errors
    /// What the system says.
    pub fn names(folder: &Path) -> io::Result<Vec<String>> {
        let names = std::fs::read_dir(folder)?.flatten();
        Ok(names.map(|file| file.file_name().to_string_lossy().into_owned()).collect())
    }

    /// A file's bytes, mapped.
    #[derive(Clone)]
    pub struct Bytes(Option<Arc<Mmap>>);

    impl Bytes {
        /// Maps a file.
        ///
        /// # Errors
        /// What the system says.
        #[allow(unsafe_code, reason = "a map is sound while nobody changes the file; every loader relies on it")]
        pub fn open(path: &Path) -> io::Result<Bytes> {
            let file = File::open(path)?;
            // A map of nothing is refused by some systems.
            if file.metadata()?.len() == 0 {
                return Ok(Bytes(None));
            }
            // SAFETY: the file is opened for reading and never written by lamina.
            Ok(Bytes(Some(Arc::new(unsafe { Mmap::map(&file) }?))))
        }

        fn all(&self) -> &[u8] {
            self.0.as_deref().map_or(&[], |map| map)
        }

        /// How many there are.
        #[allow(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
        pub fn len(&self) -> u64 {
            self.all().len() as u64
        }

        /// Those of a range.
        ///
        /// # Errors
        /// None: only a browser's read may fail.
        ///
        /// # Panics
        /// When the range leaves the file.
        pub fn get(&self, range: Range<usize>) -> io::Result<Cow<'_, [u8]>> {
            Ok(Cow::Borrowed(&self.all()[range]))
        }

        /// Tells the system that a range may leave memory; reading it again brings it back.
        #[cfg(unix)]
        #[allow(unsafe_code, reason = "unchecked advice may zero private pages; these are the file's, and read-only")]
        pub fn release(&self, range: Range<usize>) {
            let Some(map) = &self.0 else { return };
            // SAFETY: the map is a read-only view of a file, whose dropped pages are read from it again.
            // A system that does not take the advice loses nothing.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }

        /// Not on this system.
        #[cfg(not(unix))]
        pub fn release(&self, _: Range<usize>) {}
    }
}

#[cfg(target_arch = "wasm32")]
mod page {
    use std::borrow::Cow;
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::io;
    use std::ops::Range;
    use std::path::{Path, PathBuf};
    use std::rc::Rc;

    /// Reads so many bytes from an offset on.
    type Read = Rc<dyn Fn(u64, usize) -> io::Result<Vec<u8>>>;

    thread_local! {
        static FILES: RefCell<BTreeMap<PathBuf, (u64, Read)>> = RefCell::default();
    }

    /// Hands over a file: its length, and how to read it.
    pub fn put(path: &Path, length: u64, read: impl Fn(u64, usize) -> io::Result<Vec<u8>> + 'static) {
        FILES.with_borrow_mut(|files| files.insert(path.into(), (length, Rc::new(read))));
    }

    /// Takes back the files of a folder.
    pub fn remove(folder: &Path) {
        FILES.with_borrow_mut(|files| files.retain(|path, _| !path.starts_with(folder)));
    }

    fn find(path: &Path) -> io::Result<(u64, Read)> {
        let found = FILES.with_borrow(|files| files.get(path).cloned());
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such file was handed over"))
    }

    fn read_range(path: &Path, range: Range<usize>) -> io::Result<Vec<u8>> {
        let bytes = find(path)?.1(range.start as u64, range.len())?;
        match bytes.len() == range.len() {
            true => Ok(bytes),
            false => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than it was")),
        }
    }

    /// All bytes of a file.
    ///
    /// # Errors
    /// Where there is no such file, and what its reader says.
    pub fn read(path: &Path) -> io::Result<Vec<u8>> {
        read_range(path, 0..find(path)?.0 as usize)
    }

    /// Whether there is such a file.
    pub fn is_file(path: &Path) -> bool {
        find(path).is_ok()
    }

    /// The names in a folder.
    ///
    /// # Errors
    /// None.
    pub fn names(folder: &Path) -> io::Result<Vec<String>> {
        let name = |path: &PathBuf| Some(path.strip_prefix(folder).ok()?.to_string_lossy().into_owned());
        Ok(FILES.with_borrow(|files| files.keys().filter_map(name).collect()))
    }

    /// A file's bytes, read when they are asked for.
    #[derive(Clone)]
    pub struct Bytes {
        path: PathBuf,
        length: u64,
    }

    impl Bytes {
        /// Finds a file.
        ///
        /// # Errors
        /// Where there is no such file.
        pub fn open(path: &Path) -> io::Result<Bytes> {
            Ok(Bytes { path: path.into(), length: find(path)?.0 })
        }

        /// How many there are.
        #[allow(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
        pub fn len(&self) -> u64 {
            self.length
        }

        /// Those of a range.
        ///
        /// # Errors
        /// What the file's reader says.
        pub fn get(&self, range: Range<usize>) -> io::Result<Cow<'_, [u8]>> {
            read_range(&self.path, range).map(Cow::Owned)
        }

        /// Nothing is held.
        pub fn release(&self, _: Range<usize>) {}
    }
}
