//! What a command can end with, and the exit code that says so.

/// Why a command did not succeed. Every message is one line that names what was wrong, what was given and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line asks for something that cannot be: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The command was understood but could not be done: exit code 1.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// The command line asks for something that cannot be.
    pub fn usage(message: impl std::fmt::Display) -> Self {
        Self::Usage(message.to_string())
    }

    /// The command could not be done.
    pub fn failed(message: impl std::fmt::Display) -> Self {
        Self::Failed(message.to_string())
    }

    /// The exit code of a program that ends with it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Failed(_) => 1,
        }
    }
}

/// The result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;
