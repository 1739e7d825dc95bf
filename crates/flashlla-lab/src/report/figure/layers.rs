//! A panel in layers, for pages on which series can be switched off.

use super::draw::{PANEL, Part, drawing, font};
use super::{Panel, Series};
use crate::Result;
use plotters::prelude::*;

/// A panel as SVG, without the element `svg` around it.
#[derive(Debug, Clone, PartialEq)]
pub struct PanelLayers {
    /// Its size.
    pub size: (u32, u32),
    /// Title, axes and labels.
    pub axes: String,
    /// The series, to be laid over the axes in this order.
    pub series: Vec<Layer>,
}

/// One series.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Its name in the legend.
    pub name: String,
    /// Its colour, as CSS has it.
    pub colour: String,
    /// What is drawn.
    pub svg: String,
}

impl Panel {
    /// The panel in layers, `stretch` times as wide as usual.
    pub fn layers(&self, stretch: f64) -> Result<PanelLayers> {
        font()?;
        let size = ((f64::from(PANEL.0) * stretch) as u32, PANEL.1);
        let layer = |part: Part| -> Result<String> {
            let mut svg = String::new();
            {
                let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
                self.draw(&root, part)?;
                root.present().map_err(drawing)?;
            }
            let inside = svg.split_once('>').and_then(|(_, rest)| rest.rsplit_once("</svg>"));
            Ok(inside.map_or_else(String::new, |(inside, _)| inside.trim().to_owned()))
        };
        let series = |(i, series): (usize, &Series)| -> Result<Layer> {
            let RGBColor(r, g, b) = series.colour;
            let colour = format!("#{r:02x}{g:02x}{b:02x}");
            Ok(Layer { name: series.name.clone(), colour, svg: layer(Part::Series(i))? })
        };
        let series = self.series.iter().enumerate().map(series).collect::<Result<_>>()?;
        Ok(PanelLayers { size, axes: layer(Part::Axes)?, series })
    }
}
