//! What a step does, as plain data: calls of kernels on buffers, in order.
//!
//! A [`Recording`] names no wgpu type. The recorder runs it on a GPU; the `cpu` device
//! runs the twin of each call on host memory; both together bisect a fault.

use std::sync::Arc;

use super::buffer::View;
use super::compose::{Access, Declared, Shader};
use super::host::Host;
use super::recorder::Resolved;

/// Largest `Params`, bytes: one slot of the uniform ring.
pub(super) const PARAMS_SLOT: usize = 256;

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

/// Calls in order. Each sees what the ones before it wrote. Submitting one again costs less than
/// recording it again: a device keeps what it found for the calls.
#[derive(Clone, Default)]
pub struct Recording {
    calls: Vec<Call>,
    stage: Option<Arc<str>>,
    pub(super) resolved: Resolved,
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
    ///
    /// # Panics
    /// When a binding of the shader has no view or two, a view no binding, or there are `params`
    /// without a uniform or the other way round: a fault of the kernel's `record`.
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
        check(shader, &bindings, params);
        let stage = self.stage.get_or_insert_with(|| "".into()).clone();
        let (shader, params, twin) = (shader.clone(), params.to_vec(), Arc::new(twin));
        self.resolved = Resolved::default();
        self.calls.push(Call { stage, shader, bindings, params, grid, twin });
    }

    /// The calls, in order.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// Adds the calls of another recording, with their stages.
    pub fn append(&mut self, other: &Recording) {
        self.resolved = Resolved::default();
        self.calls.extend_from_slice(&other.calls);
    }

    /// The same calls on other memory: each view as `of` maps it.
    pub fn rebound(&self, of: impl Fn(&View) -> View) -> Recording {
        self.changed(|call| {
            call.bindings.iter_mut().for_each(|(_, view)| *view = of(view));
            if let Grid::Indirect(view) = &mut call.grid {
                *view = of(view);
            }
        })
    }

    /// The same calls, each as `change` leaves it: with another shader, or with bindings swapped.
    ///
    /// # Panics
    /// As [`Recording::call`], for what `change` made.
    pub fn changed(&self, change: impl Fn(&mut Call)) -> Recording {
        let mut calls = self.calls.clone();
        for call in &mut calls {
            change(call);
            check(&call.shader, &call.bindings, &call.params);
        }
        Recording { calls, ..Recording::default() }
    }

    /// Cuts it in two before call `at`.
    pub fn split_at(&self, at: usize) -> (Recording, Recording) {
        let part = |calls: &[Call]| Recording { calls: calls.to_vec(), ..Recording::default() };
        let (head, tail) = self.calls.split_at(at);
        (part(head), part(tail))
    }
}

impl From<Call> for Recording {
    /// One call alone.
    fn from(call: Call) -> Recording {
        Recording { calls: vec![call], ..Recording::default() }
    }
}

fn check(shader: &Shader, bindings: &[(&'static str, View)], params: &[u8]) {
    let kernel = shader.kernel;
    let uniform = |declared: &&Declared| declared.access == Access::Uniform;
    for declared in shader.bindings().iter().filter(|d| !uniform(d)) {
        let times = bindings.iter().filter(|(name, _)| *name == declared.name).count();
        assert!(times > 0, "{kernel}: nothing is bound to '{}'", declared.name);
        assert!(times == 1, "{kernel}: '{}' is bound twice", declared.name);
    }
    for (name, _) in bindings {
        let declared = shader.bindings().iter().any(|d| d.name == *name && !uniform(&d));
        assert!(declared, "{kernel}: the shader has no binding named '{name}'");
    }
    let has_params = shader.bindings().iter().any(|d| uniform(&d));
    assert!(has_params != params.is_empty(), "{kernel}: Params and the shader's uniform do not match");
    assert!(params.len() <= PARAMS_SLOT, "{kernel}: Params of {} bytes, over {PARAMS_SLOT}", params.len());
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
