//! Errors as this crate words them: the argument, what was given, what is allowed. Without the backtraces that Candle's
//! constructors add where they are asked for: what is wrong is with the call.

use candle_core::Error;
use std::fmt::{Debug, Display};

/// A value that is not allowed.
pub(crate) fn value(argument: &str, given: impl Display, allowed: impl Display) -> Error {
    Error::Msg(format!("{argument}: {given} is not allowed; it must be {allowed}"))
}

/// A shape that does not fit.
pub(crate) fn shape(argument: &str, given: &[usize], expected: impl Debug, meaning: &str) -> Error {
    Error::Msg(format!("{argument}: shape {given:?} does not fit; it must be {expected:?} ({meaning})"))
}

/// An error of the operator's library, which is worded alike.
pub(crate) fn raised(error: flashlla::Error) -> Error {
    Error::Wrapped(Box::new(error))
}
