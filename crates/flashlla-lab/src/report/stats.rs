//! Means, deviations and fitted slopes.

use serde::Serialize;

/// A mean over seeds with its spread.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// The mean.
    pub mean: f64,
    /// The sample standard deviation (0 for one sample).
    pub sd: f64,
    /// The standard error of the mean, `sd / √count`.
    pub se: f64,
    /// How many samples there were.
    pub count: usize,
}

impl Summary {
    /// Of at least one sample.
    pub fn of(samples: &[f64]) -> Self {
        let count = samples.len();
        let mean = samples.iter().sum::<f64>() / count as f64;
        let squares: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
        let sd = if count > 1 { (squares / (count - 1) as f64).sqrt() } else { 0.0 };
        Self { mean, sd, se: sd / (count as f64).sqrt(), count }
    }
}

/// The least-squares slope of `ln y` against `ln x`: the exponent of a power law.
pub fn log_log_slope(x: &[f64], y: &[f64]) -> f64 {
    let lx: Vec<f64> = x.iter().map(|x| x.ln()).collect();
    let ly: Vec<f64> = y.iter().map(|y| y.ln()).collect();
    let (mx, my) = (lx.iter().sum::<f64>() / lx.len() as f64, ly.iter().sum::<f64>() / ly.len() as f64);
    let covariance: f64 = lx.iter().zip(&ly).map(|(x, y)| (x - mx) * (y - my)).sum();
    covariance / lx.iter().map(|x| (x - mx).powi(2)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_law_has_its_exponent_as_slope() {
        let x = [2.0, 4.0, 16.0, 64.0];
        let y = x.map(|x: f64| 7.0 * x.powf(-0.8));
        assert!((log_log_slope(&x, &y) + 0.8).abs() < 1e-12);
    }

    #[test]
    fn spread_of_known_samples() {
        let s = Summary::of(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!((s.mean, s.count), (2.5, 4));
        assert!((s.sd - (5.0f64 / 3.0).sqrt()).abs() < 1e-15 && (s.se - s.sd / 2.0).abs() < 1e-15);
        assert_eq!(Summary::of(&[3.0]), Summary { mean: 3.0, sd: 0.0, se: 0.0, count: 1 });
    }
}
