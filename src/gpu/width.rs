//! How wide subgroups are in kernels on matrix units, where an adapter has several widths: wgpu names their bounds, not
//! what a kernel gets.

use std::sync::Arc;

use super::caps::{Caps, MatrixUnits};
use super::compose::Shader;
use super::device::Device;
use super::recording::{Grid, Recording};
use crate::error::{Error, Result};
use crate::wgsl;

/// The width that a small kernel on matrix units found. `None` where there is nothing to find: no matrix units, no
/// subgroups, one width only; or, with a warning, where they do not multiply.
///
/// # Errors
/// [`Error::DeviceLost`].
pub(super) async fn measured(device: &Device) -> Result<Option<u32>> {
    let caps = device.caps();
    // All else that kernels want, with the least width that there could be in the place of the one looked for.
    let units = Caps { matrix_width: caps.matrix_size(), ..caps.clone() }.matrix_units();
    match (units, caps.subgroups) {
        (Ok(units), Some((least, most))) if least < most => told(device, found(device, units).await),
        _ => Ok(None),
    }
}

/// What was found, with a warning in the place of faults of the driver.
fn told(device: &Device, found: Result<Vec<[u32; 2]>>) -> Result<Option<u32>> {
    let label = device.caps().label();
    match found.map(|found| width_of(&found).ok_or(found)) {
        Ok(Ok(width)) => Ok(Some(width)),
        Err(error @ Error::DeviceLost { .. }) => Err(error),
        Ok(Err(found)) => {
            let some = &found[..found.len().min(4)];
            log::warn!(
                "{label}: a product on matrix units is wrong, or its subgroups differ (width, how many: {some:?}...); kernels go without"
            );
            Ok(None)
        }
        Err(error) => {
            log::warn!("{label}: matrix units do not run, {error}; kernels go without");
            Ok(None)
        }
    }
}

/// The width that all of 256 invocations agree on.
fn width_of(found: &[[u32; 2]]) -> Option<u32> {
    let [width, count] = *found.first()?;
    (width * count == 256 && found.iter().all(|other| *other == [width, count])).then_some(width)
}

/// The kernel.
pub fn shader(units: MatrixUnits) -> Arc<Shader> {
    Shader::of(wgsl!("ceilings/width")).fragments(units).build()
}

async fn found(device: &Device, units: MatrixUnits) -> Result<Vec<[u32; 2]>> {
    let shader = shader(units);
    let widths = device.alloc(256 * 8, "widths")?;
    let mut recording = Recording::new();
    let bindings = vec![("widths", widths.view())];
    recording.call(&shader, bindings, &[], Grid::Direct([1, 1, 1]), |_| unreachable!("only GPUs are asked"));
    device.submit(&recording)?;
    let bytes = device.read(&[widths.view()]).await?.remove(0);
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_width_is_what_all_invocations_found() {
        assert_eq!(width_of(&[[32, 8]; 256]), Some(32));
        assert_eq!(width_of(&[[64, 4]; 256]), Some(64));
        assert_eq!(width_of(&[[32, 4]; 256]), None);
        assert_eq!(width_of(&[[0, 0]; 256]), None);
        let mut some = [[32, 8]; 256];
        some[77] = [64, 4];
        assert_eq!(width_of(&some), None);
    }
}
