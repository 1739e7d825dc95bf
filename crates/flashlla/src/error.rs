//! One error type for everything that can be wrong with a call.

/// What is wrong with a description or with the data handed in with it.
///
/// Every message names the argument, what was given and what is allowed, in one line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A single value lies outside what is allowed.
    #[error("{argument}: {given} is not allowed; it must be {allowed}")]
    Value {
        /// The argument's name.
        argument: &'static str,
        /// The value that was given.
        given: String,
        /// What would have been accepted.
        allowed: String,
    },
    /// A tensor has the wrong shape.
    #[error("{argument}: shape {given:?} does not fit; it must be {expected}")]
    Shape {
        /// The argument's name.
        argument: &'static str,
        /// The shape that was given.
        given: Vec<usize>,
        /// The shape that was expected, with the meaning of its sizes.
        expected: String,
    },
    /// A buffer is too short for the shape and strides that describe it.
    #[error(
        "{argument}: shape {shape:?} with strides {strides:?} from offset {offset} needs elements {first}..={last}, \
         but the buffer holds {len}"
    )]
    Buffer {
        /// The argument's name.
        argument: &'static str,
        /// The described shape.
        shape: Vec<usize>,
        /// The described strides, in elements.
        strides: Vec<isize>,
        /// The index of element (0, 0, ...).
        offset: usize,
        /// The lowest index that the description reaches.
        first: i128,
        /// The highest index that the description reaches.
        last: i128,
        /// The number of elements there are.
        len: usize,
    },
    /// An output's strides send two of its elements to the same place.
    #[error(
        "{argument}: an output of shape {shape:?} with strides {strides:?} overlaps itself; every element needs a place of its own"
    )]
    Overlap {
        /// The argument's name.
        argument: &'static str,
        /// The described shape.
        shape: Vec<usize>,
        /// The described strides, in elements.
        strides: Vec<isize>,
    },
    /// A cache has no room for what is to be appended; nothing was.
    #[error("cache: {needed}, but there is {there}; free or truncate sequences, or make a larger cache")]
    CacheFull {
        /// What was asked for.
        needed: String,
        /// What there is.
        there: String,
    },
    /// The caller ended the call ([`crate::Cpu::stopped_by`]); its outputs are written in part.
    #[error("the call was interrupted")]
    Interrupted,
    /// The GPU, its driver or its kernels cannot be used, or failed.
    #[error("device cuda: {problem}; {remedy}")]
    Cuda {
        /// What is wrong.
        problem: String,
        /// What can be done about it.
        remedy: String,
    },
}

impl Error {
    pub(crate) fn value(
        argument: &'static str,
        given: impl std::fmt::Display,
        allowed: impl std::fmt::Display,
    ) -> Self {
        Self::Value { argument, given: given.to_string(), allowed: allowed.to_string() }
    }

    pub(crate) fn shape(argument: &'static str, given: &[usize], expected: &[usize], meaning: &str) -> Self {
        Self::Shape { argument, given: given.to_vec(), expected: format!("{expected:?} ({meaning})") }
    }
}

/// The result of everything that can fail in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
