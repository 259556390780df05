//! `gemv`: a weight matrix times the activations of a few tokens, bound by reading the matrix. Rows
//! are joined by the epilogue (gate and up of a feed-forward layer in one dispatch).

use std::sync::Arc;

use super::linear::{Epilogue, Method, Params, Product, Reads};
use super::linear_case::Shape;
use super::weights::WeightFormat;
use super::{Case, Choice, Field, Kernel, Set, Variant};
use crate::gpu::{Caps, Recording, Shader, Source};
use crate::{reference, wgsl};

/// What the model fixes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// How the matrix is stored.
    pub format: WeightFormat,
    /// What becomes of its rows.
    pub epilogue: Epilogue,
    /// Tokens of a call: a hint for how many share a read of the matrix; any number runs.
    pub tokens: u32,
    /// The activations go through a norm first.
    pub norm: bool,
}

/// How it runs.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Invocations a workgroup.
    pub workgroup: u32,
    /// Teams of lanes in it; each works on rows of its own.
    pub teams: u32,
    /// Rows of a team: they share a read of the activations.
    pub rows: u32,
    /// Parts of each row that a lane has under way.
    pub unroll: u32,
    /// Teams that share the columns of their rows.
    pub split: u32,
    /// Tokens that share a read of the matrix.
    pub tokens: u32,
    /// Teams are subgroups.
    pub subgroups: bool,
}

/// Numbers of tokens that kernels are made for.
pub const TOKENS: [u32; 4] = [1, 2, 4, 8];
/// For each of them, rows of a team and parts under way: 8 loads of 16 bytes a lane; more rows where
/// the activations are most of what is read. `rows * tokens` sums of a workgroup fill 16 KiB at most.
const SHARES: [(u32, u32); 4] = [(2, 4), (2, 4), (4, 2), (4, 2)];
/// The same for software drivers, which compile for seconds what is unrolled more.
const SHARES_SOFTWARE: (u32, u32) = (2, 2);
/// The most tokens that share a read of the matrix and go through a norm.
pub const NORM_TOKENS: u32 = 1;
/// The most tokens for which subgroups share the columns of their rows: a lane has all its parts of a row of
/// 2048 under way at once, and small matrices make four times the workgroups. H100, one token, us: 2048 x 2048
/// 9.7 against 11.3, 2048 x 10944 23.0 against 31.1, 64 x 2048 8.0 against 12.4, 102400 x 2048 140.8 against 143.8.
const SPLIT_TOKENS: u32 = 2;
/// Subgroups that share the columns of their rows.
const SPLIT: u32 = 4;
/// Invocations a workgroup: few, so that small matrices still make enough workgroups.
const WORKGROUP: u32 = 128;
/// Lanes of a team without subgroups: 512 bytes of a row at a time.
const LANES: u32 = 32;
/// Invocations a workgroup, and lanes of a team, for software drivers, which make a fiber for every few invocations of
/// a workgroup that has barriers. 4096 x 256, one token: SwiftShader 31 ms against 109, llvmpipe 8 against 13.
pub(super) const NARROW: (u32, u32) = (16, 4);

/// The kernel `gemv`.
pub struct Gemv {
    spec: Spec,
    tuning: Tuning,
    shader: Arc<Shader>,
}

/// Which of [`TOKENS`] share a read of the matrix.
fn nth(spec: &Spec) -> usize {
    TOKENS.iter().position(|tokens| spec.tokens <= *tokens).unwrap_or(TOKENS.len() - 1)
}

impl Kernel for Gemv {
    const NAME: &'static str = "gemv";
    const SOURCE: Source = wgsl!("gemv");
    const PARAMS: &'static [Field] = Params::FIELDS;
    type Spec = Spec;
    type Tuning = Tuning;

    fn class(spec: &Spec) -> String {
        format!("a read for {} tokens", TOKENS[nth(spec)])
    }

    fn variants(spec: &Spec, caps: &Caps) -> Vec<Variant<Tuning>> {
        let class = nth(spec);
        let (rows, unroll) = if caps.is_software() { SHARES_SOFTWARE } else { SHARES[class] };
        let portable =
            Tuning { workgroup: WORKGROUP, teams: WORKGROUP / LANES, rows, unroll, split: 1, tokens: TOKENS[class], subgroups: false };
        let mut variants = vec![Variant { name: "portable", tuning: portable.clone() }];
        if let Some((least, _)) = caps.subgroups {
            // As many teams as there may be subgroups: with wider ones, each takes several in turn.
            let teams = WORKGROUP / least.clamp(4, WORKGROUP);
            let tuning = Tuning { teams, subgroups: true, ..portable.clone() };
            let tuning = match TOKENS[class] <= SPLIT_TOKENS {
                true => Tuning { rows: 2, unroll: 2, split: teams.min(SPLIT), ..tuning },
                false => tuning,
            };
            variants.push(Variant { name: "subgroup", tuning });
        }
        if caps.is_software() {
            let (workgroup, lanes) = NARROW;
            variants.push(Variant { name: "narrow", tuning: Tuning { workgroup, teams: workgroup / lanes, ..portable } });
        }
        variants
    }

    fn tuning(spec: &Spec, caps: &Caps) -> Choice<Tuning> {
        let variant = Self::variants(spec, caps).pop().expect("the portable variant is always there");
        let Tuning { workgroup, teams, rows, unroll, split, tokens, subgroups } = variant.tuning;
        let sums = match subgroups {
            true if split > 1 => format!("{split} subgroups sum"),
            true => "a subgroup sums".into(),
            false if caps.is_software() => format!("a software driver: {} lanes sum", workgroup / teams),
            false => format!("no subgroups: {} lanes sum", workgroup / teams),
        };
        let why = format!("{sums} {rows} rows for {tokens} tokens, {} loads a lane under way", rows * unroll);
        Choice { variant, why }
    }

    fn new(spec: &Spec, tuning: &Tuning) -> Gemv {
        let fits = !spec.norm || spec.tokens <= NORM_TOKENS;
        assert!(fits, "gemv: a norm is for {NORM_TOKENS} tokens a read of the matrix: {spec:?}");
        let shader = Shader::of(Self::SOURCE)
            .u32("WORKGROUP", tuning.workgroup)
            .u32("TEAMS", tuning.teams)
            .u32("ROWS", tuning.rows)
            .u32("UNROLL", tuning.unroll)
            .u32("SPLIT", tuning.split)
            .u32("TOKENS", tuning.tokens)
            .bool("NORM", spec.norm)
            .module(spec.format.module());
        let shader = match tuning.subgroups {
            true => spec.epilogue.add_to(shader).module(wgsl!("lib/team_subgroup")).subgroups(),
            false => spec.epilogue.add_to(shader).module(wgsl!("lib/team_shared")),
        };
        Gemv { spec: spec.clone(), tuning: tuning.clone(), shader: shader.build() }
    }

    fn shader(&self) -> &Arc<Shader> {
        &self.shader
    }

    fn cases(set: Set) -> Vec<Case<Gemv>> {
        let make = |shape: Shape| {
            let Shape { format, epilogue, hint, norm, .. } = shape;
            shape.case(Spec { format, epilogue, tokens: hint, norm }, |kernel: &Gemv, recording, product| {
                kernel.record(recording, product);
            })
        };
        if set == Set::Timed {
            // 32 tokens, to find where gemm takes over.
            let large = [(7168, 18_432), (102_400, 2048)].map(|matrix| (matrix, &[1, 4][..]));
            let small = [(2048, 10_944), (2112, 7168), (576, 2048)].map(|matrix| (matrix, &[1, 2, 4, 8, 32][..]));
            let each = |((rows, columns), tokens): ((usize, usize), &'static [usize])| {
                tokens.iter().map(move |tokens| make(Shape::new(rows, columns, *tokens)))
            };
            // As a layer of DeepSeek-V2-Lite has them with one token: norms go in, sums come out.
            let one = |rows, columns| Shape::new(rows, columns, 1);
            let of_a_layer = [
                Shape { norm: true, ..one(3648, 2048) },
                Shape { norm: true, epilogue: Epilogue::Swiglu, ..one(21_888, 2048) },
                Shape { epilogue: Epilogue::Add, ..one(2048, 2048) },
            ];
            return large.into_iter().chain(small).flat_map(each).chain(of_a_layer.map(make)).collect();
        }
        // Each spec is a pipeline, and software drivers take a second for one: not every format meets
        // every number of tokens.
        use Epilogue::{Add, Store, Swiglu};
        use WeightFormat::{Bf16, F16, F32};
        type Chunks = &'static [usize];
        let each_at_one_token: [(usize, usize, Chunks); 4] =
            [(2, 1, &[2]), (34, 31, &[34]), (514, 2050, &[202, 312]), (2112, 66, &[2112])];
        let few: [(usize, usize, usize, WeightFormat, Epilogue, Chunks); 12] = [
            (1, 7, 2, F32, Store, &[1]),
            (10, 18_432, 2, F16, Swiglu, &[10]),
            (46, 2060, 2, F32, Store, &[3, 42, 1]),
            (3, 33, 3, F16, Store, &[1, 2]),
            (18, 1030, 4, Bf16, Swiglu, &[4, 6, 8]),
            (130, 257, 5, Bf16, Swiglu, &[130]),
            (66, 64, 8, F16, Store, &[1, 65]),
            (41, 96, 9, F16, Store, &[14, 2, 25]),
            (24, 70, 17, Bf16, Swiglu, &[10, 14]),
            (7, 2, 64, F16, Store, &[7]),
            (6, 1, 65, Bf16, Swiglu, &[6]),
            (12, 40, 8, Bf16, Swiglu, &[2, 10]),
        ];
        let mut shapes: Vec<Shape> = Vec::new();
        for (rows, columns, chunks) in each_at_one_token {
            for format in WeightFormat::ALL {
                let one = Shape { format, chunks: Some(chunks), ..Shape::new(rows, columns, 1) };
                shapes.extend([Store, Swiglu].map(|epilogue| Shape { epilogue, ..one }));
                // What a layer of a model does with one token: norms go in, sums come out.
                shapes.extend([Shape { epilogue: Add, ..one }, Shape { epilogue: Swiglu, norm: true, ..one }]);
            }
        }
        for (rows, columns, tokens, format, epilogue, chunks) in few {
            shapes.push(Shape { format, epilogue, chunks: Some(chunks), ..Shape::new(rows, columns, tokens) });
        }
        let part = Shape { x: (212, 12), y: (96, 20), ..Shape::new(50, 100, 3) };
        let odd = Shape { x: (212, 12), y: (96, 20), ..Shape::new(51, 99, 3) };
        let swiglu = Shape { epilogue: Swiglu, format: Bf16, ..part };
        // Other numbers of tokens than the hint says.
        let hints = [(8, 1, F16), (1, 6, F16), (4, 3, F16), (2, 5, F32)];
        let hinted = hints.map(|(hint, tokens, format)| Shape { hint, format, ..Shape::new(70, 130, tokens) });
        shapes.extend([part, odd, swiglu].into_iter().chain(hinted));
        let added = Shape { epilogue: Add, ..odd };
        let whole = Shape { norm: true, ..Shape::new(29, 40, 1) };
        shapes.extend([added, Shape { norm: true, hint: 1, ..added }, whole, Shape { norm: true, hint: 1, ..Shape::new(64, 333, 5) }]);
        if set == Set::Full {
            shapes.extend(TOKENS.map(|tokens| Shape::new(4099, 7168, tokens as usize)));
            // More blocks of rows than a grid dimension holds workgroups.
            shapes.push(Shape::new(1_100_000, 3, 1));
        }
        shapes.into_iter().map(make).collect()
    }
}

impl Gemv {
    /// `y = epilogue(W x)`: a dispatch for each chunk of the matrix, which is read once for every
    /// `tuning.tokens` tokens.
    ///
    /// # Panics
    /// When the matrix is not of the spec's format, or the activations do not fit it.
    pub fn record(&self, recording: &mut Recording, product: &Product) {
        let Tuning { teams, rows, tokens, .. } = self.tuning;
        let Spec { format, epilogue, .. } = self.spec;
        let twin: fn(&[f32], &[&[f32]]) -> Vec<f64> = |row, tokens| tokens.iter().map(|x| reference::gemv::gemv(row, x)).collect();
        let (block, reads) = ((teams / self.tuning.split * rows, tokens), Reads::Normed(self.spec.norm, twin));
        let method = Method { shader: &self.shader, format, epilogue, block, reads, halves: false };
        method.record(recording, product);
    }
}
