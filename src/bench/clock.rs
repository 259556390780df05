//! How long work takes on a device: by the GPU's own timestamps, or, where it has none that are exact, by the time
//! until its queue is empty.

use std::time::Duration;

use serde::Serialize;
use web_time::Instant;

use super::{ceilings, median};
use crate::gpu::{Device, Recording};
use crate::{Error, Result};

/// What times are taken by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// A timestamp before and behind each run.
    Timestamps,
    /// The host's clock, from a submission of many runs until all are done, less what an empty one takes: each
    /// figure is the mean of a submission.
    Queue,
}

/// A device's clock.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Clock {
    /// What times are taken by.
    pub by: By,
    /// What was taken off each submission, microseconds; 0 with timestamps.
    pub overhead_us: f64,
}

/// How long the device works before anything is timed: idle GPUs run at a fraction of their clock.
/// After seconds of work on the host 120 ms were too few: one kernel read 3064 us where 1400 was true.
const WARM_UP: Duration = Duration::from_millis(600);
/// Work that is under way at once meanwhile.
const BURST: Duration = Duration::from_millis(100);
/// Work of one submission: far below where systems take a GPU for hung, far above what submitting costs.
const SUBMISSION: Duration = Duration::from_millis(200);
/// The most runs of one submission: a pair of timestamps each, of the 4096 that a query set holds.
const MOST_RUNS: usize = 2048;
/// By the queue, the fewest submissions of short runs: each is one figure, and their median is to say something.
const LEAST_SUBMISSIONS: usize = 5;

impl Clock {
    /// The clock of a device.
    ///
    /// # Errors
    /// [`Error::Usage`] for the `cpu` device: its time says nothing of kernels; and the driver's faults.
    pub async fn of(device: &Device) -> Result<Clock> {
        refuse(device)?;
        let caps = device.caps();
        // Browsers round timestamps against attacks, Chrome to 100 us: more than many kernels take.
        match caps.timestamps && caps.backend != "webgpu" {
            true => Ok(Clock { by: By::Timestamps, overhead_us: 0.0 }),
            false => Clock::of_queue(device).await,
        }
    }

    /// The clock of a device by its queue, whether or not it has timestamps.
    ///
    /// # Errors
    /// As [`Clock::of`].
    pub async fn of_queue(device: &Device) -> Result<Clock> {
        refuse(device)?;
        let nothing = ceilings::least(device)?;
        device.prepare(&nothing).await?;
        let mut times = Vec::new();
        for _ in 0..50 {
            times.push(until_done(device, &nothing).await?);
        }
        Ok(Clock { by: By::Queue, overhead_us: median(times).as_secs_f64() * 1e6 })
    }

    /// Runs the recordings until the device's clock can be taken for that of steady work, then each in turn,
    /// `rounds` times. Gives the time of each run (by the queue the mean of some) in that order.
    ///
    /// # Errors
    /// As [`Device::submit`].
    pub async fn time(&self, device: &Device, recordings: &[Recording], rounds: usize) -> Result<Vec<Duration>> {
        let each = warm_up(device, recordings).await?.max(Duration::from_nanos(100));
        let together = ((SUBMISSION.as_secs_f64() / each.as_secs_f64()) as usize).clamp(1, MOST_RUNS);
        let mut times = Vec::new();
        for turns in submissions(self.by, together, recordings.len(), rounds) {
            for part in recordings.chunks(together) {
                match self.by {
                    By::Timestamps => {
                        let spent = device.time(part, turns as u32).await?;
                        times.extend(spent.ok_or_else(|| no_timestamps(device))?);
                    }
                    By::Queue => times.push(self.mean(device, part, turns).await?),
                }
            }
        }
        Ok(times)
    }

    /// The mean time of `turns` runs of each recording, all in one submission.
    async fn mean(&self, device: &Device, recordings: &[Recording], turns: usize) -> Result<Duration> {
        let mut all = Recording::new();
        for recording in (0..turns).flat_map(|_| recordings) {
            all.append(recording);
        }
        let spent = until_done(device, &all).await?.as_secs_f64() - self.overhead_us * 1e-6;
        Ok(Duration::from_secs_f64(spent.max(0.0) / (turns * recordings.len()) as f64))
    }
}

/// How often each submission runs a list of `length` recordings, `rounds` times in all, where `together` runs make a
/// submission: short lists several times, long ones in parts. By the queue, where each is one figure, all are of one
/// size and there are enough of them, so that there may be more rounds.
fn submissions(by: By, together: usize, length: usize, rounds: usize) -> Vec<usize> {
    let turns = (together / length).clamp(1, rounds.max(1));
    let whole = vec![turns; rounds / turns];
    match by {
        By::Timestamps => whole.into_iter().chain(Some(rounds % turns).filter(|rest| *rest > 0)).collect(),
        By::Queue if together == 1 => vec![turns; rounds],
        By::Queue => vec![turns; rounds.div_ceil(turns).max(LEAST_SUBMISSIONS)],
    }
}

/// Refuses the `cpu` device.
///
/// # Errors
/// [`Error::Usage`].
pub fn refuse(device: &Device) -> Result<()> {
    if device.caps().backend != "cpu" {
        return Ok(());
    }
    let (expected, found) = ("a GPU adapter".into(), device.caps().label());
    Err(Error::Usage { what: "the adapter of a benchmark".into(), expected, found })
}

fn no_timestamps(device: &Device) -> Error {
    let (expected, found) = ("an adapter with timestamps".into(), device.caps().label());
    Error::Usage { what: "this clock".into(), expected, found }
}

async fn until_done(device: &Device, recording: &Recording) -> Result<Duration> {
    let started = Instant::now();
    device.submit(recording)?;
    device.finished().await?;
    Ok(started.elapsed())
}

/// Works for [`WARM_UP`], and says how long a recording takes, about. A software driver's processor needs no
/// such time: it runs the first recording once.
async fn warm_up(device: &Device, recordings: &[Recording]) -> Result<Duration> {
    for recording in recordings {
        device.prepare(recording).await?;
    }
    if device.caps().is_software() {
        return until_done(device, &recordings[0]).await;
    }
    let first = until_done(device, &recordings[0]).await?;
    let burst = ((BURST.as_secs_f64() / first.as_secs_f64()) as usize).clamp(1, 256);
    let (started, mut runs) = (Instant::now(), 0);
    let mut next = recordings.iter().cycle();
    while started.elapsed() < WARM_UP {
        for recording in next.by_ref().take(burst) {
            device.submit(recording)?;
        }
        device.finished().await?;
        runs += burst;
    }
    Ok(started.elapsed() / runs.max(1) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Options;

    #[test]
    fn submissions_by_the_queue_are_of_one_size_and_at_least_five() {
        let queue = |together, length, rounds| submissions(By::Queue, together, length, rounds);
        assert_eq!(queue(2048, 1, 50), [50; 5]);
        assert_eq!(queue(20, 2, 25), [10; 5]);
        assert_eq!(queue(20, 2, 100), [10; 10]);
        assert_eq!(queue(20, 40, 3), [1; 5], "in two parts each");
        assert_eq!(queue(1, 1, 3), [1; 3], "long runs are not made more");
        let stamps = |together, length, rounds| submissions(By::Timestamps, together, length, rounds);
        assert_eq!(stamps(2048, 1, 50), [50]);
        assert_eq!(stamps(20, 2, 25), [10, 10, 5]);
        assert_eq!(stamps(1, 1, 3), [1; 3]);
        assert!(stamps(20, 2, 0).is_empty());
    }

    #[test]
    fn the_cpu_device_has_no_clock() {
        let error = pollster::block_on(Clock::of(&Device::cpu(&Options::default()))).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("CPU twins"), "{error}");
    }

    #[test]
    fn the_queue_gives_about_the_time_that_timestamps_do() {
        let device = crate::check::adapters(&Options::default()).remove(0);
        let work = ceilings::work(&device).unwrap();
        let time = |clock: Clock| {
            let times = pollster::block_on(clock.time(&device, std::slice::from_ref(&work), 5)).unwrap();
            median(times).as_secs_f64()
        };
        let queue = pollster::block_on(Clock::of_queue(&device)).unwrap();
        assert!(queue.by == By::Queue && queue.overhead_us > 0.0, "{queue:?}");
        let clock = pollster::block_on(Clock::of(&device)).unwrap();
        assert_eq!(clock.by, By::Timestamps, "every software driver here has them");
        let (queue, stamps) = (time(queue), time(clock));
        assert!(queue > 0.3 * stamps && queue < 3.0 * stamps, "{queue} s by the queue, {stamps} s by timestamps");
    }
}
