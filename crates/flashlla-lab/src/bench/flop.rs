//! How much arithmetic a pass takes.

use flashlla::{Attention, Diagnostics};

/// A pass of which the arithmetic is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// The forward.
    Forward,
    /// The backward, given what the forward saved.
    Backward,
}

impl Pass {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
        }
    }
}

/// The floating-point operations of the products that a pass is made of, two for a multiplication and an addition: only
/// visible pairs and only the steps that each query took, so an engine's padding and repeated work count against it.
///
/// Per pair, with head dimension D and value dimension DV:
/// - a forward forms the logits and the mean key (2·2D), and at the end α and the output (2D + 2DV);
/// - every conjugate-gradient step takes two products (2·2D);
/// - a direct solve forms half a matrix of key products (D(D + 1)) and factors it once per query (D³/3);
/// - a backward forms the logits and g·v and sums c (2·2D + 2DV), then rebuilds the logits, g·v, α and β (3·2D + 2DV), and
///   from them dq (2D), dk (3·2D) and dv (2DV).
pub fn flop_executed(pass: Pass, a: &Attention, diagnostics: &Diagnostics) -> f64 {
    let (d, dv) = (a.head_dim() as f64, a.value_dim() as f64);
    let per_pair = match pass {
        Pass::Forward => 6.0 * d + 2.0 * dv,
        Pass::Backward => (4.0 * d + 2.0 * dv) + (6.0 * d + 2.0 * dv) + 2.0 * d + 6.0 * d + 2.0 * dv,
    };
    let visible: Vec<f64> = (0..a.queries()).map(|i| a.mask().visible(i, a.keys()).count() as f64).collect();
    let heads = (a.batch() * a.heads()) as f64;
    let pairs = heads * visible.iter().sum::<f64>();
    let steps: f64 = (diagnostics.iterations.iter())
        .zip(visible.iter().cycle())
        .map(|(&steps, &visible)| f64::from(steps) * visible)
        .sum();
    let queries = heads * a.queries() as f64;
    let direct = diagnostics.direct as f64;
    let direct_pairs = if queries > 0.0 { pairs * direct / queries } else { 0.0 };
    pairs * per_pair + steps * 4.0 * d + direct_pairs * d * (d + 1.0) + direct * d.powi(3) / 3.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlla::Mask;

    #[test]
    fn pairs_and_steps_are_counted_by_what_each_query_sees() {
        let a = Attention::builder().queries(3).head_dim(4).mask(Mask::causal()).build().unwrap();
        let steps = |iterations| Diagnostics { iterations, residual: vec![0.0; 3], direct: 0 };
        let none = flop_executed(Pass::Forward, &a, &steps(vec![0, 0, 0]));
        assert_eq!(none, 6.0 * 32.0);
        // Query i sees i + 1 keys; a step on one pair takes 16.
        let some = flop_executed(Pass::Forward, &a, &steps(vec![5, 1, 2]));
        assert_eq!(some - none, 16.0 * (5.0 + 2.0 + 6.0));
    }
}
