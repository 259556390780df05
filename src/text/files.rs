//! The small JSON files beside a tokenizer.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The text of a file; `None` where there is no such file.
pub(super) fn text(path: &Path) -> Result<Option<String>> {
    match crate::disk::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io { path: path.to_path_buf(), source }),
    }
}

/// The object in a JSON file; empty where there is no such file.
pub(super) fn object(path: &Path) -> Result<Map<String, Value>> {
    let Some(text) = text(path)? else { return Ok(Map::new()) };
    let (expected, what) = ("a JSON object".to_string(), "its text".to_string());
    let found = match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => return Ok(object),
        Ok(_) => "another JSON value".to_string(),
        Err(error) => error.to_string(),
    };
    Err(Error::Invalid { file: path.to_path_buf(), what, expected, found })
}

/// The text of a token in a configuration: a string, or an object with `content`.
pub(super) fn token<'a>(config: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    let value = config.get(name)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}
