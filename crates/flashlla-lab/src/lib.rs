//! What the program `flashlla` is made of, as a library so that tests and fuzz targets reach it.

pub mod attend;
pub mod bench;
pub mod cli;
pub mod device;
pub mod error;
pub mod experiments;
pub mod files;
pub mod fuzzing;
pub mod gather;
pub mod info;
pub mod inputs;
pub mod layout;
pub mod options;
pub mod report;
pub mod stdout;
pub mod summary;
pub mod sweep;
pub mod tasks;
pub mod train;

pub use error::{Error, Result};
