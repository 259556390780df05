//! Every case of every kernel and variant, on every adapter of this system, against its twin.

mod add;
mod embed;
mod gemm;
mod gemm_coop;
mod gemv;
mod gqa_append;
mod gqa_decode;
mod mla_absorb;
mod mla_append;
mod mla_combine;
mod mla_decode;
mod mla_decode_coop;
mod mla_decode_fused;
mod mla_gather;
mod mla_prefill;
mod moe_combine;
mod moe_gemm;
mod moe_gemm_coop;
mod moe_gemv;
mod moe_route;
mod moe_sort;
mod pack_rows;
mod rms_norm;
mod rope;
mod sample;
mod swiglu;
