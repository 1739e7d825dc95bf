//! What the tests share: engines, storage types, random problems, and comparisons.

mod compare;
mod data;
mod engine;
mod golden;
mod strategy;

#[allow(unused_imports)] // for the tests on a GPU, a program of their own
pub use compare::errors;
pub use compare::{Tolerance, assert_close, assert_near, assert_results, disagreements, relative_error};
pub use data::{Data, Grid, normal};
pub use engine::{AnyEngine, Dtype, Results, cast, run, run_as};
pub use golden::Golden;
pub use strategy::{Bias, Case, RidgeKind, TILE_EDGES, case, cases, mask};
