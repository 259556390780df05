//! What an adapter offers, in plain numbers. Every choice of a path reads these alone.

use serde::Serialize;

use super::tuned::Tuned;

/// What an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceType {
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares the host's memory.
    Integrated,
    /// A GPU passed through by a hypervisor.
    Virtual,
    /// A software driver, or the twins.
    Cpu,
    /// The driver does not say.
    Other,
}

/// A matrix multiply-add that the adapter's matrix units offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CooperativeShape {
    /// Rows of the result.
    pub m: u32,
    /// Columns of the result.
    pub n: u32,
    /// Length of the sums.
    pub k: u32,
    /// The operands' type, such as `F16`.
    pub operands: String,
    /// The result's type.
    pub result: String,
}

/// What an adapter offers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Caps {
    /// The adapter's name.
    pub name: String,
    /// `vulkan`, `metal`, `dx12`, `gl`, `webgpu`, or `cpu` for the twins.
    pub backend: String,
    /// What it is.
    pub device_type: DeviceType,
    /// The driver's name and version.
    pub driver: String,
    /// Largest storage binding, bytes.
    pub binding_bytes: u64,
    /// Largest buffer, bytes.
    pub buffer_bytes: u64,
    /// Workgroup memory, bytes.
    pub workgroup_bytes: u32,
    /// Largest number of invocations in a workgroup.
    pub invocations: u32,
    /// Storage buffers that one kernel may bind.
    pub storage_buffers: u32,
    /// f16 arithmetic in shaders.
    pub f16: bool,
    /// Least and greatest subgroup width, where shaders can use subgroups.
    pub subgroups: Option<(u32, u32)>,
    /// Shapes of the matrix units.
    pub cooperative: Vec<CooperativeShape>,
    /// Timestamps around a pass.
    pub timestamps: bool,
    /// Compiled pipelines can be kept on disk.
    pub pipeline_cache: bool,
    /// What was measured there, where a device was opened with it ([`super::Options::tuned`]).
    #[serde(skip)]
    pub tuned: Vec<Tuned>,
}

impl Caps {
    /// What every WebGPU implementation offers, and no more.
    pub fn portable() -> Caps {
        Caps {
            name: "WebGPU defaults".into(),
            backend: "none".into(),
            device_type: DeviceType::Other,
            driver: String::new(),
            binding_bytes: 128 << 20,
            buffer_bytes: 256 << 20,
            workgroup_bytes: 16 << 10,
            invocations: 256,
            storage_buffers: 8,
            f16: false,
            subgroups: None,
            cooperative: Vec::new(),
            timestamps: false,
            pipeline_cache: false,
            tuned: Vec::new(),
        }
    }

    /// An adapter with every feature that any path asks for, so that all variants show.
    pub fn everything() -> Caps {
        Caps {
            name: "every feature".into(),
            f16: true,
            subgroups: Some((4, 128)),
            workgroup_bytes: 48 << 10,
            timestamps: true,
            ..Caps::portable()
        }
    }

    /// As [`Caps::everything`], with the matrix units that kernels are written for, and their subgroups.
    pub fn matrices() -> Caps {
        let shape =
            |result: &str| CooperativeShape { m: 16, n: 16, k: 16, operands: "F16".into(), result: result.into() };
        let cooperative = vec![shape("F16"), shape("F32")];
        Caps { name: "matrix units".into(), subgroups: Some((32, 32)), cooperative, ..Caps::everything() }
    }

    /// The `cpu` device: the twins, which have no limits but memory.
    pub fn cpu() -> Caps {
        Caps {
            name: "CPU twins".into(),
            backend: "cpu".into(),
            device_type: DeviceType::Cpu,
            driver: format!("lamina {}", env!("CARGO_PKG_VERSION")),
            ..Caps::portable()
        }
    }

    /// Whether there are matrix units of the shape that kernels are written for: 16x16x16, f16 to f32.
    pub fn multiplies_matrices(&self) -> bool {
        let fits = |s: &CooperativeShape| (s.m, s.n, s.k) == (16, 16, 16) && s.operands == "F16" && s.result == "F32";
        self.cooperative.iter().any(fits)
    }

    /// Bytes of the largest buffer that one binding shows whole.
    pub fn bound_bytes(&self) -> u64 {
        self.binding_bytes.min(self.buffer_bytes)
    }

    /// Why kernels on matrix units do not run: those there, and what these kernels have besides, f16, subgroups of 32
    /// and workgroups of 256.
    pub fn matrices_refusal(&self) -> Option<&'static str> {
        if !self.multiplies_matrices() {
            Some("no matrix units of 16x16x16, f16 to f32")
        } else if !self.f16 || self.subgroups != Some((32, 32)) || self.invocations < 256 {
            Some("no f16, subgroups of other widths than 32, or fewer than 256 invocations")
        } else {
            None
        }
    }

    /// `name (backend)`, as messages name the adapter.
    pub fn label(&self) -> String {
        format!("{} ({})", self.name, self.backend)
    }

    /// True for a driver that runs shaders on the CPU: cases cost more there.
    pub fn is_software(&self) -> bool {
        self.device_type == DeviceType::Cpu
    }
}
