//! `lamina run`: text from a prompt, as it comes.

use std::time::{Duration, Instant};

use futures::StreamExt;
use pollster::block_on;
use serde::Serialize;

use super::session::{Answering, Interrupt, ModelArgs, SampleArgs, Session, Timings};
use super::{print, say};
use crate::bench::report::Ran;
use crate::engine::{Finish, SequenceId};
use crate::gpu::Selector;
use crate::kernels::sample::Record;
use crate::text::{ChatOptions, Message, Text, TextStream};
use crate::{Error, Result};

const AFTER_HELP: &str = "\
The text goes to stdout as it comes, all else to stderr. Ctrl-C ends the text, not the command: what
was said so far is kept, and the statistics follow.

Examples:
  lamina run --model DIR \"Once upon a time\"
  lamina run --model deepseek-ai/DeepSeek-V2-Lite --temperature 0.8 --top-p 0.95 \"The moon is\"
  lamina run --model DIR --system \"Answer in one line.\" \"Why is the sky blue?\"
  lamina run --model DIR --prompt-tokens 1,2,3 --max-tokens 8 --json

Exit codes: 0 done; 1 a file or the driver is at fault; 2 the command line cannot be meant.";

/// Continue a text
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The text to continue
    #[arg(value_name = "PROMPT", required_unless_present = "prompt_tokens")]
    prompt: Option<String>,
    /// Token ids instead of text, by commas: needs no tokenizer
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "system"])]
    prompt_tokens: Vec<u32>,
    /// Make a conversation of it, by the model's chat template, with this system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sample: SampleArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    prompt_tokens: Vec<u32>,
    tokens: Vec<u32>,
    text: Option<String>,
    finish_reason: Finish,
    logprobs: Vec<Logprob>,
    timings: Timings,
    device: Ran,
}

/// The chosen token's log-probability, and the five likeliest ids with theirs.
#[derive(Serialize)]
struct Logprob {
    logprob: f32,
    top: Vec<(u32, f32)>,
}

impl Logprob {
    fn of(record: &Record, vocab: u32) -> Logprob {
        let top = record.top_tokens.iter().copied().zip(record.top_logprobs);
        Logprob { logprob: record.logprob, top: top.filter(|(id, _)| *id < vocab).collect() }
    }
}

impl Args {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let found = self.model.find(self.prompt.is_some())?;
        if found.text.is_none() && !self.sample.stop.is_empty() {
            let (expected, found) = ("a model with a tokenizer".into(), found.folder.join("tokenizer.json"));
            let found = format!("no {}", found.display());
            return Err(Error::Usage { what: "--stop".into(), expected, found });
        }
        let prompt = self.ids(found.text.as_ref())?;
        let sampler = self.sample.sampler(&found.generation)?;
        let mut session = self.model.open(found, (prompt.len(), self.sample.max_tokens), selector)?;
        let id = session.engine.create(&sampler)?;
        session.engine.see(id, &prompt)?;
        let shows = !self.json;
        let interrupt = Interrupt::listen()?;
        let answering = interrupt.answering(); // to the end: what is said of the text is part of it
        let answer = answer(&mut session, id, (&prompt, &prompt), &self.sample, &answering, |piece| match shows {
            true => print(piece),
            false => Ok(()),
        })?;
        if shows {
            print("\n")?;
            answer.tell_end(&session);
            say(&format!("{}\n", answer.timings.line(answer.records.len(), session.engine.device().caps())));
            return Ok(0);
        }
        let vocab = session.engine.model().config.vocab;
        let report = Report {
            prompt_tokens: prompt,
            tokens: answer.records.iter().map(|record| record.token).collect(),
            finish_reason: answer.finish,
            text: session.text.is_some().then_some(answer.text),
            logprobs: answer.records.iter().map(|record| Logprob::of(record, vocab)).collect(),
            timings: answer.timings,
            device: Ran::of(session.engine.device().caps()),
        };
        print(&format!("{}\n", serde_json::to_string_pretty(&report).expect("plain data becomes JSON")))?;
        Ok(0)
    }

    fn ids(&self, text: Option<&Text>) -> Result<Vec<u32>> {
        let (Some(prompt), Some(text)) = (&self.prompt, text) else { return Ok(self.prompt_tokens.clone()) };
        let ids = match &self.system {
            Some(system) => {
                text.chat(&[Message::system(system.as_str()), Message::user(prompt.as_str())], &ChatOptions::default())?
            }
            None => text.encode(prompt)?,
        };
        some(ids, "the prompt")
    }
}

/// The tokens of what a text was made of, unless there are none.
pub(super) fn some(ids: Vec<u32>, what: &str) -> Result<Vec<u32>> {
    if ids.is_empty() {
        let (expected, found) = ("at least one token".into(), "none".into());
        return Err(Error::Usage { what: what.into(), expected, found });
    }
    Ok(ids)
}

/// What a model said.
pub(super) struct Answer {
    pub text: String,
    pub records: Vec<Record>,
    pub finish: Finish,
    pub timings: Timings,
}

impl Answer {
    /// Says on stderr where the context cut it off: to a reader the text just ends.
    pub fn tell_end(&self, session: &Session) {
        if self.finish == Finish::Context {
            let context = session.engine.options().context;
            say(&format!("the text ends here since the context of {context} tokens is full (--ctx)\n"));
        }
    }
}

/// Appends `new` to a sequence whose tokens, `new` included, are `all`, and gives each piece of what follows
/// to `show`; `answering` tells where the user ends it.
pub(super) fn answer(
    session: &mut Session,
    id: SequenceId,
    (all, new): (&[u32], &[u32]),
    sample: &SampleArgs,
    answering: &Answering,
    mut show: impl FnMut(&str) -> Result<()>,
) -> Result<Answer> {
    let mut text: Option<TextStream> = session.text.as_ref().map(|t| t.stream(all, &sample.stop)).transpose()?;
    let (mut shown, mut records) = (String::new(), Vec::new());
    let request = sample.request(&session.generation);
    let end = request.end.clone();
    let started = Instant::now();
    let (mut first, mut last) = (Duration::ZERO, Duration::ZERO);
    let mut finish = None;
    {
        let mut stream = std::pin::pin!(session.engine.generate(id, new, request));
        while let Some(record) = block_on(stream.next()) {
            let record = record?;
            last = started.elapsed();
            if records.is_empty() {
                first = last;
            }
            records.push(record);
            let ended = end.contains(&record.token);
            if let Some(text) = text.as_mut().filter(|_| !ended) {
                let piece = text.push(record.token)?;
                show(&piece)?;
                shown.push_str(&piece);
            }
            if ended || text.as_ref().is_some_and(TextStream::stopped) {
                finish = Some(Finish::Stop);
                break;
            }
            if answering.interrupted() {
                finish = Some(Finish::Abort);
                break;
            }
        }
    }
    let most = if records.len() == sample.max_tokens { Finish::Most } else { Finish::Context };
    if let Some(text) = &mut text {
        let rest = text.finish()?;
        show(&rest)?;
        shown.push_str(&rest);
    }
    let held = all.len() + records.len();
    let timings = Timings::new(session, new.len(), records.len(), held, first, last);
    Ok(Answer { text: shown, records, finish: finish.unwrap_or(most), timings })
}
