//! What `run`, `chat` and `logits` share: a model opened on a device, and how its tokens are drawn.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use clap::builder::NonEmptyStringValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::demo;
use super::hub::{self, Need};
use super::plan::{Format, size};
use super::say;
use crate::engine::{Engine, Options, PAGES, Request};
use crate::gpu::{self, Caps, Device, Selector};
use crate::kernels::sample::Sampler;
use crate::model::forward::{Decode, Prefill};
use crate::model::generation::Generation;
use crate::model::plan::{self, Kind, Plan, Widths};
use crate::model::tensors::Tensors;
use crate::model::{Config, Model};
use crate::text::Text;
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// The context where nobody says how long it is to be, unless the model's own is shorter.
const CONTEXT: u32 = 4096;

/// Which model, and how it runs.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// A checkpoint's folder in Hugging Face layout, or a repo id such as deepseek-ai/DeepSeek-V2-Lite
    /// [default: the small model of stories that comes with lamina]
    #[arg(long, value_name = "DIR|REPO_ID", env = "LAMINA_MODEL", hide_env = true)]
    model: Option<String>,
    /// Tokens of the context, prompt and answer together [default: what they need, at least 4096, at
    /// most what the model was made for]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    ctx: Option<u32>,
    /// Refuse before loading what takes more memory, such as 24GB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// How the latent cache is stored
    #[arg(long, value_name = "FORMAT", default_value = "f16")]
    cache: Format,
    /// Tokens of a cache page
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = page)]
    page: u32,
    /// How attention runs while decoding: the kernel that absorbs in workgroup memory (fused), the two
    /// kernels that do it in turn (separate), or whichever is taken to be faster
    #[arg(long, value_name = "KERNEL", default_value = "auto")]
    attention: AttentionKernel,
    /// How attention of a prompt runs: over the latents, as while decoding (absorbed), over expanded keys
    /// and values (materialised), or whichever is taken to be faster for the step
    #[arg(long, value_name = "WAY", default_value = "auto")]
    prefill: PrefillWay,
    /// Split contexts by their own length alone: attention over the same cache gives the same bits in any batch
    #[arg(long)]
    deterministic: bool,
    /// Run the stages of each step up to this one on the CPU twins, to find a fault: embed, layers.0,
    /// layers.0.attention, ... head, sample
    #[arg(long, value_name = "STAGE")]
    reference_until: Option<String>,
}

/// Reads the tokens of a page.
fn page(text: &str) -> std::result::Result<u32, String> {
    let size = text.parse().ok().filter(|size| PAGES.contains(size));
    size.ok_or_else(|| format!("expected one of {PAGES:?}"))
}

/// Which kernels decode.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum AttentionKernel {
    Auto,
    Separate,
    Fused,
}

/// How prompts are attended to.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum PrefillWay {
    Auto,
    Absorbed,
    Materialised,
}

/// How tokens are drawn.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SampleArgs {
    /// Divides the logits; 0 takes the likeliest token [default: the model's generation_config.json
    /// where that draws, else 0]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Draw among so many of the likeliest; 0 for all [default: the model's]
    #[arg(long, value_name = "COUNT")]
    top_k: Option<u32>,
    /// Draw among the likeliest that have this probability together; 1 for all [default: the model's]
    #[arg(long, value_name = "PROBABILITY", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Draw among those with this share of the likeliest's probability; 0 for all [default: the model's]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Divides the positive logits of tokens that were there before, multiplies negative ones; 1 for
    /// none [default: the model's]
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true)]
    repeat_penalty: Option<f32>,
    /// Of the random numbers: the same seed gives the same text
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    seed: u32,
    /// The most tokens of an answer
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    pub max_tokens: usize,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Go on behind the tokens that end a text
    #[arg(long)]
    ignore_eos: bool,
}

impl SampleArgs {
    /// The sampler: what the flags say, else what the model recommends.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the number that is out of range.
    pub fn sampler(&self, model: &Generation) -> Result<Sampler> {
        // A checkpoint that does not draw means its other numbers for those who do.
        let draws = model.sample == Some(true);
        let recommended = if draws { model.temperature.unwrap_or(1.0) } else { 0.0 };
        let sampler = Sampler {
            temperature: self.temperature.unwrap_or(recommended),
            top_k: self.top_k.or(model.top_k).unwrap_or(0),
            top_p: self.top_p.or(model.top_p).unwrap_or(1.0),
            min_p: self.min_p.or(model.min_p).unwrap_or(0.0),
            repetition_penalty: self.repeat_penalty.or(model.repetition_penalty).unwrap_or(1.0),
            ..Sampler::default()
        };
        // What a file says was checked when it was read; the sampler calls its numbers as the flags do.
        let flag = |error| match error {
            Error::Usage { what, expected, found } => Error::Usage { what: format!("--{what}"), expected, found },
            other => other,
        };
        sampler.check().map_err(flag)?;
        Ok(sampler)
    }

    /// What is asked of the engine.
    pub fn request(&self, generation: &Generation) -> Request {
        let end = if self.ignore_eos { Vec::new() } else { generation.eos.clone() };
        Request { seed: self.seed, max_tokens: self.max_tokens, end }
    }
}

/// A model ready to run.
pub struct Session {
    /// The model on its device.
    pub engine: Engine,
    /// Its tokenizer, where it has one.
    pub text: Option<Text>,
    /// What its makers recommend.
    pub generation: Generation,
    /// How long it took to load.
    pub load: Duration,
}

/// A checkpoint whose small files are read, but not its weights.
pub struct Found {
    pub folder: PathBuf,
    /// The configuration.
    pub config: Config,
    /// The tokenizer, where there is one.
    pub text: Option<Text>,
    /// What its makers recommend.
    pub generation: Generation,
}

impl ModelArgs {
    /// The model as messages name it.
    pub fn name(&self) -> &str {
        self.model.as_deref().unwrap_or("the small model of stories that comes with lamina")
    }

    /// Finds the checkpoint and reads its small files; `text` asks for a tokenizer.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn find(&self, text: bool) -> Result<Found> {
        let folder = match &self.model {
            Some(named) => hub::folder(named, if text { Need::Text } else { Need::Weights })?,
            None => demo::folder()?,
        };
        say(&format!("model: {}\n", self.name()));
        let config = Config::open(&folder)?;
        let text = match text || folder.join("tokenizer.json").exists() {
            true => Some(Text::load(&folder)?),
            false => None,
        };
        if let Some(text) = &text {
            text.check(config.vocab)?;
        }
        let generation = Generation::open(&folder, &config, text.as_ref().and_then(Text::end))?;
        Ok(Found { folder, config, text, generation })
    }

    /// The context for tokens that are given, and so many more that may follow.
    ///
    /// # Errors
    /// [`Error::Usage`] where the given ones do not fit what `--ctx` or the model allows.
    fn context(&self, config: &Config, (given, more): (usize, usize)) -> Result<u32> {
        let needed = u32::try_from(given.saturating_add(more)).unwrap_or(u32::MAX);
        let context = self.ctx.unwrap_or(needed.max(CONTEXT).min(config.max_context));
        if context > config.max_context {
            let (expected, found) = (format!("at most the model's {}", config.max_context), context.to_string());
            return Err(Error::Usage { what: "--ctx".into(), expected, found });
        }
        if given > context as usize {
            let what = if self.ctx.is_some() { "--ctx" } else { "max_position_embeddings of the model" };
            let expected = format!("at least the {given} tokens that are given");
            return Err(Error::Usage { what: what.into(), expected, found: context.to_string() });
        }
        Ok(context)
    }

    /// Loads the checkpoint, for contexts of so many tokens: those that are given, and those that may follow.
    ///
    /// # Errors
    /// What does not fit is refused with the numbers before anything is loaded; and as [`Model::load`].
    pub fn open(&self, found: Found, tokens: (usize, usize), selector: &Selector) -> Result<Session> {
        self.open_with(found, tokens, selector, &gpu::Options::default())
    }

    /// As [`ModelArgs::open`], on a device with other options.
    ///
    /// # Errors
    /// As [`ModelArgs::open`].
    pub fn open_with(
        &self,
        found: Found,
        tokens: (usize, usize),
        selector: &Selector,
        device: &gpu::Options,
    ) -> Result<Session> {
        let Found { folder, config, text, generation } = found;
        let format = self.cache.record().0;
        let context = self.context(&config, tokens)?;
        let device = pollster::block_on(Device::open(selector, device))?;
        let checkpoint = Checkpoint::open(&folder)?;
        let tensors = Tensors::find(&config, &checkpoint)?;
        let token = Widths::of(&config, 1, format).token_bytes(Kind::Mla);
        let plan = Plan {
            weights: plan::weight_bytes(&tensors.0, Some(&checkpoint)),
            scratch: plan::scratch_bytes(&config, Some(device.caps()), token, (context.into(), 1)),
            token,
            context: u64::from(context),
            batch: 1,
            memory: self.memory,
        };
        plan.check("--memory")?;
        plan::check_bindings(&config, format, device.caps())?;
        let started = Instant::now();
        let bar = progress();
        let model = Model::load_found(&device, config, &checkpoint, tensors, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
        for skipped in &model.skipped {
            log::info!("{skipped:?} is in the checkpoint and is not needed");
        }
        let options = Options {
            context,
            page: self.page,
            format,
            decode: match self.attention {
                AttentionKernel::Auto => Decode::Auto,
                AttentionKernel::Separate => Decode::Separate,
                AttentionKernel::Fused => Decode::Fused,
            },
            prefill: match self.prefill {
                PrefillWay::Auto => Prefill::Auto,
                PrefillWay::Absorbed => Prefill::Absorbed,
                PrefillWay::Materialised => Prefill::Materialised,
            },
            deterministic: self.deterministic,
            reference_until: self.reference_until.clone(),
            ..Options::default()
        };
        let engine = Engine::new(&device, model, &options)?;
        Ok(Session { engine, text, generation, load: started.elapsed() })
    }
}

/// A bar of bytes on a terminal, nothing elsewhere.
fn progress() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "loading {wide_bar} {bytes}/{total_bytes}, {eta} left";
    ProgressBar::new(0).with_style(ProgressStyle::with_template(style).expect("a template that was tried"))
}

/// Exit code of a command that Ctrl-C ends, as of one that its signal ends.
const INTERRUPTED: i32 = 130;

/// What Ctrl-C ends: the answer that is under way, or else the command.
pub struct Interrupt {
    answering: Arc<AtomicBool>,
    pressed: Arc<AtomicBool>,
}

/// An answer under way, until it is dropped.
pub struct Answering<'a>(&'a Interrupt);

impl Interrupt {
    /// Listens from now on.
    ///
    /// # Errors
    /// [`Error::Io`] where the system does not let it.
    pub fn listen() -> Result<Interrupt> {
        let listening = Interrupt { answering: Arc::default(), pressed: Arc::default() };
        let (answering, pressed) = (listening.answering.clone(), listening.pressed.clone());
        let handler = move || match answering.load(Ordering::Relaxed) {
            true => pressed.store(true, Ordering::Relaxed),
            false => std::process::exit(INTERRUPTED),
        };
        ctrlc::set_handler(handler)
            .map_err(|fault| Error::Io { path: "the signal of Ctrl-C".into(), source: std::io::Error::other(fault) })?;
        Ok(listening)
    }

    /// From now on it ends an answer.
    pub fn answering(&self) -> Answering<'_> {
        self.pressed.store(false, Ordering::Relaxed);
        self.answering.store(true, Ordering::Relaxed);
        Answering(self)
    }
}

impl Answering<'_> {
    /// Whether it was pressed since the answer began.
    pub fn interrupted(&self) -> bool {
        self.0.pressed.load(Ordering::Relaxed)
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.answering.store(false, Ordering::Relaxed);
    }
}

/// How long things took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Timings {
    /// Seconds to load the model.
    pub load_s: f64,
    /// Seconds from the prompt to the first token.
    pub time_to_first_token_s: f64,
    /// Tokens of the prompt.
    pub prefill_tokens: usize,
    /// Of the prompt, tokens a second.
    pub prefill_tokens_per_s: f64,
    /// Seconds from the first token to the last.
    pub decode_s: f64,
    /// Tokens behind the first, a second.
    pub decode_tokens_per_s: f64,
    /// Bytes of the cache that the tokens take.
    pub cache_bytes: u64,
}

impl Timings {
    /// Of an answer of `tokens` tokens, the first after `first` and the last after `all`.
    pub fn new(
        session: &Session,
        prompt: usize,
        tokens: usize,
        held: usize,
        first: Duration,
        all: Duration,
    ) -> Timings {
        let decode = all.saturating_sub(first).as_secs_f64();
        let rate = |count: usize, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        Timings {
            load_s: session.load.as_secs_f64(),
            time_to_first_token_s: first.as_secs_f64(),
            prefill_tokens: prompt,
            prefill_tokens_per_s: rate(prompt, first.as_secs_f64()),
            decode_s: decode,
            decode_tokens_per_s: rate(tokens.saturating_sub(1), decode),
            cache_bytes: session.engine.cache_bytes(held as u32),
        }
    }

    /// One line for people.
    pub fn line(&self, tokens: usize, caps: &Caps) -> String {
        format!(
            "{} tokens of prompt, {tokens} of text; load {:.2} s, first token after {:.3} s, prefill {:.1} tokens/s, \
             decode {:.1} tokens/s, cache {}; {}",
            self.prefill_tokens,
            self.load_s,
            self.time_to_first_token_s,
            self.prefill_tokens_per_s,
            self.decode_tokens_per_s,
            plan::human(self.cache_bytes),
            caps.label(),
        )
    }
}
