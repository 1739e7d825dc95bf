//! Drawing.

use super::legend::Legend;
use super::{Figure, Mark, Panel, Series};
use crate::report::axis::Ticks;
use crate::{Error, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::sync::LazyLock;

/// In the order in which browsers try them; DejaVu Sans is the one that comes with the program.
const FONT: &str = "DejaVu Sans, Verdana, Arial, sans-serif";
/// Pixels per panel and around them. The drawing has twice the size at which it is meant to be shown, for sharp lines.
pub(super) const PANEL: (u32, u32) = (900, 680);
const TITLE: u32 = 76;
/// The title of a panel.
const CAPTION: u32 = 46;
pub(super) const TEXT: u32 = 27;
pub(super) const INK: RGBColor = RGBColor(34, 34, 34);
const GRID: RGBColor = RGBColor(225, 225, 225);

pub(super) type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

pub(super) fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

/// Whatever the drawing library reports, as one of our errors.
pub(super) fn drawing(error: impl std::fmt::Display) -> Error {
    Error::failed(format!("figure: cannot be drawn: {error}"))
}

/// The corners of a marker around (0, 0).
pub(super) fn marker(corners: usize, radius: f64) -> Vec<(i32, i32)> {
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

/// Makes the font known to the drawing library.
pub(super) fn font() -> Result<()> {
    static REGISTERED: LazyLock<bool> = LazyLock::new(|| {
        plotters::style::register_font(FONT, FontStyle::Normal, dejavu::sans::regular()).is_ok()
    });
    if *REGISTERED { Ok(()) } else { Err(drawing("the font that comes with the program cannot be read")) }
}

/// What of a panel to draw.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    All,
    /// Everything but the series.
    Axes,
    /// One of the series, where it would be.
    Series(usize),
}

impl Figure {
    /// As SVG.
    pub fn to_svg(&self) -> Result<String> {
        font()?;
        let columns = self.columns.min(self.panels.len()).max(1);
        let rows = self.panels.len().div_ceil(columns);
        let width = (f64::from(PANEL.0) * self.stretch) as u32 * columns as u32;
        let legend = Legend::new(self, width)?;
        let height = TITLE + legend.height() + PANEL.1 * rows as u32;
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
            root.fill(&WHITE).map_err(drawing)?;
            let centre = Pos::new(HPos::Center, VPos::Center);
            let style = text(38, INK).pos(centre);
            root.draw(&Text::new(self.title.clone(), (width as i32 / 2, TITLE as i32 / 2 + 4), style))
                .map_err(drawing)?;
            let (head, body) = root.split_vertically(TITLE + legend.height());
            legend.draw(&head, TITLE)?;
            for (panel, area) in self.panels.iter().zip(body.split_evenly((rows, columns))) {
                panel.draw(&area, Part::All)?;
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
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Ticks, Ticks>>;

impl Panel {
    /// Draws a part of the panel where it would stand in the whole.
    pub(super) fn draw(&self, area: &Root, part: Part) -> Result<()> {
        let area = if self.title.is_empty() {
            area.clone()
        } else {
            let (head, body) = area.split_vertically(CAPTION);
            if !matches!(part, Part::Series(_)) {
                let style = text(30, INK).pos(Pos::new(HPos::Center, VPos::Center));
                let middle = head.dim_in_pixel().0 as i32 / 2;
                head.draw(&Text::new(self.title.clone(), (middle, CAPTION as i32 / 2 + 4), style))
                    .map_err(drawing)?;
            }
            body
        };
        let all = || self.series.iter().flat_map(|series| &series.points);
        let from_zero = self.series.iter().any(|series| series.mark == Mark::Bar);
        let x = self.x.layout(all().map(|p| (p.0, p.0)), false);
        let y = self.y.layout(all().map(|p| (p.1 - p.2, p.1 + p.2)), from_zero);
        let range = y.range;
        let mut builder = ChartBuilder::on(&area);
        builder.margin_top(8).margin_right(36).margin_bottom(14).margin_left(14);
        builder.x_label_area_size(84).y_label_area_size(122);
        let mut chart = builder.build_cartesian_2d(x, y).map_err(drawing)?;
        if !matches!(part, Part::Series(_)) {
            self.draw_axes(&mut chart)?;
        }
        for (i, series) in self.series.iter().enumerate() {
            if part == Part::All || part == Part::Series(i) {
                self.draw_series(&mut chart, i, series, range)?;
            }
        }
        Ok(())
    }

    fn draw_axes(&self, chart: &mut Chart) -> Result<()> {
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
        mesh.draw().map_err(drawing)
    }

    /// Bars of several series stand side by side: how far from their middle, and how wide each is.
    fn bar(&self, place: usize) -> (f64, f64) {
        let bars = |series: &[Series]| series.iter().filter(|series| series.mark == Mark::Bar).count() as f64;
        let width = 0.8 / bars(&self.series).max(1.0);
        ((bars(&self.series[..place]) + 0.5) * width - 0.4, width)
    }

    fn draw_series(
        &self,
        chart: &mut Chart,
        place: usize,
        series: &Series,
        (y0, y1): (f64, f64),
    ) -> Result<()> {
        let (shift, bar_width) = if series.mark == Mark::Bar { self.bar(place) } else { (0.0, 0.0) };
        let places: Vec<(f64, f64)> =
            series.points.iter().map(|p| (self.x.place(p.0) + shift, self.y.place(p.1))).collect();
        let colour = series.colour;
        match series.mark {
            Mark::Line(_) | Mark::Thin => {
                chart.draw_series([PathElement::new(places.clone(), colour.stroke_width(4))]).map(drop)
            }
            Mark::Dot(_) => Ok(()),
            Mark::Dashed => {
                let points = places.iter().copied();
                chart.draw_series(DashedLineSeries::new(points, 14, 10, colour.stroke_width(4))).map(drop)
            }
            Mark::Bar => {
                let half = 0.46 * bar_width;
                let bar =
                    |&(x, y): &(f64, f64)| Rectangle::new([(x - half, y0), (x + half, y)], colour.filled());
                chart.draw_series(places.iter().map(bar)).map(drop)
            }
        }
        .map_err(drawing)?;
        if matches!(series.mark, Mark::Line(_) | Mark::Dot(_) | Mark::Bar) {
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
        if let Mark::Line(corners) | Mark::Dot(corners) = series.mark {
            let markers = places
                .iter()
                .map(|&at| EmptyElement::at(at) + Polygon::new(marker(corners, 10.0), colour.filled()));
            chart.draw_series(markers).map_err(drawing)?;
        }
        Ok(())
    }
}
