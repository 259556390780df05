//! The fields of a JSON object in a configuration: read with their type and range, each fault named.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// One JSON object of a configuration. A field that is `null` counts as missing.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    file: &'a Path,
    /// Where the object stands in the file: empty, or `text_config.`.
    path: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a Path, path: &'a str, value: &'a Value) -> Result<Fields<'a>> {
        let whole = Fields { file, path: "", map: EMPTY.get_or_init(Map::new) };
        match value {
            Value::Object(map) => Ok(Fields { file, path, map }),
            other => Err(whole.wrong(path.trim_end_matches('.'), "a JSON object", &shown(other))),
        }
    }

    pub(super) fn file(&self) -> &'a Path {
        self.file
    }

    /// How the fields of the object in field `name` are called: `rope_scaling.`.
    pub(super) fn path_of(&self, name: &str) -> String {
        format!("{}{name}.", self.path)
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there, be it `null`.
    pub(super) fn names(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &'a String> {
        self.map.keys()
    }

    /// The error for a field that is not what it must be.
    pub(super) fn wrong(&self, name: &str, expected: &str, found: &str) -> Error {
        let what = match (self.path, name) {
            ("", "") => "the whole".into(),
            (path, name) => format!("{path}{name}"),
        };
        Error::Invalid { file: self.file.into(), what, expected: expected.into(), found: found.into() }
    }

    /// The error for something that lamina does not compute.
    pub(super) fn unsupported(&self, feature: String) -> Error {
        Error::Unsupported { file: self.file.into(), feature }
    }

    fn read<T>(&self, name: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(name, expected, &shown(value)))
    }

    fn required<T>(&self, name: &str, expected: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.wrong(name, expected, if self.names(name) { "null" } else { "none" }))
    }

    /// A whole number from `least` to `most`.
    pub(super) fn count(&self, name: &str, least: u32, most: u32) -> Result<u32> {
        let found = self.count_or_none(name, least, most)?;
        self.required(name, &format!("a whole number from {least} to {most}"), found)
    }

    pub(super) fn count_or_none(&self, name: &str, least: u32, most: u32) -> Result<Option<u32>> {
        let expected = format!("a whole number from {least} to {most}");
        let within = |n: u64| u32::try_from(n).ok().filter(|n| (least..=most).contains(n));
        self.read(name, &expected, |value| value.as_u64().and_then(within))
    }

    /// A finite number above zero.
    pub(super) fn number(&self, name: &str) -> Result<f64> {
        let found = self.number_or_none(name)?;
        self.required(name, ABOVE_0, found)
    }

    pub(super) fn number_or_none(&self, name: &str) -> Result<Option<f64>> {
        self.read(name, ABOVE_0, positive)
    }

    /// As [`Fields::number_or_none`], or 0.
    pub(super) fn weight_or_none(&self, name: &str) -> Result<Option<f64>> {
        self.read(name, FROM_0, |value| value.as_f64().filter(|n| *n >= 0.0 && (*n as f32).is_finite()))
    }

    pub(super) fn weight(&self, name: &str) -> Result<f64> {
        let found = self.weight_or_none(name)?;
        self.required(name, FROM_0, found)
    }

    /// Finite numbers above zero.
    pub(super) fn numbers(&self, name: &str, length: usize) -> Result<Vec<f64>> {
        let expected = format!("a list of {length} numbers above 0 that f32 holds");
        let list = |value: &Value| value.as_array()?.iter().map(positive).collect::<Option<Vec<f64>>>();
        let found = self.read(name, &expected, list)?;
        let found = self.required(name, &expected, found)?;
        if found.len() != length {
            return Err(self.wrong(name, &expected, &found.len().to_string()));
        }
        Ok(found)
    }

    pub(super) fn flag_or_none(&self, name: &str) -> Result<Option<bool>> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub(super) fn flag(&self, name: &str) -> Result<bool> {
        let found = self.flag_or_none(name)?;
        self.required(name, "true or false", found)
    }

    pub(super) fn text_or_none(&self, name: &str) -> Result<Option<&'a str>> {
        self.read(name, "a string", Value::as_str)
    }

    pub(super) fn list_or_none(&self, name: &str) -> Result<Option<&'a Vec<Value>>> {
        self.read(name, "a list", Value::as_array)
    }

    /// A token id, or a list of them.
    pub(super) fn ids(&self, name: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = |value: &Value| match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<u32>>>(),
            value => id(value).map(|id| vec![id]),
        };
        Ok(self.read(name, "a token id or a list of them", ids)?.unwrap_or_default())
    }

    /// One of the listed strings, if the field is there.
    pub(super) fn one_of(&self, name: &str, known: &[&str]) -> Result<Option<&'a str>> {
        match self.text_or_none(name)? {
            Some(found) if !known.contains(&found) => {
                let known: Vec<String> = known.iter().map(|value| format!("'{value}'")).collect();
                Err(self.wrong(name, &known.join(" or "), &format!("'{found}'")))
            }
            found => Ok(found),
        }
    }

    /// Refuses a flag that says other than `must`; missing is `must`.
    pub(super) fn always(&self, name: &str, must: bool) -> Result<()> {
        match self.flag_or_none(name)? {
            Some(found) if found != must => Err(self.wrong(name, &must.to_string(), &found.to_string())),
            _ => Ok(()),
        }
    }
}

static EMPTY: std::sync::OnceLock<Map<String, Value>> = std::sync::OnceLock::new();

const ABOVE_0: &str = "a number above 0 that f32 holds";
const FROM_0: &str = "a number from 0 on that f32 holds";

fn positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|n| *n as f32 > 0.0 && (*n as f32).is_finite())
}

/// A value as it stands in the file, cut to a line.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text,
    }
}
