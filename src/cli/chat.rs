//! `lamina chat`: a conversation, line by line.

use std::io::{BufRead, IsTerminal};

use super::run::{answer, some};
use super::session::{Interrupt, ModelArgs, SampleArgs};
use super::{print, say};
use crate::gpu::Selector;
use crate::text::{ChatOptions, Message};
use crate::{Error, Result};

const AFTER_HELP: &str = "\
Reads a line, prints the model's answer, and so on to the end of the input (Ctrl-D). Ctrl-C ends an
answer, and between answers the command. What stays the same of the conversation is not computed
again.

Examples:
  lamina chat --model DIR
  lamina chat --model DIR --system \"You are a patient teacher.\" --temperature 0.7
  printf 'Hello\\nAnd in French?\\n' | lamina chat --model DIR

Exit codes: 0 done; 1 a file or the driver is at fault; 2 the command line cannot be meant; 130 Ctrl-C
between answers.";

/// Hold a conversation
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sample: SampleArgs,
}

impl Args {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let found = self.model.find(true)?;
        let sampler = self.sample.sampler(&found.generation)?;
        let mut session = self.model.open(found, (0, 0), selector)?;
        let text = session.text.clone().expect("a tokenizer was asked for");
        let mut messages: Vec<Message> = self.system.iter().map(|system| Message::system(system.as_str())).collect();
        let id = session.engine.create(&sampler)?;
        // The ids that the cache holds.
        let mut held: Vec<u32> = Vec::new();
        let interrupt = Interrupt::listen()?;
        let asks = std::io::stdin().is_terminal();
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if asks {
                say("> ");
            }
            let Some(line) = lines.next() else { break };
            let line = line.map_err(|source| Error::Io { path: "standard input".into(), source })?;
            if line.trim().is_empty() {
                continue;
            }
            messages.push(Message::user(line));
            let all = some(text.chat(&messages, &ChatOptions::default())?, "the conversation")?;
            let context = session.engine.options().context as usize;
            if all.len() >= context {
                let (asked, limit) = (all.len() as u64, context as u64);
                return Err(Error::Capacity { what: "tokens of the conversation (--ctx)".into(), asked, limit });
            }
            // At least one token is fed, whose logits give the next.
            let same = held.iter().zip(&all).take_while(|(a, b)| a == b).count().min(all.len() - 1);
            session.engine.truncate(id, same);
            session.engine.see(id, &all)?;
            let answering = interrupt.answering();
            let said = answer(&mut session, id, (&all, &all[same..]), &self.sample, &answering, print)?;
            print("\n")?;
            said.tell_end(&session);
            log::info!("{}", said.timings.line(said.records.len(), session.engine.device().caps()));
            held = all;
            held.extend(said.records.iter().map(|record| record.token));
            held.truncate(session.engine.tokens(id));
            messages.push(Message::assistant(said.text));
        }
        Ok(0)
    }
}
