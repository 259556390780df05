//! Which adapter: listing them, and choosing one.

use super::caps::{Caps, CooperativeShape, DeviceType};
use super::device::switch;
use crate::error::{Error, Result};

/// How the user names an adapter (`--adapter`, `LAMINA_ADAPTER`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selector {
    /// Discrete, then integrated, then CPU drivers; without any adapter the `cpu` device.
    #[default]
    Best,
    /// The twins.
    Cpu,
    /// The place in `lamina info`'s list, from 0.
    Index(usize),
    /// A part of a name, on one backend or on any.
    Name {
        /// `vulkan`, `metal`, `dx12` or `gl`.
        backend: Option<String>,
        /// Any part of the adapter's name, in any case.
        part: String,
    },
}

const BACKENDS: [&str; 4] = ["vulkan", "gl", "dx12", "metal"];

impl std::str::FromStr for Selector {
    type Err = Error;

    fn from_str(text: &str) -> Result<Selector> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Selector::Best);
        }
        if text.eq_ignore_ascii_case("cpu") {
            return Ok(Selector::Cpu);
        }
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return text.parse().map(Selector::Index).map_err(|_| usage("an adapter's index", &format!("'{text}'")));
        }
        if let Some((prefix, part)) = text.split_once(':') {
            let prefix = prefix.trim().to_ascii_lowercase();
            if BACKENDS.contains(&prefix.as_str()) {
                return Ok(Selector::Name { backend: Some(prefix), part: part.trim().to_string() });
            }
        }
        Ok(Selector::Name { backend: None, part: text.to_string() })
    }
}

fn usage(expected: &str, found: &str) -> Error {
    Error::Usage { what: "--adapter".into(), expected: expected.into(), found: found.into() }
}

impl Selector {
    /// The place in `list` of the adapter it means; `None` is the `cpu` device.
    ///
    /// # Errors
    /// [`Error::Usage`] when nothing or more than one adapter answers; it lists them.
    pub fn choose(&self, list: &[Caps]) -> Result<Option<usize>> {
        match self {
            Selector::Cpu => Ok(None),
            Selector::Best => Ok(best(list)),
            Selector::Index(i) if *i < list.len() => Ok(Some(*i)),
            Selector::Index(i) => {
                let found = format!("'{i}', but there are{}", lines(list, |_| true));
                Err(usage(&format!("an index below {}", list.len()), &found))
            }
            Selector::Name { backend, part } => {
                let part = part.to_lowercase();
                let fits = |caps: &Caps| {
                    backend.as_ref().is_none_or(|b| *b == caps.backend) && caps.name.to_lowercase().contains(&part)
                };
                let found: Vec<usize> = (0..list.len()).filter(|i| fits(&list[*i])).collect();
                let asked = match backend {
                    Some(backend) => format!("{backend}:{part}"),
                    None => part.clone(),
                };
                match found[..] {
                    [one] => Ok(Some(one)),
                    [] => Err(usage(
                        "a part of an adapter's name",
                        &format!("'{asked}', but there are{}", lines(list, |_| true)),
                    )),
                    _ => Err(usage(
                        "an index, or a backend and name that one adapter has",
                        &format!("'{asked}', which fits{}", lines(list, fits)),
                    )),
                }
            }
        }
    }
}

fn lines(list: &[Caps], keep: impl Fn(&Caps) -> bool) -> String {
    let line = |(i, caps): (usize, &Caps)| format!("\n  {i}  {}:{}", caps.backend, caps.name);
    if list.is_empty() {
        return " none on this system; 'cpu' runs the twins, and lamina info says how to get an adapter".into();
    }
    list.iter().enumerate().filter(|(_, caps)| keep(caps)).map(line).collect()
}

/// Discrete, integrated, virtual, CPU, other; of equals the first listed, but GL last,
/// since it is the same hardware behind an older interface.
fn best(list: &[Caps]) -> Option<usize> {
    let rank = |caps: &Caps| match caps.device_type {
        DeviceType::Discrete => 0,
        DeviceType::Integrated => 1,
        DeviceType::Virtual => 2,
        DeviceType::Cpu => 4,
        // GL drivers often do not say what they are: before software, after what says it.
        DeviceType::Other => 3,
    };
    (0..list.len()).min_by_key(|i| (rank(&list[*i]), list[*i].backend == "gl", *i))
}

/// The adapters of this system, in the drivers' order. `checked` loads the validation that drivers
/// and wgpu have, such as that of indirect dispatches, which costs a pass each.
pub(super) async fn enumerate(checked: bool) -> Vec<(wgpu::Adapter, Caps)> {
    let flags = if checked { wgpu::InstanceFlags::debugging() } else { wgpu::InstanceFlags::empty() };
    let backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY | wgpu::Backends::GL);
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        flags: flags.with_env(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapters = instance.enumerate_adapters(backends).await;
    let found = adapters
        .into_iter()
        .filter(|a| {
            // Without compute shaders there is nothing to run (old GL).
            let flags = a.get_downlevel_capabilities().flags;
            flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
        })
        .map(|adapter| {
            let caps = caps_of(&adapter);
            (adapter, caps)
        })
        .collect();
    #[cfg(target_arch = "wasm32")]
    let found = {
        let mut found: Vec<(wgpu::Adapter, Caps)> = found;
        for (_, caps) in &mut found {
            super::browser::describe(caps).await;
        }
        found
    };
    found
}

/// What each adapter of this system offers, in the order of their indices, as far as it shows without opening them.
pub async fn list() -> Vec<Caps> {
    // A switch that says nothing is refused where a device is opened.
    let switch = switch().unwrap_or_default();
    let mut found: Vec<Caps> = enumerate(false).await.into_iter().map(|(_, caps)| caps).collect();
    for caps in &mut found {
        caps.matrix_kernels = switch.unwrap_or(!caps.is_software());
    }
    found
}

fn caps_of(adapter: &wgpu::Adapter) -> Caps {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let backend = match info.backend {
        wgpu::Backend::Vulkan => "vulkan",
        wgpu::Backend::Metal => "metal",
        wgpu::Backend::Dx12 => "dx12",
        wgpu::Backend::Gl => "gl",
        wgpu::Backend::BrowserWebGpu => "webgpu",
        wgpu::Backend::Noop => "noop",
    };
    let device_type = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => DeviceType::Discrete,
        wgpu::DeviceType::IntegratedGpu => DeviceType::Integrated,
        wgpu::DeviceType::VirtualGpu => DeviceType::Virtual,
        wgpu::DeviceType::Cpu => DeviceType::Cpu,
        wgpu::DeviceType::Other => DeviceType::Other,
    };
    let shape = |p: wgpu::CooperativeMatrixProperties| CooperativeShape {
        m: p.m_size,
        n: p.n_size,
        k: p.k_size,
        operands: format!("{:?}", p.ab_type),
        result: format!("{:?}", p.cr_type),
    };
    let has = |feature| features.contains(feature);
    Caps {
        name: info.name,
        backend: backend.into(),
        device_type,
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
        binding_bytes: limits.max_storage_buffer_binding_size,
        buffer_bytes: limits.max_buffer_size,
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        invocations: limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
        storage_buffers: limits.max_storage_buffers_per_shader_stage,
        f16: has(wgpu::Features::SHADER_F16),
        subgroups: has(wgpu::Features::SUBGROUP).then_some((info.subgroup_min_size, info.subgroup_max_size)),
        // Kernels on matrix units pass tiles through workgroup memory within a subgroup.
        cooperative: if has(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SUBGROUP_BARRIER) {
            adapter.cooperative_matrix_properties().into_iter().map(shape).collect()
        } else {
            Vec::new()
        },
        matrix_width: None,
        matrix_kernels: true,
        timestamps: has(wgpu::Features::TIMESTAMP_QUERY),
        pipeline_cache: has(wgpu::Features::PIPELINE_CACHE),
        tuned: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(name: &str, backend: &str, device_type: DeviceType) -> Caps {
        Caps { name: name.into(), backend: backend.into(), device_type, ..Caps::portable() }
    }

    fn three() -> Vec<Caps> {
        vec![
            adapter("llvmpipe", "gl", DeviceType::Cpu),
            adapter("llvmpipe", "vulkan", DeviceType::Cpu),
            adapter("Radeon 780M", "vulkan", DeviceType::Integrated),
        ]
    }

    #[test]
    fn the_best_adapter_is_discrete_then_integrated_then_software_with_gl_last() {
        let mut list = three();
        assert_eq!(Selector::Best.choose(&list).unwrap(), Some(2));
        list.push(adapter("RTX", "vulkan", DeviceType::Discrete));
        assert_eq!(Selector::Best.choose(&list).unwrap(), Some(3));
        assert_eq!(Selector::Best.choose(&list[..2]).unwrap(), Some(1));
        assert_eq!(Selector::Best.choose(&[]).unwrap(), None);
    }

    #[test]
    fn a_selector_is_read_from_text() {
        let name = |backend: Option<&str>, part: &str| Selector::Name {
            backend: backend.map(str::to_string),
            part: part.to_string(),
        };
        for (text, expected) in [
            ("", Selector::Best),
            ("CPU", Selector::Cpu),
            ("2", Selector::Index(2)),
            ("vulkan:llvm", name(Some("vulkan"), "llvm")),
            ("GL:", name(Some("gl"), "")),
            ("radeon", name(None, "radeon")),
            ("odd:name", name(None, "odd:name")),
        ] {
            assert_eq!(text.parse::<Selector>().unwrap(), expected, "{text}");
        }
        assert!("99999999999999999999999".parse::<Selector>().is_err());
    }

    #[test]
    fn an_ambiguous_name_is_a_usage_error_that_lists_the_matches() {
        let error = "llvmpipe".parse::<Selector>().unwrap().choose(&three()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains("0  gl:llvmpipe") && text.contains("1  vulkan:llvmpipe"), "{text}");
        assert!(!text.contains("Radeon"), "{text}");
        assert_eq!("gl:llvm".parse::<Selector>().unwrap().choose(&three()).unwrap(), Some(0));
        assert_eq!("780m".parse::<Selector>().unwrap().choose(&three()).unwrap(), Some(2));
    }

    #[test]
    fn a_name_or_index_that_nothing_answers_is_a_usage_error() {
        for text in ["geforce", "7", "metal:llvmpipe"] {
            let error = text.parse::<Selector>().unwrap().choose(&three()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{text}");
            assert!(error.to_string().contains("Radeon 780M"), "{text}: {error}");
        }
        assert_eq!(Selector::Cpu.choose(&three()).unwrap(), None);
    }
}
