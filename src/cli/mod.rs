//! The command line: one file a command.

mod bench;
mod chat;
mod check;
mod demo;
mod download;
mod drivers;
mod hub;
mod info;
mod logits;
mod plan;
mod run;
mod session;
mod svg;

use std::io::{IsTerminal, Write};
use std::path::Path;

use clap::{Parser, Subcommand};

use crate::gpu::Selector;
use crate::{Error, Result};

const AFTER_HELP: &str = "\
Examples:
  lamina run --model DIR \"Once upon\"     continue a text with the model in a folder
  lamina chat --model DIR               hold a conversation
  lamina info                           the adapters of this machine, and each kernel's path
  lamina check                          every kernel on the best adapter, against its CPU twin
  lamina plan DIR --memory 24GB         whether a model fits, and how long a context
  lamina bench ceilings                 what the best adapter can do at most
  lamina --adapter vulkan:nvidia check  the same on the NVIDIA adapter, through Vulkan
  LAMINA_ADAPTER=cpu lamina check       the twins themselves, with no GPU

Environment:
  LAMINA_ADAPTER       as --adapter
  LAMINA_MATRIX_UNITS  on or off: kernels on matrix units [default: on, but off on software drivers]
  LAMINA_CACHE         the folder for compiled pipelines and what bench tune found
  WGPU_BACKEND         look for adapters on these only: vulkan, metal, dx12, gl, by commas
  RUST_LOG             what is logged to stderr, such as debug or lamina=trace [default: warn]

Exit codes: 0 done; 1 a check or the driver failed; 2 the command line cannot be meant.";

/// Multi-head Latent Attention (MLA) on any GPU.
#[derive(Debug, Parser)]
#[command(name = "lamina", version, after_help = AFTER_HELP)]
pub struct Cli {
    /// Which adapter: an index of `lamina info`, a part of a name, BACKEND:PART with vulkan, metal,
    /// dx12 or gl, or `cpu` for the twins [default: discrete, then integrated, then CPU drivers]
    #[arg(long, global = true, env = "LAMINA_ADAPTER", hide_env = true, value_name = "ADAPTER")]
    adapter: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Chat(chat::Args),
    Logits(logits::Args),
    Info(info::Args),
    Check(check::Args),
    Plan(plan::Args),
    Bench(bench::Args),
}

impl Cli {
    /// Runs the command; its exit code.
    ///
    /// # Errors
    /// What stopped the command, as [`Error`] describes.
    pub fn run(&self) -> Result<u8> {
        let selector: Selector = self.adapter.as_deref().unwrap_or_default().parse()?;
        match &self.command {
            Command::Run(args) => args.run(&selector),
            Command::Chat(args) => args.run(&selector),
            Command::Logits(args) => args.run(&selector),
            Command::Info(args) => args.run(&selector),
            Command::Check(args) => args.run(&selector),
            Command::Plan(args) => args.run(&selector),
            Command::Bench(args) => args.run(&selector),
        }
    }
}

/// What is logged unless `RUST_LOG` says otherwise. wgpu's own warnings are about graphics and its
/// EGL messages about displays; what goes wrong in lamina's use of it comes back as an [`Error`].
const LOG: &str = "warn,wgpu_core=error,wgpu_hal=error,wgpu_hal::gles::egl=off,naga=error";

/// Sends the log to stderr.
pub fn log_to_stderr() {
    let filter = env_logger::Env::default().default_filter_or(LOG);
    let mut builder = env_logger::Builder::from_env(filter);
    if !std::io::stderr().is_terminal() {
        // The logger's own way to stderr panics where nobody reads it any more.
        builder.target(env_logger::Target::Pipe(Box::new(std::io::stderr())));
    }
    builder.format_timestamp(None).format_target(false).init();
}

/// Says something on stderr. That nobody reads it is no reason to stop.
pub fn say(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Writes a file whole, or leaves what was there: beside it first, and renamed then. What is no plain file, such as
/// a pipe, is written as it is.
///
/// # Errors
/// [`Error::Io`].
fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |source| Error::Io { path: path.into(), source };
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return std::fs::write(path, bytes).map_err(io);
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    written.map_err(|source| {
        let _ = std::fs::remove_file(&part);
        io(source)
    })
}

/// Prints to stdout. A reader that has gone (`lamina info | head -1`) is no error.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::Io { path: "standard output".into(), source: error })
        }
        _ => Ok(()),
    }
}

/// A table as all commands print them: a line under the header, and no wider than the terminal.
fn table(header: &[&str]) -> comfy_table::Table {
    use comfy_table::{ContentArrangement, LineStyle, presets};
    let mut table = comfy_table::Table::new();
    table.load_style(presets::NOTHING.header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_content_arrangement(ContentArrangement::Dynamic).set_header(header.to_vec());
    table
}
