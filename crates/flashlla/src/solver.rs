//! How `(C + λI) x = δ` is solved, and in which arithmetic.

use crate::{Error, Result};

/// How the system `(C + λI) x = δ` of every query is solved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Solver {
    /// Conjugate gradients, changing over to [`Solver::Direct`] for the queries of a block for which that is cheaper.
    ///
    /// Each block of queries starts with conjugate gradients. From the rate at which its residuals fall it predicts, after
    /// every step, what the remaining steps would cost; once that exceeds the cost of forming and factoring the remaining
    /// queries' matrices, or `max_iters` steps are done, those queries are solved directly. Well-conditioned problems thus
    /// pay for a handful of steps only, and ill-conditioned ones never for more than about twice the direct solve.
    Auto {
        /// Relative residual `|δ − A x| / |δ|` to reach; `None`: near the resolution of the arithmetic
        /// ([`Solver::default_tolerance`]); on a GPU, see `flashlla::cuda`.
        tolerance: Option<f64>,
        /// The most steps before changing over; `None`: no limit but cost.
        max_iters: Option<usize>,
    },
    /// Conjugate gradients without forming `C`.
    Cg {
        /// Relative residual `|δ − A x| / |δ|` at which a query is done. Below 4 times the machine epsilon of the
        /// arithmetic it is raised to that.
        tolerance: f64,
        /// The most steps that a query may take.
        max_iters: usize,
    },
    /// Forms the `D × D` matrix of every query and factors it (Cholesky).
    Direct,
}

impl Default for Solver {
    fn default() -> Self {
        Self::Auto { tolerance: None, max_iters: None }
    }
}

impl Solver {
    /// The relative residual that [`Solver::Auto`] aims for unless told: `1e-12` in `f64`, `1e-6` in `f32`.
    pub fn default_tolerance(f64_arithmetic: bool) -> f64 {
        if f64_arithmetic { 1e-12 } else { 1e-6 }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let (tolerance, max_iters) = match *self {
            Self::Auto { tolerance, max_iters } => (tolerance, max_iters),
            Self::Cg { tolerance, max_iters } => (Some(tolerance), Some(max_iters)),
            Self::Direct => (None, None),
        };
        if let Some(tolerance) = tolerance.filter(|t| !(t.is_finite() && *t >= 0.0 && *t < 1.0)) {
            return Err(Error::value("tolerance", tolerance, "a number from 0 to below 1"));
        }
        if max_iters == Some(0) {
            return Err(Error::value("max_iters", 0, "at least 1"));
        }
        Ok(())
    }
}

/// In which arithmetic an engine works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// The accumulation type of the inputs: `f32` for `f32`, `bf16` and `f16`, `f64` for `f64`. The CPU engine computes in
    /// `f64` what `f32` would not resolve: blocks with very large probes (few keys and a small λ), and very large logits.
    #[default]
    Standard,
    /// More than that where the engine can: `f64` on the CPU whatever the inputs (outputs are still rounded to `f32` for
    /// the narrower types).
    High,
}
