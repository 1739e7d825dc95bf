//! What `attend` says about a run, for people and for programs.

use crate::attend::{AttendArgs, Outcome};
use crate::files::Stored;
use crate::inputs::Inputs;
use crate::options::{Device, Dtype, Layout};
use flashlla::{Attention, Diagnostics, Element, Solver};
use std::fmt;
use std::time::Duration;

/// What `attend` says about a run.
#[derive(Debug, serde::Serialize)]
pub struct Summary {
    q: Vec<usize>,
    k: Vec<usize>,
    v: Vec<usize>,
    layout: Layout,
    dtype: Dtype,
    device: Device,
    threads: usize,
    /// The mask, the scale and the ridge in words.
    attention: String,
    forward: Pass,
    backward: Option<Pass>,
    /// Queries whose output holds a NaN or an infinity.
    nonfinite_queries: usize,
    output: String,
    /// The tensors written.
    pub tensors: Vec<&'static str>,
}

/// A forward or a backward: how long it took and how its solves went.
#[derive(Debug, serde::Serialize)]
struct Pass {
    seconds: f64,
    iterations_median: u32,
    iterations_max: u32,
    /// Queries solved by Cholesky factorisation.
    direct: usize,
    /// `null` in JSON when it is not a number.
    worst_residual: f32,
    /// Queries that ran out of steps above the tolerance.
    unconverged: usize,
}

impl Pass {
    fn new(time: Duration, diagnostics: &Diagnostics, a: &Attention) -> Self {
        let unconverged = match a.solver() {
            // Residuals are reported in f32: a relative 1e-6 is their rounding.
            Solver::Cg { tolerance, max_iters } => (diagnostics.iterations.iter())
                .zip(&diagnostics.residual)
                .filter(|(steps, residual)| {
                    **steps as usize >= max_iters && f64::from(**residual) > tolerance * (1.0 + 1e-6)
                })
                .count(),
            _ => 0,
        };
        Self {
            seconds: time.as_secs_f64(),
            iterations_median: diagnostics.median_iterations(),
            iterations_max: diagnostics.max_iterations(),
            direct: diagnostics.direct,
            worst_residual: diagnostics.worst_residual(),
            unconverged,
        }
    }
}

impl Summary {
    /// Describes a run; the tensors written are filled in when they are.
    pub fn new<T: Stored>(
        inputs: &Inputs<T>,
        outcome: &Outcome<T::Acc>,
        args: &AttendArgs,
        dtype: Dtype,
        threads: usize,
    ) -> Self {
        let a = &inputs.attention;
        let rows = [inputs.layout.view(&outcome.out)].into_iter().flatten();
        let nonfinite_queries = rows
            .map(|out| {
                let [b, h, n, d] = out.shape();
                let finite = |b, h, n| (0..d).all(|d| out.at(b, h, n, d).is_finite());
                (0..b * h * n).filter(|i| !finite(i / (h * n), i / n % h, i % n)).count()
            })
            .sum();
        Self {
            q: inputs.q.shape().to_vec(),
            k: inputs.k.shape().to_vec(),
            v: inputs.v.shape().to_vec(),
            layout: inputs.layout,
            dtype,
            device: args.device,
            threads,
            attention: describe(inputs),
            forward: Pass::new(outcome.forward_time, &outcome.state.diagnostics, a),
            backward: outcome.backward.as_ref().map(|b| Pass::new(b.time, &b.other.diagnostics, a)),
            nonfinite_queries,
            output: args.output.display().to_string(),
            tensors: vec![],
        }
    }
}

/// Mask, scale and ridge in words.
fn describe<T: Element>(inputs: &Inputs<T>) -> String {
    let a = &inputs.attention;
    let mask = a.mask();
    let mut words = vec![if mask.is_causal() { "causal" } else { "full" }.to_string()];
    words.extend(mask.window_len().map(|window| format!("window {window}")));
    words.extend(mask.sequences().map(|sums| format!("{} packed sequences", sums.len() - 1)));
    if mask.offset() != 0 {
        words.push(format!("query 0 at {}", mask.offset()));
    }
    if mask.is_leave_one_out() {
        words.push("leave one out".into());
    }
    words.push(format!("scale {:.6}", a.scale()));
    let ridge = a.ridge().values();
    let (min, max) = ridge.iter().fold((f64::INFINITY, 0.0), |(a, b), &x| (f64::min(a, x), f64::max(b, x)));
    words.push(match () {
        _ if inputs.probe.is_some() => "probe given".into(),
        _ if min < max => format!("ridge {min} to {max}"),
        _ if ridge.is_empty() => "no ridge".into(),
        _ => format!("ridge {max}"),
    });
    if inputs.bias.is_some() {
        words.push("bias".into());
    }
    words.join(", ")
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let dtype = format!("{:?}", self.dtype).to_lowercase();
        writeln!(f, "shape     q {:?}  k {:?}  v {:?}  {dtype}", self.q, self.k, self.v)?;
        writeln!(f, "attention {}", self.attention)?;
        for (name, pass) in [("forward", Some(&self.forward)), ("backward", self.backward.as_ref())] {
            let Some(pass) = pass else { continue };
            write!(f, "{name:<9} {}", duration(pass.seconds))?;
            write!(f, ", iterations median {} max {}", pass.iterations_median, pass.iterations_max)?;
            if pass.direct > 0 {
                write!(f, ", {} queries solved directly", pass.direct)?;
            }
            write!(f, ", worst residual {:.1e}", pass.worst_residual)?;
            if pass.unconverged > 0 {
                write!(f, ", {} queries above the tolerance (raise --max-iters)", pass.unconverged)?;
            }
            writeln!(f)?;
        }
        if self.nonfinite_queries > 0 {
            writeln!(f, "note      {} queries have non-finite outputs", self.nonfinite_queries)?;
        }
        writeln!(f, "wrote     {}: {}", crate::error::one_line(&self.output), self.tensors.join(", "))
    }
}

/// Seconds in the unit that fits.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}
