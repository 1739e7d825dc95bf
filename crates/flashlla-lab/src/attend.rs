//! `flashlla attend`: attention over the tensors of a file.

use crate::device::AnyEngine;
use crate::files::{Entry, Stored, Target, TensorFile};
use crate::inputs::{InputArgs, Inputs, query_dtype};
use crate::options::{Device, Dtype, thread_pool};
use crate::summary::Summary;
use crate::{Result, stdout};
use clap::Args;
use flashlla::{Engine, OtherGradients, Solver, State, Tensor};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The options of `attend`.
#[derive(Debug, Args)]
pub struct AttendArgs {
    /// A safetensors file with q, k, v and, if wanted, ridge, bias, grad_out
    #[arg(value_name = "IN.safetensors")]
    pub input: PathBuf,

    /// The file to write
    #[arg(short, long, value_name = "OUT.safetensors")]
    pub output: PathBuf,

    /// The type that q, k, v and grad_out are rounded to and computed in [default: the type of the file's q]
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub inputs: InputArgs,

    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub device: Device,

    /// Threads [default: one per logical CPU]
    #[arg(long, value_name = "COUNT", allow_hyphen_values = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// Print the summary as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// What `attend` computes; `A` is the type of the arithmetic.
#[derive(Debug)]
pub struct Outcome<A> {
    /// The outputs, in the layout of the inputs.
    pub out: Tensor<A>,
    /// The rest of the forward, `[batch, head, token, dim]`.
    pub state: State<A>,
    /// How long the forward took.
    pub forward_time: Duration,
    /// The gradients, when they were asked for.
    pub backward: Option<Backward<A>>,
}

/// The gradients, those of q, k and v in the layout of the inputs.
#[derive(Debug)]
pub struct Backward<A> {
    dq: Tensor<A>,
    dk: Tensor<A>,
    dv: Tensor<A>,
    /// The other gradients.
    pub other: OtherGradients<A>,
    /// How long the backward took.
    pub time: Duration,
}

/// Runs the command.
pub fn run(args: &AttendArgs) -> Result<()> {
    let mut file = TensorFile::open(&args.input)?;
    let target = Target::new(&args.output, &[&args.input])?;
    let dtype = match args.dtype {
        Some(dtype) => dtype,
        None => query_dtype(&file)?,
    };
    match dtype {
        Dtype::F64 => attend::<f64>(&mut file, args, dtype, &target),
        Dtype::F32 => attend::<f32>(&mut file, args, dtype, &target),
        Dtype::Bf16 => attend::<flashlla::bf16>(&mut file, args, dtype, &target),
        Dtype::F16 => attend::<flashlla::f16>(&mut file, args, dtype, &target),
    }
}

fn attend<T: Stored>(
    file: &mut TensorFile<std::fs::File>,
    args: &AttendArgs,
    dtype: Dtype,
    target: &Target,
) -> Result<()>
where
    T::Acc: Stored,
{
    let inputs = Inputs::<T>::read(file, &args.inputs)?;
    let pool = thread_pool(args.threads)?;
    let engine = AnyEngine::open(args.device)?;
    let outcome = pool.install(|| compute(&inputs, &engine)).map_err(|error| file.error(error))?;
    let mut summary = Summary::new(&inputs, &outcome, args, dtype, pool.current_num_threads());
    let metadata = metadata(&inputs, args, dtype);
    summary.tensors = write(outcome, &inputs, target, &metadata)?;
    if args.json { stdout::json(&summary) } else { stdout::write(&summary) }
}

/// Forward, and backward when there is a gradient of the outputs.
pub fn compute<T: Stored, E: Engine>(inputs: &Inputs<T>, engine: &E) -> flashlla::Result<Outcome<T::Acc>> {
    let (a, layout) = (&inputs.attention, inputs.layout);
    let problem = inputs.problem()?;
    let mut out = layout.zeros(a.out_shape());
    let start = Instant::now();
    let state = engine.forward_into(&problem, layout.view_mut(&mut out))?;
    let forward_time = start.elapsed();
    let backward = match &inputs.grad_out {
        None => None,
        Some(grad_out) => {
            let (mut dq, mut dk, mut dv) =
                (layout.zeros(a.query_shape()), layout.zeros(a.key_shape()), layout.zeros(a.value_shape()));
            let start = Instant::now();
            let other = engine.backward_into(
                &problem,
                &state,
                inputs.view(grad_out),
                layout.view_mut(&mut dq),
                layout.view_mut(&mut dk),
                layout.view_mut(&mut dv),
            )?;
            Some(Backward { dq, dk, dv, other, time: start.elapsed() })
        }
    };
    Ok(Outcome { out, state, forward_time, backward })
}

/// Writes the results and says what they are called.
fn write<T: Stored>(
    outcome: Outcome<T::Acc>,
    inputs: &Inputs<T>,
    target: &Target,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<&'static str>>
where
    T::Acc: Stored,
{
    let layout = inputs.layout;
    let query = inputs.attention.query_shape();
    let reshaped = |tensor: Tensor<T::Acc>, shape: &[usize]| Tensor::new(tensor.into_vec(), shape);
    let state = outcome.state;
    let mut results = vec![
        ("out", outcome.out),
        ("lse", reshaped(state.lse, &layout.query_shape(query))),
        ("key_mean", layout.arrange(state.key_mean)),
        ("probe", layout.arrange(state.probe)),
    ];
    if let Some(Backward { dq, dk, dv, other, .. }) = outcome.backward {
        results.extend([("dq", dq), ("dk", dk), ("dv", dv)]);
        results.push(("dridge", reshaped(other.dridge, &inputs.ridge_shape)));
        results.push(("dscale", Tensor::new(vec![other.dscale], &[1])));
        if let (Some(dbias), Some(bias)) = (other.dbias, &inputs.bias) {
            results.push(("dbias", reshaped(dbias, bias.tensor.shape())));
        }
        results.extend(other.dprobe.map(|dprobe| ("dprobe", layout.arrange(dprobe))));
    }
    let entries =
        results.iter().map(|(name, tensor)| Entry::new(name, tensor.shape(), tensor.data())).collect();
    target.write(entries, metadata)?;
    Ok(results.into_iter().map(|(name, _)| name).collect())
}

/// Everything the results depend on beside the tensors, in the keys and spellings that inputs use.
fn metadata<T: Stored>(inputs: &Inputs<T>, args: &AttendArgs, dtype: Dtype) -> BTreeMap<String, String> {
    let a = &inputs.attention;
    let mask = a.mask();
    let flag = |on: bool| u8::from(on).to_string();
    let mut pairs = vec![
        ("scale", format!("{:?}", a.scale())),
        ("causal", flag(mask.is_causal())),
        ("window", mask.window_len().unwrap_or(0).to_string()),
        ("q_offset", mask.offset().to_string()),
        ("cu_seqlens", mask.sequences().map_or(String::new(), join)),
        ("leave_one_out", flag(mask.is_leave_one_out())),
        ("layout", inputs.layout.name().into()),
        ("dtype", name(&dtype)),
        ("precision", name(&args.inputs.solver.precision)),
        ("device", name(&args.device)),
        ("producer", concat!("flashlla ", env!("CARGO_PKG_VERSION")).into()),
    ];
    if inputs.probe.is_none() {
        pairs.push(("solver", name(&args.inputs.solver.solver)));
        if !inputs.ridge_in_file {
            pairs.push(("ridge", join(a.ridge().values())));
        }
        let (tolerance, max_iters) = match a.solver() {
            Solver::Auto { tolerance, max_iters } => {
                // A GPU has tolerances of its own.
                let default =
                    (args.device == Device::Cpu).then(|| Solver::default_tolerance(dtype == Dtype::F64));
                (tolerance.or(default), max_iters)
            }
            Solver::Cg { tolerance, max_iters } => (Some(tolerance), Some(max_iters)),
            Solver::Direct => (None, None),
        };
        pairs.extend(tolerance.map(|x| ("tolerance", format!("{x:?}"))));
        pairs.extend(max_iters.map(|n| ("max_iters", n.to_string())));
    }
    pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

/// An option's value as it is spelled on the command line.
fn name(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().expect("no value is hidden").get_name().to_string()
}

fn join(values: &[impl std::fmt::Debug]) -> String {
    values.iter().map(|x| format!("{x:?}")).collect::<Vec<_>>().join(",")
}
