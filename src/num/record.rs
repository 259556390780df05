//! Records of the latent cache: what one token leaves in one layer, as bytes.
//!
//! A record is the latent (r values), then the rope key (p values). In `F16` and `F32` zeros fill it
//! up to a multiple of 8 values. In `Fp8` (FlashMLA's V3.2 layout) r e4m3 codes, ceil(r / 128) f32
//! scales, a power of two for each 128 codes, and p f16 values; zeros fill it up to 16 bytes.

use half::f16;

use super::fp8::{e4m3_decode, e4m3_encode, e4m3_scale};

/// Latent values that share a scale.
pub const SCALED: usize = 128;

/// How a record is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordFormat {
    /// All values as f16.
    F16,
    /// All values as f32, for tests of exactness.
    F32,
    /// The latent as e4m3 with scales, the rope key as f16.
    Fp8,
}

impl RecordFormat {
    /// Every format.
    pub const ALL: [RecordFormat; 3] = [RecordFormat::F16, RecordFormat::F32, RecordFormat::Fp8];

    /// Bytes of a record of `r` latent and `p` rope values, a multiple of 16.
    pub fn bytes(self, r: usize, p: usize) -> usize {
        let width = (r + p).next_multiple_of(8);
        match self {
            RecordFormat::F16 => 2 * width,
            RecordFormat::F32 => 4 * width,
            RecordFormat::Fp8 => (r + 4 * r.div_ceil(SCALED) + 2 * p).next_multiple_of(16),
        }
    }

    /// The record of `latent` `[r]` and `rope` `[p]`.
    pub fn encode(self, latent: &[f32], rope: &[f32]) -> Vec<u8> {
        let half = |v: &f32| f16::from_f32(*v).to_le_bytes();
        let values = || latent.iter().chain(rope);
        let mut record: Vec<u8> = match self {
            RecordFormat::F16 => values().flat_map(half).collect(),
            RecordFormat::F32 => values().flat_map(|v| v.to_le_bytes()).collect(),
            RecordFormat::Fp8 => {
                let scale = |part: &[f32]| e4m3_scale(part.iter().fold(0.0, |most, v| most.max(v.abs())));
                let scales: Vec<f32> = latent.chunks(SCALED).map(scale).collect();
                let code = |(i, v): (usize, &f32)| e4m3_encode(v / scales[i / SCALED]);
                let codes = latent.iter().enumerate().map(code);
                let scales = scales.iter().flat_map(|s| s.to_le_bytes());
                codes.chain(scales).chain(rope.iter().flat_map(half)).collect()
            }
        };
        record.resize(self.bytes(latent.len(), rope.len()), 0);
        record
    }

    /// The `r + p` values of a record.
    pub fn decode(self, record: &[u8], r: usize, p: usize) -> Vec<f32> {
        let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
        let single = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        match self {
            RecordFormat::F16 => record[..2 * (r + p)].chunks_exact(2).map(half).collect(),
            RecordFormat::F32 => record[..4 * (r + p)].chunks_exact(4).map(single).collect(),
            RecordFormat::Fp8 => {
                let (codes, rest) = record.split_at(r);
                let (scales, rest) = rest.split_at(4 * r.div_ceil(SCALED));
                let latent = |(i, code): (usize, &u8)| e4m3_decode(*code) * single(&scales[i / SCALED * 4..]);
                codes.iter().enumerate().map(latent).chain(rest[..2 * p].chunks_exact(2).map(half)).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of all magnitudes and both signs.
    fn values(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 1.7).sin() * 1.05f32.powi((i % 97) as i32 - 40)).collect()
    }

    #[test]
    fn records_have_the_published_sizes() {
        let bytes = |r, p| RecordFormat::ALL.map(|format| format.bytes(r, p));
        assert_eq!(bytes(512, 64), [1152, 2304, 656]);
        assert_eq!(bytes(512, 0), [1024, 2048, 528]);
        assert_eq!(bytes(32, 8), [80, 160, 64]);
        assert_eq!(bytes(48, 16), [128, 256, 96]);
        assert_eq!(bytes(16, 2), [48, 96, 32]);
    }

    #[test]
    fn records_come_back_within_their_format() {
        for (r, p) in [(512, 64), (512, 0), (256, 32), (144, 6), (32, 8), (48, 16), (16, 2)] {
            let all = values(r + p);
            for (format, step) in RecordFormat::ALL.into_iter().zip([2f32.powi(-11), 0.0, 2f32.powi(-4)]) {
                let record = format.encode(&all[..r], &all[r..]);
                assert_eq!(record.len(), format.bytes(r, p));
                let back = format.decode(&record, r, p);
                assert_eq!(back.len(), r + p);
                for (i, (found, value)) in back.iter().zip(&all).enumerate() {
                    // An e4m3 code below the normal ones is off by a part of its block's largest value.
                    let error = if i < r { step } else { step.min(2f32.powi(-11)) };
                    let least = if format == RecordFormat::Fp8 && i < r { 1e-5 } else { 1e-7 };
                    let most = all.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                    let limit = error * value.abs() + if step > 0.0 { least * most } else { 0.0 };
                    assert!((found - value).abs() <= limit, "{format:?} {r}+{p}, {i}: {value} came back as {found}");
                }
            }
        }
    }

    #[test]
    fn an_fp8_record_is_laid_out_as_flashmlas() {
        let mut latent = vec![0.0; 512];
        (latent[0], latent[127], latent[128], latent[511]) = (448.0, -1.0, 896.0, -0.5);
        let record = RecordFormat::Fp8.encode(&latent, &[1.0; 64]);
        assert_eq!((record[0], record[127], record[128]), (0x7e, 0xb8, 0x7e));
        let scale = |i: usize| f32::from_le_bytes(record[512 + 4 * i..][..4].try_into().expect("four bytes"));
        assert_eq!([0, 1, 2, 3].map(scale), [1.0, 2.0, 2f32.powi(-64), 2f32.powi(-9)]);
        // The first rope value follows the scales at once.
        assert_eq!(record[528..530], 0x3c00u16.to_le_bytes());
        assert_eq!(record.len(), 656);
    }

    #[test]
    fn padding_is_zero() {
        for format in RecordFormat::ALL {
            let record = format.encode(&[1.0; 16], &[1.0; 2]);
            let used = match format {
                RecordFormat::F16 => 36,
                RecordFormat::F32 => 72,
                RecordFormat::Fp8 => 24,
            };
            assert!(record[used - 1] != 0 && record[used..].iter().all(|b| *b == 0), "{format:?}: {record:?}");
            assert!(record.len() > used);
        }
    }
}
