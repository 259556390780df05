//! The library in a browser: what `demos/lamina` calls, usually in a worker. Numbers and texts cross the border
//! as they are, all else as JSON.
//!
//! A checkpoint's files are handed over with [`put_file`]; a [`WebModel`] is loaded from their folder onto a
//! [`WebDevice`]. Errors are JavaScript `Error`s with a `code`.

mod bench;
mod model;

use futures::future::join;
use js_sys::{Function, Reflect, Uint8Array};
use serde::{Deserialize, Serialize};
use sha2::Digest;
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;
use web_time::Instant;

pub use model::WebModel;

use crate::check::report::{self, Report};
use crate::check::{Outcome, Prepared};
use crate::gpu::{Device, Options, Selector};
use crate::kernels::{ALL, AnyCase, Entry};
use crate::{Error, Result, disk};

/// A result that JavaScript sees as a value or an exception.
type Thrown<T> = std::result::Result<T, JsValue>;

/// The word by which JavaScript tells errors apart.
fn code(error: &Error) -> &'static str {
    match error {
        Error::Usage { .. } => "usage",
        Error::Driver { .. } => "driver",
        Error::OutOfMemory { .. } => "out-of-memory",
        Error::DeviceLost { .. } => "device-lost",
        Error::Shader { .. } => "shader",
        Error::OutOfPages { .. } | Error::Capacity { .. } | Error::Fragmented { .. } => "capacity",
        Error::NotFinite { .. } => "not-finite",
        Error::Invalid { .. } => "invalid",
        Error::Unsupported { .. } => "unsupported",
        Error::Io { .. } => "io",
    }
}

fn thrown(error: Error) -> JsValue {
    let value = js_sys::Error::new(&error.to_string());
    value.set_name("LaminaError");
    // Both are set on an object of our own, which takes them.
    let _ = Reflect::set(&value, &"code".into(), &code(&error).into());
    value.into()
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data becomes JSON")
}

fn parse<'a, T: Deserialize<'a>>(what: &str, text: &'a str) -> Thrown<T> {
    serde_json::from_str(text).map_err(|fault| {
        let (what, expected) = (what.to_string(), "the fields that lamina.d.ts names".to_string());
        thrown(Error::Usage { what, expected, found: fault.to_string() })
    })
}

/// Calls back, awaits the answer where it is a promise, and says whether it is true.
async fn call(back: &Function, arguments: &[JsValue]) -> Thrown<bool> {
    let list: js_sys::Array = arguments.iter().collect();
    let answer = back.apply(&JsValue::NULL, &list)?;
    let answer = match answer.dyn_into::<js_sys::Promise>() {
        Ok(promise) => JsFuture::from(promise).await?,
        Err(answer) => answer,
    };
    Ok(answer.is_truthy())
}

/// A panic ends the module; its message goes to the console and to `lamina_panic`, where the worker finds it.
#[wasm_bindgen(start)]
pub fn start() {
    std::panic::set_hook(Box::new(|info| {
        let _ = Reflect::set(&js_sys::global(), &"lamina_panic".into(), &info.to_string().into());
    }));
}

/// The version of the library.
#[wasm_bindgen]
pub fn version() -> String {
    env!("CARGO_PKG_VERSION").into()
}

/// Hands over a file under a path: its length in bytes, and a function that reads so many bytes from an offset on
/// (a `Uint8Array`), at once.
#[wasm_bindgen]
pub fn put_file(path: &str, length: f64, read: Function) {
    let fault = |value: JsValue| std::io::Error::other(format!("{value:?}"));
    disk::put(path.as_ref(), length as u64, move |offset, size| {
        let bytes = read.call2(&JsValue::NULL, &(offset as f64).into(), &(size as f64).into()).map_err(fault)?;
        Ok(bytes.dyn_into::<Uint8Array>().map_err(fault)?.to_vec())
    });
}

/// Takes back the files of a folder.
#[wasm_bindgen]
pub fn remove_files(folder: &str) {
    disk::remove(folder.as_ref());
}

/// SHA-256 of what comes in parts.
#[wasm_bindgen]
#[derive(Default)]
pub struct Sha256(sha2::Sha256);

#[wasm_bindgen]
impl Sha256 {
    /// Of nothing yet.
    #[wasm_bindgen(constructor)]
    pub fn new() -> Sha256 {
        Sha256::default()
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash, in hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// How a device is opened.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Opening {
    /// No binding larger than this.
    binding_bytes: Option<u64>,
}

/// Seconds that a case may take, of those that a software driver is spared.
const DEAR: f64 = 2.0;
/// What takes longer on the device is run again, at most so often, and its shortest run counts: a driver may compile
/// when a kernel first runs, as part of its time, and share its cores with others.
const AGAIN: f64 = 1.0;
const TURNS: usize = 3;

/// A kernel's path on a device.
#[derive(Serialize)]
struct Path {
    kernel: &'static str,
    spec: String,
    variant: &'static str,
    why: String,
}

/// A device.
#[wasm_bindgen]
pub struct WebDevice(Device);

#[wasm_bindgen]
impl WebDevice {
    /// Opens the browser's adapter (`gpu`), the CPU twins (`cpu`), or the twins where there is no adapter
    /// (`best`).
    pub async fn open(kind: &str, options: &str) -> Thrown<WebDevice> {
        let opening: Opening = parse("options of a device", options)?;
        let selector = match kind {
            "gpu" => Selector::Index(0),
            "cpu" => Selector::Cpu,
            _ => Selector::Best,
        };
        let options = Options { binding_bytes: opening.binding_bytes, ..Options::default() };
        Device::open(&selector, &options).await.map(WebDevice).map_err(thrown)
    }

    /// What it offers.
    pub fn caps(&self) -> String {
        json(self.0.caps())
    }

    /// The path of every kernel on it, and why.
    pub fn paths(&self) -> String {
        let of = |entry: &Entry| {
            let choices = (entry.choices)(self.0.caps());
            let kernel = entry.name;
            choices.into_iter().map(move |(spec, variant, why)| Path { kernel, spec, variant, why })
        };
        json(&ALL.iter().flat_map(of).collect::<Vec<_>>())
    }

    /// Every case of the kernels (of all where none is named), or one in `every`, against its twin. A browser may not
    /// say that its adapter is a software driver: what would take seconds, by what was measured, is left out.
    /// `each` hears how many cases are
    /// done, how many there are, the kernel, and the outcomes of the last one with the place of each one's largest
    /// error, and may end it with true. Gives the report of `lamina check --json`.
    pub async fn check(&self, kernels: Vec<String>, every: usize, each: Function) -> Thrown<String> {
        let named = |entry: &&Entry| kernels.is_empty() || kernels.iter().any(|name| name == entry.name);
        let entries: Vec<&Entry> = ALL.iter().filter(named).collect();
        let (cases, _) = report::select(&entries, self.0.caps(), false);
        let cases: Vec<_> = cases.into_iter().step_by(every.max(1)).collect();
        let (total, mut results, mut rate) = (cases.len(), Vec::new(), 0.0);
        let mut cases = cases.into_iter().enumerate();
        let mut next = |rate: f64| -> Result<Option<(usize, Prepared, f64)>> {
            let dear = |case: &AnyCase| case.flops > report::SOFTWARE_FLOPS && rate > 0.0 && case.flops / rate > DEAR;
            let Some((index, case)) = cases.find(|(_, case)| !dear(case)) else { return Ok(None) };
            let started = Instant::now();
            Ok(Some((index, Prepared::new(case)?, started.elapsed().as_secs_f64())))
        };
        let mut ready = next(rate).map_err(thrown)?;
        while let Some((done, prepared, _)) = ready {
            let (kernel, flops) = (prepared.case().kernel, prepared.case().flops);
            let started = Instant::now();
            // The next twin runs while the driver is busy with this case.
            let (outcomes, following) = join(self.outcomes(&prepared), async { next(rate) }).await;
            let (outcomes, following) = (outcomes.map_err(thrown)?, following.map_err(thrown)?);
            let (all, twin) = (started.elapsed().as_secs_f64(), following.as_ref().map_or(0.0, |(.., twin)| *twin));
            // At most this long: the driver may have been done before the twin.
            let seconds = f64::max(all - twin, all / 4.0) / outcomes.len().max(1) as f64;
            rate = f64::max(rate, flops / seconds);
            ready = following;
            let places: Vec<&str> = outcomes.iter().map(|outcome| outcome.place.as_str()).collect();
            let heard = [(done + 1).into(), total.into(), kernel.into(), json(&(&outcomes, places)).into()];
            results.extend(outcomes);
            if call(&each, &heard).await? {
                break;
            }
        }
        Ok(json(&Report::new(self.0.caps(), results)))
    }

    /// Every variant of a case.
    async fn outcomes(&self, case: &Prepared) -> Result<Vec<Outcome>> {
        let mut outcomes = report::run_case(&self.0, case).await?;
        let slow = |outcome: &&mut Outcome| outcome.passed && outcome.seconds.is_some_and(|seconds| seconds > AGAIN);
        for outcome in outcomes.iter_mut() {
            for _ in 0..TURNS {
                if !slow(&outcome) {
                    break;
                }
                let again = case.run_awaited(&self.0, &outcome.variant).await?;
                if !again.passed || again.seconds < outcome.seconds {
                    *outcome = again;
                }
            }
        }
        Ok(outcomes)
    }

    /// Loses it, as a driver may.
    pub fn destroy(&self) {
        self.0.destroy();
    }
}
