//! Figures: panels of lines, points or bars with error bars, drawn as SVG and, from the same drawing, as PNG.
//!
//! The font travels with the program, so a figure looks the same wherever it was made.

mod draw;
mod layers;
mod legend;

pub use layers::{Layer, PanelLayers};

use super::axis::Axis;
use plotters::style::RGBColor;
use serde::{Deserialize, Serialize};

/// The colours of Okabe and Ito, which people of every colour vision can tell apart.
pub mod colours {
    use plotters::style::RGBColor;
    /// LLA everywhere.
    pub const VERMILLION: RGBColor = RGBColor(213, 94, 0);
    /// Softmax attention everywhere.
    pub const BLUE: RGBColor = RGBColor(0, 114, 178);
    /// Global linear models.
    pub const GREEN: RGBColor = RGBColor(0, 158, 115);
    /// Linear attention.
    pub const PURPLE: RGBColor = RGBColor(204, 121, 167);
    /// Theory.
    pub const GREY: RGBColor = RGBColor(110, 110, 110);
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mark {
    /// A line through markers with this many corners.
    Line(usize),
    /// Such markers without a line.
    Dot(usize),
    /// A line without markers or error bars.
    Thin,
    /// A dashed line without markers: a theory to compare with.
    Dashed,
    /// A bar from the axis; series stand side by side.
    Bar,
}

/// A named sequence of points.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// In the legend; series of the same name in several panels share one entry. Empty: not in the legend.
    pub name: String,
    /// Its colour.
    #[serde(with = "colour")]
    pub colour: RGBColor,
    /// How it is drawn.
    pub mark: Mark,
    /// `(x, y, half the height of the error bar)`.
    pub points: Vec<(f64, f64, f64)>,
}

/// One set of axes with its series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Panel {
    /// Above the axes.
    pub title: String,
    /// Horizontal.
    pub x: Axis,
    /// Vertical.
    pub y: Axis,
    /// Drawn in order, later ones on top.
    pub series: Vec<Series>,
}

/// Panels on a grid under one title and one legend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The stem of the file names.
    pub name: String,
    /// The title.
    pub title: String,
    /// Panels side by side.
    pub columns: usize,
    /// Width of one panel in units of the usual one.
    pub stretch: f64,
    /// Row by row.
    pub panels: Vec<Panel>,
}

/// A colour as its three numbers.
mod colour {
    use plotters::style::RGBColor;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(colour: &RGBColor, to: S) -> Result<S::Ok, S::Error> {
        [colour.0, colour.1, colour.2].serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<RGBColor, D::Error> {
        <[u8; 3]>::deserialize(from).map(|[r, g, b]| RGBColor(r, g, b))
    }
}
