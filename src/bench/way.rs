//! Which kernel of decode attention runs.

use super::shape::PAGE;
use crate::Result;
use crate::gpu::Device;
use crate::kernels::Kernel;
use crate::kernels::mla_decode::{MlaDecode, Spec};
use crate::kernels::mla_decode_coop::Decoder;

/// Which kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The one that the engine takes.
    Auto,
    /// `mla_decode` as every browser runs it.
    Portable,
    /// `mla_decode` with subgroups.
    Subgroup,
    /// `mla_decode_coop`, on matrix units.
    Coop,
}

/// A kernel for a spec, and how it is called.
pub(super) fn decoder(
    device: &Device,
    spec: &Spec,
    way: Way,
) -> Result<std::result::Result<(Decoder, String), String>> {
    let plain = |name: &str| {
        let found = MlaDecode::variants(spec, device.caps()).into_iter().find(|variant| variant.name == name);
        let kernel = found.map(|variant| Decoder::Plain(MlaDecode::new(spec, &variant.tuning)));
        kernel
            .map(|kernel| (kernel, format!("mla_decode {name}")))
            .ok_or(format!("mla_decode has no variant {name} here"))
    };
    let decoder = match way {
        Way::Portable => return Ok(plain("portable")),
        Way::Subgroup => return Ok(plain("subgroup")),
        Way::Auto => Decoder::new(spec, PAGE, device)?,
        Way::Coop => match Decoder::matrices(spec, device)? {
            Ok(decoder) => decoder,
            Err(why) => return Ok(Err(format!("mla_decode_coop: {why}"))),
        },
    };
    let name = match &decoder {
        Decoder::Plain(_) => format!("mla_decode {}", MlaDecode::choice(spec, device.caps()).variant.name),
        Decoder::Matrices { .. } => "mla_decode_coop".to_string(),
    };
    Ok(Ok((decoder, name)))
}
