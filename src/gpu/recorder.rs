//! Runs a [`Recording`] on a GPU: one encoder and one compute pass a step.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use super::buffer::{Memory, View};
use super::compose::Access;
use super::gpu::{Copies, Gpu, Reading, Scopes, gpu_buffer};
use super::pipelines::Pipeline;
use super::recording::{Call, Grid, PARAMS_SLOT, Recording};
use crate::error::Result;

/// The parameter ring and the bind groups of one device.
pub(super) struct Recorder {
    /// Every call's `Params`, 256 bytes apart.
    ring: wgpu::Buffer,
    /// What the ring holds: a step often has the parameters of the one before it.
    held: Vec<u8>,
    /// Unique in this process: names the device and the ring that bind groups were made with.
    generation: u64,
    groups: HashMap<GroupKey, Group>,
    /// At this many groups, those of freed buffers are looked for.
    prune_at: usize,
}

/// A call's pipeline and bind group.
type Step = (Arc<Pipeline>, wgpu::BindGroup);

/// What a recorder of some generation found for a recording's calls.
#[derive(Default)]
pub(super) struct Resolved(Mutex<Option<(u64, Arc<[Step]>)>>);

impl Clone for Resolved {
    /// A clone of a recording may be changed: it finds its own.
    fn clone(&self) -> Resolved {
        Resolved::default()
    }
}

/// A pipeline and the ranges bound to it.
type GroupKey = (usize, Vec<(u64, u64, u64)>);

struct Group {
    group: wgpu::BindGroup,
    /// The buffers it binds: once one is freed, the group is of no use.
    holds: Vec<Weak<Memory>>,
}

/// The fewest groups among which those of freed buffers are looked for.
const LEAST_PRUNE: usize = 256;

fn generation() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn ring(device: &wgpu::Device, size: u64) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("params"),
        size,
        usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    })
}

impl Recorder {
    pub fn new(device: &wgpu::Device) -> Recorder {
        let ring = ring(device, 256 * PARAMS_SLOT as u64);
        Recorder { ring, held: Vec::new(), generation: generation(), groups: HashMap::new(), prune_at: LEAST_PRUNE }
    }

    /// Drops every bind group: the ring is another one, or the driver failed and some may be invalid.
    fn forget(&mut self) {
        self.held.clear();
        self.generation = generation();
        self.groups.clear();
    }

    /// Writes the calls' parameters to the ring; the ring grows to the longest step.
    fn params(&mut self, gpu: &Gpu, calls: &[&Call]) {
        let size = (calls.len() * PARAMS_SLOT) as u64;
        if size > self.ring.size() {
            self.ring = ring(&gpu.device, size.next_power_of_two());
            self.forget();
        }
        let mut bytes = vec![0u8; size as usize];
        for (call, slot) in calls.iter().zip(bytes.chunks_exact_mut(PARAMS_SLOT)) {
            slot[..call.params.len()].copy_from_slice(&call.params);
        }
        if !self.held.starts_with(&bytes) {
            gpu.queue.write_buffer(&self.ring, 0, &bytes);
            self.held = bytes;
        }
    }

    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The pipelines and bind groups of a recording's calls; found once for each recording.
    fn resolve(&mut self, gpu: &Gpu, recording: &Recording) -> Result<Arc<[Step]>> {
        let mut resolved = recording.resolved.0.lock().expect("a panic in it is a fault of lamina");
        if let Some((_, steps)) = resolved.as_ref().filter(|(generation, _)| *generation == self.generation) {
            return Ok(steps.clone());
        }
        let step = |call: &Call| {
            let pipeline = gpu.pipelines.get(&call.shader)?;
            let group = self.group(gpu, &pipeline, call);
            Ok((pipeline, group))
        };
        let steps: Arc<[Step]> = recording.calls().iter().map(step).collect::<Result<_>>()?;
        *resolved = Some((self.generation, steps.clone()));
        Ok(steps)
    }

    fn group(&mut self, gpu: &Gpu, pipeline: &Pipeline, call: &Call) -> wgpu::BindGroup {
        let bound = bound(pipeline, call);
        let range = |view: &&View| (view.buffer.0.id, view.offset, view.size);
        let key = (pipeline.id, bound.iter().map(|(_, view)| range(view)).collect());
        if let Some(group) = self.groups.get(&key) {
            return group.group.clone();
        }
        if self.groups.len() >= self.prune_at {
            self.groups.retain(|_, group| group.holds.iter().all(|weak| weak.strong_count() > 0));
            self.prune_at = LEAST_PRUNE.max(2 * self.groups.len());
        }
        let mut entries: Vec<_> = bound.iter().map(|(index, view)| entry(*index, gpu_buffer(view), view)).collect();
        if let Some(params) = pipeline.bindings.iter().find(|d| d.access == Access::Uniform) {
            entries.push(wgpu::BindGroupEntry {
                binding: params.index,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &self.ring,
                    offset: 0,
                    size: std::num::NonZeroU64::new(PARAMS_SLOT as u64),
                }),
            });
        }
        let group = gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(call.shader.kernel),
            layout: &pipeline.layout,
            entries: &entries,
        });
        let holds = bound.iter().map(|(_, view)| Arc::downgrade(&view.buffer.0)).collect();
        self.groups.insert(key, Group { group: group.clone(), holds });
        group
    }
}

fn entry<'a>(binding: u32, buffer: &'a wgpu::Buffer, view: &View) -> wgpu::BindGroupEntry<'a> {
    let size = std::num::NonZeroU64::new(view.size);
    let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset: view.offset, size });
    wgpu::BindGroupEntry { binding, resource }
}

/// The call's views in the order of the shader's bindings.
fn bound<'a>(pipeline: &Pipeline, call: &'a Call) -> Vec<(u32, &'a View)> {
    let storage = pipeline.bindings.iter().filter(|d| d.access != Access::Uniform);
    let view = |name: &str| call.bindings.iter().find(|(n, _)| *n == name).map(|(_, view)| view);
    storage.map(|d| (d.index, view(&d.name).expect("Recording::call checked the names"))).collect()
}

impl Gpu {
    /// Compiles what the recording needs, on all cores.
    pub async fn prepare(&self, recording: &Recording) -> Result<()> {
        self.pipelines.prepare(recording.calls().iter().map(|call| &call.shader)).await
    }

    /// Submits the recording; returns before it has run.
    pub fn submit(&self, recording: &Recording) -> Result<()> {
        let scopes = Scopes::push(&self.device);
        let encoder = self.encode(&[recording], None)?;
        self.queue.submit([encoder.finish()]);
        self.submitted(scopes)
    }

    /// As [`Gpu::submit`] and [`Gpu::start_read`], in one submission.
    pub fn submit_reading(&self, recording: &Recording, views: &[View]) -> Result<Reading> {
        let scopes = Scopes::push(&self.device);
        let mut encoder = self.encode(&[recording], None)?;
        let copies = Copies::encode(&self.device, &mut encoder, views);
        let submission = self.queue.submit([encoder.finish()]);
        self.submitted(scopes)?;
        self.reading(copies, submission, None)
    }

    /// What became of a step that was just submitted.
    fn submitted(&self, scopes: Scopes) -> Result<()> {
        self.pending.store(0, Ordering::Relaxed);
        let result = self.explain("a step", scopes.pop());
        if result.is_err() {
            self.recorder.lock().expect("a panic in it is a fault of lamina").forget();
        }
        result
    }

    /// Runs the recordings in turn, `times` times, in one submission, each in a pass of its own
    /// between two timestamps. `None` where the adapter has no timestamps.
    pub async fn time(&self, recordings: &[Recording], times: u32) -> Result<Option<Vec<Duration>>> {
        if !self.caps.timestamps {
            return Ok(None);
        }
        let passes = recordings.len() as u32 * times;
        let most = wgpu::QUERY_SET_MAX_QUERIES / 2;
        assert!(passes <= most, "{passes} timed runs in one submission, of at most {most}");
        let queries = self.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("timestamps"),
            ty: wgpu::QueryType::Timestamp,
            count: 2 * passes,
        });
        let size = u64::from(passes) * 16;
        let resolved = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("timestamps"),
            size,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let turns: Vec<&Recording> = (0..times).flat_map(|_| recordings).collect();
        let scopes = Scopes::push(&self.device);
        let mut encoder = self.encode(&turns, Some(&queries))?;
        encoder.resolve_query_set(&queries, 0..2 * passes, &resolved, 0);
        self.queue.submit([encoder.finish()]);
        self.submitted(scopes)?;
        let place = super::buffer::Place::Gpu(resolved);
        let view = super::buffer::Buffer::new(size, "timestamps", place).view();
        let bytes = self.read(&[view]).await?.remove(0);
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        let period = f64::from(self.queue.get_timestamp_period());
        let spent = |pair: &[u64]| Duration::from_nanos((pair[1].saturating_sub(pair[0]) as f64 * period) as u64);
        Ok(Some(ticks.chunks_exact(2).map(spent).collect()))
    }

    /// Encodes each recording as one pass, with a pair of timestamps where they are asked for.
    fn encode(&self, recordings: &[&Recording], timed: Option<&wgpu::QuerySet>) -> Result<wgpu::CommandEncoder> {
        let calls: Vec<&Call> = recordings.iter().flat_map(|r| r.calls()).collect();
        let mut recorder = self.recorder.lock().expect("a panic in it is a fault of lamina");
        recorder.params(self, &calls);
        let steps = recordings.iter().map(|r| recorder.resolve(self, r)).collect::<Result<Vec<_>>>()?;
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut at = 0;
        for (turn, (recording, steps)) in recordings.iter().zip(&steps).enumerate() {
            let turn = turn as u32;
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some("step"),
                timestamp_writes: timed.map(|query_set| wgpu::ComputePassTimestampWrites {
                    query_set,
                    beginning_of_pass_write_index: Some(2 * turn),
                    end_of_pass_write_index: Some(2 * turn + 1),
                }),
            });
            for (call, (pipeline, group)) in recording.calls().iter().zip(&**steps) {
                let offset = (at * PARAMS_SLOT) as u32;
                pass.set_pipeline(&pipeline.pipeline);
                let offsets: &[u32] = if call.params.is_empty() { &[] } else { &[offset] };
                pass.set_bind_group(0, group, offsets);
                match &call.grid {
                    Grid::Direct([x, y, z]) => pass.dispatch_workgroups(*x, *y, *z),
                    Grid::Indirect(view) => pass.dispatch_workgroups_indirect(gpu_buffer(view), view.offset),
                }
                at += 1;
            }
        }
        Ok(encoder)
    }
}
