//! Options that several commands share, and how they meet a file's metadata and the defaults.

// Help texts show shapes and defaults in brackets, which are not links.
#![allow(rustdoc::broken_intra_doc_links)]

use crate::{Error, Result};
use clap::{Args, ValueEnum};
use flashlla::{Mask, Precision, Solver};

/// A storage type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 64 bits; computed in 64 bits
    F64,
    /// 32 bits
    F32,
    /// 16 bits with float32's range; computed in 32 bits where they suffice
    Bf16,
    /// 16 bits (IEEE half precision); computed in 32 bits where they suffice
    F16,
}

/// The order of a tensor's axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// [batch, head, token, dim]
    Bhnd,
    /// [batch, token, head, dim]
    Bnhd,
    /// [batch, token, dim], one head
    Bnd,
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The processor, all of `--threads`
    #[default]
    Cpu,
    /// The first NVIDIA GPU; times include the copies to and from it
    Cuda,
}

/// How the systems are solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SolverKind {
    /// Conjugate gradients, and a direct solve where that is cheaper
    #[default]
    Auto,
    /// Conjugate gradients
    Cg,
    /// Cholesky factorisation of every query's matrix
    Direct,
}

/// In which arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionKind {
    /// f64 for f64, f32 for the others
    #[default]
    Standard,
    /// f64 for all
    High,
}

impl From<PrecisionKind> for Precision {
    fn from(kind: PrecisionKind) -> Self {
        match kind {
            PrecisionKind::Standard => Self::Standard,
            PrecisionKind::High => Self::High,
        }
    }
}

/// The options of the solve.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Solver")]
pub struct SolverArgs {
    /// How the system of every query is solved
    #[arg(long, value_enum, default_value_t)]
    pub solver: SolverKind,

    /// Relative residual to reach [default: 1e-12 for f64, 1e-6 for the others]
    #[arg(long, value_name = "X", allow_hyphen_values = true, value_parser = tolerance)]
    pub tolerance: Option<f64>,

    /// The most conjugate-gradient steps per query [default: for cg, ten times the head dimension; for auto, as many as
    /// are cheaper than a direct solve]
    #[arg(long, value_name = "COUNT", allow_hyphen_values = true, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_iters: Option<u64>,

    /// The arithmetic
    #[arg(long, value_enum, default_value_t)]
    pub precision: PrecisionKind,
}

impl SolverArgs {
    /// The solver for heads of dimension `head_dim`.
    pub fn solver(&self, wide: bool, head_dim: usize) -> Result<Solver> {
        let max_iters = self.max_iters.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let tolerance = self.tolerance;
        Ok(match self.solver {
            SolverKind::Auto => Solver::Auto { tolerance, max_iters },
            SolverKind::Cg => Solver::Cg {
                tolerance: tolerance.unwrap_or(Solver::default_tolerance(wide)),
                max_iters: max_iters.unwrap_or(10 * head_dim),
            },
            SolverKind::Direct => {
                let given = [("--tolerance", tolerance.is_some()), ("--max-iters", max_iters.is_some())];
                if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
                    return Err(Error::usage(format_args!(
                        "{option}: a direct solve has none; leave it out, or use --solver auto or cg"
                    )));
                }
                Solver::Direct
            }
        })
    }
}

/// The options of the mask and the logits. Each overrides what the file says.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Attention")]
pub struct MaskArgs {
    /// A query sees the keys up to its own position [default]
    #[arg(long, overrides_with = "no_causal")]
    pub causal: bool,

    /// A query sees later keys too
    #[arg(long, overrides_with = "causal")]
    pub no_causal: bool,

    /// A query sees only the last COUNT positions up to its own; "none" for all
    #[arg(long, value_name = "COUNT", allow_hyphen_values = true, value_parser = window)]
    pub window: Option<Setting<usize>>,

    /// The position of query 0 among the keys [default: 0]
    #[arg(long, value_name = "POSITION", allow_hyphen_values = true)]
    pub q_offset: Option<i64>,

    /// Sequences packed one after another: the running sums of their lengths, from 0 to the number of keys, such as 0,5,9;
    /// "none" for a single sequence
    #[arg(long, value_name = "SUMS", allow_hyphen_values = true, value_parser = cu_seqlens)]
    pub cu_seqlens: Option<Setting<Vec<usize>>>,

    /// A query does not see the key at its own position
    #[arg(long, overrides_with = "no_leave_one_out")]
    pub leave_one_out: bool,

    /// A query sees the key at its own position [default]
    #[arg(long, overrides_with = "leave_one_out")]
    pub no_leave_one_out: bool,

    /// Factor on q·k in the logits [default: head_dim^-0.5]
    #[arg(long, value_name = "X", allow_hyphen_values = true, value_parser = scale)]
    pub scale: Option<f64>,
}

/// A setting that can be switched off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setting<T> {
    /// Without it.
    Off,
    /// With this value.
    On(T),
}

impl<T> Setting<T> {
    fn into_option(self) -> Option<T> {
        match self {
            Self::Off => None,
            Self::On(value) => Some(value),
        }
    }
}

/// Mask and scale after options, metadata and defaults have met.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The mask.
    pub mask: Mask,
    /// The scale; `None`: `head_dim^-0.5`.
    pub scale: Option<f64>,
}

impl MaskArgs {
    /// Joins the options with a file's metadata: `metadata` looks up a key.
    ///
    /// The error names the key of the value that is wrong.
    pub fn resolve<'a>(&self, metadata: impl Fn(&str) -> Option<&'a str>) -> Result<Resolved, String> {
        let flag = |on: bool, off: bool| (on || off).then_some(on);
        let causal = match flag(self.causal, self.no_causal) {
            Some(causal) => causal,
            None => parse(&metadata, "causal", boolean)?.unwrap_or(true),
        };
        let leave_one_out = match flag(self.leave_one_out, self.no_leave_one_out) {
            Some(leave) => leave,
            None => parse(&metadata, "leave_one_out", boolean)?.unwrap_or(false),
        };
        let window = match &self.window {
            Some(window) => window.clone().into_option(),
            // Files say 0 for no window.
            None => parse(&metadata, "window", |text| match text {
                "" | "0" => Ok(Setting::Off),
                text => window(text),
            })?
            .and_then(Setting::into_option),
        };
        let cu_seqlens = match &self.cu_seqlens {
            Some(sums) => sums.clone().into_option(),
            None => parse(&metadata, "cu_seqlens", |text| match text {
                "" => Ok(Setting::Off),
                text => cu_seqlens(text),
            })?
            .and_then(Setting::into_option),
        };
        let q_offset = match self.q_offset {
            Some(position) => position,
            None => parse(&metadata, "q_offset", |text| {
                text.parse().map_err(|_| "must be a whole number".to_string())
            })?
            .unwrap_or(0),
        };
        let scale = match self.scale {
            Some(scale) => Some(scale),
            None => parse(&metadata, "scale", scale)?,
        };

        let mut mask = if causal { Mask::causal() } else { Mask::full() }.q_offset(q_offset);
        if let Some(window) = window {
            mask = mask.window(window);
        }
        if let Some(sums) = cu_seqlens {
            mask = mask.cu_seqlens(sums);
        }
        if leave_one_out {
            mask = mask.leave_one_out();
        }
        Ok(Resolved { mask, scale })
    }
}

/// Parses the metadata under a key, if there is any; the error names the key.
pub fn parse<'a, T>(
    metadata: impl Fn(&str) -> Option<&'a str>,
    key: &str,
    parser: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, String> {
    let Some(text) = metadata(key) else { return Ok(None) };
    parser(text.trim()).map(Some).map_err(|reason| {
        let shown: String = text.chars().take(40).collect();
        format!("metadata {key}: {shown:?} is not allowed; it {reason}")
    })
}

fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" | "True" => Ok(true),
        "0" | "false" | "False" => Ok(false),
        _ => Err("must be 1 or 0".into()),
    }
}

fn window(text: &str) -> Result<Setting<usize>, String> {
    match text.parse() {
        _ if text == "none" => Ok(Setting::Off),
        Ok(window) if window > 0 => Ok(Setting::On(window)),
        _ => Err("must be a whole number from 1, or \"none\"".into()),
    }
}

fn cu_seqlens(text: &str) -> Result<Setting<Vec<usize>>, String> {
    if text == "none" {
        return Ok(Setting::Off);
    }
    let sums: Result<Vec<usize>, _> = text.split(',').map(|sum| sum.trim().parse()).collect();
    sums.map(Setting::On).map_err(|_| "must be whole numbers with commas between, such as 0,5,9".into())
}

fn scale(text: &str) -> Result<f64, String> {
    finite(text).ok_or_else(|| "must be a finite number".into())
}

fn tolerance(text: &str) -> Result<f64, String> {
    finite(text)
        .filter(|x| (0.0..1.0).contains(x))
        .ok_or_else(|| "must be a number from 0 to below 1, such as 1e-5".into())
}

/// A ridge penalty.
pub fn ridge(text: &str) -> Result<f64, String> {
    finite(text).filter(|x| *x > 0.0).ok_or_else(|| "must be a finite number greater than 0".into())
}

/// The name of a layout, as in a file's metadata.
pub fn layout(text: &str) -> Result<Layout, String> {
    Layout::from_str(text, true).map_err(|_| "must be bhnd, bnhd or bnd".into())
}

fn finite(text: &str) -> Option<f64> {
    text.parse().ok().filter(|x: &f64| x.is_finite())
}

/// A pool of `threads` threads (default: one per logical CPU, or `RAYON_NUM_THREADS`).
pub fn thread_pool(threads: Option<u16>) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or(0).into())
        .build()
        .map_err(|error| Error::failed(format_args!("--threads: {error}; ask for fewer")))
}

/// Threads that a pool has when none are asked for.
pub fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
