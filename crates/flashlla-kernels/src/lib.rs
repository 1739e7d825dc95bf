//! The GPU kernels of local linear attention, as tile programs, and the list of what is compiled from them.
//! `README.md` beside this crate's manifest is the launch contract.

pub mod answer;
pub mod backward_key;
pub mod backward_query;
pub mod backward_solve;
pub mod cache_write;
pub mod columns;
pub mod decode;
pub mod decode_merge;
pub mod decode_pass;
pub mod decode_split;
pub mod decode_step;
pub mod decode_together;
pub mod decode_whole;
pub mod forward;
pub mod moments;
pub mod numbers;
pub mod poison;
pub mod prepare;
pub mod state;
pub mod tiles;
pub mod variants;
