//! What a command can end with, and the exit code that says so.

use std::io::Write;

/// Why a command did not succeed. Every message is one line that names what was wrong, what was given and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line asks for something that cannot be: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The command was understood but could not be done: exit code 1.
    #[error("{0}")]
    Failed(String),
    /// Whoever reads the standard output has stopped reading (`flashlla ... | head -1`): end without a word, exit code 0.
    #[error("the standard output is closed")]
    Closed,
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
            Self::Closed => 0,
        }
    }

    /// Says it on the standard error, in one line whatever names the message quotes, and gives the exit code.
    pub fn report(&self) -> u8 {
        if !matches!(self, Self::Closed) {
            // Nobody is left to be told when even this fails.
            let _ = writeln!(std::io::stderr(), "error: {}", one_line(&self.to_string()));
        }
        self.exit_code()
    }
}

/// The text with control characters escaped: file and tensor names may hold anything.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.into() }).collect()
}

/// The result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;
