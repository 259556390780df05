//! What a device can do at most, measured by itself: every other figure is a share of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{median, warm_up};
use crate::gpu::{Buffer, Caps, Device, Grid, Recording, Shader, Source, View, grid_1d};
use crate::{Error, Result, wgsl};

/// The shaders that measure them, with whether they need f16.
pub const SHADERS: [fn() -> Arc<Shader>; 5] = [
    || shader(wgsl!("ceilings/fill")),
    || shader(wgsl!("ceilings/read")),
    || shader(wgsl!("ceilings/copy")),
    || multiply("f32"),
    || multiply("f16"),
];

/// Ceilings of a device.
#[derive(Clone, Debug, Serialize)]
pub struct Ceilings {
    /// Bytes that were read and copied.
    pub bytes: u64,
    /// Reading only, GB/s.
    pub read_gbs: f64,
    /// Copying, bytes read and bytes written together, GB/s.
    pub copy_gbs: f64,
    /// f32 multiply-adds, TFLOP/s of two operations each.
    pub f32_tflops: f64,
    /// f16 multiply-adds, TFLOP/s; `null` where shaders have no f16.
    pub f16_tflops: Option<f64>,
    /// One of many dispatches in a pass that wait for each other, microseconds.
    pub dispatch_us: f64,
    /// From the submission of one dispatch to its result on the host, microseconds.
    pub round_trip_us: f64,
}

const WORKGROUP: u32 = 256;
/// Bytes of one buffer, at most, where bindings may be so large.
const PART: u64 = 1 << 30;
/// Invocations that read.
const READERS: u32 = 1 << 20;
/// Turns of 16 multiply-adds.
const TURNS: u32 = 64;
/// Dispatches in a row.
const DISPATCHES: u32 = 500;

fn shader(source: Source) -> Arc<Shader> {
    Shader::of(source).u32("WORKGROUP", WORKGROUP).build()
}

fn multiply(scalar: &'static str) -> Arc<Shader> {
    let source = wgsl!("ceilings/multiply");
    let builder = Shader::of(source).u32("WORKGROUP", WORKGROUP).u32("TURNS", TURNS).alias("Scalar", scalar);
    if scalar == "f16" { builder.f16().build() } else { builder.build() }
}

/// Adds a dispatch of one of the shaders. Ceilings are those of a GPU: there is no twin.
fn call(recording: &mut Recording, shader: &Arc<Shader>, bindings: Vec<(&'static str, View)>, p: &[u32], grid: Grid) {
    recording.call(shader, bindings, bytemuck::cast_slice(p), grid, |_| unreachable!("the cpu device was refused"));
}

/// The word that `ceilings/fill` writes at a place.
fn hash(word: u32) -> u32 {
    let a = (word ^ (word >> 16)).wrapping_mul(0x7feb_352d);
    let b = (a ^ (a >> 15)).wrapping_mul(0x846c_a68b);
    b ^ (b >> 16)
}

/// Measures a device with `bytes` of memory, rounded down to whole MiB. What was computed is checked before
/// anything is timed.
///
/// # Errors
/// [`Error::Usage`] for the `cpu` device and for one without timestamps; [`Error::OutOfMemory`];
/// [`Error::Driver`] where a sum or a number is wrong.
pub fn measure(device: &Device, bytes: u64) -> Result<Ceilings> {
    refuse(device.caps())?;
    let memory = Memory::new(device, bytes)?;
    memory.check(device)?;
    let (read, copy) = (memory.read(), memory.copy());
    let total = memory.bytes();
    let f16 = device.caps().f16;
    Ok(Ceilings {
        bytes: total,
        read_gbs: total as f64 / seconds(device, &read)? / 1e9,
        copy_gbs: 2.0 * (total / 2) as f64 / seconds(device, &copy)? / 1e9,
        f32_tflops: multiplies(device, "f32")?,
        f16_tflops: f16.then(|| multiplies(device, "f16")).transpose()?,
        dispatch_us: dispatches(device)?,
        round_trip_us: round_trip(device)?,
    })
}

/// Refuses a device whose work cannot be timed.
///
/// # Errors
/// [`Error::Usage`] for the `cpu` device and for an adapter without timestamps.
pub fn refuse(caps: &Caps) -> Result<()> {
    if caps.timestamps {
        return Ok(());
    }
    let (expected, found) = ("a GPU adapter with timestamps".into(), caps.label());
    Err(Error::Usage { what: "the adapter of a benchmark".into(), expected, found })
}

/// The median time of a recording, seconds.
fn seconds(device: &Device, recording: &Recording) -> Result<f64> {
    let recordings = std::slice::from_ref(recording);
    warm_up(device, recordings)?;
    let times = pollster::block_on(device.time(recordings, 10))?.expect("there are timestamps");
    Ok(median(times).as_secs_f64())
}

fn wrong(device: &Device, asked: &str, expected: String, found: String) -> Error {
    let found = format!("{found}, not {expected}");
    Error::Driver { adapter: device.caps().label(), asked: asked.into(), found }
}

/// Memory full of numbers, in buffers of at most [`PART`].
struct Memory {
    parts: Vec<Buffer>,
    sums: Buffer,
}

impl Memory {
    fn new(device: &Device, bytes: u64) -> Result<Memory> {
        let part = PART.min(device.caps().binding_bytes) >> 20 << 20;
        let bytes = (bytes >> 20 << 20).max(2 << 20);
        let count = bytes.div_ceil(part).next_multiple_of(2);
        let size = (bytes / count) >> 10 << 10;
        let parts = (0..count).map(|_| device.alloc(size, "memory to read")).collect::<Result<Vec<_>>>()?;
        let sums = device.alloc(count * 4 * u64::from(READERS), "sums")?;
        let memory = Memory { parts, sums };
        let fill = shader(wgsl!("ceilings/fill"));
        let mut recording = Recording::new();
        for (i, part) in memory.parts.iter().enumerate() {
            let vectors = (size / 16) as u32;
            let first = (i as u32).wrapping_mul(4 * vectors);
            let grid = grid_1d(vectors.div_ceil(WORKGROUP));
            call(&mut recording, &fill, vec![("y", part.view())], &[vectors, first], grid);
        }
        device.submit(&recording)?;
        Ok(memory)
    }

    fn part_bytes(&self) -> u64 {
        self.parts[0].view().size()
    }

    fn bytes(&self) -> u64 {
        self.part_bytes() * self.parts.len() as u64
    }

    fn read(&self) -> Recording {
        let shader = shader(wgsl!("ceilings/read"));
        let mut recording = Recording::new();
        for (i, part) in self.parts.iter().enumerate() {
            let sums = self.sums.view().part(i as u64 * 4 * u64::from(READERS), 4 * u64::from(READERS));
            let vectors = (part.view().size() / 16) as u32;
            let groups = (READERS / WORKGROUP).min(vectors.div_ceil(WORKGROUP));
            let bindings = vec![("x", part.view()), ("sums", sums)];
            call(&mut recording, &shader, bindings, &[vectors], Grid::Direct([groups, 1, 1]));
        }
        recording
    }

    /// The first half of the buffers to the second.
    fn copy(&self) -> Recording {
        let shader = shader(wgsl!("ceilings/copy"));
        let mut recording = Recording::new();
        let (from, to) = self.parts.split_at(self.parts.len() / 2);
        for (from, to) in from.iter().zip(to) {
            let vectors = (from.view().size() / 16) as u32;
            let bindings = vec![("x", from.view()), ("y", to.view())];
            call(&mut recording, &shader, bindings, &[vectors], grid_1d(vectors.div_ceil(4 * WORKGROUP)));
        }
        recording
    }

    /// The sum of all that was read is that of all that was written.
    fn check(&self, device: &Device) -> Result<()> {
        device.submit(&self.read())?;
        let bytes = pollster::block_on(device.read(&[self.sums.view()]))?.remove(0);
        let sum = |words: &[u32]| words.iter().fold(0u32, |sum, word| sum.wrapping_add(*word));
        let found = sum(&bytemuck::pod_collect_to_vec::<u8, u32>(&bytes));
        let words = (self.bytes() / 4) as u32;
        let expected = (0..words).fold(0u32, |sum, word| sum.wrapping_add(hash(word)));
        match found == expected {
            true => Ok(()),
            false => Err(wrong(device, "the sum of what it read", expected.to_string(), found.to_string())),
        }
    }
}

fn multiplies(device: &Device, scalar: &'static str) -> Result<f64> {
    // A software driver does about as many in the same time as a GPU with 1024 workgroups.
    let groups = if device.caps().is_software() { 8 } else { 4096 };
    let y = device.alloc(4 * u64::from(groups * WORKGROUP), "multiplied")?;
    let mut recording = Recording::new();
    let params = [0.5f32.to_bits(), 1f32.to_bits()];
    call(&mut recording, &multiply(scalar), vec![("y", y.view())], &params, Grid::Direct([groups, 1, 1]));
    device.submit(&recording)?;
    let bytes = pollster::block_on(device.read(&[y.view()]))?.remove(0);
    let found: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    if let Some(value) = found.iter().find(|value| !((*value - 2.0).abs() <= 4e-3)) {
        return Err(wrong(device, &format!("a chain of {scalar} multiply-adds"), "2".into(), value.to_string()));
    }
    let steps = f64::from(TURNS * 16) * 32.0 * f64::from(groups * WORKGROUP);
    Ok(2.0 * steps / seconds(device, &recording)? / 1e12)
}

fn dispatches(device: &Device) -> Result<f64> {
    let y = device.alloc(1024, "a little memory")?;
    let fill = shader(wgsl!("ceilings/fill"));
    let mut recording = Recording::new();
    for i in 0..DISPATCHES {
        call(&mut recording, &fill, vec![("y", y.view())], &[64, i], grid_1d(1));
    }
    Ok(seconds(device, &recording)? * 1e6 / f64::from(DISPATCHES))
}

fn round_trip(device: &Device) -> Result<f64> {
    let y = device.alloc(1024, "a little memory")?;
    let mut recording = Recording::new();
    call(&mut recording, &shader(wgsl!("ceilings/fill")), vec![("y", y.view())], &[64, 0], grid_1d(1));
    let trip = |_| -> Result<Duration> {
        let started = Instant::now();
        device.submit(&recording)?;
        let bytes = pollster::block_on(device.read(&[y.view().part(0, 16)]))?.remove(0);
        let spent = started.elapsed();
        match bytes[..4] == hash(0).to_le_bytes() {
            true => Ok(spent),
            false => Err(wrong(device, "one word", hash(0).to_string(), format!("{:?}", &bytes[..4]))),
        }
    };
    let times = (0..50).map(trip).collect::<Result<Vec<_>>>()?;
    Ok(median(times).as_secs_f64() * 1e6)
}
