//! Moments as they grow, in rounds of a few steps: operands are packed, then multiplied together, while the next round's memory is asked
//! for.

use super::tiles::{Lines, Operand, Right, SIDE, Sums, Terms, Tiles, Unit};
use crate::cpu::decode::stream::Stream;
use std::ops::Range;

/// Steps of a round: sums are read and written once for so many.
pub const STEPS: usize = 8;
/// Bytes of a line of memory.
const LINE: usize = 64;

/// Memory that will be read in the next round, asked for a few lines at a time between other things: all at once, everything would wait
/// for it; left to the hardware, it would come only when read, since it does not look beyond what it has seen.
#[derive(Default)]
pub struct Ahead {
    pieces: Vec<(*const u8, usize)>,
    /// The first piece of which not all was asked for, and how much of it was.
    at: [usize; 2],
}

impl Ahead {
    /// Tokens to ask for.
    pub fn refill(&mut self, stream: &Stream<f32>, tokens: Range<usize>) {
        self.pieces.clear();
        self.at = [0; 2];
        for from in [stream.inputs.k, stream.inputs.v] {
            from.pieces(stream.place, tokens.clone(), &mut self.pieces);
        }
    }

    /// So many lines, or some that lie before or behind them.
    pub fn take(&mut self, count: usize) -> Lines {
        let Some(&(start, len)) = self.pieces.get(self.at[0]) else {
            return Lines { start: self.pieces.as_ptr().cast(), step: 0 };
        };
        let lines = Lines { start: start.wrapping_add(self.at[1]), step: LINE };
        self.at[1] += count * LINE;
        if self.at[1] >= len {
            self.at = [self.at[0] + 1, 0];
        }
        lines
    }
}

/// Right operands of a round for every sixteen columns.
pub enum Columns {
    Exact(Vec<Operand>),
    Terms(Vec<Terms>),
}

impl Columns {
    fn new(exact: bool, columns: usize) -> Self {
        if exact {
            Self::Exact(vec![Operand::ZERO; columns * STEPS])
        } else {
            Self::Terms(vec![Terms::ZERO; columns * STEPS])
        }
    }

    /// Those of a step, of a block of columns and the next.
    pub fn exact(&mut self, block: usize, step: usize) -> [&mut Operand; 2] {
        let Self::Exact(all) = self else { panic!("columns are exact") };
        two(all, block, step)
    }

    pub fn terms(&mut self, block: usize, step: usize) -> &mut Terms {
        let Self::Terms(all) = self else { panic!("columns are terms") };
        &mut all[block * STEPS + step]
    }

    fn get(&self, block: usize, steps: usize) -> Right<'_> {
        match self {
            Self::Exact(all) => Right::Exact(&all[block * STEPS..][..steps]),
            Self::Terms(all) => Right::Terms(&all[block * STEPS..][..steps]),
        }
    }
}

fn two<T>(all: &mut [T], block: usize, step: usize) -> [&mut T; 2] {
    let (first, second) = all[block * STEPS..][..2 * STEPS].split_at_mut(STEPS);
    [&mut first[step], &mut second[step]]
}

/// The operands of a round, and the sums so far. Sums come in pairs, of sixteen rows each, as the unit makes them.
pub struct Moments {
    tiles: Tiles,
    /// Weighted keys less the reference key, by sixteen coordinates, an even number of blocks.
    left: Vec<Terms>,
    pub weights: Vec<Operand>,
    pub keys: Columns,
    pub values: Columns,
    /// Steps that are ready.
    pub steps: usize,
    /// Sixteens of coordinates, of keys and values.
    blocks: [usize; 2],
    /// `Σ w (k − o) kᵀ`, pairs of rows after pairs of rows; below the diagonal zeros.
    second: Vec<[Sums; 2]>,
    /// `Σ w (k − o) vᵀ`
    cross: Vec<[Sums; 2]>,
    /// `Σ w v`, the sum of its first three rows.
    value_sum: Vec<[Sums; 2]>,
}

impl Moments {
    pub fn new(unit: Unit, exact: bool, widths: [usize; 2]) -> Self {
        let blocks = widths.map(|width| width / SIDE);
        let pairs = blocks[0].div_ceil(2);
        let zeros = |count| vec![[Sums::ZERO; 2]; count];
        Self {
            tiles: Tiles::new(unit),
            left: vec![Terms::ZERO; 2 * pairs * STEPS],
            weights: vec![Operand::ZERO; STEPS],
            keys: Columns::new(exact, blocks[0]),
            values: Columns::new(exact, blocks[1].next_multiple_of(2)),
            steps: 0,
            blocks,
            second: zeros(pairs * blocks[0]),
            cross: zeros(pairs * blocks[1]),
            value_sum: zeros(blocks[1].div_ceil(2)),
        }
    }

    /// Left operands of a step, of a block of coordinates and the next.
    pub fn left(&mut self, block: usize, step: usize) -> [&mut Terms; 2] {
        two(&mut self.left, block, step)
    }

    /// Adds the products of the steps that are ready.
    pub fn multiply(&mut self, ahead: &mut Ahead) {
        let steps = std::mem::take(&mut self.steps);
        if steps == 0 {
            return;
        }
        let ([keys, values], tiles) = (self.blocks, &self.tiles);
        for pair in 0..keys.div_ceil(2) {
            let left = [2 * pair, 2 * pair + 1].map(|i| &self.left[i * STEPS..][..steps]);
            for column in 2 * pair..keys {
                let lines = ahead.take(steps * Lines::PER_STEP);
                let sums = self.second[pair * keys + column].each_mut();
                tiles.add(sums, left, self.keys.get(column, steps), lines);
            }
            for column in 0..values {
                let lines = ahead.take(steps * Lines::PER_STEP);
                let sums = self.cross[pair * values + column].each_mut();
                tiles.add(sums, left, self.values.get(column, steps), lines);
            }
        }
        for (pair, sums) in self.value_sum.iter_mut().enumerate() {
            let right = [2 * pair, 2 * pair + 1].map(|i| self.values.get(i, steps));
            tiles.add_exact(sums.each_mut(), &self.weights[..steps], right);
        }
    }

    pub fn scale(&mut self, factor: f32) {
        let all = [&mut self.second, &mut self.cross, &mut self.value_sum];
        all.into_iter().flatten().flatten().flat_map(|sums| &mut sums.0).flatten().for_each(|x| *x *= factor);
    }

    /// Pairs after pairs, as [`each`] takes them.
    pub fn second(&self) -> Vec<f32> {
        flat(&self.second)
    }

    pub fn cross(&self) -> Vec<f32> {
        flat(&self.cross)
    }

    /// Calls `f` with the block, the place in it, and the sum of weighted values.
    pub fn each_value(&self, mut f: impl FnMut(usize, usize, f32)) {
        for (block, sums) in self.value_sum.as_flattened().iter().enumerate().take(self.blocks[1]) {
            (0..SIDE).for_each(|i| f(block, i, sums.0[..3].iter().map(|row| row[i]).sum()));
        }
    }
}

fn flat(sums: &[[Sums; 2]]) -> Vec<f32> {
    let mut all = Vec::with_capacity(sums.len() * 2 * SIDE * SIDE);
    sums.as_flattened().iter().for_each(|sums| all.extend_from_slice(sums.0.as_flattened()));
    all
}

/// Calls `f` with the blocks of row and column, the places in them, and the sum, for each of sums that are so many blocks wide.
pub fn each(sums: &[f32], columns: usize, mut f: impl FnMut([usize; 2], [usize; 2], f32)) {
    for (n, tile) in sums.as_chunks::<{ SIDE * SIDE }>().0.iter().enumerate() {
        let (pair, half) = (n / 2, n % 2);
        let blocks = [pair / columns * 2 + half, pair % columns];
        for (i, row) in tile.as_chunks::<SIDE>().0.iter().enumerate() {
            row.iter().enumerate().for_each(|(j, &x)| f(blocks, [i, j], x));
        }
    }
}
