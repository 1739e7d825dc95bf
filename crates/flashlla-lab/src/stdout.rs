//! The standard output, which may close before the program ends.

use crate::{Error, Result};
use std::fmt::Display;
use std::io::{ErrorKind, Write};

/// Prints a line.
pub fn line(text: impl Display) -> Result<()> {
    write(format_args!("{text}\n"))
}

/// Prints a value as one line of JSON.
pub fn json(value: &impl serde::Serialize) -> Result<()> {
    line(serde_json::to_string(value).map_err(Error::failed)?)
}

/// Prints text as it is.
pub fn write(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => Error::Closed,
        _ => Error::failed(format_args!("standard output: {error}")),
    })
}
