//! Integration tests of the library: one program of many modules, so that engines are compiled for them once.
//!
//! Every property is held for every engine and storage type; `common` has the random problems and the comparisons.

mod cache;
mod common;
mod decode;
mod empty;
mod engines;
mod errors;
mod golden;
mod gradients;
mod invariances;
mod layouts;
mod limits;
mod masks;
mod non_finite;
mod parameters;
mod threads;
