//! A checkpoint's folder in Hugging Face layout: one `model.safetensors`, or shards with an index.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::shard::{Entry, Shard};
use crate::disk;
use crate::{Error, Result};

const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How a tensor's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// The upper half of f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// f32.
    F32,
    /// Another, which lamina does not read.
    Other(safetensors::tensor::Dtype),
}

impl Dtype {
    /// Bytes of a number, of those that lamina reads.
    pub fn bytes(self) -> Option<usize> {
        match self {
            Dtype::Bf16 | Dtype::F16 => Some(2),
            Dtype::F32 => Some(4),
            Dtype::Other(_) => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Dtype::Bf16 => f.write_str("BF16"),
            Dtype::F16 => f.write_str("F16"),
            Dtype::F32 => f.write_str("F32"),
            Dtype::Other(dtype) => write!(f, "{dtype:?}"),
        }
    }
}

/// A tensor in a checkpoint.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Its name.
    pub name: &'a str,
    /// How its numbers are stored.
    pub dtype: Dtype,
    /// Its shape; a matrix is `[out, in]`.
    pub shape: &'a [usize],
    /// The file it stands in.
    pub file: &'a Path,
    /// Its size, bytes.
    pub size: usize,
    shard: &'a Shard,
    entry: usize,
}

impl<'a> TensorView<'a> {
    /// Its numbers, row-major, little-endian, at no alignment.
    ///
    /// # Errors
    /// [`Error::Io`] in a browser, where a file is read only now.
    pub fn bytes(&self) -> Result<&'a [u8]> {
        self.shard.bytes(self.entry)
    }
}

impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {} {:?} in {}", self.name, self.dtype, self.shape, self.file.display())
    }
}

/// A folder's tensors: nothing is read before it is asked for. In a browser what was read is held until the
/// checkpoint is dropped: [`Checkpoint::again`].
pub struct Checkpoint {
    folder: PathBuf,
    source: PathBuf,
    shards: Vec<Shard>,
    /// Shard and entry of each name.
    names: Arc<BTreeMap<String, (usize, usize)>>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or all files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] naming the file and the tensor, what was expected and found.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        let (whole, index) = (folder.join(WHOLE), folder.join(INDEX));
        if disk::is_file(&whole) {
            let shards = vec![Shard::open(&whole)?];
            let names = Arc::new(names(&shards)?);
            return Ok(Checkpoint { folder: folder.into(), source: whole, shards, names });
        }
        if !disk::is_file(&index) {
            let found = contents(folder)?;
            let expected = format!("{WHOLE} or {INDEX}");
            return Err(Error::Invalid { file: folder.into(), what: "the folder".into(), expected, found });
        }
        let listed = read_index(&index)?;
        let mut files: Vec<&str> = listed.values().map(String::as_str).collect();
        files.sort_unstable();
        files.dedup();
        let shards = files.iter().map(|file| open_shard(&index, folder, file, &listed)).collect::<Result<Vec<_>>>()?;
        let names = Arc::new(names(&shards)?);
        agree(&index, &listed, &shards, &names)?;
        Ok(Checkpoint { folder: folder.into(), source: index, shards, names })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file that says which tensors there are.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, place) = self.names.get_key_value(name)?;
        Some(self.view(name, *place))
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.names.iter().map(|(name, place)| self.view(name, *place))
    }

    /// Lets a tensor's pages leave memory. It can still be read.
    pub fn release(&self, name: &str) {
        if let Some((shard, entry)) = self.names.get(name) {
            self.shards[*shard].release(*entry);
        }
    }

    /// The same checkpoint, with nothing of it in memory.
    pub fn again(&self) -> Checkpoint {
        Checkpoint {
            folder: self.folder.clone(),
            source: self.source.clone(),
            shards: self.shards.iter().map(Shard::again).collect(),
            names: self.names.clone(),
        }
    }

    fn view<'a>(&'a self, name: &'a str, (shard, entry): (usize, usize)) -> TensorView<'a> {
        let shard = &self.shards[shard];
        let Entry { dtype, shape, range, .. } = &shard.entries[entry];
        let dtype = match *dtype {
            safetensors::tensor::Dtype::BF16 => Dtype::Bf16,
            safetensors::tensor::Dtype::F16 => Dtype::F16,
            safetensors::tensor::Dtype::F32 => Dtype::F32,
            other => Dtype::Other(other),
        };
        TensorView { name, dtype, shape, file: &shard.path, size: range.1 - range.0, shard, entry }
    }
}

fn wrong(file: &Path, what: String, expected: &str, found: String) -> Error {
    Error::Invalid { file: file.into(), what, expected: expected.into(), found }
}

/// What a folder without a checkpoint holds, for its error.
fn contents(folder: &Path) -> Result<String> {
    let mut names = disk::names(folder).map_err(|source| Error::Io { path: folder.into(), source })?;
    names.sort_unstable();
    let more = if names.len() > 8 { ", ..." } else { "" };
    names.truncate(8);
    Ok(if names.is_empty() { "nothing in it".into() } else { format!("{}{more}", names.join(", ")) })
}

/// Names of tensors with their shards.
fn names(shards: &[Shard]) -> Result<BTreeMap<String, (usize, usize)>> {
    let mut names = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        for (j, entry) in shard.entries.iter().enumerate() {
            if let Some((other, _)) = names.insert(entry.name.clone(), (i, j)) {
                let found = format!("one in {} too", file_name(&shards[other].path));
                return Err(wrong(&shard.path, format!("tensor '{}'", entry.name), "one of this name", found));
            }
        }
    }
    Ok(names)
}

/// `weight_map` of an index: tensor to file.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    let text = disk::read(index).map_err(|source| Error::Io { path: index.into(), source })?;
    let value: Value = serde_json::from_slice(&text)
        .map_err(|fault| wrong(index, "the whole".into(), "a JSON object", format!("a fault: {fault}")))?;
    let Some(Value::Object(map)) = value.get("weight_map") else {
        let found = value.get("weight_map").map_or("none", |_| "another kind of value");
        return Err(wrong(index, "weight_map".into(), "an object of tensors and files", found.into()));
    };
    let mut listed = BTreeMap::new();
    for (tensor, file) in map {
        let plain = file.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file));
        let Some(file) = plain else {
            let what = format!("weight_map, tensor '{tensor}'");
            return Err(wrong(index, what, "the name of a file in this folder", file.to_string()));
        };
        listed.insert(tensor.clone(), file.to_string());
    }
    match listed.is_empty() {
        true => Err(wrong(index, "weight_map".into(), "tensors", "none".into())),
        false => Ok(listed),
    }
}

fn open_shard(index: &Path, folder: &Path, file: &str, listed: &BTreeMap<String, String>) -> Result<Shard> {
    let path = folder.join(file);
    if !disk::is_file(&path) {
        let tensor = listed.iter().find(|(_, at)| *at == file).map(|(tensor, _)| tensor.as_str()).unwrap_or_default();
        let what = format!("tensor '{tensor}'");
        return Err(wrong(index, what, &format!("the file {file}"), "no such file in the folder".into()));
    }
    Shard::open(&path)
}

/// The index and the files say the same.
fn agree(
    index: &Path,
    listed: &BTreeMap<String, String>,
    shards: &[Shard],
    names: &BTreeMap<String, (usize, usize)>,
) -> Result<()> {
    for (tensor, file) in listed {
        let found = names.get(tensor).map(|(shard, _)| file_name(&shards[*shard].path));
        if found.as_ref() != Some(file) {
            let found = found.map_or("no such tensor in any file".into(), |found| format!("it in {found}"));
            return Err(wrong(index, format!("tensor '{tensor}'"), &format!("it in {file}"), found));
        }
    }
    match names.iter().find(|(tensor, _)| !listed.contains_key(*tensor)) {
        Some((tensor, (shard, _))) => {
            let (what, found) = (format!("tensor '{tensor}'"), "no such tensor in the index".to_string());
            Err(wrong(&shards[*shard].path, what, &format!("a line in {INDEX}"), found))
        }
        None => Ok(()),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
