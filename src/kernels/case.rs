//! A parity case: inputs, what to record, and what must come out.

use std::sync::Arc;

use half::f16;

use super::Kernel;
use crate::gpu::{Caps, Device, Recording, View};

/// Which cases to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// Every value and every pair of values of the parameters, each case at most 0.5 GFLOP.
    Pairs,
    /// The product of the parameters, for real GPUs (`lamina check --full`).
    Full,
    /// A few of the sizes that models have, for timing.
    Timed,
}

/// A tensor's elements on the host.
#[derive(Clone, Debug)]
pub enum Data {
    /// f32 values.
    F32(Vec<f32>),
    /// f16 values.
    F16(Vec<f16>),
    /// Indices and packed words; compared bit by bit.
    U32(Vec<u32>),
    /// Bytes; compared bit by bit.
    U8(Vec<u8>),
}

impl Data {
    /// The elements' bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Data::F32(v) => bytemuck::cast_slice(v),
            Data::F16(v) => bytemuck::cast_slice(v),
            Data::U32(v) => bytemuck::cast_slice(v),
            Data::U8(v) => v,
        }
    }

    /// The elements that `bytes` hold in this data's type, as f64, cut to this data's length.
    pub fn decode(&self, bytes: &[u8]) -> Vec<f64> {
        let mut values: Vec<f64> = match self {
            Data::F32(_) => bytemuck::pod_collect_to_vec::<u8, f32>(bytes).into_iter().map(f64::from).collect(),
            Data::F16(_) => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).into_iter().map(f64::from).collect(),
            Data::U32(_) => bytemuck::pod_collect_to_vec::<u8, u32>(bytes).into_iter().map(f64::from).collect(),
            Data::U8(_) => bytes.iter().copied().map(f64::from).collect(),
        };
        values.truncate(self.len());
        values
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::F16(v) => v.len(),
            Data::U32(v) => v.len(),
            Data::U8(v) => v.len(),
        }
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` elements that a kernel must overwrite: NaN.
    pub fn poison(len: usize) -> Data {
        Data::F32(vec![f32::NAN; len])
    }

    /// `len` words that a kernel must overwrite.
    pub fn poison_u32(len: usize) -> Data {
        Data::U32(vec![0xFFFF_FFFF; len])
    }
}

/// How far an output may be from its twin's, as a normalised mean square error
/// `sum((got - expected)^2) / sum(expected^2)` over one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// The largest NMSE of a row. 0 asks for the same bits.
    pub nmse: f64,
    /// The largest root mean square error of a row whose expected values are all zero.
    pub zero: f64,
    /// A root mean square error that passes whatever the values are: what is left of terms that cancel
    /// is off by the rounding of the terms.
    pub absolute: f64,
}

impl Tolerance {
    /// The same bits.
    pub const EXACT: Tolerance = Tolerance { nmse: 0.0, zero: 0.0, absolute: 0.0 };

    /// f32 arithmetic with sums of `length` terms: each term may be rounded once more than the
    /// twin's, in the worst order; the factor 16 leaves room for `exp`, `sqrt` and division, which
    /// drivers round by a few units.
    pub fn f32(length: usize) -> Tolerance {
        let eps = f64::from(f32::EPSILON) / 2.0;
        Tolerance { nmse: 16.0 * eps * eps * (length.max(16) as f64), zero: 1e-30, absolute: 0.0 }
    }

    /// An f32 result stored as f16: the rounding may fall to the neighbour of the twin's.
    pub fn f16() -> Tolerance {
        Tolerance { nmse: 3e-7, zero: 1e-7, absolute: 0.0 }
    }

    /// An NMSE of at most `nmse`.
    pub fn nmse(nmse: f64) -> Tolerance {
        Tolerance { nmse, zero: 1e-30, absolute: 0.0 }
    }
}

/// How an output is compared: as rows of `stride` elements, of which `columns` from `first` on count.
/// The verdict is one for each row. A tensor with parts of different size gets several checks.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Elements from one row to the next.
    pub stride: usize,
    /// The first element of a row that counts.
    pub first: usize,
    /// Elements that count; the rest is padding or another check's.
    pub columns: usize,
    /// How far a row may be off.
    pub tolerance: Tolerance,
}

impl Check {
    /// Rows of `columns` elements with no padding.
    pub fn rows(columns: usize, tolerance: Tolerance) -> Check {
        Check { stride: columns, first: 0, columns, tolerance }
    }
}

/// What a case does with a tensor.
#[derive(Clone, Debug)]
pub enum Role {
    /// Read only; must be unchanged afterwards is not checked.
    Input,
    /// Written between the case's dispatches.
    Scratch,
    /// Compared afterwards. Its initial data is poison, or what the kernel updates in place.
    Output(Vec<Check>),
}

/// A named tensor of a case.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name in the case.
    pub name: &'static str,
    /// Its contents before the run.
    pub data: Data,
    /// What it is for.
    pub role: Role,
}

impl Tensor {
    /// An input.
    pub fn input(name: &'static str, data: Data) -> Tensor {
        Tensor { name, data, role: Role::Input }
    }

    /// An output, with its contents before the run.
    pub fn output(name: &'static str, data: Data, check: Check) -> Tensor {
        Tensor { name, data, role: Role::Output(vec![check]) }
    }

    /// An output with several checks.
    pub fn checked(name: &'static str, data: Data, checks: Vec<Check>) -> Tensor {
        Tensor { name, data, role: Role::Output(checks) }
    }

    /// `len` f32 of scratch, NaN at first.
    pub fn scratch(name: &'static str, len: usize) -> Tensor {
        Tensor { name, data: Data::poison(len), role: Role::Scratch }
    }
}

/// The device views of a case's tensors.
pub struct Tensors(Vec<(&'static str, View)>);

impl Tensors {
    /// Uploads the tensors, each to a buffer of its own.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub fn upload(device: &Device, tensors: &[Tensor]) -> crate::Result<Tensors> {
        let upload = |t: &Tensor| Ok((t.name, device.upload(t.data.bytes(), t.name)?.view()));
        Ok(Tensors(tensors.iter().map(upload).collect::<crate::Result<_>>()?))
    }

    /// The view of a tensor.
    ///
    /// # Panics
    /// When the case has no tensor of that name.
    pub fn get(&self, name: &str) -> View {
        let found = self.0.iter().find(|(n, _)| *n == name);
        found.unwrap_or_else(|| panic!("the case has no tensor named {name}")).1.clone()
    }
}

/// What must come out: for some rows of an output, their values.
#[derive(Clone, Debug)]
pub struct Expected {
    /// The output tensor.
    pub tensor: &'static str,
    /// Row and its values from its first element on, as far as the tensor's checks reach.
    pub rows: Vec<(usize, Vec<f64>)>,
}

type Record<K> = Box<dyn Fn(&K, &Tensors, &mut Recording) + Send + Sync>;
type Expect = Box<dyn Fn(&[Tensor]) -> Vec<Expected> + Send + Sync>;

/// A case's inputs and work.
pub struct Job<K> {
    /// All its tensors.
    pub tensors: Vec<Tensor>,
    /// Adds the case's dispatches.
    pub record: Record<K>,
    /// The expected rows; `None` runs the recording on the twins and takes every row.
    pub expected: Option<Expect>,
}

impl<K> Job<K> {
    /// A job whose expected outputs are those of the calls' twins.
    pub fn new(tensors: Vec<Tensor>, record: impl Fn(&K, &Tensors, &mut Recording) + Send + Sync + 'static) -> Job<K> {
        Job { tensors, record: Box::new(record), expected: None }
    }

    /// Takes the expected rows from `expected` instead.
    pub fn expecting(mut self, expected: impl Fn(&[Tensor]) -> Vec<Expected> + Send + Sync + 'static) -> Job<K> {
        self.expected = Some(Box::new(expected));
        self
    }
}

/// One parity case of a kernel. `job` makes the same inputs each time.
pub struct Case<K: Kernel> {
    /// Its name within the kernel.
    pub name: String,
    /// What the model fixes.
    pub spec: K::Spec,
    /// Floating-point operations, about.
    pub flops: f64,
    /// Bytes that must move through device memory, each input read once; 0 where nobody times it.
    pub bytes: f64,
    /// Makes the inputs.
    pub job: Box<dyn Fn() -> Job<K> + Send + Sync>,
}

impl<K: Kernel> Case<K> {
    /// A case.
    pub fn new(
        name: impl Into<String>,
        spec: K::Spec,
        flops: f64,
        job: impl Fn() -> Job<K> + Send + Sync + 'static,
    ) -> Case<K> {
        Case { name: name.into(), spec, flops, bytes: 0.0, job: Box::new(job) }
    }

    /// Sets the bytes that must move.
    pub fn moving(mut self, bytes: f64) -> Case<K> {
        self.bytes = bytes;
        self
    }

    /// The case without its kernel's types.
    pub fn erase(self) -> AnyCase {
        let (name, flops, bytes) = (self.name.clone(), self.flops, self.bytes);
        let case = Arc::new(self);
        let (of, tuned) = (case.clone(), case.clone());
        AnyCase {
            kernel: K::NAME,
            name,
            flops,
            bytes,
            class: K::class(&case.spec),
            variants: Box::new(move |caps| K::variants(&of.spec, caps).iter().map(|v| v.name).collect()),
            tuning: Box::new(move |caps| K::tuning(&tuned.spec, caps).variant.name),
            job: Box::new(move || {
                let (job, case) = ((case.job)(), case.clone());
                AnyJob {
                    tensors: job.tensors,
                    record: Box::new(move |variant, caps, tensors, recording| {
                        let found = K::variants(&case.spec, caps).into_iter().find(|v| v.name == variant);
                        let variant = found.unwrap_or_else(|| panic!("{} has no variant {variant} here", K::NAME));
                        (job.record)(&K::new(&case.spec, &variant.tuning), tensors, recording);
                    }),
                    expected: job.expected,
                }
            }),
        }
    }
}

type AnyRecord = Box<dyn Fn(&str, &Caps, &Tensors, &mut Recording) + Send + Sync>;

/// A [`Case`] without its kernel's types.
pub struct AnyCase {
    /// The kernel's name.
    pub kernel: &'static str,
    /// The case's name.
    pub name: String,
    /// Floating-point operations, about.
    pub flops: f64,
    /// Bytes that must move through device memory.
    pub bytes: f64,
    /// The class of its spec ([`Kernel::class`]).
    pub class: String,
    /// The names of the variants under some caps, portable first.
    pub variants: Box<dyn Fn(&Caps) -> Vec<&'static str> + Send + Sync>,
    /// The name of the variant that the kernel's tables take of these.
    pub tuning: Box<dyn Fn(&Caps) -> &'static str + Send + Sync>,
    /// Makes the inputs.
    pub job: Box<dyn Fn() -> AnyJob + Send + Sync>,
}

/// A [`Job`] without its kernel's types.
pub struct AnyJob {
    /// All its tensors.
    pub tensors: Vec<Tensor>,
    /// Adds the dispatches of one variant.
    pub record: AnyRecord,
    /// The expected rows, where the case has its own.
    pub expected: Option<Expect>,
}
