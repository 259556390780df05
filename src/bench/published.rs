//! Shapes that others publish times of, and these times.

use super::shape::Shape;

/// Another implementation's time for a shape.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Published {
    /// Which, and on what.
    pub by: &'static str,
    /// Its time, microseconds.
    pub us: f64,
    /// Its time over ours: above 1 where ours is shorter.
    pub ratio: f64,
}

const FLASH_MLA: &str = "FlashMLA on an H100";
const FLASH_INFER: &str = "FlashInfer on an RTX 4090";

/// FlashMLA at commit 9241ae3, dense decode with its combine, on one H100 80GB HBM3, pages of 64 tokens in
/// bf16 with cold caches and CUDA graphs: sequences, context, heads and microseconds.
const FLASH_MLA_US: [(u32, u32, u32, f64); 14] = [
    (1, 1024, 16, 15.5),
    (1, 4096, 16, 27.1),
    (1, 16_384, 16, 46.1),
    (1, 32_768, 16, 53.1),
    (1, 131_072, 16, 95.1),
    (1, 32_768, 128, 45.9),
    (1, 131_072, 128, 90.7),
    (8, 4096, 16, 30.7),
    (32, 4096, 16, 71.2),
    (128, 4096, 16, 231.7),
    (128, 4096, 40, 233.4),
    (128, 4096, 64, 233.9),
    (128, 4096, 128, 260.8),
    (128, 8192, 128, 520.6),
];

/// The `thunder` case (github.com/HazyResearch/ThunderMLA): FlashMLA's time there, to which ThunderMLA's is 41.
const THUNDER_US: f64 = 52.0;
/// FlashInfer, 8 heads, 256 sequences of 16,384 tokens: 943.6 GB/s (flashinfer.ai/2025/02/10/flashinfer-deepseek-mla.html).
const FLASH_INFER_GBS: f64 = 943.6;

/// Shapes that have a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// FlashMLA's own benchmark: 128 sequences, 128 heads.
    FlashMla,
    /// FlashInfer's on an RTX 4090: 8 and 16 heads.
    FlashInfer,
    /// ThunderMLA's: four sequences of very different lengths, four new tokens each.
    Thunder,
    /// What fp8 records gain over f16 where memory decides: 128 sequences, 16 heads.
    Fp8,
}

impl Named {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Named::FlashMla => "flashmla",
            Named::FlashInfer => "flashinfer-4090",
            Named::Thunder => "thunder",
            Named::Fp8 => "fp8",
        }
    }

    /// Its shapes.
    pub fn shapes(self) -> Vec<Shape> {
        match self {
            Named::FlashMla => Shape::product(&[128], &[128], &[4096, 8192, 16_384, 32_768]),
            Named::FlashInfer => Shape::product(&[16, 256], &[8, 16], &[1024, 16_384]),
            Named::Thunder => vec![Shape { heads: 16, contexts: vec![4641, 45_118, 1730, 1696], tokens: 4 }],
            Named::Fp8 => Shape::product(&[128], &[16], &[4096]),
        }
    }
}

/// What others take for a shape with f16 or bf16 records, against `us`.
pub fn published(shape: &Shape, us: f64) -> Option<Published> {
    let (by, theirs) = time(shape)?;
    Some(Published { by, us: theirs, ratio: theirs / us })
}

fn time(shape: &Shape) -> Option<(&'static str, f64)> {
    if *shape == Named::Thunder.shapes()[0] {
        return Some((FLASH_MLA, THUNDER_US));
    }
    let (batch, context) = shape.even()?;
    if shape.tokens != 1 {
        return None;
    }
    if (batch, context, shape.heads) == (256, 16_384, 8) {
        let bytes = f64::from(batch) * f64::from(context) * 1152.0;
        return Some((FLASH_INFER, bytes / FLASH_INFER_GBS * 1e-3));
    }
    let found = FLASH_MLA_US.iter().find(|(b, c, h, _)| (*b, *c, *h) == (batch, context, shape.heads))?;
    Some((FLASH_MLA, found.3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_has_the_time_that_was_published_for_it_and_others_have_none() {
        let of = |batch, heads, context| published(&Shape::product(&[batch], &[heads], &[context])[0], 100.0);
        assert_eq!(of(128, 16, 4096), Some(Published { by: FLASH_MLA, us: 231.7, ratio: 231.7 / 100.0 }));
        assert_eq!(of(128, 16, 8192), None);
        // 4.83 GB at 943.6 GB/s.
        assert!((of(256, 8, 16_384).unwrap().us - 5120.6).abs() < 1.0);
        assert_eq!(published(&Named::Thunder.shapes()[0], 26.0).unwrap().ratio, 2.0);
        let drafts = Shape { tokens: 2, ..Shape::product(&[128], &[16], &[4096])[0].clone() };
        assert_eq!(published(&drafts, 1.0), None);
    }
}
