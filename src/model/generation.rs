//! `generation_config.json`: how the model's makers would have its tokens drawn.

use std::path::Path;

use serde_json::Value;

use super::config::Config;
use super::fields::Fields;
use crate::{Error, Result};

/// What a checkpoint recommends for generating. Fields that it leaves out are `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// The ids that end a text: every id that `generation_config.json`, `config.json` or the tokenizer
    /// (`eos_token`) calls one, ascending. Hugging Face transformers takes `config.json`'s only where
    /// `generation_config.json` has none, and never asks the tokenizer; but checkpoints were published whose
    /// generation file lacks the end that their chat template writes, and no text goes on behind an id that
    /// one of its files calls its end.
    pub eos: Vec<u32>,
    /// Whether tokens are drawn; otherwise the likeliest is taken (`do_sample`).
    pub sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Draw among so many of the likeliest; 0 for all.
    pub top_k: Option<u32>,
    /// Draw among the likeliest that have this probability together.
    pub top_p: Option<f32>,
    /// Draw among those with this share of the likeliest's probability.
    pub min_p: Option<f32>,
    /// Divides the positive logits of what was there before, multiplies the negative ones.
    pub repetition_penalty: Option<f32>,
}

impl Generation {
    /// Reads a checkpoint's file, which may be missing. `end` is the tokenizer's own end of a text, where
    /// there is a tokenizer that has one.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] naming the field; ids outside the vocabulary are one too.
    pub fn open(folder: &Path, config: &Config, end: Option<u32>) -> Result<Generation> {
        let file = folder.join("generation_config.json");
        match crate::disk::read(&file) {
            Ok(text) => Generation::parse(&text, &file, config, end),
            Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => Generation::parse(b"{}", &file, config, end),
            Err(source) => Err(Error::Io { path: file, source }),
        }
    }

    /// As [`Generation::open`], from the text of the file.
    ///
    /// # Errors
    /// As [`Generation::open`].
    pub fn parse(text: &[u8], file: &Path, config: &Config, end: Option<u32>) -> Result<Generation> {
        let value: Value = serde_json::from_slice(text).map_err(|fault| Error::Invalid {
            file: file.into(),
            what: "the whole".into(),
            expected: "a JSON object".into(),
            found: format!("a fault: {fault}"),
        })?;
        let fields = Fields::new(file, "", &value)?;
        let mut eos = fields.ids("eos_token_id")?;
        if let Some(id) = eos.iter().find(|id| **id >= config.vocab) {
            return Err(fields.wrong("eos_token_id", &format!("ids below {}", config.vocab), &id.to_string()));
        }
        eos.extend(config.eos.iter().copied().chain(end));
        eos.sort_unstable();
        eos.dedup();
        let weight = |name: &str, most: f64, expected: &str| match fields.weight_or_none(name)? {
            Some(found) if found > most => Err(fields.wrong(name, expected, &found.to_string())),
            found => Ok(found.map(|value| value as f32)),
        };
        Ok(Generation {
            eos,
            sample: fields.flag_or_none("do_sample")?,
            temperature: fields.weight_or_none("temperature")?.map(|value| value as f32),
            top_k: fields.count_or_none("top_k", 0, u32::MAX)?,
            top_p: weight("top_p", 1.0, "a probability from 0 to 1")?,
            min_p: weight("min_p", 1.0, "a share from 0 to 1")?,
            repetition_penalty: fields.number_or_none("repetition_penalty")?.map(|value| value as f32),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Generation> {
        parse_with(text, None)
    }

    fn parse_with(text: &str, end: Option<u32>) -> Result<Generation> {
        let config = include_bytes!("../../tests/data/configs/deepseek_v3.json");
        let config = Config::parse(config, Path::new("config.json")).expect("a model");
        Generation::parse(text.as_bytes(), Path::new("generation_config.json"), &config, end)
    }

    #[test]
    fn a_text_ends_with_every_id_that_a_file_calls_its_end() {
        for (text, end, expected) in [
            ("{}", None, &[2][..]),
            ("{}", Some(5), &[2, 5]),
            (r#"{"eos_token_id": 7}"#, None, &[2, 7]),
            (r#"{"eos_token_id": [9, 2, 7]}"#, Some(1), &[1, 2, 7, 9]),
            (r#"{"eos_token_id": null}"#, Some(2), &[2]),
        ] {
            assert_eq!(parse_with(text, end).expect(text).eos, expected, "{text}, {end:?}");
        }
    }

    #[test]
    fn what_is_left_out_is_none() {
        assert_eq!(parse("{}").expect("empty"), Generation { eos: vec![2], ..Generation::default() });
        let read =
            parse(r#"{"eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 50}"#);
        let expected = Generation {
            eos: vec![2, 7],
            sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(50),
            ..Generation::default()
        };
        assert_eq!(read.expect("as published"), expected);
    }

    #[test]
    fn faults_name_the_field() {
        for (text, part) in [
            (r#"{"eos_token_id": 320}"#, "eos_token_id: expected ids below 320, found 320"),
            (r#"{"eos_token_id": "</s>"}"#, "eos_token_id: expected a token id or a list of them"),
            (r#"{"temperature": -1}"#, "temperature: expected a number from 0 on that f32 holds, found -1"),
            (r#"{"temperature": 1e300}"#, "temperature: expected a number from 0 on that f32 holds"),
            (r#"{"top_p": 5}"#, "top_p: expected a probability from 0 to 1, found 5"),
            (r#"{"min_p": 1.5}"#, "min_p: expected a share from 0 to 1, found 1.5"),
            (r#"{"repetition_penalty": 1e-300}"#, "repetition_penalty: expected a number above 0 that f32 holds"),
            (r#"{"top_k": 0.5}"#, "top_k: expected a whole number"),
            ("[]", "expected a JSON object"),
            ("{", "a fault"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.starts_with("generation_config.json: ") && error.contains(part), "{error}");
        }
    }
}
