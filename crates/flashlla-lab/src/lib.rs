//! What the program `flashlla` is made of, as a library so that tests and fuzz targets reach it.

pub mod cli;
pub mod error;
pub mod experiments;
pub mod report;

pub use error::{Error, Result};
