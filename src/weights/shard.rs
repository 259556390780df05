//! One safetensors file, mapped into memory.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, SafeTensorError};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::{Error, Result};

/// The header's length stands in so many bytes.
const LENGTH_BYTES: usize = 8;

/// A tensor of the file.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Its first byte in the file, and one past the last.
    pub(super) range: (usize, usize),
}

/// A file and what its header says, checked.
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) entries: Vec<Entry>,
    map: Mmap,
}

impl Shard {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] naming what is wrong with the header or with which tensor.
    pub(super) fn open(path: &Path) -> Result<Shard> {
        let io = |source| Error::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.len() < LENGTH_BYTES as u64 {
            let found = format!("{} bytes", file.metadata().map_err(io)?.len());
            return Err(wrong(path, "the header's length", "8 bytes", &found));
        }
        let map = map(&file).map_err(io)?;
        let entries = entries(path, &map)?;
        Ok(Shard { path: path.into(), entries, map })
    }

    pub(super) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.range.0..entry.range.1]
    }

    /// Tells the system that a tensor's pages may leave memory; reading them again brings them back.
    #[cfg(unix)]
    #[allow(unsafe_code, reason = "unchecked advice may zero private pages; these are the file's own and read-only")]
    pub(super) fn release(&self, entry: &Entry) {
        let length = entry.range.1 - entry.range.0;
        // SAFETY: the map is a read-only view of a file, whose dropped pages are read from it again.
        // A system that does not take the advice loses nothing.
        let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, entry.range.0, length) };
    }

    #[cfg(not(unix))]
    pub(super) fn release(&self, _: &Entry) {}
}

#[allow(unsafe_code, reason = "a map of a file is sound while nobody changes the file; every loader relies on it")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the file is opened for reading and never written by lamina.
    unsafe { Mmap::map(file) }
}

fn wrong(path: &Path, what: &str, expected: &str, found: &str) -> Error {
    Error::Invalid { file: path.into(), what: what.into(), expected: expected.into(), found: found.into() }
}

/// What the header of a whole file says.
fn entries(path: &Path, file: &[u8]) -> Result<Vec<Entry>> {
    let start = check(path, file)?;
    let (_, metadata) = SafeTensors::read_metadata(file).map_err(|fault| refused(path, fault))?;
    let entry = |name: String| {
        let info = metadata.info(&name).expect("a name that the header gave");
        let (begin, end) = info.data_offsets;
        let range = (start + begin, start + end);
        Entry { name, dtype: info.dtype, shape: info.shape.clone(), range }
    };
    Ok(metadata.offset_keys().into_iter().map(entry).collect())
}

/// What the safetensors crate finds beyond [`check`].
fn refused(path: &Path, fault: SafeTensorError) -> Error {
    match fault {
        SafeTensorError::InvalidOffset(name) => {
            let expected = "data that starts where the tensor before it ends";
            wrong(path, &format!("tensor '{name}'"), expected, "a gap or an overlap")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            wrong(path, "the file's length", "the end of the last tensor", "more bytes")
        }
        other => wrong(path, "the header", "a safetensors header", &other.to_string()),
    }
}

/// Checks a header one tensor after the other, so that a fault has a name. Gives the first byte of the data.
fn check(path: &Path, file: &[u8]) -> Result<usize> {
    let (length, rest) = file.split_at(LENGTH_BYTES);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let within = usize::try_from(length).ok().filter(|length| *length <= rest.len());
    let Some(length) = within else {
        let found = format!("a length of {length}; the file is truncated or no safetensors file");
        return Err(wrong(path, "the header", &format!("at most {} bytes, as the file has", rest.len()), &found));
    };
    let (header, data) = rest.split_at(length);
    let text = std::str::from_utf8(header)
        .map_err(|fault| wrong(path, "the header", "UTF-8", &format!("a fault: {fault}")))?;
    let Header(fields) = serde_json::from_str(text)
        .map_err(|fault| wrong(path, "the header", "a JSON object", &format!("a fault: {fault}")))?;
    let mut seen = HashSet::new();
    for (name, value) in &fields {
        let what = format!("tensor '{name}'");
        if !seen.insert(name) {
            return Err(wrong(path, &what, "one of this name", "two"));
        }
        if name != "__metadata__" {
            check_tensor(path, &what, value, data.len())?;
        }
    }
    Ok(LENGTH_BYTES + length)
}

fn check_tensor(path: &Path, what: &str, value: &Value, data: usize) -> Result<()> {
    let dtype = value.get("dtype").cloned().unwrap_or_default();
    let bits = serde_json::from_value::<Dtype>(dtype.clone()).map(|dtype| dtype.bitsize());
    let bits = bits.map_err(|_| wrong(path, what, "a dtype such as BF16, F16 or F32", &dtype.to_string()))?;
    let lengths = |field: &str| -> Option<Vec<usize>> {
        let list = value.get(field)?.as_array()?;
        list.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
    };
    let shown = |field: &str| value.get(field).map_or("none".into(), Value::to_string);
    let Some(shape) = lengths("shape") else {
        return Err(wrong(path, what, "a shape, a list of whole numbers", &shown("shape")));
    };
    let Some([begin, end]) = lengths("data_offsets").and_then(|list| <[usize; 2]>::try_from(list).ok()) else {
        return Err(wrong(path, what, "data_offsets, a list of two numbers", &shown("data_offsets")));
    };
    if begin > end || end > data {
        let found = format!("data_offsets [{begin}, {end}]; the file is truncated or its header lies");
        return Err(wrong(path, what, &format!("data within the {data} bytes behind the header"), &found));
    }
    let values = shape.iter().try_fold(1usize, |all, length| all.checked_mul(*length));
    let Some(needed) = values.and_then(|values| values.checked_mul(bits)) else {
        return Err(wrong(path, what, "a shape whose size can be counted", &format!("{shape:?}")));
    };
    if needed != (end - begin) * 8 {
        let expected = format!("{} bytes for shape {shape:?} of {}", needed.div_ceil(8), dtype.as_str().unwrap_or("?"));
        return Err(wrong(path, what, &expected, &format!("{} bytes", end - begin)));
    }
    Ok(())
}

/// The header's fields in their order, two of one name both kept.
struct Header(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Header, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Header(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}
