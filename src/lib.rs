//! Multi-head Latent Attention (MLA) on any GPU: WGSL kernels, and a runtime for them on wgpu.
//!
//! MLA, the attention of DeepSeek-V2 and its successors, caches one low-rank latent and one rotary
//! key a token instead of keys and values for every head. lamina holds the kernels for it as plain
//! WGSL, run through Vulkan, Metal, DX12 or GL, and a plain f64 twin of each on the CPU, which every
//! kernel is checked against.
//!
//! A kernel adds its calls to a [`gpu::Recording`]; a [`gpu::Device`] runs it. The same recording
//! runs on a GPU and on the `cpu` device, which calls the twins:
//!
//! ```
//! use lamina::gpu::{Device, Options, Recording};
//! use lamina::kernels::{Kernel, add};
//!
//! # fn main() -> lamina::Result<()> {
//! // `Device::open(&Selector::Best, ...)` takes the best GPU instead.
//! let device = Device::cpu(&Options::default());
//! let x = device.upload(&[1.0f32, 2.0, 3.0, 4.0], "x")?.view();
//! let y = device.upload(&[10.0f32, 20.0, 30.0, 40.0], "y")?.view();
//!
//! // The variant and its numbers follow from what the device offers.
//! let tuning = add::Add::tuning(&add::Spec, device.caps()).variant.tuning;
//! let kernel = add::Add::new(&add::Spec, &tuning);
//! let mut recording = Recording::new();
//! kernel.record(&mut recording, add::Params { length: 4, scale: 0.5 }, x.clone(), y);
//! device.submit(&recording)?;
//!
//! let sum = pollster::block_on(device.read(&[x]))?.remove(0);
//! assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&sum), [6.0, 12.0, 18.0, 24.0]);
//! # Ok(())
//! # }
//! ```
//!
//! [`model::Model`] loads a checkpoint, and [`engine::Engine`] continues texts with it. The command `lamina`
//! (feature `cli`, on by default) does so from a prompt, shows the adapters of a machine, and checks every
//! kernel on them. `docs/architecture.md` is the map of the sources.

pub mod bench;
pub mod check;
#[cfg(feature = "cli")]
pub mod cli;
pub mod disk;
pub mod engine;
pub mod error;
pub mod gpu;
pub mod kernels;
pub mod model;
pub mod num;
pub mod reference;
pub mod text;
#[cfg(target_arch = "wasm32")]
pub mod web;
pub mod weights;

pub use error::{Error, Result};

/// The README's example, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
