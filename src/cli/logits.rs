//! `lamina logits`: the logits of every position of a prompt, to a file.

use std::path::{Path, PathBuf};

use pollster::block_on;
use safetensors::tensor::{Dtype, TensorView};

use super::session::ModelArgs;
use super::{say, write_file};
use crate::gpu::Selector;
use crate::kernels::sample::Sampler;
use crate::{Error, Result};

const AFTER_HELP: &str = "\
Writes one f32 tensor, `logits`, of shape [tokens, vocabulary]: row i holds the logits of what follows
token i. It is how a model is held against another implementation of it.

Examples:
  lamina logits --model DIR --prompt-tokens 1,2,3 --out logits.safetensors
  lamina --adapter cpu logits --model DIR --prompt-tokens 1,2,3 --cache f32 --out exact.safetensors

Exit codes: 0 done; 1 a file or the driver is at fault; 2 the command line cannot be meant.";

/// Write the logits of every position of a prompt
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The token ids, by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    prompt_tokens: Vec<u32>,
    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Args {
    pub fn run(&self, selector: &Selector) -> Result<u8> {
        let found = self.model.find(false)?;
        self.spare(&found.folder)?;
        let vocab = found.config.vocab as usize;
        let mut session = self.model.open(found, (self.prompt_tokens.len(), 0), selector)?;
        let id = session.engine.create(&Sampler::default())?;
        let logits = block_on(session.engine.logits(id, &self.prompt_tokens))?;
        if let Some(position) = logits.chunks(vocab).position(|row| row.iter().any(|logit| !logit.is_finite())) {
            return Err(Error::NotFinite { position });
        }
        let shape = vec![self.prompt_tokens.len(), vocab];
        let view = TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(&logits)).expect("rows of the vocabulary");
        let bytes = safetensors::serialize([("logits", view)], None).expect("one tensor of a known shape");
        write_file(&self.out, &bytes)?;
        say(&format!("{}: logits of {} tokens, {vocab} each\n", self.out.display(), self.prompt_tokens.len()));
        Ok(0)
    }

    /// Refuses to write over a file of the model.
    fn spare(&self, model: &Path) -> Result<()> {
        let (Ok(model), Ok(out)) = (model.canonicalize(), self.out.canonicalize()) else { return Ok(()) };
        if out.parent() != Some(&model) {
            return Ok(());
        }
        let (expected, found) =
            ("a new file, or one outside the model's folder".into(), self.out.display().to_string());
        Err(Error::Usage { what: "--out".into(), expected, found })
    }
}
