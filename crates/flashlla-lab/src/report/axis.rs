//! Axes: where values lie and which of them are labelled.

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use serde::{Deserialize, Serialize};

/// How values are spread along an [`Axis`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Scale {
    /// Evenly.
    Linear,
    /// By their logarithm; labels at powers of ten, or at 1, 2 and 5 times them.
    Log,
    /// By their logarithm, labels at the given values only.
    LogAt(Vec<f64>),
    /// Value `i` stands for the `i`th name.
    Categories(Vec<String>),
}

/// One axis of a panel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    /// What it shows, with the unit.
    pub label: String,
    /// How.
    pub scale: Scale,
    /// From where to where; otherwise what the points need.
    pub range: Option<(f64, f64)>,
}

/// Where an axis begins and ends and what is labelled, in places along it.
pub(super) struct Ticks {
    pub range: (f64, f64),
    pub places: Vec<f64>,
    pub labels: Vec<String>,
}

impl Ranged for Ticks {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        let (low, high) = self.range;
        start + ((value - low) / (high - low) * f64::from(end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // The lines between those that are labelled stay away.
        if hint.weight().allow_light_points() { vec![] } else { self.places.clone() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.0..self.range.1
    }
}

impl ValueFormatter<f64> for Ticks {
    fn format_ext(&self, value: &f64) -> String {
        let place = self.places.iter().position(|place| (place - value).abs() < 1e-9);
        place.map_or(String::new(), |i| self.labels[i].clone())
    }
}

impl Axis {
    /// An axis that fits itself to the points.
    pub fn new(label: &str, scale: Scale) -> Self {
        Self { label: label.into(), scale, range: None }
    }

    /// Sets where it begins and ends.
    pub fn range(mut self, from: f64, to: f64) -> Self {
        self.range = Some((from, to));
        self
    }

    pub(super) fn is_categories(&self) -> bool {
        matches!(self.scale, Scale::Categories(_))
    }

    /// The place of a value along the axis.
    pub(super) fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Log | Scale::LogAt(_) => value.max(f64::MIN_POSITIVE).log10(),
            _ => value,
        }
    }

    /// Fits the axis to the extents `(low, high)` of points.
    pub(super) fn layout(&self, points: impl Iterator<Item = (f64, f64)>, from_zero: bool) -> Ticks {
        if let Scale::Categories(names) = &self.scale {
            let places = (0..names.len()).map(|i| i as f64).collect();
            return Ticks { range: (-0.6, names.len() as f64 - 0.4), places, labels: names.clone() };
        }
        let log = self.scale != Scale::Linear;
        let extent = points
            .filter(|(low, high)| high.is_finite() && (!log || *low > 0.0))
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), (low, high)| (a.min(low), b.max(high)));
        let extent = if extent.0 <= extent.1 { extent } else { (1.0, 2.0) };
        let (mut low, mut high) = (self.place(extent.0), self.place(extent.1));
        let margin = ((high - low) * 0.05).max(1e-6);
        (low, high) = (if from_zero && !log { 0.0 } else { low - margin }, high + margin);
        if let Some((from, to)) = self.range {
            (low, high) = (self.place(from), self.place(to));
        }
        let values = match &self.scale {
            Scale::LogAt(values) => values.clone(),
            Scale::Log => log_ticks(low, high),
            _ => linear_ticks(low, high),
        };
        let inside = |v: &f64| (low - 1e-9..=high + 1e-9).contains(&self.place(*v));
        let values: Vec<f64> = values.into_iter().filter(inside).collect();
        let labels = values.iter().map(|&v| label(v, log)).collect();
        Ticks { range: (low, high), places: values.iter().map(|&v| self.place(v)).collect(), labels }
    }
}

/// Round numbers, about six of them.
fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let raw = (high - low) / 6.0;
    let unit = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * unit).find(|s| *s >= raw).unwrap_or(unit);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// Powers of ten, with more between them the fewer there are.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let factors: &[f64] = match high - low {
        span if span < 0.9 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
        span if span < 2.2 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let decades = low.floor() as i32..=high.ceil() as i32;
    decades.flat_map(|e| factors.iter().map(move |f| f * 10f64.powi(e))).collect()
}

fn label(value: f64, log: bool) -> String {
    if log && value > 0.0 && !(1e-4..1e5).contains(&value) {
        let exponent = value.log10().floor() as i32;
        let factor = (value / 10f64.powi(exponent)).round();
        let digits: String = exponent
            .to_string()
            .chars()
            .map(|c| match c {
                '-' => '⁻',
                digit => ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹']
                    [digit.to_digit(10).unwrap_or(0) as usize],
            })
            .collect();
        return if factor == 1.0 { format!("10{digits}") } else { format!("{factor}·10{digits}") };
    }
    // As many decimals as the number has, not what the sum of binary fractions has.
    let rounded = format!("{value:.6}");
    let short = rounded.trim_end_matches('0').trim_end_matches('.');
    if short == "-0" { "0".into() } else { short.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(linear_ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        let axis = Axis::new("", Scale::Log);
        let ticks = axis.layout([(0.0007, 0.0008), (2.0, 2.5)].into_iter(), false);
        assert_eq!(ticks.labels, ["0.001", "0.01", "0.1", "1"]);
        assert!(ticks.range.0 < ticks.places[0] && ticks.places[3] < ticks.range.1);
    }

    #[test]
    fn labels_are_short() {
        assert_eq!([0.6000000000000001, -0.0, 250.0].map(|v| label(v, false)), ["0.6", "0", "250"]);
        assert_eq!([1e-5, 2e6, 0.01].map(|v| label(v, true)), ["10⁻⁵", "2·10⁶", "0.01"]);
    }

    #[test]
    fn values_that_a_logarithm_cannot_show_do_not_upset_the_range() {
        let ticks = Axis::new("", Scale::Log).layout([(-1.0, 3.0), (1.0, 10.0)].into_iter(), false);
        assert!(ticks.range.0 > -0.1 && ticks.range.1 < 1.1);
    }
}
