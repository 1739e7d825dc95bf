//! A call's options, and the description that they make with its sizes.

use crate::raised;
use flashlla::{Attention, Mask, Precision, Ridge, Solver};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// What a call is told beside its tensors: a dict with these keys.
#[derive(Debug, Clone, FromPyObject)]
#[pyo3(from_item_all)]
pub struct Options {
    /// λ where no tensor of them is given.
    ridge: f64,
    /// Factor on q·k; the default of the head dimension when `None`.
    scale: Option<f64>,
    causal: bool,
    window: Option<i64>,
    cu_seqlens: Option<Vec<i64>>,
    q_offset: i64,
    leave_one_out: bool,
    /// `auto`, `cg` or `direct`.
    solver: String,
    tolerance: Option<f64>,
    max_iters: Option<i64>,
    /// `standard` or `high`.
    precision: String,
}

impl Options {
    /// Whether more than the standard precision is asked for.
    pub fn high(&self) -> bool {
        self.precision == "high"
    }
}

fn refused(argument: &str, given: impl std::fmt::Display, allowed: &str) -> PyErr {
    PyValueError::new_err(format!("{argument}: {given} is not allowed; it must be {allowed}"))
}

/// A count that Python gives as any integer.
fn count(argument: &str, given: i64) -> PyResult<usize> {
    usize::try_from(given).ok().filter(|&n| n > 0).ok_or_else(|| refused(argument, given, "at least 1"))
}

impl Options {
    /// The description of a call with queries `[B, HQ, N, D]`, keys `[B, H, M, D]` and values `[B, H, M, DV]`. `resolution` is
    /// the relative residual that plain conjugate gradients go to unless told.
    pub fn attention(
        &self,
        q: [usize; 4],
        k: [usize; 4],
        v: [usize; 4],
        ridge: Option<Ridge>,
        resolution: f64,
    ) -> PyResult<Attention> {
        let mut mask = if self.causal { Mask::causal() } else { Mask::full() }.q_offset(self.q_offset);
        if let Some(window) = self.window {
            mask = mask.window(count("window", window)?);
        }
        if let Some(cu_seqlens) = &self.cu_seqlens {
            let sums: Option<Vec<usize>> = cu_seqlens.iter().map(|&c| usize::try_from(c).ok()).collect();
            let allowed = "running sums from 0 to the number of keys, never decreasing";
            mask = mask.cu_seqlens(sums.ok_or_else(|| refused("cu_seqlens", "a negative number", allowed))?);
        }
        if self.leave_one_out {
            mask = mask.leave_one_out();
        }
        let max_iters = self.max_iters.map(|n| count("max_iters", n)).transpose()?;
        let solver = match self.solver.as_str() {
            "auto" => Solver::Auto { tolerance: self.tolerance, max_iters },
            "cg" => {
                let tolerance = self.tolerance.unwrap_or(resolution);
                Solver::Cg { tolerance, max_iters: max_iters.unwrap_or(4 * q[3].max(1)) }
            }
            "direct" => Solver::Direct,
            other => return Err(refused("solver", format!("'{other}'"), "'auto', 'cg' or 'direct'")),
        };
        let precision = match self.precision.as_str() {
            "standard" => Precision::Standard,
            "high" => Precision::High,
            other => return Err(refused("precision", format!("'{other}'"), "'standard' or 'high'")),
        };
        let mut builder = Attention::builder()
            .batch(q[0])
            .heads(q[1])
            .kv_heads(k[1])
            .queries(q[2])
            .keys(k[2])
            .head_dim(q[3])
            .value_dim(v[3])
            .mask(mask)
            .ridge(ridge.unwrap_or(Ridge::scalar(self.ridge)))
            .solver(solver)
            .precision(precision);
        if let Some(scale) = self.scale {
            builder = builder.scale(scale);
        }
        builder.build().map_err(raised)
    }
}
