//! The command line: what `flashlla` can be asked to do.

use crate::experiments::Experiment;
use crate::{Error, Result};
use clap::{Parser, Subcommand};

/// Local Linear Attention: run it on your tensors, measure it, and see what it is for.
#[derive(Debug, Parser)]
#[command(name = "flashlla", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compute attention over the queries, keys and values of a safetensors file
    Attend,
    /// Run one of the experiments
    #[command(subcommand)]
    Experiment(Experiment),
    /// Measure the speed of forward and backward
    Bench,
    /// Show the version, the CPU's features and the threads
    Info,
    /// Print a completion script for a shell
    Completions,
}

impl Cli {
    /// Does what was asked for.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Experiment(experiment) => experiment.run(),
            _ => Err(Error::failed("this command is not built yet")),
        }
    }
}
