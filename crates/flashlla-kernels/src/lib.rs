//! The GPU kernels of local linear attention, as tile programs, and the list of what is compiled from them.
//! `README.md` beside this crate's manifest is the launch contract.

pub mod backward_key;
pub mod backward_mix;
pub mod backward_query;
pub mod output;
pub mod poison;
pub mod prepare;
pub mod solve;
pub mod tiles;
pub mod variants;
pub mod weights;
