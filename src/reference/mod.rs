//! The kernels' CPU twins: plain loops, f64 accumulation, no cleverness.
//!
//! A twin imports nothing from `gpu` or `kernels`: a bug that both shared would be invisible.

pub mod add;
pub mod embed;
pub mod gemm;
pub mod gemm_coop;
pub mod gemv;
pub mod gqa_append;
pub mod gqa_decode;
pub mod mla_absorb;
pub mod mla_append;
pub mod mla_combine;
pub mod mla_decode;
pub mod mla_decode_coop;
pub mod mla_decode_fused;
pub mod mla_gather;
pub mod mla_prefill;
pub mod mla_prefill_coop;
pub mod moe_combine;
pub mod moe_gemm;
pub mod moe_gemm_coop;
pub mod moe_gemv;
pub mod moe_route;
pub mod moe_sort;
pub mod pack_rows;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod swiglu;
