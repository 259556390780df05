//! A look into steps, for tests and benchmarks: hidden states layer by layer, and a step's recording.

use super::pages::SequenceId;
use super::step::{Engine, Ids};
use crate::error::{Error, Result};
use crate::gpu::Recording;
use crate::model::plan::{Kind, Widths};

impl Engine {
    /// Appends `ids` to a sequence, at most those of one step, and gives the hidden states behind the embedding
    /// and behind each layer, the last of them normalised: `[layers + 1]` of `[ids, hidden]`. It is how a model
    /// is held against another implementation of it, layer by layer.
    ///
    /// # Errors
    /// As [`Engine::feed`]; [`Error::Capacity`] for more ids than a step takes.
    pub async fn hidden(&mut self, id: SequenceId, ids: &[u32]) -> Result<Vec<Vec<f32>>> {
        self.check_step(id, ids)?;
        let (shape, plan) = self.prepare(&[(id, ids.len() as u32, 0)], Ids::Given(ids), &[0], false)?;
        let cache = self.caches();
        let step = self.step(&shape, &plan, &cache);
        let (forward, model) = (&self.forward, &self.model);
        let layers = model.layers.len();
        let mut all = Vec::new();
        for part in 0..=layers {
            let mut recording = Recording::new();
            match part {
                0 => forward.embed(&mut recording, model, &step),
                _ => forward.layers(&mut recording, model, &step, part - 1..part),
            }
            let states = match part == layers {
                true => forward.final_norm(&mut recording, model, step.tokens),
                false => forward.hidden(),
            };
            self.device.submit(&recording)?;
            let bytes = self.device.read(std::slice::from_ref(&states.view)).await?.remove(0);
            let rows: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
            let row = |row: &[f32]| row[..model.config.hidden as usize].to_vec();
            all.push(rows.chunks(states.stride as usize).take(ids.len()).flat_map(row).collect());
        }
        Ok(all)
    }

    /// What a step of one sequence would submit, with its facts written, for timing: it can run any number of
    /// times, and the sequence keeps the tokens that it has. It is the step of `ids`, at most those of one, or
    /// without them that of the token that the last step sampled.
    ///
    /// # Errors
    /// As [`Engine::hidden`].
    pub fn rehearse(&mut self, id: SequenceId, ids: Option<&[u32]>) -> Result<Recording> {
        let tokens = self.tokens(id);
        let (count, ids) = match ids {
            Some(ids) => {
                self.check_step(id, ids)?;
                (ids.len() as u32, Ids::Given(ids))
            }
            None => (1, Ids::Sampled),
        };
        let (shape, plan) = self.prepare(&[(id, count, 0)], ids, &[count - 1], true)?;
        let recording = self.record(&shape, &plan);
        self.truncate(id, tokens);
        Ok(recording)
    }

    /// That `ids` can be a step of a sequence.
    fn check_step(&self, id: SequenceId, ids: &[u32]) -> Result<()> {
        self.check(id, ids)?;
        if ids.len() > self.step_tokens() as usize {
            let (asked, limit) = (ids.len() as u64, u64::from(self.step_tokens()));
            return Err(Error::Capacity { what: "tokens in a step".into(), asked, limit });
        }
        Ok(())
    }

    /// New tokens of a step, at most.
    pub fn step_tokens(&self) -> u32 {
        self.step_tokens
    }

    /// Bytes of the cache that `tokens` tokens of a sequence fill.
    pub fn cache_bytes(&self, tokens: u32) -> u64 {
        Widths::of(&self.model.config, 1, self.options.format).token_bytes(Kind::Mla) * u64::from(tokens)
    }
}
