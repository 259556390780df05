//! What a device can do at most, measured by itself: every other figure is a share of it.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use web_time::Instant;

use super::clock::Clock;
use super::median;
use crate::gpu::{Buffer, Device, Grid, MatrixUnits, Recording, Shader, Source, View, grid_1d};
use crate::{Error, Result, wgsl};

/// The shaders that measure them.
pub const SHADERS: [fn() -> Arc<Shader>; 8] = [
    || shader(wgsl!("ceilings/fill")),
    || shader(wgsl!("ceilings/read")),
    || shader(wgsl!("ceilings/copy")),
    || multiply("f32"),
    || multiply("f16"),
    || matrices(MatrixUnits::TUNED),
    || matrices(MatrixUnits { size: 8, width: 32 }),
    || crate::gpu::width(MatrixUnits { size: 8, width: 32 }),
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
    /// Multiply-adds on matrix units, f16 to f32, TFLOP/s; `null` where kernels run on none.
    pub matrix_tflops: Option<f64>,
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

/// The sum of the first `words` of them. Places count in u32, of which each has a word of its own: a whole round of
/// places sums to 2^31.
fn summed(words: u64) -> u32 {
    let rounds = (words >> 32) as u32;
    (0..words as u32).fold(rounds << 31, |sum, word| sum.wrapping_add(hash(word)))
}

fn matrices(units: MatrixUnits) -> Arc<Shader> {
    let builder = Shader::of(wgsl!("ceilings/matrices")).u32("WORKGROUP", WORKGROUP).u32("TURNS", 16 * TURNS);
    builder.fragments(units).build()
}

impl Ceilings {
    /// The most floating-point operations of any kind, TFLOP/s.
    pub fn tflops(&self) -> f64 {
        [self.f16_tflops, self.matrix_tflops].into_iter().flatten().fold(self.f32_tflops, f64::max)
    }

    /// The least seconds that so many bytes and operations take, and whether the bytes decide.
    pub fn least_seconds(&self, bytes: f64, flops: f64) -> (f64, bool) {
        let (memory, compute) = (bytes / (self.read_gbs * 1e9), flops / (self.tflops() * 1e12));
        (memory.max(compute), memory >= compute)
    }
}

/// Measures a device with `bytes` of memory, rounded down to whole MiB. What was computed is checked before
/// anything is timed.
///
/// # Errors
/// [`Error::Usage`] for the `cpu` device; [`Error::OutOfMemory`]; [`Error::Driver`] where a sum or a number is
/// wrong.
pub async fn measure(device: &Device, clock: &Clock, bytes: u64) -> Result<Ceilings> {
    super::clock::refuse(device)?;
    let memory = Memory::new(device, bytes).await?;
    memory.check(device).await?;
    let (read, copy) = (memory.read(), memory.copy());
    let total = memory.bytes();
    let f16_tflops = if device.caps().f16 { Some(multiplies(device, clock, "f16").await?) } else { None };
    Ok(Ceilings {
        bytes: total,
        read_gbs: total as f64 / seconds(device, clock, &read).await? / 1e9,
        copy_gbs: 2.0 * (total / 2) as f64 / seconds(device, clock, &copy).await? / 1e9,
        f32_tflops: multiplies(device, clock, "f32").await?,
        f16_tflops,
        matrix_tflops: matrix_multiplies(device, clock).await?,
        dispatch_us: dispatches(device, clock).await?,
        round_trip_us: round_trip(device).await?,
    })
}

/// A dispatch of next to no work.
pub(super) fn least(device: &Device) -> Result<Recording> {
    let y = device.alloc(1024, "a little memory")?;
    let mut recording = Recording::new();
    call(&mut recording, &shader(wgsl!("ceilings/fill")), vec![("y", y.view())], &[64, 0], grid_1d(1));
    Ok(recording)
}

/// Some milliseconds of work, for tests of clocks.
#[cfg(test)]
pub(super) fn work(device: &Device) -> Result<Recording> {
    Ok(chains(device, "f32", 8)?.0)
}

/// The median time of a recording, seconds.
async fn seconds(device: &Device, clock: &Clock, recording: &Recording) -> Result<f64> {
    let times = clock.time(device, std::slice::from_ref(recording), 10).await?;
    Ok(median(times).as_secs_f64())
}

/// What a buffer holds once a recording has run, as words.
async fn run<T: bytemuck::Pod>(device: &Device, recording: &Recording, view: View) -> Result<Vec<T>> {
    device.prepare(recording).await?;
    device.submit(recording)?;
    Ok(bytemuck::pod_collect_to_vec(&device.read(&[view]).await?.remove(0)))
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
    async fn new(device: &Device, bytes: u64) -> Result<Memory> {
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
        device.prepare(&recording).await?;
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
    async fn check(&self, device: &Device) -> Result<()> {
        let sums: Vec<u32> = run(device, &self.read(), self.sums.view()).await?;
        let found = sums.iter().fold(0u32, |sum, word| sum.wrapping_add(*word));
        let expected = summed(self.bytes() / 4);
        match found == expected {
            true => Ok(()),
            false => Err(wrong(device, "the sum of what it read", expected.to_string(), found.to_string())),
        }
    }
}

/// `groups` workgroups of multiply-adds, and what they write.
fn chains(device: &Device, scalar: &'static str, groups: u32) -> Result<(Recording, Buffer)> {
    let y = device.alloc(4 * u64::from(groups * WORKGROUP), "multiplied")?;
    let mut recording = Recording::new();
    let params = [0.5f32.to_bits(), 1f32.to_bits()];
    call(&mut recording, &multiply(scalar), vec![("y", y.view())], &params, Grid::Direct([groups, 1, 1]));
    Ok((recording, y))
}

async fn multiplies(device: &Device, clock: &Clock, scalar: &'static str) -> Result<f64> {
    // A software driver does about as many in the same time as a GPU with 1024 workgroups.
    let groups = if device.caps().is_software() { 8 } else { 4096 };
    let (recording, y) = chains(device, scalar, groups)?;
    let found: Vec<f32> = run(device, &recording, y.view()).await?;
    if let Some(value) = found.iter().find(|value| !((*value - 2.0).abs() <= 4e-3)) {
        return Err(wrong(device, &format!("a chain of {scalar} multiply-adds"), "2".into(), value.to_string()));
    }
    let steps = f64::from(TURNS * 16) * 32.0 * f64::from(groups * WORKGROUP);
    Ok(2.0 * steps / seconds(device, clock, &recording).await? / 1e12)
}

/// Fragments that a subgroup multiplies in turn: 4 of rows with 2 of columns.
const FRAGMENTS: u32 = 8;

/// `None` without matrix units, and, with a warning, where they compute something else or the driver refuses.
async fn matrix_multiplies(device: &Device, clock: &Clock) -> Result<Option<f64>> {
    let Ok(units) = device.caps().matrix_units() else { return Ok(None) };
    match products(device, clock, units).await {
        Err(error) if !matches!(error, Error::DeviceLost { .. }) => {
            log::warn!("{}: the ceiling of matrix units is unknown: {error}", device.caps().label());
            Ok(None)
        }
        outcome => outcome.map(Some),
    }
}

async fn products(device: &Device, clock: &Clock, units: MatrixUnits) -> Result<f64> {
    let caps = device.caps();
    let area = units.size * units.size;
    // As many products whatever the units; a software driver takes about as long for few of them.
    let subgroups = WORKGROUP / units.width;
    let products = if caps.is_software() { 64 } else { 4096 * 8 * 16 * 16 * 16 };
    let groups = (products / (subgroups * area * units.size)).clamp(1, 65_535);
    let x = device.upload(&vec![half::f16::from_f32(0.25); 6 * area as usize], "factors")?;
    let y = device.alloc(4 * u64::from(groups * subgroups * area), "multiplied")?;
    let mut recording = Recording::new();
    let bindings = vec![("x", x.view()), ("y", y.view())];
    call(&mut recording, &matrices(units), bindings, &[subgroups], Grid::Direct([groups, 1, 1]));
    let found: Vec<f32> = run(device, &recording, y.view()).await?;
    // Each step adds `size` products of 1/16, to each of the fragments that are summed at last.
    let expected = (units.size * TURNS * FRAGMENTS) as f32;
    if let Some(value) = found.iter().find(|value| **value != expected) {
        return Err(wrong(device, "a chain of products on matrix units", expected.to_string(), value.to_string()));
    }
    let steps = f64::from(16 * TURNS * FRAGMENTS) * f64::from(area * units.size) * f64::from(groups * subgroups);
    Ok(2.0 * steps / seconds(device, clock, &recording).await? / 1e12)
}

async fn dispatches(device: &Device, clock: &Clock) -> Result<f64> {
    let y = device.alloc(1024, "a little memory")?;
    let fill = shader(wgsl!("ceilings/fill"));
    let mut recording = Recording::new();
    for i in 0..DISPATCHES {
        call(&mut recording, &fill, vec![("y", y.view())], &[64, i], grid_1d(1));
    }
    Ok(seconds(device, clock, &recording).await? * 1e6 / f64::from(DISPATCHES))
}

async fn round_trip(device: &Device) -> Result<f64> {
    let y = device.alloc(1024, "a little memory")?;
    let mut recording = Recording::new();
    call(&mut recording, &shader(wgsl!("ceilings/fill")), vec![("y", y.view())], &[64, 0], grid_1d(1));
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..50 {
        let started = Instant::now();
        device.submit(&recording)?;
        let bytes = device.read(&[y.view().part(0, 16)]).await?.remove(0);
        times.push(started.elapsed());
        if bytes[..4] != hash(0).to_le_bytes() {
            return Err(wrong(device, "one word", hash(0).to_string(), format!("{:?}", &bytes[..4])));
        }
    }
    Ok(median(times).as_secs_f64() * 1e6)
}

#[cfg(test)]
mod tests {
    use super::{hash, summed};

    #[test]
    fn sums_go_on_where_places_begin_anew() {
        let of = |words: std::ops::Range<u32>| words.fold(0u32, |sum, word| sum.wrapping_add(hash(word)));
        assert_eq!(summed(1000), of(0..1000));
        // All places' words are all numbers: 0 + 1 + ... + (2^32 - 1).
        let round = ((1u64 << 31) * ((1u64 << 32) - 1)) as u32;
        assert_eq!(summed((1 << 32) + 7), round.wrapping_add(of(0..7)));
        assert_eq!(summed((3 << 32) + 7), round.wrapping_mul(3).wrapping_add(of(0..7)));
        let mut numbers: Vec<u32> = (0..1 << 20).map(|i| hash(i * 4096)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 1 << 20, "no two places have the same word");
    }
}
