//! One safetensors file.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use safetensors::tensor::Dtype;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::disk::Bytes;
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
    pub(super) entries: Arc<Vec<Entry>>,
    file: Bytes,
    /// Of each entry what was read, where the file is not mapped.
    held: Vec<OnceLock<Vec<u8>>>,
}

impl Shard {
    /// Opens the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] naming what is wrong with the header or with which tensor.
    pub(super) fn open(path: &Path) -> Result<Shard> {
        let io = |source| Error::Io { path: path.into(), source };
        let file = Bytes::open(path).map_err(io)?;
        if file.len() < LENGTH_BYTES as u64 {
            return Err(wrong(path, "the header's length", "8 bytes", &format!("{} bytes", file.len())));
        }
        let length = file.get(0..LENGTH_BYTES).map_err(io)?;
        let length = u64::from_le_bytes(length[..].try_into().expect("eight bytes"));
        let rest = file.len() - LENGTH_BYTES as u64;
        let within = usize::try_from(length).ok().filter(|_| length <= rest);
        let Some(length) = within else {
            let found = format!("a length of {length}; the file is truncated or no safetensors file");
            return Err(wrong(path, "the header", &format!("at most {rest} bytes, as the file has"), &found));
        };
        let start = LENGTH_BYTES + length;
        let entries = Arc::new(entries(path, &file.get(LENGTH_BYTES..start).map_err(io)?, start, file.len())?);
        Ok(Shard::of(path.into(), entries, file))
    }

    fn of(path: PathBuf, entries: Arc<Vec<Entry>>, file: Bytes) -> Shard {
        let held = entries.iter().map(|_| OnceLock::new()).collect();
        Shard { path, entries, file, held }
    }

    /// The same file, with nothing of it in memory.
    pub(super) fn again(&self) -> Shard {
        Shard::of(self.path.clone(), self.entries.clone(), self.file.clone())
    }

    /// A tensor's bytes.
    ///
    /// # Errors
    /// [`Error::Io`] where the file is not mapped and cannot be read.
    pub(super) fn bytes(&self, entry: usize) -> Result<&[u8]> {
        let (held, (start, end)) = (&self.held[entry], self.entries[entry].range);
        if let Some(bytes) = held.get() {
            return Ok(bytes);
        }
        match self.file.get(start..end) {
            Ok(Cow::Borrowed(bytes)) => Ok(bytes),
            Ok(Cow::Owned(bytes)) => Ok(held.get_or_init(|| bytes)),
            Err(source) => Err(Error::Io { path: self.path.clone(), source }),
        }
    }

    /// Tells the system that a tensor may leave memory; reading it again brings it back.
    pub(super) fn release(&self, entry: usize) {
        let (start, end) = self.entries[entry].range;
        self.file.release(start..end);
    }
}

fn wrong(path: &Path, what: &str, expected: &str, found: &str) -> Error {
    Error::Invalid { file: path.into(), what: what.into(), expected: expected.into(), found: found.into() }
}

/// What a header says, checked one tensor after the other, so that a fault has a name. The data start at byte
/// `start` of a file of `length` bytes.
fn entries(path: &Path, header: &[u8], start: usize, length: u64) -> Result<Vec<Entry>> {
    let text = std::str::from_utf8(header)
        .map_err(|fault| wrong(path, "the header", "UTF-8", &format!("a fault: {fault}")))?;
    let Header(fields) = serde_json::from_str(text)
        .map_err(|fault| wrong(path, "the header", "a JSON object", &format!("a fault: {fault}")))?;
    let data = length - start as u64;
    let (mut seen, mut entries) = (HashSet::new(), Vec::new());
    for (name, value) in &fields {
        let what = format!("tensor '{name}'");
        if !seen.insert(name) {
            return Err(wrong(path, &what, "one of this name", "two"));
        }
        if name != "__metadata__" {
            let (dtype, shape, [begin, end]) = tensor(path, &what, value, data)?;
            entries.push(Entry { name: name.clone(), dtype, shape, range: (start + begin, start + end) });
        }
    }
    entries.sort_by_key(|entry| entry.range);
    let mut at = start;
    for entry in &entries {
        if entry.range.0 != at {
            let expected = "data that starts where the tensor before it ends";
            return Err(wrong(path, &format!("tensor '{}'", entry.name), expected, "a gap or an overlap"));
        }
        at = entry.range.1;
    }
    if at as u64 != length {
        return Err(wrong(path, "the file's length", "the end of the last tensor", "more bytes"));
    }
    Ok(entries)
}

/// A tensor's dtype, shape, and range behind the header.
fn tensor(path: &Path, what: &str, value: &Value, data: u64) -> Result<(Dtype, Vec<usize>, [usize; 2])> {
    let named = value.get("dtype").cloned().unwrap_or_default();
    let dtype = serde_json::from_value::<Dtype>(named.clone());
    let dtype = dtype.map_err(|_| wrong(path, what, "a dtype such as BF16, F16 or F32", &named.to_string()))?;
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
    if begin > end || end as u64 > data {
        let found = format!("data_offsets [{begin}, {end}]; the file is truncated or its header lies");
        return Err(wrong(path, what, &format!("data within the {data} bytes behind the header"), &found));
    }
    let values = shape.iter().try_fold(1usize, |all, length| all.checked_mul(*length));
    let Some(needed) = values.and_then(|values| values.checked_mul(dtype.bitsize())) else {
        return Err(wrong(path, what, "a shape whose size can be counted", &format!("{shape:?}")));
    };
    if needed != (end - begin) * 8 {
        let expected = format!("{} bytes for shape {shape:?} of {}", needed.div_ceil(8), named.as_str().unwrap_or("?"));
        return Err(wrong(path, what, &expected, &format!("{} bytes", end - begin)));
    }
    Ok((dtype, shape, [begin, end]))
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
