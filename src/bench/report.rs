//! What every benchmark's `--json` holds, whatever it measured and wherever it ran.

use serde::Serialize;

use super::ceilings::Ceilings;
use super::clock::Clock;
use crate::gpu::{Caps, DeviceType};

/// A benchmark's record.
#[derive(Clone, Debug, Serialize)]
pub struct Report<T: Serialize> {
    /// lamina's version.
    pub version: &'static str,
    /// The commit it was built from: `LAMINA_COMMIT` when it was compiled, else `null`.
    pub commit: Option<&'static str>,
    /// What was asked for: a command line, or what a page sent.
    pub command: String,
    /// Which device ran.
    pub device: Ran,
    /// Its driver's name and version.
    pub driver: String,
    /// What times were taken by.
    pub clock: Clock,
    /// What the device can do at most.
    pub ceilings: Ceilings,
    /// What was measured.
    #[serde(flatten)]
    pub results: T,
}

/// A device by its names.
#[derive(Clone, Debug, Serialize)]
pub struct Ran {
    /// The adapter.
    pub adapter: String,
    /// Its backend.
    pub backend: String,
    /// What it is.
    #[serde(rename = "type")]
    pub device_type: DeviceType,
}

impl Ran {
    /// From what the device says of itself.
    pub fn of(caps: &Caps) -> Ran {
        Ran { adapter: caps.name.clone(), backend: caps.backend.clone(), device_type: caps.device_type }
    }
}

/// The results of `ceilings`, which are none beside them.
#[derive(Clone, Debug, Serialize)]
pub struct Nothing {}

impl<T: Serialize> Report<T> {
    /// The record of what was measured on a device.
    pub fn new(caps: &Caps, command: String, clock: Clock, ceilings: Ceilings, results: T) -> Report<T> {
        Report {
            version: env!("CARGO_PKG_VERSION"),
            commit: option_env!("LAMINA_COMMIT"),
            command,
            device: Ran::of(caps),
            driver: caps.driver.clone(),
            clock,
            ceilings,
            results,
        }
    }

    /// As one JSON object.
    pub fn json(&self) -> String {
        format!("{}\n", serde_json::to_string_pretty(self).expect("plain data becomes JSON"))
    }
}
