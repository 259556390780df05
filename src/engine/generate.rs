//! Text of one sequence, token by token: behind the first, the next step is submitted while the last one runs.

use futures::Stream;
use serde::Serialize;

use super::pages::SequenceId;
use super::step::Engine;
use crate::error::{Error, Result};
use crate::gpu::Reading;
use crate::kernels::sample::Record;

/// What is to be generated.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Of the random numbers; the same seed gives the same text.
    pub seed: u32,
    /// The most tokens.
    pub max_tokens: usize,
    /// Ids that end the text; they are part of it.
    pub end: Vec<u32>,
}

/// Why a text ended; its name is what OpenAI's API calls `finish_reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Finish {
    /// One of the tokens that end it, or a text to stop before.
    #[serde(rename = "stop")]
    Stop,
    /// The most tokens.
    #[serde(rename = "length")]
    Most,
    /// No room in the context.
    #[serde(rename = "length")]
    Context,
    /// The user.
    #[serde(rename = "abort")]
    Abort,
}

/// A sequence that is being continued.
struct Continuation<'a> {
    engine: &'a mut Engine,
    id: SequenceId,
    request: Request,
    /// Tokens still to come, that of the pending record counted.
    left: usize,
    pending: Option<Reading>,
}

impl Continuation<'_> {
    /// Whether the context holds another token.
    fn has_room(&self) -> bool {
        self.engine.tokens(self.id) < self.engine.options().context as usize
    }
}

impl Engine {
    /// Appends `prompt` to a sequence and samples what follows. The stream ends after one of the request's
    /// end ids, after its most tokens, or where the context is full. Afterwards the cache holds all tokens
    /// of the text but the last one.
    ///
    /// # Errors
    /// In the stream: as [`Engine::feed`], and [`Error::NotFinite`] where the logits are no numbers.
    pub fn generate<'a>(
        &'a mut self,
        id: SequenceId,
        prompt: &[u32],
        request: Request,
    ) -> impl Stream<Item = Result<Record>> + use<'a> {
        let prompt = prompt.to_vec();
        let left = request.max_tokens;
        let start = (Continuation { engine: self, id, request, left, pending: None }, Some(prompt));
        futures::stream::try_unfold(start, |(mut on, prompt)| async move {
            if on.left == 0 {
                return Ok(None);
            }
            let first = prompt.is_some();
            let pending = match (prompt, on.pending.take()) {
                (Some(prompt), _) => on.engine.feed(on.id, &prompt, on.request.seed).await?,
                (None, Some(pending)) => pending,
                (None, None) if on.has_room() => on.engine.decode(&[(on.id, on.request.seed)]).await?,
                (None, None) => return Ok(None),
            };
            let held = on.engine.tokens(on.id);
            // The first token is read before another step is recorded: whoever waits for it has it sooner.
            if !first && on.left > 1 && on.has_room() {
                on.pending = Some(on.engine.decode(&[(on.id, on.request.seed)]).await?);
            }
            let record = on.engine.records(pending).await?.remove(0);
            on.left -= 1;
            if record.non_finite != 0 {
                return Err(Error::NotFinite { position: held });
            }
            if on.request.end.contains(&record.token) {
                (on.left, on.pending) = (0, None);
                // The step that was submitted meanwhile continued a text that has ended.
                on.engine.truncate(on.id, held);
            }
            Ok(Some((record, (on, None))))
        })
    }
}
