//! Figures: panels of lines or bars with error bars, drawn as SVG and, from the same drawing, as PNG.
//!
//! The font travels with the program, so a figure looks the same wherever it was made.

use super::axis::Axis;
use crate::{Error, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::sync::LazyLock;

/// In the order in which browsers try them; DejaVu Sans is the one that comes with the program.
const FONT: &str = "DejaVu Sans, Verdana, Arial, sans-serif";
/// Pixels per panel and around them. The drawing has twice the size at which it is meant to be shown, for sharp lines.
const PANEL: (u32, u32) = (900, 680);
const TITLE: u32 = 76;
const LEGEND: u32 = 64;
const TEXT: u32 = 27;
const INK: RGBColor = RGBColor(34, 34, 34);
const GRID: RGBColor = RGBColor(225, 225, 225);

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// A line through markers with this many corners.
    Line(usize),
    /// A line without markers or error bars.
    Thin,
    /// A dashed line without markers: a theory to compare with.
    Dashed,
    /// A bar from the axis; series stand side by side.
    Bar,
}

/// A named sequence of points.
#[derive(Debug, Clone)]
pub struct Series {
    /// In the legend; series of the same name in several panels share one entry. Empty: not in the legend.
    pub name: String,
    /// Its colour.
    pub colour: RGBColor,
    /// How it is drawn.
    pub mark: Mark,
    /// `(x, y, half the height of the error bar)`.
    pub points: Vec<(f64, f64, f64)>,
}

/// One set of axes with its series.
#[derive(Debug, Clone)]
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
#[derive(Debug, Clone)]
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

type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

/// Whatever the drawing library reports, as one of our errors.
fn drawing(error: impl std::fmt::Display) -> Error {
    Error::failed(format!("figure: cannot be drawn: {error}"))
}

/// The corners of a marker around (0, 0).
fn marker(corners: usize, radius: f64) -> Vec<(i32, i32)> {
    // Few corners enclose less area: enlarge them to look alike. An even number stands on a side.
    let (turn, radius) = match corners {
        3 => (-0.25, radius * 1.35),
        4 => (0.125, radius * 1.2),
        _ => (0.0, radius),
    };
    (0..corners)
        .map(|i| {
            let angle = std::f64::consts::TAU * (i as f64 / corners as f64 + turn);
            ((radius * angle.cos()).round() as i32, (radius * angle.sin()).round() as i32)
        })
        .collect()
}

impl Figure {
    /// As SVG.
    pub fn to_svg(&self) -> Result<String> {
        static REGISTERED: LazyLock<bool> = LazyLock::new(|| {
            plotters::style::register_font(FONT, FontStyle::Normal, dejavu::sans::regular()).is_ok()
        });
        if !*REGISTERED {
            return Err(drawing("the font that comes with the program cannot be read"));
        }
        let columns = self.columns.min(self.panels.len()).max(1);
        let rows = self.panels.len().div_ceil(columns);
        let width = (f64::from(PANEL.0) * self.stretch) as u32 * columns as u32;
        let height = TITLE + LEGEND + PANEL.1 * rows as u32;
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
            root.fill(&WHITE).map_err(drawing)?;
            let centre = Pos::new(HPos::Center, VPos::Center);
            let style = text(38, INK).pos(centre);
            root.draw(&Text::new(self.title.clone(), (width as i32 / 2, TITLE as i32 / 2 + 4), style))
                .map_err(drawing)?;
            let (head, body) = root.split_vertically(TITLE + LEGEND);
            self.draw_legend(&head, width)?;
            for (panel, area) in self.panels.iter().zip(body.split_evenly((rows, columns))) {
                panel.draw(&area)?;
            }
            root.present().map_err(drawing)?;
        }
        Ok(svg)
    }

    /// As PNG, from the SVG.
    pub fn to_png(svg: &str) -> Result<Vec<u8>> {
        use resvg::{tiny_skia, usvg};
        let mut options = usvg::Options::default();
        options.fontdb_mut().load_font_data(dejavu::sans::regular().to_vec());
        let tree = usvg::Tree::from_str(svg, &options).map_err(drawing)?;
        let size = tree.size().to_int_size();
        let mut pixels =
            tiny_skia::Pixmap::new(size.width(), size.height()).ok_or_else(|| drawing("it has no area"))?;
        resvg::render(&tree, tiny_skia::Transform::identity(), &mut pixels.as_mut());
        pixels.encode_png().map_err(drawing)
    }

    /// One entry per name, centred under the title.
    fn draw_legend(&self, area: &Root, width: u32) -> Result<()> {
        let mut entries: Vec<&Series> = vec![];
        for series in self.panels.iter().flat_map(|panel| &panel.series) {
            if !series.name.is_empty() && entries.iter().all(|entry| entry.name != series.name) {
                entries.push(series);
            }
        }
        let (sample, gap) = (64, 54);
        let style = text(TEXT, INK);
        let widths: Vec<i32> = entries
            .iter()
            .map(|entry| area.estimate_text_size(&entry.name, &style).map(|(w, _)| w as i32))
            .collect::<Result<_, _>>()
            .map_err(drawing)?;
        let total: i32 = widths.iter().map(|w| w + sample + 14 + gap).sum::<i32>() - gap;
        let (mut x, y) = ((width as i32 - total) / 2, (TITLE + LEGEND / 2) as i32 - 4);
        for (entry, width) in entries.iter().zip(widths) {
            match entry.mark {
                Mark::Bar => area
                    .draw(&Rectangle::new([(x + 14, y - 14), (x + 50, y + 14)], entry.colour.filled()))
                    .map_err(drawing)?,
                Mark::Dashed => {
                    for dash in 0..3 {
                        let from = x + dash * 24;
                        area.draw(&PathElement::new(
                            vec![(from, y), (from + 14, y)],
                            entry.colour.stroke_width(4),
                        ))
                        .map_err(drawing)?;
                    }
                }
                Mark::Line(_) | Mark::Thin => {
                    area.draw(&PathElement::new(vec![(x, y), (x + sample, y)], entry.colour.stroke_width(5)))
                        .map_err(drawing)?;
                    if let Mark::Line(corners) = entry.mark {
                        let corners = marker(corners, 12.0)
                            .iter()
                            .map(|(dx, dy)| (x + sample / 2 + dx, y + dy))
                            .collect();
                        area.draw(&Polygon::new::<Vec<_>, _>(corners, entry.colour.filled()))
                            .map_err(drawing)?;
                    }
                }
            }
            let style = style.pos(Pos::new(HPos::Left, VPos::Center));
            area.draw(&Text::new(entry.name.clone(), (x + sample + 14, y + 2), style)).map_err(drawing)?;
            x += sample + 14 + width + gap;
        }
        Ok(())
    }
}

impl Panel {
    fn draw(&self, area: &Root) -> Result<()> {
        let all = || self.series.iter().flat_map(|series| &series.points);
        let from_zero = self.series.iter().any(|series| series.mark == Mark::Bar);
        let x = self.x.layout(all().map(|p| (p.0, p.0)), false);
        let y = self.y.layout(all().map(|p| (p.1 - p.2, p.1 + p.2)), from_zero);
        let (y0, y1) = y.range;
        let mut builder = ChartBuilder::on(area);
        builder.margin_top(8).margin_right(36).margin_bottom(14).margin_left(14);
        builder.x_label_area_size(84).y_label_area_size(122);
        if !self.title.is_empty() {
            builder.caption(&self.title, text(30, INK));
        }
        let mut chart = builder.build_cartesian_2d(x, y).map_err(drawing)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(&self.x.label)
            .y_desc(&self.y.label)
            .axis_desc_style(text(TEXT + 1, INK))
            .label_style(text(TEXT - 3, INK))
            .bold_line_style(GRID.stroke_width(2))
            .light_line_style(TRANSPARENT)
            .axis_style(INK.stroke_width(2));
        if self.x.is_categories() {
            mesh.disable_x_mesh();
        }
        mesh.draw().map_err(drawing)?;

        let bars = self.series.iter().filter(|series| series.mark == Mark::Bar).count();
        let bar_width = 0.8 / bars.max(1) as f64;
        let mut bar = 0;
        for series in &self.series {
            let shift = if series.mark == Mark::Bar {
                bar += 1;
                (bar as f64 - 0.5) * bar_width - 0.4
            } else {
                0.0
            };
            let places: Vec<(f64, f64)> =
                series.points.iter().map(|p| (self.x.place(p.0) + shift, self.y.place(p.1))).collect();
            let colour = series.colour;
            match series.mark {
                Mark::Line(_) => {
                    chart.draw_series([PathElement::new(places.clone(), colour.stroke_width(4))])
                }
                Mark::Thin => chart.draw_series([PathElement::new(places.clone(), colour.stroke_width(4))]),
                Mark::Dashed => chart.draw_series(DashedLineSeries::new(
                    places.iter().copied(),
                    14,
                    10,
                    colour.stroke_width(4),
                )),
                Mark::Bar => chart.draw_series(places.iter().map(|&(x, y)| {
                    let half = 0.46 * bar_width;
                    Rectangle::new([(x - half, y0), (x + half, y)], colour.filled())
                })),
            }
            .map_err(drawing)?;
            if matches!(series.mark, Mark::Line(_) | Mark::Bar) {
                let ink = if series.mark == Mark::Bar { INK } else { colour };
                for (&(x, _), &(_, y, error)) in places.iter().zip(&series.points) {
                    if error > 0.0 {
                        let (low, high) = (self.y.place(y - error).max(y0), self.y.place(y + error).min(y1));
                        let cap = |at: f64| {
                            EmptyElement::at((x, at))
                                + PathElement::new(vec![(-7, 0), (7, 0)], ink.stroke_width(3))
                        };
                        chart
                            .draw_series([PathElement::new(vec![(x, low), (x, high)], ink.stroke_width(3))])
                            .map_err(drawing)?;
                        chart.draw_series([cap(low), cap(high)]).map_err(drawing)?;
                    }
                }
            }
            if let Mark::Line(corners) = series.mark {
                chart
                    .draw_series(places.iter().map(|&at| {
                        EmptyElement::at(at) + Polygon::new(marker(corners, 10.0), colour.filled())
                    }))
                    .map_err(drawing)?;
            }
        }
        Ok(())
    }
}
