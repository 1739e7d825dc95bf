//! `flashlla bench`: how fast forward and backward run, as a share of what this machine's matrix products reach, and decoding, as a
//! share of what its memory does.

mod decode;
mod matmul;

use crate::device::AnyEngine;
use crate::files::Stored;
use crate::options::{self, Device, Dtype, SolverArgs, thread_pool};
use crate::summary::duration;
use crate::{Error, Result, stdout};
use clap::{Args, ValueEnum};
use flashlla::{Attention, Diagnostics, Element, Engine, Mask, Tensor};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};
use std::io::IsTerminal;
use std::time::Instant;

/// Shown under the help text.
pub const EXAMPLES: &str = "\
Examples:
  flashlla bench
  flashlla bench --shape 1,8,2048,64 --shape 1,8,2048,128 --op forward --threads 1
  flashlla bench --dtype bf16 --ridge 1 --json > bench.jsonl
  flashlla bench --op decode --dtype bf16 --context 16384 --group 1 --group 4 --page-size 64";

/// The options of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Batch, heads, tokens and head dimension; may be given more than once [default: 1,1,1024,64 1,1,4096,64
    /// 1,1,1024,128 1,1,4096,128]
    #[arg(long, value_name = "B,H,N,D", value_parser = shape)]
    pub shape: Vec<Shape>,

    /// What to measure
    #[arg(long, value_enum, default_value_t)]
    pub op: Op,

    /// The type of q, k and v
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,

    /// The ridge penalty λ
    #[arg(long, value_name = "X", default_value = "10", allow_hyphen_values = true, value_parser = options::ridge)]
    pub ridge: f64,

    /// Every query sees every key [default: causal]
    #[arg(long)]
    pub no_causal: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub solver: SolverArgs,

    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub device: Device,

    /// Threads [default: one per logical CPU]
    #[arg(long, value_name = "COUNT", allow_hyphen_values = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// Runs whose median is taken, after one that is not counted
    #[arg(long, value_name = "COUNT", default_value = "7", allow_hyphen_values = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub repeats: u16,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub decode: decode::DecodeArgs,

    /// Seed of the inputs
    #[arg(long, value_name = "NUMBER", default_value = "0")]
    pub seed: u64,

    /// Print JSON lines even on a terminal
    #[arg(long)]
    pub json: bool,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Op {
    /// The forward
    Forward,
    /// The backward, given what the forward saved
    Backward,
    /// One after the other, each by itself
    #[default]
    Both,
    /// One step of generation against a cache of keys and values
    Decode,
}

/// A pass that is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Pass {
    Forward,
    Backward,
}

impl Pass {
    fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
        }
    }
}

/// The floating-point operations that a pass executed, two for a multiplication and an addition, as its engine counted them.
fn flop_executed(diagnostics: &Diagnostics) -> f64 {
    diagnostics.flop as f64
}

/// Batch, heads, tokens, head dimension.
pub type Shape = [usize; 4];

fn shape(text: &str) -> Result<Shape, String> {
    let sizes: Vec<usize> = text.split(',').map_while(|size| size.trim().parse().ok()).collect();
    match Shape::try_from(sizes) {
        Ok(sizes @ [b, h, n, d])
            if text.split(',').count() == 4 && b > 0 && h > 0 && n > 0 && (1..=256).contains(&d) =>
        {
            Ok(sizes)
        }
        _ => Err("must be four numbers from 1, B,H,N,D, with D at most 256, such as 1,8,1024,64".into()),
    }
}

/// One line of the results.
#[derive(Debug, serde::Serialize)]
struct Line {
    op: Pass,
    batch: usize,
    heads: usize,
    tokens: usize,
    head_dim: usize,
    dtype: Dtype,
    causal: bool,
    ridge: f64,
    device: Device,
    threads: usize,
    repeats: u16,
    seconds: f64,
    fastest_seconds: f64,
    iterations_median: u32,
    iterations_max: u32,
    direct: usize,
    worst_residual: f32,
    flop: f64,
    flop_per_second: f64,
    matmul_flop_per_second: f64,
    efficiency: f64,
}

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<()> {
    match args.dtype {
        Dtype::F64 => bench::<f64>(args),
        Dtype::F32 => bench::<f32>(args),
        Dtype::Bf16 => bench::<flashlla::bf16>(args),
        Dtype::F16 => bench::<flashlla::f16>(args),
    }
}

fn bench<T: Stored>(args: &BenchArgs) -> Result<()>
where
    StandardNormal: Distribution<T::Acc>,
{
    if args.op == Op::Decode {
        return decode::run::<T>(args);
    }
    if let Some(option) = args.decode.given() {
        return Err(Error::usage(format_args!("{option}: only together with --op decode; leave it out")));
    }
    let shapes = match &args.shape[..] {
        [] => &[[1, 1, 1024, 64], [1, 1, 4096, 64], [1, 1, 1024, 128], [1, 1, 4096, 128]],
        shapes => shapes,
    };
    // Everything that can be wrong is found before anything is measured.
    let attentions: Vec<Attention> =
        shapes.iter().map(|&shape| describe::<T>(args, shape)).collect::<Result<_>>()?;
    let engine = AnyEngine::open(args.device)?;
    let pool = thread_pool(args.threads)?;
    let table = !args.json && std::io::stdout().is_terminal();
    pool.install(|| {
        // What the processor's products reach says nothing of a GPU: there the efficiency is left out.
        let matmul = if args.device == Device::Cpu { matmul::rate::<T::Acc>() } else { f64::NAN };
        if table && args.device == Device::Cpu {
            let name = std::any::type_name::<T::Acc>();
            stdout::line(format_args!("matrix products in {name}: {:.1} Gflop/s\n", matmul / 1e9))?;
        }
        if table {
            stdout::line(
                "op        batch heads tokens  dim         time  iterations (max)     Gflop/s  efficiency",
            )?;
        }
        for attention in &attentions {
            measure::<T>(args, attention, &engine, matmul, &mut |line| {
                if table { stdout::line(row(&line)) } else { stdout::json(&line) }
            })?;
        }
        Ok(())
    })
}

fn row(line: &Line) -> String {
    format!(
        "{:<9} {:>5} {:>5} {:>6} {:>4} {:>12}  {:>10} {:>5} {:>11.1} {:>12}",
        line.op.name(),
        line.batch,
        line.heads,
        line.tokens,
        line.head_dim,
        duration(line.seconds),
        line.iterations_median,
        format!("({})", line.iterations_max),
        line.flop_per_second / 1e9,
        if line.efficiency.is_nan() { "-".into() } else { format!("{:.0} %", line.efficiency * 100.0) }
    )
}

fn describe<T: Element>(
    args: &BenchArgs,
    shape @ [batch, heads, tokens, head_dim]: Shape,
) -> Result<Attention> {
    Attention::builder()
        .batch(batch)
        .heads(heads)
        .queries(tokens)
        .head_dim(head_dim)
        .mask(if args.no_causal { Mask::full() } else { Mask::causal() })
        .ridge(args.ridge)
        .solver(args.solver.solver(size_of::<T::Acc>() == 8, head_dim)?)
        .precision(args.solver.precision.into())
        .build()
        .map_err(|error| Error::usage(format_args!("--shape {shape:?}: {error}")))
}

/// Measures one shape and hands over a line per pass.
fn measure<T: Element>(
    args: &BenchArgs,
    a: &Attention,
    engine: &impl Engine,
    matmul: f64,
    emit: &mut dyn FnMut(Line) -> Result<()>,
) -> Result<()>
where
    StandardNormal: Distribution<T::Acc>,
{
    let mut rng = StdRng::seed_from_u64(args.seed);
    let mut normal = |shape: [usize; 4]| -> Tensor<T> {
        let numbers = (&mut rng).sample_iter(StandardNormal);
        let data = numbers.take(shape.iter().product()).map(|x: T::Acc| T::from_real(x)).collect();
        Tensor::new(data, &shape)
    };
    let (q, k, v) = (normal(a.query_shape()), normal(a.key_shape()), normal(a.value_shape()));
    let grad_out = normal(a.out_shape());
    let problem = a.problem(q.view(), k.view(), v.view()).map_err(Error::failed)?;

    let line = |op: Pass, mut times: Vec<f64>, diagnostics: &Diagnostics| {
        times.sort_by(f64::total_cmp);
        let seconds = (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0;
        let flop = flop_executed(diagnostics);
        Line {
            op,
            batch: a.batch(),
            heads: a.heads(),
            tokens: a.queries(),
            head_dim: a.head_dim(),
            dtype: args.dtype,
            causal: a.mask().is_causal(),
            ridge: args.ridge,
            device: args.device,
            threads: rayon::current_num_threads(),
            repeats: args.repeats,
            seconds,
            fastest_seconds: times[0],
            iterations_median: diagnostics.median_iterations(),
            iterations_max: diagnostics.max_iterations(),
            direct: diagnostics.direct,
            worst_residual: diagnostics.worst_residual(),
            flop,
            flop_per_second: flop / seconds,
            matmul_flop_per_second: matmul,
            efficiency: flop / seconds / matmul,
        }
    };
    let mut out = Tensor::<T::Acc>::zeros(&a.out_shape());
    let mut forward = || engine.forward_into(&problem, out.view_mut()).map_err(Error::failed);
    // The warm-up of the forward; what it saves is what the backward starts from.
    let state = forward()?;
    if args.op != Op::Backward {
        let (times, last) = repeat(args.repeats, &mut forward)?;
        emit(line(Pass::Forward, times, &last.diagnostics))?;
    }
    if args.op != Op::Forward {
        let mut dq = Tensor::<T::Acc>::zeros(&a.query_shape());
        let mut dk = Tensor::<T::Acc>::zeros(&a.key_shape());
        let mut dv = Tensor::<T::Acc>::zeros(&a.value_shape());
        let mut backward = || {
            let (dq, dk, dv) = (dq.view_mut(), dk.view_mut(), dv.view_mut());
            engine.backward_into(&problem, &state, grad_out.view(), dq, dk, dv).map_err(Error::failed)
        };
        backward()?;
        let (times, last) = repeat(args.repeats, &mut backward)?;
        emit(line(Pass::Backward, times, &last.diagnostics))?;
    }
    Ok(())
}

/// The seconds of every run, and what the last one returned.
fn repeat<R>(repeats: u16, run: &mut impl FnMut() -> Result<R>) -> Result<(Vec<f64>, R)> {
    let mut times = Vec::new();
    loop {
        let start = Instant::now();
        let result = run()?;
        times.push(start.elapsed().as_secs_f64());
        if times.len() >= repeats.into() {
            return Ok((times, result));
        }
    }
}
