//! The inputs of `attend`: from a file and options to a validated description with its tensors.

use crate::files::TensorFile;
use crate::options::{self, Layout, MaskArgs, SolverArgs};
use crate::{Error, Result};
use clap::Args;
use flashlla::{Attention, Element, Problem, Ridge, Tensor, View};
use safetensors::Dtype;
use std::io::{Read, Seek};

/// The options that say what is read and what it means.
#[derive(Debug, Clone, Default, Args)]
pub struct InputArgs {
    /// Also compute gradients: reads grad_out, adds dq, dk, dv, dridge, dscale (dbias, dprobe)
    #[arg(long)]
    pub backward: bool,

    /// Take the file's tensor `probe` instead of solving for it (Parallax attention)
    #[arg(long, conflicts_with_all = ["ridge", "solver", "tolerance", "max_iters"])]
    pub parallax: bool,

    /// The order of the axes of q, k, v, grad_out, probe and of all results [default: the file's metadata, or bhnd]
    #[arg(long, value_enum)]
    pub layout: Option<Layout>,

    /// The ridge penalty λ: one number, or one per query head with commas between [default: the file's, or 10]
    #[arg(
        long,
        value_name = "X",
        value_delimiter = ',',
        allow_hyphen_values = true,
        value_parser = options::ridge,
        help_heading = "Attention"
    )]
    pub ridge: Vec<f64>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub mask: MaskArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub solver: SolverArgs,
}

/// Everything `attend` computes with, checked: past this no input can be wrong.
#[derive(Debug)]
pub struct Inputs<T: Element> {
    /// The description.
    pub attention: Attention,
    /// The layout of the tensors.
    pub layout: Layout,
    /// The shape that the gradient of the ridge is written in.
    pub ridge_shape: Vec<usize>,
    /// Whether the ridge came from a tensor of the file.
    pub ridge_in_file: bool,
    /// The queries, in the file's shape; so are the others.
    pub q: Tensor<T>,
    /// The keys.
    pub k: Tensor<T>,
    /// The values.
    pub v: Tensor<T>,
    /// The bias.
    pub bias: Option<Bias<T>>,
    /// A given probe.
    pub probe: Option<Tensor<T::Acc>>,
    /// The gradient of the outputs.
    pub grad_out: Option<Tensor<T>>,
}

/// A bias on the logits.
#[derive(Debug)]
pub struct Bias<T: Element> {
    /// The tensor, in the file's shape.
    pub tensor: Tensor<T::Acc>,
    /// The shape `[B or 1, HQ or H or 1, M, 1]` that the library knows it by.
    shape: [usize; 4],
}

impl<T: Element> Inputs<T> {
    /// Reads and checks everything.
    pub fn read<R: Read + Seek>(file: &mut TensorFile<R>, args: &InputArgs) -> Result<Self> {
        let layout = match args.layout {
            Some(layout) => layout,
            None => options::parse(|key| file.metadata(key), "layout", options::layout)
                .map_err(|error| file.error(error))?
                .unwrap_or(Layout::Bhnd),
        };
        let resolved = args.mask.resolve(|key| file.metadata(key)).map_err(|error| file.error(error))?;
        let (ridge, ridge_shape, ridge_in_file) = read_ridge(file, &args.ridge, layout)?;
        if args.backward && !file.has("grad_out") {
            return Err(file.error("grad_out: no such tensor, and --backward needs one of out's shape"));
        }
        if args.parallax && !file.has("probe") {
            return Err(file.error("probe: no such tensor, and --parallax needs one of q's shape"));
        }
        let (q, k, v) = (file.read::<T>("q")?, file.read::<T>("k")?, file.read::<T>("v")?);
        let bias = if file.has("bias") { Some(read_bias(file, layout)?) } else { None };
        let probe = if args.parallax { Some(file.read("probe")?) } else { None };
        let grad_out = if args.backward { Some(file.read("grad_out")?) } else { None };

        let attention = {
            let (q, k, v) =
                (view(file, layout, "q", &q)?, view(file, layout, "k", &k)?, view(file, layout, "v", &v)?);
            let wide = size_of::<T::Acc>() == 8;
            let mut builder = Attention::builder_for(&q, &k, &v)
                .mask(resolved.mask)
                .ridge(ridge)
                .solver(args.solver.solver(wide, q.shape()[3])?)
                .precision(args.solver.precision.into());
            if let Some(scale) = resolved.scale {
                builder = builder.scale(scale);
            }
            builder.build().map_err(|error| blame(file, args, layout, error))?
        };
        let inputs = Self { attention, layout, ridge_shape, ridge_in_file, q, k, v, bias, probe, grad_out };
        inputs.check(file, args)?;
        Ok(inputs)
    }

    /// Checks what only shows when description and tensors meet.
    fn check<R: Read + Seek>(&self, file: &TensorFile<R>, args: &InputArgs) -> Result<()> {
        let layout = self.layout;
        if let Some(probe) = &self.probe {
            view(file, layout, "probe", probe)?;
        }
        self.problem().map_err(|error| blame(file, args, layout, error))?;
        if let Some(grad_out) = &self.grad_out {
            view(file, layout, "grad_out", grad_out)?;
            let expected = layout.shape(self.attention.out_shape());
            if grad_out.shape() != expected {
                return Err(file.error(format_args!(
                    "grad_out: shape {:?} does not fit; it must be out's {expected:?}",
                    grad_out.shape()
                )));
            }
        }
        Ok(())
    }

    /// The description joined with its tensors.
    pub fn problem(&self) -> flashlla::Result<Problem<'_, T>> {
        let mut problem =
            self.attention.problem(self.view(&self.q), self.view(&self.k), self.view(&self.v))?;
        if let Some(bias) = &self.bias {
            problem = problem.with_bias(View::bhnd(bias.tensor.data(), bias.shape)?)?;
        }
        if let Some(probe) = &self.probe {
            problem = problem.with_probe(self.view(probe))?;
        }
        Ok(problem)
    }

    /// One of the tensors as a view.
    pub fn view<'a, S: Element>(&self, tensor: &'a Tensor<S>) -> View<'a, S> {
        self.layout.view(tensor).expect("the number of axes was checked when it was read")
    }
}

fn view<'a, R: Read + Seek, T: Element>(
    file: &TensorFile<R>,
    layout: Layout,
    name: &str,
    tensor: &'a Tensor<T>,
) -> Result<View<'a, T>> {
    layout.view(tensor).map_err(|reason| file.error(format_args!("{name}: {reason}")))
}

/// The ridge, the shape of its gradient, and whether it came from a tensor.
fn read_ridge<R: Read + Seek>(
    file: &mut TensorFile<R>,
    option: &[f64],
    layout: Layout,
) -> Result<(Ridge, Vec<usize>, bool)> {
    if option.is_empty() && file.has("ridge") {
        let (values, shape) = {
            let tensor = file.read::<f64>("ridge")?;
            let shape = tensor.shape().to_vec();
            (tensor.into_vec(), shape)
        };
        let ridge = match shape[..] {
            [] | [1] => Ridge::scalar(values[0]),
            [_] => Ridge::per_head(values),
            [b, n] if layout == Layout::Bnd => Ridge::broadcast(values, [b, 1, n]),
            [b, h, n] => Ridge::broadcast(values, [b, h, n]),
            _ => {
                return Err(file.error(format_args!(
                    "ridge: shape {shape:?} does not fit; it must be [], [query heads] or [batch, query heads, queries] \
                     with 1 where it is constant"
                )));
            }
        };
        return Ok((ridge, shape, true));
    }
    let numbers =
        |text: &str| text.split(',').map(|x| options::ridge(x.trim())).collect::<Result<Vec<_>, _>>();
    let values = if option.is_empty() {
        options::parse(|key| file.metadata(key), "ridge", numbers)
            .map_err(|error| file.error(error))?
            .unwrap_or_default()
    } else {
        option.to_vec()
    };
    let shape = vec![values.len().max(1)];
    let ridge = match values[..] {
        [] => Ridge::default(),
        [one] => Ridge::scalar(one),
        _ => Ridge::per_head(values),
    };
    Ok((ridge, shape, false))
}

fn read_bias<R: Read + Seek, T: Element>(file: &mut TensorFile<R>, layout: Layout) -> Result<Bias<T>> {
    let tensor = file.read("bias")?;
    let shape = match *tensor.shape() {
        [m] => [1, 1, m, 1],
        [b, m] if layout == Layout::Bnd => [b, 1, m, 1],
        [h, m] => [1, h, m, 1],
        [b, h, m] => [b, h, m, 1],
        ref shape => {
            return Err(file.error(format_args!(
                "bias: shape {shape:?} does not fit; it must be [keys], [heads, keys] or [batch, heads, keys] with 1 \
                 where it is constant"
            )));
        }
    };
    Ok(Bias { tensor, shape })
}

/// Turns what the library found wrong into an error about the option or the file that it came from.
fn blame<R: Read + Seek>(
    file: &TensorFile<R>,
    args: &InputArgs,
    layout: Layout,
    error: flashlla::Error,
) -> Error {
    use flashlla::Error as E;
    let (E::Value { argument, .. } | E::Shape { argument, .. } | E::Buffer { argument, .. }) = error else {
        return file.error(error);
    };
    let mask = &args.mask;
    let from_option = match argument {
        "ridge" => !args.ridge.is_empty(),
        "scale" => mask.scale.is_some(),
        "window" => mask.window.is_some(),
        "q_offset" => mask.q_offset.is_some(),
        "cu_seqlens" => mask.cu_seqlens.is_some(),
        "tolerance" | "max_iters" => true,
        _ => false,
    };
    let message = error.to_string();
    if from_option {
        let rest = message.strip_prefix(argument).unwrap_or(&message);
        return Error::usage(format_args!("--{}{rest}", argument.replace('_', "-")));
    }
    // The library speaks of [batch, head, token, dim] whatever the file's order.
    let reordered = matches!(error, E::Shape { argument: "q" | "k" | "v" | "probe", .. });
    match layout {
        Layout::Bhnd => file.error(message),
        _ if reordered => file.error(format_args!("{message}, here in the order batch, head, token, dim")),
        _ => file.error(message),
    }
}

/// The type of a file's queries as an option's value.
pub fn query_dtype<R: Read + Seek>(file: &TensorFile<R>) -> Result<options::Dtype> {
    match file.info("q")?.0 {
        Dtype::F64 => Ok(options::Dtype::F64),
        Dtype::F32 => Ok(options::Dtype::F32),
        Dtype::BF16 => Ok(options::Dtype::Bf16),
        Dtype::F16 => Ok(options::Dtype::F16),
        other => {
            Err(file.error(format_args!("q: type {other} is not allowed; it must be F64, F32, BF16 or F16")))
        }
    }
}
