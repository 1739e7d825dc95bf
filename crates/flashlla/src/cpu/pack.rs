//! Keys and values laid out for the tile products.
//!
//! Each KV head's keys are copied once into the type of arithmetic, twice: as rows (the right-hand side of `weights · K`) and,
//! tile by tile, transposed (that of `Q Kᵀ`). Values likewise; their transpose is for the backward only.
//!
//! Keys are stored less a reference key `μ` of their head. That leaves the weights as they are (each logit of a row changes
//! by the same `scale q·μ`) and the fit too, but what is computed from squares and differences of keys no longer loses
//! digits to a mean that is large against the spread. `μ` is a coordinate-wise median, which a few wild keys do not move.
//!
//! Keys and values with a non-finite entry are stored as zeros and counted: a weight of 0 does not keep a NaN out of a product.
//! The queries that see them are found by the counts and set to NaN at the end.

use super::rows::{Inputs, ReadRows};
use super::{LANES, TILE, padded};
use crate::Real;

/// Running counts of bad tokens: how many lie below each place. Empty when there is none.
#[derive(Default)]
pub struct Bad(Vec<u32>);

impl Bad {
    pub fn new(bad: impl Iterator<Item = bool>) -> Self {
        let mut counts = vec![0];
        counts.extend(bad.scan(0, |sum, bad| {
            *sum += u32::from(bad);
            Some(*sum)
        }));
        if counts.last() == Some(&0) { Self::default() } else { Self(counts) }
    }

    /// Whether token `j` is bad.
    pub fn at(&self, j: usize) -> bool {
        !self.0.is_empty() && self.0[j + 1] > self.0[j]
    }

    /// Whether any of the tokens seen is bad.
    pub fn seen(&self, visible: &crate::Visible) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let own = visible.skip.is_some_and(|j| self.at(j));
        self.0[visible.end] - self.0[visible.start] > u32::from(own)
    }
}

/// Rows of numbers of one width, padded to whole registers with zeros.
pub struct Packed<C> {
    /// Row `j` is `rows[j · width..]`.
    pub rows: Vec<C>,
    pub width: usize,
    /// Tile `t` transposed is `transposed[t · dim · TILE..]`, element `(d, j)` at `d · TILE + j`.
    pub transposed: Vec<C>,
    pub dim: usize,
    /// The largest norm of a row.
    pub longest: C,
    pub bad: Bad,
}

impl<C: Real> Packed<C> {
    /// The tokens of one head, less `origin`.
    fn new(view: &dyn ReadRows<C>, b: usize, h: usize, origin: &[C], by_row: bool, by_column: bool) -> Self {
        let [_, _, tokens, dim] = view.shape();
        let (width, tiles) = (padded(dim, LANES), tokens.div_ceil(TILE));
        let mut rows = vec![C::ZERO; if by_row { tiles * TILE * width } else { 0 }];
        let mut transposed = vec![C::ZERO; if by_column { tiles * dim * TILE } else { 0 }];
        let mut token = vec![C::ZERO; dim];
        let mut longest = C::ZERO;
        let bad = Bad::new((0..tokens).map(|j| {
            let bad = !view.read(b, h, j, &mut token);
            if !bad {
                for (x, &o) in token.iter_mut().zip(origin) {
                    *x -= o;
                }
                let norm = token.iter().map(|&x| x * x).sum::<C>().root();
                if norm > longest {
                    longest = norm;
                }
                if by_row {
                    rows[j * width..][..dim].copy_from_slice(&token);
                }
                if by_column {
                    let tile = &mut transposed[(j / TILE) * dim * TILE..][..dim * TILE];
                    token.iter().enumerate().for_each(|(d, &x)| tile[d * TILE + j % TILE] = x);
                }
            }
            bad
        }));
        Self { rows, width, transposed, dim, longest, bad }
    }

    /// The rows of tile `t`.
    pub fn tile(&self, t: usize) -> &[C] {
        &self.rows[t * TILE * self.width..][..TILE * self.width]
    }

    /// Tile `t` transposed.
    pub fn tile_transposed(&self, t: usize) -> &[C] {
        &self.transposed[t * self.dim * TILE..][..self.dim * TILE]
    }
}

/// One KV head.
pub struct Head<C> {
    pub k: Packed<C>,
    pub v: Packed<C>,
    /// The reference key, `D` long.
    pub origin: Vec<C>,
}

impl<C: Real> Head<C> {
    pub fn new(inputs: &Inputs<C>, b: usize, h: usize, backward: bool) -> Self {
        let origin = reference_key(inputs.k, b, h);
        let k = Packed::new(inputs.k, b, h, &origin, true, true);
        let zeros = vec![C::ZERO; inputs.attention.value_dim()];
        let v = Packed::new(inputs.v, b, h, &zeros, !backward, backward);
        Self { k, v, origin }
    }
}

/// The coordinate-wise median of up to 33 finite keys, evenly spread.
fn reference_key<C: Real>(k: &dyn ReadRows<C>, b: usize, h: usize) -> Vec<C> {
    const SAMPLES: usize = 33;
    let [_, _, tokens, dim] = k.shape();
    let mut samples: Vec<Vec<C>> = (0..dim).map(|_| Vec::with_capacity(SAMPLES)).collect();
    let mut key = vec![C::ZERO; dim];
    for j in (0..tokens).step_by(tokens.div_ceil(SAMPLES).max(1)) {
        if k.read(b, h, j, &mut key) {
            samples.iter_mut().zip(&key).for_each(|(column, &x)| column.push(x));
        }
    }
    samples
        .into_iter()
        .map(|mut column| {
            column.sort_unstable_by(|a, b| a.partial_cmp(b).expect("finite"));
            column.get(column.len() / 2).copied().unwrap_or(C::ZERO)
        })
        .collect()
}
