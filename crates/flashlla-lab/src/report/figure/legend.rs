//! The legend: one entry per name, in as many lines as they need.

use super::draw::{INK, Root, TEXT, drawing, font, marker, text};
use super::{Figure, Mark, Series};
use crate::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Pixels: a line's height, the sample before a name, what lies between them, and between entries.
const LINE: u32 = 64;
const SAMPLE: i32 = 64;
const INDENT: i32 = 14;
const GAP: i32 = 54;

/// The entries of a figure, laid out.
pub(super) struct Legend<'a> {
    /// Line by line; each entry with the width of its name.
    lines: Vec<Vec<(&'a Series, i32)>>,
    width: i32,
}

impl<'a> Legend<'a> {
    /// For a figure of this width.
    pub fn new(figure: &'a Figure, width: u32) -> Result<Self> {
        font()?;
        let mut entries: Vec<&Series> = vec![];
        for series in figure.panels.iter().flat_map(|panel| &panel.series) {
            if !series.name.is_empty() && entries.iter().all(|entry| entry.name != series.name) {
                entries.push(series);
            }
        }
        let width = width as i32;
        let mut lines = vec![vec![]];
        let mut taken = 0;
        for entry in entries {
            let size = text(TEXT, INK).font.box_size(&entry.name).map_err(drawing)?.0 as i32;
            let needed = SAMPLE + INDENT + size + GAP;
            if taken > 0 && taken + needed - GAP > width - 2 * INDENT {
                lines.push(vec![]);
                taken = 0;
            }
            taken += needed;
            if let Some(line) = lines.last_mut() {
                line.push((entry, size));
            }
        }
        Ok(Self { lines, width })
    }

    /// Of all lines.
    pub fn height(&self) -> u32 {
        LINE * self.lines.len() as u32
    }

    /// Draws the lines from `top` on, each in the middle.
    pub fn draw(&self, area: &Root, top: u32) -> Result<()> {
        for (i, line) in self.lines.iter().enumerate() {
            let total = line.iter().map(|(_, size)| SAMPLE + INDENT + size + GAP).sum::<i32>() - GAP;
            let mut x = (self.width - total) / 2;
            let y = (top + LINE * i as u32 + LINE / 2) as i32 - 4;
            for (entry, size) in line {
                sample(area, entry, (x, y))?;
                let style = text(TEXT, INK).pos(Pos::new(HPos::Left, VPos::Center));
                let at = (x + SAMPLE + INDENT, y + 2);
                area.draw(&Text::new(entry.name.clone(), at, style)).map_err(drawing)?;
                x += SAMPLE + INDENT + size + GAP;
            }
        }
        Ok(())
    }
}

/// What a series looks like.
fn sample(area: &Root, entry: &Series, (x, y): (i32, i32)) -> Result<()> {
    let colour = entry.colour;
    match entry.mark {
        Mark::Bar => {
            area.draw(&Rectangle::new([(x + 14, y - 14), (x + 50, y + 14)], colour.filled()))
                .map_err(drawing)?;
        }
        Mark::Dashed => {
            for dash in 0..3 {
                let from = x + dash * 24;
                area.draw(&PathElement::new(vec![(from, y), (from + 14, y)], colour.stroke_width(4)))
                    .map_err(drawing)?;
            }
        }
        Mark::Line(_) | Mark::Thin => {
            area.draw(&PathElement::new(vec![(x, y), (x + SAMPLE, y)], colour.stroke_width(5)))
                .map_err(drawing)?;
        }
        Mark::Dot(_) => {}
    }
    if let Mark::Line(corners) | Mark::Dot(corners) = entry.mark {
        let corners = marker(corners, 12.0).iter().map(|(dx, dy)| (x + SAMPLE / 2 + dx, y + dy)).collect();
        area.draw(&Polygon::new::<Vec<_>, _>(corners, colour.filled())).map_err(drawing)?;
    }
    Ok(())
}
