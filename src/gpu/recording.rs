//! What a step does, as plain data: calls of kernels on buffers, in order.
//!
//! A [`Recording`] names no wgpu type. The recorder runs it on a GPU; the `cpu` device
//! runs the twin of each call on host memory; both together bisect a fault.

use std::sync::Arc;

use super::buffer::View;
use super::compose::Shader;
use super::host::Host;

/// How many workgroups a call runs.
#[derive(Clone, Debug)]
pub enum Grid {
    /// Known on the CPU.
    Direct([u32; 3]),
    /// Three `u32` that an earlier call wrote.
    Indirect(View),
}

/// A CPU twin, run on the call's bindings in host memory.
pub type Twin = Arc<dyn Fn(&Host) + Send + Sync>;

/// One dispatch of one kernel.
#[derive(Clone)]
pub struct Call {
    /// Where in the model it stands, such as `layers.3`; empty outside a model.
    pub stage: Arc<str>,
    /// The kernel with its specialisation.
    pub shader: Arc<Shader>,
    /// Storage bindings by the name that the shader gives them.
    pub bindings: Vec<(&'static str, View)>,
    /// The `Params` struct's bytes; empty for a shader without `params`.
    pub params: Vec<u8>,
    /// The workgroups.
    pub grid: Grid,
    /// The same computation on the CPU.
    pub twin: Twin,
}

/// Calls in order. Each sees what the ones before it wrote.
#[derive(Clone, Default)]
pub struct Recording {
    calls: Vec<Call>,
    stage: Option<Arc<str>>,
}

impl Recording {
    /// An empty recording.
    pub fn new() -> Recording {
        Recording::default()
    }

    /// Names the stage that the following calls belong to.
    pub fn stage(&mut self, name: &str) {
        self.stage = Some(name.into());
    }

    /// Adds a dispatch. A grid with a zero does nothing and is left out.
    pub fn call(
        &mut self,
        shader: &Arc<Shader>,
        bindings: Vec<(&'static str, View)>,
        params: &[u8],
        grid: Grid,
        twin: impl Fn(&Host) + Send + Sync + 'static,
    ) {
        if matches!(grid, Grid::Direct(g) if g.contains(&0)) {
            return;
        }
        let stage = self.stage.get_or_insert_with(|| "".into()).clone();
        let (shader, params, twin) = (shader.clone(), params.to_vec(), Arc::new(twin));
        self.calls.push(Call { stage, shader, bindings, params, grid, twin });
    }

    /// The calls, in order.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// Cuts it in two before call `at`.
    pub fn split_at(&self, at: usize) -> (Recording, Recording) {
        let part = |calls: &[Call]| Recording { calls: calls.to_vec(), stage: None };
        let (head, tail) = self.calls.split_at(at);
        (part(head), part(tail))
    }
}

/// `count` workgroups as a grid that no dimension limit stops: x first, the rest folded into y.
/// The shader takes `id.x + id.y * groups.x` and leaves where that is at or over its count.
pub fn grid_1d(count: u32) -> Grid {
    /// The least `max_compute_workgroups_per_dimension` there is.
    const MAX: u32 = 65_535;
    if count <= MAX {
        return Grid::Direct([count, 1, 1]);
    }
    let rows = count.div_ceil(MAX);
    Grid::Direct([count.div_ceil(rows), rows, 1])
}
