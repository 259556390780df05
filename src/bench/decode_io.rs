//! What runs of a decode read and write beside the cache.

use super::sets::Sets;
use super::shape::{Shape, WIDTHS};
use crate::Result;
use crate::gpu::{Buffer, Device};
use crate::kernels::Sequence;
use crate::kernels::plan::Plan;

/// One set of sequences on their own pages.
pub struct Set {
    /// The sequences, each of the shape's new tokens.
    pub batch: Vec<Sequence>,
    /// Their block tables.
    pub table: Vec<u32>,
    /// Their splits.
    pub plan: Plan,
    /// `[rows, 576]`, in units of log2.
    pub queries: Vec<f32>,
}

/// The buffers: apart for each set, but for what is written and read at once.
pub struct Io {
    /// [`Set::batch`].
    pub batch: Sets,
    /// [`Plan::splits`].
    pub splits: Sets,
    /// [`Set::table`].
    pub table: Sets,
    /// [`Set::queries`].
    pub queries: Sets,
    /// The rows of a step, the same for all sets.
    pub rows: Buffer,
    /// `[partial tokens * heads, 516]`.
    pub partials: Buffer,
    /// `[rows, 512]`, merged.
    pub output: Buffer,
    /// `[rows]`, merged, natural logarithm.
    pub lse: Buffer,
}

impl Io {
    /// Uploads the sets.
    ///
    /// # Errors
    /// As [`Device::alloc_bound`] and [`Device::upload`].
    pub fn new(device: &Device, shape: &Shape, sets: &[Set]) -> Result<Io> {
        let r = u64::from(WIDTHS.0);
        let (rows, partials) = (shape.rows() as u64, sets.iter().map(|set| set.plan.partials).max().unwrap_or(1));
        Ok(Io {
            batch: Sets::new(device, sets, |set| &set.batch, "batch")?,
            splits: Sets::new(device, sets, |set| &set.plan.splits, "splits")?,
            table: Sets::new(device, sets, |set| &set.table, "block table")?,
            queries: Sets::new(device, sets, |set| &set.queries, "queries")?,
            rows: device.upload(&Sequence::rows(&sets[0].batch), "rows")?,
            partials: device.alloc_bound(u64::from(partials * shape.heads) * 4 * (r + 4), "partials")?,
            output: device.alloc_bound(4 * rows * r, "output")?,
            lse: device.alloc_bound(4 * rows, "lse")?,
        })
    }

    /// The latent of a row and its log-sum-exp in base 2 as a run of `set` left them: merged, or as the partial of the
    /// sequence's only split.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub async fn found(
        &self,
        device: &Device,
        shape: &Shape,
        set: &Set,
        merged: bool,
    ) -> Result<impl Fn(usize) -> (Vec<f32>, f64) + use<>> {
        let (r, heads, tokens) = (WIDTHS.0 as usize, shape.heads as usize, shape.tokens as usize);
        let views = if merged { vec![self.output.view(), self.lse.view()] } else { vec![self.partials.view()] };
        let read = device.read(&views).await?;
        let read: Vec<Vec<f32>> = read.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect();
        let mut first = vec![0; set.batch.len()];
        set.plan.splits.iter().for_each(|split| first[split.sequence as usize] = split.partial as usize * heads);
        Ok(move |row: usize| match &read[..] {
            [output, lse] => (output[row * r..][..r].to_vec(), f64::from(lse[row]) * std::f64::consts::LOG2_E),
            _ => {
                let sequence = row / heads / tokens;
                let at = (first[sequence] + row - sequence * tokens * heads) * (r + 4);
                (read[0][at..][..r].to_vec(), f64::from(read[0][at + r]))
            }
        })
    }
}
