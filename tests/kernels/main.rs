//! Every case of every kernel and variant, on every adapter of this system, against its twin.

mod add;
mod mla_append;
mod rms_norm;
