//! The command line: what `flashlla` can be asked to do.

// Help texts show shapes and defaults in brackets, which are not links.
#![allow(rustdoc::broken_intra_doc_links)]

use crate::attend::{self, AttendArgs};
use crate::bench::{self, BenchArgs};
use crate::experiments::Experiment;
use crate::experiments::trained::{self, Running};
use crate::gather::{self, ReportArgs};
use crate::info::{self, InfoArgs};
use crate::sweep::Sweep;
use crate::{Error, Result, stdout};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use std::ffi::OsString;
use std::path::PathBuf;

/// Local Linear Attention: run it on your tensors, measure it, and see what it is for
#[derive(Debug, Parser)]
#[command(
    name = "flashlla",
    version,
    arg_required_else_help = true,
    max_term_width = 100,
    after_help = "Exit codes: 0 ok, 1 failed, 2 wrong usage."
)]
pub struct Cli {
    #[command(subcommand)]
    #[allow(missing_docs)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compute attention over the tensors of a safetensors file
    ///
    /// Reads q [B, HQ, N, D], k [B, H, M, D] and v [B, H, M, DV] and writes out [B, HQ, N, DV], lse [B, HQ, N],
    /// key_mean and probe [B, HQ, N, D]: float64 for f64, float32 for every other type. HQ must be a multiple of H.
    ///
    /// Also reads, if they are there: ridge, the penalty λ, shape [], [HQ] or [B, HQ, N] with 1 where it is constant; bias,
    /// added to the logits, shape [M], [H, M] or [B, H, M] with 1 where it is constant and H or HQ heads; and, when an
    /// option asks for it, grad_out [B, HQ, N, DV] and probe [B, HQ, N, D]. Ridge, bias and lse keep this order of axes
    /// under every --layout (without the head axis under bnd).
    ///
    /// The file's metadata may hold scale, causal (0 or 1), window (0: none), q_offset, cu_seqlens (such as 0,5,9),
    /// leave_one_out (0 or 1), ridge and layout. Options override the metadata, which overrides the defaults. A ridge
    /// tensor overrides the ridge in the metadata.
    #[command(after_long_help = ATTEND_EXAMPLES)]
    Attend(Box<AttendArgs>),

    /// Run an experiment: what Local Linear Attention is for, in tables and figures
    #[command(subcommand)]
    Experiment(Experiment),

    /// Train the models that a TOML file describes: mixers, sizes, seeds and options of a task
    ///
    /// Finished runs are skipped and those that were stopped go on, so that the same command may be given again and again, and by
    /// several processes at once. `flashlla experiment NAME --print-config` prints a file to start from.
    #[command(after_long_help = SWEEP_EXAMPLES)]
    Sweep(SweepArgs),

    /// Gather folders of results into tables, figures and one page to look at in a browser
    Report(ReportArgs),

    /// Measure the speed of forward, backward and decoding on this machine
    ///
    /// Times are medians over repeats after a warm-up, on normally distributed inputs. The machine's own rate of matrix
    /// products, in the same arithmetic and on the same threads, is measured in the same run; efficiency is the ratio of
    /// the two. With --op decode, the yardstick is the rate at which the same cache can merely be summed, or on a GPU copied. A table on a terminal;
    /// JSON lines with --json or into a pipe.
    #[command(after_long_help = bench::EXAMPLES)]
    Bench(BenchArgs),

    /// Show the version, the CPU's features and the threads
    Info(InfoArgs),

    /// Print a completion script for a shell
    #[command(
        after_long_help = "Example:\n  flashlla completions bash > ~/.local/share/bash-completion/completions/flashlla"
    )]
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: Shell,
    },
}

const ATTEND_EXAMPLES: &str = "\
Examples:
  flashlla attend qkv.safetensors -o out.safetensors
  flashlla attend qkv.safetensors -o out.safetensors --ridge 1 --no-causal --dtype f32
  flashlla attend qkv.safetensors -o out.safetensors --backward --dtype f64 --json
  flashlla attend qkv.safetensors -o out.safetensors --layout bnhd --cu-seqlens 0,128,512";

const SWEEP_EXAMPLES: &str = "\
Examples:
  flashlla sweep my.toml --out results/mine
  flashlla sweep my.toml --out results/mine --device cuda --shard 3/8
  flashlla report results/mine

A file:
  mixers = [\"lla\", \"softmax\"]
  seeds = [0, 1, 2]
  [mqar]                  # or in-context-regression, state-tracking, language-model
  pairs = [8, 16]         # a list stands for each of its values
  [training]
  steps = 1000            # what is left out is as in the experiment";

/// The options of `sweep`.
#[derive(Debug, clap::Args)]
pub struct SweepArgs {
    /// The file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Folder for the runs and for CSV, JSON, SVG and PNG files
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub running: Running,
    /// Threads to compute with [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Print one JSON document instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Why the command line did not lead to a command.
pub enum Stop {
    /// Help or the version was asked for: text for the standard output.
    Text(String),
    /// There is no command: help for the standard error.
    Help(String),
    /// A mistake.
    Mistake(Error),
}

impl Cli {
    /// Reads the command line.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, Stop> {
        Self::try_parse_from(args).map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Stop::Text(styled(&error, false)),
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Stop::Help(styled(&error, true)),
            _ => Stop::Mistake(Error::usage(condensed(&error.render().to_string()))),
        })
    }

    /// Whether it trains models side by side, a thread each, so that Candle should have one thread, not all of them.
    pub fn side_by_side(&self) -> bool {
        match &self.command {
            Command::Experiment(experiment) => experiment.side_by_side(),
            Command::Sweep(args) => args.running.side_by_side(args.threads),
            _ => false,
        }
    }

    /// Does what was asked for.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Attend(args) => attend::run(&args),
            Command::Experiment(experiment) => experiment.run(),
            Command::Sweep(args) => {
                let sweep = Sweep::read(&args.file)?;
                trained::finish(&args.running, &sweep, &args.out, args.threads, args.json)
            }
            Command::Report(args) => gather::run(&args),
            Command::Bench(args) => bench::run(&args),
            Command::Info(args) => info::run(&args),
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "flashlla", &mut script);
                stdout::write(String::from_utf8_lossy(&script))
            }
        }
    }
}

/// The text of clap's answer, with styles when it goes to a terminal that wants them.
fn styled(error: &clap::Error, to_stderr: bool) -> String {
    use std::io::IsTerminal;
    let terminal = if to_stderr { std::io::stderr().is_terminal() } else { std::io::stdout().is_terminal() };
    let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let text = error.render();
    if colour { text.ansi().to_string() } else { text.to_string() }
}

/// clap's paragraphs in one line, without the usage: what is wrong and the way out.
fn condensed(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let (mut line, mut rest) = (String::new(), text.lines().map(str::trim).peekable());
    while let Some(part) = rest.next_if(|part| !part.starts_with("Usage:") && !part.starts_with("For more")) {
        let part = part.replace("tip: ", "");
        if line.is_empty() {
            line = part;
        } else if !part.is_empty() {
            line.push_str(if line.ends_with(':') { " " } else { "; " });
            line.push_str(&part);
        }
    }
    let help = text.split_once("try '").and_then(|(_, end)| end.split_once('\'')).map(|(command, _)| command);
    // The program's own help lists the commands; a command's usage line names its help.
    let usage = text.lines().find_map(|line| line.strip_prefix("Usage: "));
    let command = usage.map(|usage| {
        usage
            .split(' ')
            .take_while(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))
            .collect::<Vec<_>>()
            .join(" ")
    });
    match (command, help) {
        (Some(command), _) if !command.is_empty() => format!("{line}; see '{command} --help'"),
        _ => format!("{line}; see 'flashlla {}'", help.unwrap_or("--help")),
    }
}
