//! `tokenizer.json`.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::files;
use crate::{Error, Result};

/// A tokenizer. Clones share it.
#[derive(Clone, Debug)]
pub struct Tokenizer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: PathBuf,
    tokenizer: tokenizers::Tokenizer,
    /// What begins each text, where the configuration and not the tokenizer's own file says so.
    begin: Option<u32>,
    vocabulary: u32,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. `config` is the object of `tokenizer_config.json`: where `add_bos_token` is
    /// true, each text starts with `bos_token`, also where the file's post-processor adds none (DeepSeek-V3).
    ///
    /// # Errors
    /// Names the file, and what is wrong with it.
    pub fn load(file: &Path, config: &Map<String, Value>) -> Result<Tokenizer> {
        let invalid = |what: &str, expected: &str, found: String| Error::Invalid {
            file: file.to_path_buf(),
            what: what.into(),
            expected: expected.into(),
            found,
        };
        let Some(text) = files::text(file)? else {
            let expected = "tokenizer.json (other formats can be converted with Hugging Face transformers)";
            return Err(invalid("the tokenizer", expected, "no such file".into()));
        };
        let listed = match serde_json::from_str::<Listed>(&text) {
            Ok(listed) => listed.added_tokens,
            // The crate panics over some texts that are no JSON: say what is wrong with them.
            Err(_) => serde_json::from_str::<serde::de::IgnoredAny>(&text)
                .map(|_| Vec::new())
                .map_err(|error| invalid("its text", "a JSON object", error.to_string()))?,
        };
        let mut tokenizer = guarded(|| tokenizers::Tokenizer::from_bytes(text))
            .map_err(|error| invalid("the tokenizer", "a tokenizer of Hugging Face", error))?;
        for Added { id, content } in listed {
            if let Some(read) = tokenizer.token_to_id(&content).filter(|read| *read != id) {
                log::warn!(
                    "{}: added_tokens: '{content}' has the id {id} there, but becomes {read}, as in transformers",
                    file.display()
                );
            }
        }
        // These are for training batches: a prompt is neither cut nor filled up.
        let _ = tokenizer.with_truncation(None).map_err(|error| invalid("truncation", "none", error.to_string()))?;
        tokenizer.with_padding(None);
        let mut begin = None;
        if config.get("add_bos_token") == Some(&Value::Bool(true)) {
            if let Some(token) = files::token(config, "bos_token") {
                let missing = || invalid("bos_token of tokenizer_config.json", "one of its tokens", token.into());
                begin = Some(tokenizer.token_to_id(token).ok_or_else(missing)?);
            }
        }
        let vocabulary = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id.saturating_add(1));
        Ok(Tokenizer(Arc::new(Inner { file: file.to_path_buf(), tokenizer, begin, vocabulary })))
    }

    /// The file it was read from.
    pub fn file(&self) -> &Path {
        &self.0.file
    }

    /// One more than its greatest id.
    pub fn vocabulary(&self) -> u32 {
        self.0.vocabulary
    }

    /// The id of a token's exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// The ids of a text. Special tokens that stand in it by name become their ids. With `special` also those
    /// that the tokenizer puts around a text.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the tokenizer cannot express the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encode = || self.0.tokenizer.encode_fast(text, special);
        let encoding = guarded(encode).map_err(|error| self.fault("a text", error))?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some(begin) = self.0.begin.filter(|begin| special && ids.first() != Some(begin)) {
            ids.insert(0, begin);
        }
        Ok(ids)
    }

    /// The text of ids, without special tokens; bytes that are no UTF-8 become U+FFFD, and ids that the
    /// tokenizer does not have nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the tokenizer's decoder refuses them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.0.tokenizer.decode(ids, true)).map_err(|error| self.fault("token ids", error))
    }

    fn fault(&self, what: &str, found: String) -> Error {
        Error::Invalid { file: self.0.file.clone(), what: what.into(), expected: "something it can turn".into(), found }
    }
}

/// What a file says of tokens beside its vocabulary.
#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

thread_local! {
    /// This thread's panics are caught and told.
    static TOLD: Cell<bool> = const { Cell::new(false) };
}

/// What the crate gives. It panics over some files that it should refuse, which is the file's fault and no end
/// of the process, nor worth a trace of the crate's.
fn guarded<T, E: std::fmt::Display>(run: impl FnOnce() -> std::result::Result<T, E>) -> std::result::Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !TOLD.get() {
                usual(panic);
            }
        }));
    });
    TOLD.set(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    TOLD.set(false);
    match result {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("what the tokenizers crate fails on".into()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    fn load(name: &str, tokenizer: &Value, config: Value) -> Result<Tokenizer> {
        let folder = std::env::temp_dir().join(format!("lamina-tokenizer-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("tokenizer.json");
        std::fs::write(&file, tokenizer.to_string()).unwrap();
        let loaded = Tokenizer::load(&file, config.as_object().unwrap());
        std::fs::remove_dir_all(&folder).unwrap();
        loaded
    }

    /// The file of a tokenizer whose tokens are the 256 bytes, and `<s>` with the id 256.
    pub(in crate::text) fn byte_level_json() -> Value {
        // GPT-2's letters for bytes: printable ones stand for themselves, the others from U+0100 on.
        let mut other = 0x100;
        let mut vocabulary = Map::new();
        for byte in 0..=255u8 {
            let own = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let letter = if own { char::from(byte) } else { char::from_u32(other).unwrap() };
            other += u32::from(!own);
            vocabulary.insert(letter.to_string(), byte.into());
        }
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        json!({
            "version": "1.0",
            "added_tokens": [{"id": 256, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []}
        })
    }

    pub(in crate::text) fn byte_level() -> Tokenizer {
        load("bytes", &byte_level_json(), json!({})).unwrap()
    }

    /// As Llama's: spaces as U+2581, unknown characters as bytes.
    pub(in crate::text) fn sentencepiece() -> Tokenizer {
        let vocabulary = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁world": 4, "<0xE2>": 5, "<0x82>": 6,
            "<0xAC>": 7, "low": 8});
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}
            ]},
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocabulary, "merges": []}
        });
        load("pieces", &tokenizer, json!({})).unwrap()
    }

    #[test]
    fn texts_become_ids_and_come_back() {
        let tokenizer = byte_level();
        for text in ["", "plain", " two  spaces\n", "é €😀"] {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(ids.len(), text.len());
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
        assert_eq!(tokenizer.vocabulary(), 257);
        assert_eq!(tokenizer.encode("<s>a", false).unwrap(), [256, 97]);
        assert_eq!(tokenizer.decode(&[256, 97, 9999]).unwrap(), "a");
    }

    #[test]
    fn the_configuration_puts_the_begin_of_sentence_before_a_text() {
        for token in [json!("<s>"), json!({"__type": "AddedToken", "content": "<s>"})] {
            let config = json!({"add_bos_token": true, "bos_token": token});
            let tokenizer = load("begin", &byte_level_json(), config).unwrap();
            assert_eq!(tokenizer.encode("a", true).unwrap(), [256, 97]);
            assert_eq!(tokenizer.encode("<s>a", true).unwrap(), [256, 97]);
            assert_eq!(tokenizer.encode("a", false).unwrap(), [97]);
        }
        let error = load("no-begin", &byte_level_json(), json!({"add_bos_token": true, "bos_token": "<x>"}));
        assert!(error.unwrap_err().to_string().ends_with("expected one of its tokens, found <x>"));
    }

    #[test]
    fn a_bad_file_is_named() {
        let missing = Tokenizer::load("nowhere/tokenizer.json".as_ref(), &Map::new()).unwrap_err().to_string();
        assert!(missing.starts_with("nowhere/tokenizer.json: the tokenizer: expected"), "{missing}");
        let bad = load("bad", &json!({"model": 3}), json!({})).unwrap_err().to_string();
        assert!(bad.contains("tokenizer.json: the tokenizer: expected a tokenizer of Hugging Face, found"), "{bad}");
    }
}
