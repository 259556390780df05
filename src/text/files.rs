//! The small JSON files beside a tokenizer.

use std::path::Path;

use serde_json::{Map, Value};

use super::Tokenizer;
use crate::{Error, Result};

/// The text of a file; `None` where there is no such file.
pub(super) fn text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
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

/// The ids that end a text: `eos_token_id` of `generation_config.json`, else of `config.json`, and the
/// tokenizer's own `eos_token`.
pub(super) fn ends(folder: &Path, config: &Map<String, Value>, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut ends = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        let path = folder.join(name);
        let object = object(&path)?;
        let wrapped = object.get("text_config").and_then(|text| text.get("eos_token_id"));
        let Some(value) = object.get("eos_token_id").or(wrapped).filter(|value| !value.is_null()) else { continue };
        ends = ids(value).ok_or_else(|| Error::Invalid {
            file: path,
            what: "eos_token_id".into(),
            expected: "a token id or a list of them".into(),
            found: value.to_string(),
        })?;
        break;
    }
    ends.extend(token(config, "eos_token").and_then(|token| tokenizer.id(token)));
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    match value {
        Value::Array(values) => values.iter().map(id).collect(),
        one => Some(vec![id(one)?]),
    }
}
