//! The command `lamina`: parse, dispatch, exit code.

use std::process::ExitCode;

use clap::Parser;
use lamina::cli::{self, Cli};

fn main() -> ExitCode {
    give_wayland_a_folder();
    let cli = Cli::parse();
    cli::log_to_stderr();
    match cli.run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            cli::say(&format!("lamina: {error}\n"));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Mesa's Vulkan layer looks for a Wayland display, and libwayland prints an error of its own to
/// stderr where this variable is missing, as in containers.
#[allow(unsafe_code, reason = "set_var is sound only before other threads start: first thing in main")]
fn give_wayland_a_folder() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: this is the process's only thread.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
}
