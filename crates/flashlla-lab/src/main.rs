//! The program `flashlla`; see `flashlla --help`.

use flashlla_lab::cli::{Cli, Stop};
use flashlla_lab::stdout;
use std::process::ExitCode;

fn main() -> ExitCode {
    let result = match Cli::read(std::env::args_os()) {
        Ok(cli) => {
            const THREADS: &str = "CANDLE_NUM_THREADS";
            if cli.side_by_side() && std::env::var_os(THREADS).is_none() {
                // Candle has one pool of threads, whose callers wait for each other, and no other way to be told its size.
                // SAFETY: the program has no other thread yet.
                unsafe { std::env::set_var(THREADS, "1") };
            }
            cli.run()
        }
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
