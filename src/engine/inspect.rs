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
        self.check(id, ids)?;
        if ids.len() > self.step_tokens as usize {
            let (asked, limit) = (ids.len() as u64, u64::from(self.step_tokens));
            return Err(Error::Capacity { what: "tokens in a step".into(), asked, limit });
        }
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

    /// What [`Engine::decode`] would submit for one sequence, with its facts written, for timing: it can run any
    /// number of times, and the sequence keeps the tokens that it has.
    ///
    /// # Errors
    /// As [`Engine::feed`].
    pub fn rehearse(&mut self, id: SequenceId) -> Result<Recording> {
        let tokens = self.tokens(id);
        let (shape, plan) = self.prepare(&[(id, 1, 0)], Ids::Sampled, &[0], true)?;
        let recording = self.record(&shape, &plan);
        self.truncate(id, tokens);
        Ok(recording)
    }

    /// Bytes of the cache that `tokens` tokens of a sequence fill.
    pub fn cache_bytes(&self, tokens: u32) -> u64 {
        Widths::of(&self.model.config, 1, self.options.format).token_bytes(Kind::Mla) * u64::from(tokens)
    }
}
