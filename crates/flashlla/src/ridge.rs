//! The ridge penalty λ.

use crate::{Error, Result};

/// The ridge penalty `λ > 0` of every query, constant along any of batch, head and query.
///
/// λ weighs the size of the fitted slope against the fit; it is measured in squared key units, relative to weights that
/// sum to 1. As λ grows the operator becomes softmax attention.
#[derive(Debug, Clone, PartialEq)]
pub struct Ridge {
    values: Vec<f64>,
    /// `[1 or B, 1 or HQ, 1 or N]`.
    shape: [usize; 3],
    /// The shape that the caller gave, which its gradient has too.
    own_shape: Vec<usize>,
}

impl Ridge {
    /// One λ for all.
    pub fn scalar(value: f64) -> Self {
        Self { values: vec![value], shape: [1, 1, 1], own_shape: vec![] }
    }

    /// One λ per query head.
    pub fn per_head(values: impl Into<Vec<f64>>) -> Self {
        let values = values.into();
        Self { shape: [1, values.len(), 1], own_shape: vec![values.len()], values }
    }

    /// One λ per query: `values` in the order `[batch, query head, query]`.
    pub fn per_query(values: impl Into<Vec<f64>>, shape: [usize; 3]) -> Self {
        Self { values: values.into(), shape, own_shape: shape.to_vec() }
    }

    /// λ constant along every axis of `[batch, query head, query]` where `shape` is 1.
    pub fn broadcast(values: impl Into<Vec<f64>>, shape: [usize; 3]) -> Self {
        Self::per_query(values, shape)
    }

    /// The values, in the order of [`Ridge::shape`].
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The shape it was made with, which its gradient has too: `[]`, `[HQ]`, or three sizes.
    pub fn shape(&self) -> &[usize] {
        &self.own_shape
    }

    /// The place of a query's λ in [`Ridge::values`].
    #[inline]
    pub fn index(&self, batch: usize, head: usize, query: usize) -> usize {
        let pick = |size: usize, i: usize| if size == 1 { 0 } else { i };
        let [b, h, n] = self.shape;
        (pick(b, batch) * h + pick(h, head)) * n + pick(n, query)
    }

    /// A query's λ.
    #[inline]
    pub fn at(&self, batch: usize, head: usize, query: usize) -> f64 {
        self.values[self.index(batch, head, query)]
    }

    pub(crate) fn validate(&self, full: [usize; 3]) -> Result<()> {
        let fits = self.shape.iter().zip(full).all(|(&s, f)| s == 1 || s == f);
        let len = self.shape.iter().try_fold(1usize, |a, &s| a.checked_mul(s));
        if !fits || len != Some(self.values.len()) {
            let [b, h, n] = full;
            return Err(Error::Shape {
                argument: "ridge",
                given: if len == Some(self.values.len()) {
                    self.own_shape.clone()
                } else {
                    vec![self.values.len()]
                },
                expected: format!(
                    "a scalar, [{h}] (query heads), or [{b}, {h}, {n}] (batch, query heads, queries) with 1 where it is constant"
                ),
            });
        }
        match self.values.iter().find(|v| !(v.is_finite() && **v > 0.0)) {
            Some(bad) => Err(Error::value("ridge", bad, "finite and greater than 0")),
            None => Ok(()),
        }
    }
}

impl Default for Ridge {
    /// λ = 10, the paper's default.
    fn default() -> Self {
        Self::scalar(10.0)
    }
}

impl From<f64> for Ridge {
    fn from(value: f64) -> Self {
        Self::scalar(value)
    }
}
