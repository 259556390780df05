//! A step that runs on the twins up to some stage and on the GPU from there: the first stage whose
//! twins mend the answer is the one at fault.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::error::{Error, Result};
use crate::gpu::{Access, Buffer, Call, Declared, Device, Grid, Options, Recording, View};

/// The stages of a recording, in the order in which they end.
pub fn stages(recording: &Recording) -> Vec<&str> {
    let mut stages: Vec<&str> = Vec::new();
    for call in recording.calls() {
        stages.retain(|stage| *stage != &*call.stage);
        stages.push(&call.stage);
    }
    stages
}

/// Runs the calls up to the last one of `stage` on the twins, in host memory, and those behind it on the
/// device. A stage means its parts too: `layers.0` those of `layers.0.attention`. On the `cpu` device it
/// is the same as submitting.
///
/// # Errors
/// [`Error::Usage`] with the stages that there are, [`Error::OutOfMemory`] where the host cannot hold
/// what the first stages bind, and faults of the driver.
pub async fn run_until(device: &Device, recording: &Recording, stage: &str) -> Result<()> {
    let part_of =
        |call: &Call| call.stage.strip_prefix(stage).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    let Some(last) = recording.calls().iter().rposition(part_of) else {
        let expected = format!("one of {}", stages(recording).join(", "));
        return Err(Error::Usage {
            what: "a stage of the step (--reference-until)".into(),
            expected,
            found: stage.into(),
        });
    };
    let (head, tail) = recording.split_at(last + 1);
    let host = Device::cpu(&Options::default());
    let mirrors = mirror(device, &host, &head).await?;
    host.submit(&head.rebound(|view| view.of(&mirrors[&view.buffer().id()].1)))?;
    for id in written(&head) {
        let (buffer, mirror) = &mirrors[&id];
        let bytes = host.read(&[mirror.view()]).await?.remove(0);
        device.write(&buffer.view(), 0, &bytes)?;
    }
    device.submit(&tail)
}

/// A copy in host memory of each buffer that the recording binds, by the buffer's id.
async fn mirror(device: &Device, host: &Device, recording: &Recording) -> Result<HashMap<u64, (Buffer, Buffer)>> {
    let mut mirrors = HashMap::new();
    for buffer in bound(recording).map(View::buffer) {
        if let Entry::Vacant(entry) = mirrors.entry(buffer.id()) {
            let bytes = device.read(&[buffer.view()]).await?.remove(0);
            entry.insert((buffer.clone(), host.upload(&bytes, buffer.view().label())?));
        }
    }
    Ok(mirrors)
}

/// Every view that the calls bind or take their grid from.
fn bound(recording: &Recording) -> impl Iterator<Item = &View> {
    recording.calls().iter().flat_map(|call| {
        let grid = match &call.grid {
            Grid::Indirect(view) => Some(view),
            Grid::Direct(_) => None,
        };
        call.bindings.iter().map(|(_, view)| view).chain(grid)
    })
}

/// The ids of the buffers that its kernels write.
fn written(recording: &Recording) -> Vec<u64> {
    let mut ids = Vec::new();
    for call in recording.calls() {
        for (name, view) in &call.bindings {
            let writes = |d: &Declared| d.name == *name && d.access == Access::ReadWrite;
            if call.shader.bindings().iter().any(writes) {
                ids.push(view.buffer().id());
            }
        }
    }
    ids.sort();
    ids.dedup();
    ids
}
