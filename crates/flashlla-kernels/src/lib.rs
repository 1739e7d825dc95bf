//! The GPU kernels.
pub mod backward_key;
pub mod backward_mix;
pub mod backward_query;
pub mod output;
pub mod poison;
pub mod prepare;
pub mod solve;
pub mod tiles;
pub mod weights;
