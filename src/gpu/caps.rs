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

/// Matrix units as kernels use them: f16 operands, f32 sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixUnits {
    /// Rows and columns of a fragment: 16, or 8 where there are no larger ones.
    pub size: u32,
    /// Invocations of a subgroup, which multiplies fragments together.
    pub width: u32,
}

impl MatrixUnits {
    /// Those that the fastest kernels are written for; others have kernels of their own.
    pub const TUNED: MatrixUnits = MatrixUnits { size: 16, width: 32 };

    /// Subgroups of a workgroup of at most 256 invocations, at most `most`.
    pub fn subgroups(&self, most: u32) -> u32 {
        (256 / self.width).min(most)
    }
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
    /// Subgroup width of kernels on matrix units: measured when a device is opened whose adapter has several widths.
    pub matrix_width: Option<u32>,
    /// Kernels run on the matrix units, as [`super::Options::matrix_units`] says.
    pub matrix_kernels: bool,
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
            matrix_width: None,
            matrix_kernels: true,
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

    /// As [`Caps::everything`], with the matrix units and subgroups that the fastest kernels are written for.
    pub fn matrices() -> Caps {
        Caps { workgroup_bytes: 48 << 10, ..Caps::with(MatrixUnits::TUNED) }
    }

    /// As [`Caps::everything`], with those matrix units and 32 KiB of workgroup memory.
    pub fn with(units: MatrixUnits) -> Caps {
        let MatrixUnits { size, width } = units;
        let shape = |result: &str| CooperativeShape {
            m: size,
            n: size,
            k: size,
            operands: "F16".into(),
            result: result.into(),
        };
        Caps {
            name: format!("matrix units of {size}x{size}x{size}, subgroups of {width}"),
            subgroups: Some((width, width)),
            cooperative: vec![shape("F16"), shape("F32")],
            workgroup_bytes: 32 << 10,
            ..Caps::everything()
        }
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

    /// The size of the matrix units' fragments, f16 to f32, of those that kernels take: 16, or 8.
    pub fn matrix_size(&self) -> Option<u32> {
        let has = |size: &u32| {
            let fits = |s: &CooperativeShape| [s.m, s.n, s.k] == [*size; 3] && s.operands == "F16" && s.result == "F32";
            self.cooperative.iter().any(fits)
        };
        [16, 8].into_iter().find(has)
    }

    /// Bytes of the largest buffer that one binding shows whole.
    pub fn bound_bytes(&self) -> u64 {
        self.binding_bytes.min(self.buffer_bytes)
    }

    /// Refuses what no binding shows whole.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn check_bound(&self, size: u64, label: &str) -> crate::Result<()> {
        let most = self.bound_bytes();
        if size <= most {
            return Ok(());
        }
        let (asked, offered) = (format!("{size} bytes for {label}"), format!("its largest binding is {most} bytes"));
        Err(crate::Error::OutOfMemory { adapter: self.label(), asked, offered })
    }

    /// The matrix units that kernels run on, or why they do not: kernels want f16 and workgroups of 256 besides, and a
    /// subgroup that has a fragment's rows.
    ///
    /// # Errors
    /// The reason.
    pub fn matrix_units(&self) -> Result<MatrixUnits, &'static str> {
        let size = self.matrix_size().ok_or("no matrix units of 16x16x16 or 8x8x8, f16 to f32")?;
        if !self.matrix_kernels {
            return Err(
                "matrix units are switched off by LAMINA_MATRIX_UNITS, or slower than none, as a software driver's are",
            );
        }
        let only = self.subgroups.filter(|(least, most)| least == most).map(|(width, _)| width);
        let width = only
            .or(self.matrix_width)
            .ok_or("subgroups of several widths, none of them found for kernels on matrix units")?;
        if !self.f16 || self.invocations < 256 {
            Err("no f16, or fewer than 256 invocations")
        } else if !(size..=64).contains(&width) || !width.is_power_of_two() {
            Err("subgroups narrower than a fragment, or wider than 64")
        } else {
            Ok(MatrixUnits { size, width })
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
