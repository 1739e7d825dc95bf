//! How mixers look in tables and figures.

use flashlla_candle::MixerKind;
use plotters::style::RGBColor;

/// A mixer's name, colour and the corners of its marker. Those that the untrained experiments have too look as there.
pub fn look(kind: MixerKind) -> (&'static str, RGBColor, usize) {
    use crate::report::colours::{BLUE, GREEN, PURPLE, VERMILLION};
    match kind {
        MixerKind::LocalLinear => ("LLA", VERMILLION, 24),
        MixerKind::Softmax => ("softmax", BLUE, 3),
        MixerKind::Parallax => ("Parallax", RGBColor(130, 30, 60), 6),
        MixerKind::Linear => ("linear", PURPLE, 5),
        MixerKind::GatedLinear => ("GLA", RGBColor(230, 159, 0), 4),
        MixerKind::DeltaNet => ("DeltaNet", RGBColor(86, 180, 233), 7),
        MixerKind::GatedDeltaNet => ("Gated DeltaNet", RGBColor(20, 50, 120), 8),
        MixerKind::Mesa => ("MesaNet", GREEN, 4),
        MixerKind::Mamba2 => ("Mamba-2", RGBColor(120, 94, 40), 5),
        MixerKind::Hyena => ("Hyena", RGBColor(90, 90, 90), 3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_mixers_share_a_colour_or_a_name() {
        for (i, a) in MixerKind::ALL.iter().enumerate() {
            for b in &MixerKind::ALL[..i] {
                assert!(look(*a).0 != look(*b).0 && look(*a).1 != look(*b).1, "{a} {b}");
            }
        }
    }
}
