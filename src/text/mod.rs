//! Text to token ids and back: tokenizer, chat template, and text that comes token by token.
//!
//! [`Text::load`] reads what a folder in Hugging Face layout says of text. A conversation becomes a
//! prompt by [`Text::chat`], a text by [`Text::encode`]; [`Text::stream`] turns the ids that a model
//! gives, one by one, into pieces of text that can be printed at once:
//!
//! ```no_run
//! use lamina::text::{ChatOptions, Message, Text};
//!
//! # fn main() -> lamina::Result<()> {
//! let text = Text::load("model".as_ref())?;
//! let prompt = text.chat(&[Message::user("Why is the sky blue?")], &ChatOptions::default())?;
//! let mut stream = text.stream(&prompt, &["\nUser:".to_string()])?;
//! # let next = |_: &[u32]| 1;
//! let mut ids = prompt;
//! while !stream.stopped() {
//!     let id = next(&ids); // the model's choice
//!     if text.end() == Some(id) {
//!         break;
//!     }
//!     print!("{}", stream.push(id)?);
//!     ids.push(id);
//! }
//! print!("{}", stream.finish()?);
//! # Ok(())
//! # }
//! ```

mod files;
mod json;
mod stream;
mod template;
mod tokenizer;

use std::path::Path;

use serde_json::Value;

pub use stream::{Detokenizer, Stops, TextStream};
pub use template::{ChatOptions, ChatTemplate, Message};
pub use tokenizer::Tokenizer;

use crate::{Error, Result};

/// What a model's folder says of text.
#[derive(Clone, Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    end: Option<u32>,
}

impl Text {
    /// Reads `tokenizer.json`, and where they are there `tokenizer_config.json`, `chat_template.jinja` and
    /// `chat_template.json`.
    ///
    /// # Errors
    /// Names the file and the field that is missing or no good.
    pub fn load(folder: &Path) -> Result<Text> {
        let config = files::object(&folder.join("tokenizer_config.json"))?;
        let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"), &config)?;
        let template = ChatTemplate::load(folder, &config)?;
        let end = files::token(&config, "eos_token").and_then(|token| tokenizer.id(token));
        Ok(Text { tokenizer, template, end })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template, where the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The tokenizer's own end of a text (`eos_token`), one of those of `model::generation::Generation`.
    pub fn end(&self) -> Option<u32> {
        self.end
    }

    /// Holds the tokenizer against the model's vocabulary.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the tokenizer has an id that the model has not.
    pub fn check(&self, vocabulary: u32) -> Result<()> {
        let found = self.tokenizer.vocabulary();
        if found <= vocabulary {
            return Ok(());
        }
        Err(Error::Invalid {
            file: self.tokenizer.file().to_path_buf(),
            what: "its ids".into(),
            expected: format!("below the model's vocabulary of {vocabulary}"),
            found: format!("up to {}", found - 1),
        })
    }

    /// The ids of a text, after the tokens that the tokenizer puts before it (such as the begin of sentence).
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, true)
    }

    /// The ids of a conversation, by the model's chat template.
    ///
    /// # Errors
    /// [`Error::Invalid`] without a template, and where the template refuses the messages.
    pub fn chat(&self, messages: &[Message], options: &ChatOptions) -> Result<Vec<u32>> {
        let messages = messages.iter().map(Message::to_json).collect::<Vec<Value>>();
        let Some(template) = &self.template else {
            return Err(Error::Invalid {
                file: self.tokenizer.file().with_file_name("tokenizer_config.json"),
                what: "chat_template".into(),
                expected: "a template, here, in chat_template.jinja or in chat_template.json".into(),
                found: "none: the model was not made for conversations".into(),
            });
        };
        // The template writes the special tokens itself.
        self.tokenizer.encode(&template.render(&messages, options)?, false)
    }

    /// A stream of text for the ids that follow `prompt`, up to the first of the strings `stops`.
    ///
    /// # Errors
    /// [`Error::Usage`] for an empty stop string.
    pub fn stream(&self, prompt: &[u32], stops: &[String]) -> Result<TextStream> {
        Ok(TextStream::new(Detokenizer::new(self.tokenizer.clone(), prompt), Stops::new(stops)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A folder with a tokenizer of bytes and the given files.
    struct Folder(std::path::PathBuf);

    impl Folder {
        fn new(name: &str, files: &[(&str, Value)]) -> Folder {
            let folder = std::env::temp_dir().join(format!("lamina-text-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            let tokenizer = tokenizer::tests::byte_level_json();
            for (name, value) in [("tokenizer.json", tokenizer)].iter().chain(files) {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                std::fs::write(folder.join(name), text).unwrap();
            }
            Folder(folder)
        }

        fn load(&self) -> Result<Text> {
            Text::load(&self.0)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_end_of_a_text_is_the_tokenizer_s() {
        let end = |token: Value| {
            Folder::new("end", &[("tokenizer_config.json", json!({"eos_token": token}))]).load().map(|text| text.end())
        };
        assert_eq!(Folder::new("no-end", &[]).load().unwrap().end(), None);
        assert_eq!(end(json!({"content": "<s>"})).unwrap(), Some(256));
        assert_eq!(end(json!("<s>")).unwrap(), Some(256));
        assert_eq!(end(json!("<unknown>")).unwrap(), None);
        assert_eq!(end(json!(null)).unwrap(), None);
        let error = Folder::new("bad", &[("tokenizer_config.json", json!("{"))]).load().unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: its text: expected a JSON object, found"), "{error}");
    }

    #[test]
    fn a_conversation_becomes_ids_by_the_first_template_there_is() {
        let prompt = |files: &[(&str, Value)]| {
            let text = Folder::new("chat", files).load()?;
            let ids = text.chat(&[Message::user("hi")], &ChatOptions::default())?;
            text.tokenizer().decode(&ids)
        };
        let config =
            ("tokenizer_config.json", json!({"add_bos_token": true, "bos_token": "<s>", "chat_template": "C"}));
        let own = ("chat_template.json", json!({"chat_template": "J{{ messages[0].content }}"}));
        assert_eq!(prompt(std::slice::from_ref(&config)).unwrap(), "C");
        assert_eq!(prompt(&[config.clone(), own.clone()]).unwrap(), "Jhi");
        assert_eq!(prompt(&[config, own, ("chat_template.jinja", json!("F"))]).unwrap(), "F");
        let error = prompt(&[]).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: chat_template: expected a template"), "{error}");
    }

    #[test]
    fn a_tokenizer_larger_than_the_vocabulary_is_refused() {
        let text = Folder::new("large", &[]).load().unwrap();
        assert!(text.check(257).is_ok() && text.check(1000).is_ok());
        let error = text.check(256).unwrap_err().to_string();
        assert!(error.ends_with("its ids: expected below the model's vocabulary of 256, found up to 256"), "{error}");
    }

    #[test]
    fn a_stream_ends_before_a_stop_string() {
        let text = Folder::new("stream", &[]).load().unwrap();
        let mut stream = text.stream(&[], &["€!".into()]).unwrap();
        let mut shown = String::new();
        for id in text.encode("a €b €!c").unwrap() {
            shown += &stream.push(id).unwrap();
        }
        assert!(stream.stopped());
        assert_eq!(shown + &stream.finish().unwrap(), "a €b ");
    }

    /// The published file is too large to keep here.
    #[test]
    #[ignore = "needs DeepSeek-V3's tokenizer: LAMINA_TOKENIZER=FOLDER"]
    fn deepseeks_own_tokenizer_and_template() {
        let folder = std::env::var("LAMINA_TOKENIZER").expect("LAMINA_TOKENIZER names a folder");
        let text = Text::load(folder.as_ref()).unwrap();
        let ids = text.encode("Hello, world! 你好😀 1234567").unwrap();
        assert_eq!(ids[..5], [0, 19923, 14, 2058, 3]);
        let mut stream = text.stream(&[], &[]).unwrap();
        let shown: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert_eq!(shown, "Hello, world! 你好😀 1234567");
        let talk = [Message::system("S"), Message::user("Q"), Message::assistant("A"), Message::user("R")];
        let ids = text.chat(&talk, &ChatOptions::default()).unwrap();
        let (user, assistant) = (128_803, 128_804);
        assert_eq!((ids[0], ids[2], ids[4], *ids.last().unwrap()), (0, user, assistant, assistant));
        assert_eq!((text.end(), ids[6]), (Some(1), 1));
        text.check(129_280).unwrap();
    }
}
