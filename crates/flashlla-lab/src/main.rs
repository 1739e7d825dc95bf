//! The program `flashlla`; see `flashlla --help`.

use flashlla_lab::cli::{Cli, Stop};
use flashlla_lab::stdout;
use std::process::ExitCode;

fn main() -> ExitCode {
    let result = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli.run(),
        Err(Stop::Text(text)) => stdout::write(text),
        Err(Stop::Help(text)) => {
            eprint!("{text}");
            return ExitCode::from(2);
        }
        Err(Stop::Mistake(error)) => Err(error),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(error.report()),
    }
}
