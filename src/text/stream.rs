//! Text that comes token by token: whole characters, up to a stop string.

use super::Tokenizer;
use crate::{Error, Result};

/// Turns ids into text one by one. A piece never ends within a character.
///
/// An id's text depends on those before it (spaces, bytes of one character), so a few of these are
/// turned again each time, and what comes new is the piece.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// The last ids: those that were given out, and the others.
    ids: Vec<u32>,
    /// How many of `ids` were given out.
    given: usize,
}

/// How many ids of the prompt go before the first: enough for the character and the word it stands in.
const CONTEXT: usize = 6;

impl Detokenizer {
    /// Goes on after the ids of a prompt.
    pub fn new(tokenizer: Tokenizer, prompt: &[u32]) -> Detokenizer {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        Detokenizer { tokenizer, given: ids.len(), ids }
    }

    /// The text that this id completes: nothing for a part of a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let all = self.tokenizer.decode(&self.ids)?;
        if all.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.take(&all)
    }

    /// What is left of a character that never was completed, as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let all = self.tokenizer.decode(&self.ids)?;
        self.take(&all)
    }

    fn take(&mut self, all: &str) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.given])?;
        // A prompt may end within a character, which then is completed here.
        let before = before.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let piece = all.strip_prefix(before).unwrap_or_default().to_string();
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(piece)
    }
}

/// Ends a text at the first of some strings, which may come in several pieces.
#[derive(Clone, Debug)]
pub struct Stops {
    stops: Vec<String>,
    /// Text that may be the start of a stop string.
    held: String,
    stopped: bool,
}

impl Stops {
    /// Stops at the first of `stops`.
    ///
    /// # Errors
    /// [`Error::Usage`] for an empty string, which every text starts with.
    pub fn new(stops: &[String]) -> Result<Stops> {
        if stops.iter().any(String::is_empty) {
            let (what, expected) = ("stop".to_string(), "a string to stop at".to_string());
            return Err(Error::Usage { what, expected, found: "an empty string".into() });
        }
        Ok(Stops { stops: stops.to_vec(), held: String::new(), stopped: false })
    }

    /// What can be shown after this piece: all before a stop string, or before what may become one.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let may_start = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let starts = self.held.char_indices().map(|(at, _)| at);
        let at = starts.into_iter().find(may_start).unwrap_or(self.held.len());
        let rest = self.held.split_off(at);
        std::mem::replace(&mut self.held, rest)
    }

    /// True once a stop string came.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back, when the text ends without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Whole characters of the ids that a model gives, up to a stop string.
#[derive(Clone, Debug)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: Stops,
}

impl TextStream {
    /// Puts the two together.
    pub fn new(detokenizer: Detokenizer, stops: Stops) -> TextStream {
        TextStream { detokenizer, stops }
    }

    /// The text to show after this id; may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        let piece = self.detokenizer.push(id)?;
        Ok(self.stops.push(&piece))
    }

    /// True once a stop string came: no text follows.
    pub fn stopped(&self) -> bool {
        self.stops.stopped()
    }

    /// The text to show when no id follows.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let last = self.detokenizer.finish()?;
        let shown = self.stops.push(&last);
        Ok(shown + &self.stops.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::{byte_level, sentencepiece};

    fn pieces(mut stream: Detokenizer, ids: &[u32]) -> Vec<String> {
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    #[test]
    fn a_character_of_several_tokens_comes_whole() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("hé €😀!", false).unwrap();
        let pieces = pieces(Detokenizer::new(tokenizer, &[]), &ids);
        assert_eq!(pieces, ["h", "", "é", " ", "", "", "€", "", "", "", "😀", "!", ""]);
    }

    #[test]
    fn a_character_that_is_never_completed_comes_as_a_replacement_at_the_end() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("a😀", false).unwrap();
        let pieces = pieces(Detokenizer::new(tokenizer, &[]), &ids[..4]);
        assert_eq!(pieces.concat(), "a\u{FFFD}");
        assert_eq!(pieces[1..4], ["", "", ""]);
    }

    #[test]
    fn byte_fallback_and_spaces_between_words_are_kept() {
        let tokenizer = sentencepiece();
        let ids = [4, 5, 6, 7, 8, 4]; // world, the three bytes of €, low, world
        assert_eq!(pieces(Detokenizer::new(tokenizer.clone(), &[]), &ids).concat(), "world€low world");
        // After a prompt the first word keeps its space.
        assert_eq!(pieces(Detokenizer::new(tokenizer, &[4]), &ids[..1]).concat(), " world");
    }

    #[test]
    fn a_stop_string_over_several_pieces_is_cut_off() {
        let mut stops = Stops::new(&["END".into(), "\n\n".into()]).unwrap();
        assert_eq!(stops.push("one E"), "one ");
        assert_eq!(stops.push("N"), "");
        assert_eq!(stops.push("Q"), "ENQ");
        assert_eq!(stops.push("é\n"), "é");
        assert_eq!(stops.push("\nmore"), "");
        assert!(stops.stopped());
        assert_eq!(stops.push("more") + &stops.finish(), "");
    }

    #[test]
    fn the_earliest_stop_string_counts_and_what_was_held_comes_at_the_end() {
        let mut stops = Stops::new(&["b".into(), "ab".into()]).unwrap();
        assert_eq!(stops.push("xaby"), "x");
        let mut stops = Stops::new(&["aab".into()]).unwrap();
        assert_eq!(stops.push("aaa"), "a");
        assert_eq!(stops.finish(), "aa");
        assert!(Stops::new(&[String::new()]).unwrap_err().to_string().starts_with("stop: expected"));
    }
}
