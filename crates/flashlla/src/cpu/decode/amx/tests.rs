//! The matrix unit's pieces against plain loops. Where there is none, a word says so.

#![allow(clippy::needless_range_loop)] // Indices are what is tested.

use super::pack::{self, Step, weights_alone};
use super::raw;
use super::tiles::{Lines, Operand, Right, SIDE, STEP, Sums, Terms, Tiles, Unit};
use crate::cpu::Run;
use crate::cpu::decode::decode_into;
use crate::{Attention, CacheView, Element, Engine, Reference, Tensor, View};
use half::bf16;
use rand::{RngExt, SeedableRng, rngs::StdRng};

const STEPS: usize = 3;
const WIDTH: usize = 64;
const NONE: Lines = Lines { start: std::ptr::null(), step: 0 };

fn unit() -> Option<Unit> {
    let unit = Unit::get();
    if unit.is_none() {
        eprintln!("skipped: no matrix unit here");
    }
    unit
}

/// Rows of numbers that are `bf16`, rows that are not, weights, and an origin.
struct Data {
    exact: Vec<bf16>,
    wide: Vec<f32>,
    weights: Vec<f32>,
    origin: Vec<f32>,
}

fn data() -> Data {
    let mut rng = StdRng::seed_from_u64(1);
    let mut numbers = |count| (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>();
    let (exact, wide) = (numbers(STEPS * STEP * WIDTH), numbers(STEPS * STEP * WIDTH));
    let (weights, origin) = (numbers(STEPS * STEP), numbers(WIDTH));
    let exact = exact.into_iter().map(bf16::from_f32).collect();
    Data { exact, wide, weights: weights.into_iter().map(f32::abs).collect(), origin }
}

/// Number `j` of row `i` of a left operand.
fn left(operand: &Operand, i: usize, j: usize) -> f64 {
    let pair = operand.0[i][j / 2];
    f64::from(f32::from_bits(if j.is_multiple_of(2) { pair << 16 } else { pair & 0xffff_0000 }))
}

/// Column `i` of row `j` of a right operand.
fn right(operand: &Operand, i: usize, j: usize) -> f64 {
    let pair = operand.0[j / 2][i];
    f64::from(f32::from_bits(if j.is_multiple_of(2) { pair << 16 } else { pair & 0xffff_0000 }))
}

fn close(got: f64, want: f64, error: f64) {
    assert!((got - want).abs() <= error, "{got} is not {want}");
}

#[test]
fn operands_are_what_they_stand_for() {
    let Some(unit) = unit() else { return };
    let data = data();
    let weights: &[f32; STEP] = data.weights.first_chunk().unwrap();
    let rows: Vec<&[bf16]> = data.exact.chunks_exact(WIDTH).take(STEP).collect();
    let rows: &[&[bf16]; STEP] = rows.first_chunk().unwrap();
    let wide: Vec<&[f32]> = data.wide.chunks_exact(WIDTH).take(STEP).collect();
    let wide = Step { rows: wide.first_chunk().unwrap(), origin: &data.origin };
    const TWO_TERMS: f64 = 1.0 / (1 << 17) as f64;

    let origin = raw::ordered(&data.origin);
    for block in [0, 2] {
        let column = block * SIDE;
        let (mut out, mut sums) = ([Terms::ZERO; 2], [[1.0f32; SIDE]; 2]);
        let [first, second] = [0, 1].map(|half| *origin[(block + half) * SIDE..].first_chunk().unwrap());
        raw::weighted(unit, rows, column, (weights, &[first, second]), out.each_mut(), &mut sums, NONE);
        let mut pairs = [Operand::ZERO; 2];
        raw::pairs(unit, rows, column, pairs.each_mut(), NONE);
        for half in 0..2 {
            for i in 0..SIDE {
                let d = raw::coordinate(block + half, i);
                let mut sum = 1.0;
                for j in 0..STEP {
                    let key = f64::from(rows[j][d].to_f32());
                    let want = f64::from(weights[j]) * (key - f64::from(data.origin[d]));
                    let [high, low] = &out[half].0;
                    let got = left(high, i, j) + left(low, i, j);
                    close(got, want, TWO_TERMS * want.abs() + 1e-7);
                    assert_eq!(right(&pairs[half], i, j), key);
                    sum += got;
                }
                close(sums[half][i].into(), sum, 1e-5);
            }
        }
    }

    let (mut out, mut pairs, mut sums) = (Terms::ZERO, Terms::ZERO, [1.0f32; SIDE]);
    pack::weighted(unit, wide, SIDE, weights, &mut out, &mut sums, NONE);
    pack::terms(unit, wide, SIDE, &mut pairs, NONE);
    for i in 0..SIDE {
        let mut sum = 1.0;
        for j in 0..STEP {
            let x = f64::from(data.wide[j * WIDTH + SIDE + i] - data.origin[SIDE + i]);
            let want = f64::from(weights[j]) * x;
            close(left(&out.0[0], i, j) + left(&out.0[1], i, j), want, TWO_TERMS * want.abs() + 1e-7);
            close(right(&pairs.0[0], i, j) + right(&pairs.0[1], i, j), x, TWO_TERMS * x.abs());
            sum += want;
        }
        close(sums[i].into(), sum, 1e-5);
    }

    let mut alone = Operand::ZERO;
    weights_alone(weights, &mut alone);
    for j in 0..STEP {
        assert_eq!((0..3).map(|i| left(&alone, i, j)).sum::<f64>(), f64::from(weights[j]));
        assert!((3..SIDE).all(|i| left(&alone, i, j) == 0.0));
    }

    let mut scores = vec![0.0; STEP];
    let q = &data.wide[..WIDTH];
    raw::scores(unit, rows, &origin, &raw::ordered(q), &mut scores);
    for (row, score) in rows.iter().zip(scores) {
        let terms = row.iter().zip(&data.origin).zip(q);
        let want = terms.map(|((k, o), q)| (f64::from(k.to_f32()) - f64::from(*o)) * f64::from(*q)).sum();
        close(score.into(), want, 1e-5);
    }
    let mut scores = vec![0.0; STEP];
    pack::scores(unit, wide.rows, &data.origin, &data.wide[..WIDTH], &mut scores);
    for (row, score) in wide.rows.iter().zip(scores) {
        let terms = row.iter().zip(&data.origin).zip(&data.wide);
        let want = terms.map(|((k, o), q)| f64::from(k - o) * f64::from(*q)).sum();
        close(score.into(), want, 1e-5);
    }
}

#[test]
fn products_are_those_of_plain_loops() {
    let Some(unit) = unit() else { return };
    let data = data();
    let (mut lefts, mut rights) = ([[Terms::ZERO; STEPS]; 2], [[Terms::ZERO; STEPS]; 2]);
    let mut alone = [Operand::ZERO; STEPS];
    for s in 0..STEPS {
        let rows: Vec<&[f32]> = data.wide[s * STEP * WIDTH..].chunks_exact(WIDTH).take(STEP).collect();
        let rows = Step { rows: rows.first_chunk().unwrap(), origin: &[0.0; WIDTH] };
        let weights = data.weights[s * STEP..].first_chunk().unwrap();
        weights_alone(weights, &mut alone[s]);
        for block in 0..2 {
            pack::weighted(unit, rows, block * SIDE, weights, &mut lefts[block][s], &mut [0.0; SIDE], NONE);
            pack::terms(unit, rows, (2 + block) * SIDE, &mut rights[block][s], NONE);
        }
    }
    let firsts = rights.map(|rights| rights.map(|terms| terms.0[0]));
    let tiles = Tiles::new(unit);
    for exact in [false, true] {
        let of = |block: usize| {
            if exact { Right::Exact(&firsts[block][..]) } else { Right::Terms(&rights[block][..]) }
        };
        let mut sums = [Sums([[1.0; SIDE]; SIDE]); 2];
        tiles.add(sums.each_mut(), [&lefts[0], &lefts[1]], of(1), NONE);
        let mut means = [Sums::ZERO; 2];
        tiles.add_exact(means.each_mut(), &alone, [of(0), of(1)]);
        // What the right operands stand for; what the left ones do is 2⁻¹⁷ away from the numbers.
        let value = |block: usize, j: usize, c: usize| {
            let Terms([first, second]) = &rights[block][j / STEP];
            right(first, c, j % STEP) + if exact { 0.0 } else { right(second, c, j % STEP) }
        };
        for i in 0..SIDE {
            for c in 0..SIDE {
                for half in 0..2 {
                    let term = |j: usize| {
                        f64::from(data.weights[j] * data.wide[j * WIDTH + half * SIDE + i]) * value(1, j, c)
                    };
                    let want = 1.0 + (0..STEPS * STEP).map(term).sum::<f64>();
                    close(sums[half].0[i][c].into(), want, 1e-4);
                }
            }
            for half in 0..2 {
                let want = (0..STEPS * STEP).map(|j| f64::from(data.weights[j]) * value(half, j, i)).sum();
                close((0..3).map(|term| f64::from(means[half].0[term][i])).sum(), want, 2e-5);
            }
        }
    }
}

#[test]
fn decodings_are_as_exact_as_without() {
    fn check<T: Element<Acc = f32>>(unit: Unit, [dim, value_dim]: [usize; 2], mean: f32) {
        let (heads, tokens) = (2, 2 * 2048 + 1100);
        let mut rng = StdRng::seed_from_u64(2);
        let mut numbers = |count: usize, mean: f32| -> Vec<T> {
            (0..count).map(|_| T::from_real(mean + rng.random_range(-2.0f32..2.0))).collect()
        };
        let (k, v) = (numbers(heads * tokens * dim, mean), numbers(heads * tokens * value_dim, 0.0));
        let q = Tensor::new(numbers(heads * dim, mean), &[1, heads, 1, dim]);
        let view = |data, dim| View::bhnd(data, [1, heads, tokens, dim]).unwrap();
        let cache = CacheView::contiguous(view(&k[..], dim), view(&v[..], value_dim), &[tokens]).unwrap();
        let attention = Attention::builder_for_cache(&q.view(), &cache).ridge(1.0).build().unwrap();
        let decoding = attention.decoding(q.view(), &cache).unwrap();
        let [with, without] = [Some(unit), None].map(|unit| {
            let mut out = Tensor::<f32>::zeros(&attention.out_shape());
            let run = Run { arch: pulp::Arch::new(), stop: None, unit };
            let state = decode_into(run, &decoding, out.view_mut()).unwrap();
            (out, state)
        });
        let want = Reference::default().decode(&decoding).unwrap();
        let triples = [
            ("out", &with.0, &without.0, &want.out),
            ("key_mean", &with.1.key_mean, &without.1.key_mean, &want.state.key_mean),
            ("lse", &with.1.lse, &without.1.lse, &want.state.lse),
        ];
        for (name, with, without, want) in triples {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            // Where values of size 1 nearly cancel, an output is small beside what it is made of.
            let size = norm(&mut want.data().iter().copied()).max(0.1 * (want.data().len() as f64).sqrt());
            let error =
                |got: &Tensor<f32>| norm(&mut got.data().iter().zip(want.data()).map(|(a, b)| a - b)) / size;
            let [with, without] = [error(with), error(without)];
            let what = format!("{} {dim} {value_dim} {mean}: {name}", T::NAME);
            assert!(with <= 3e-5, "{what} has an error of {with:e}, and {without:e} without the unit");
        }
        // The ways differ, or the test would compare one with itself.
        assert_ne!(with.0, without.0);
    }
    let Some(unit) = unit() else { return };
    for dims in [[64, 64], [128, 64], [32, 96], [48, 40], [5, 3]] {
        for mean in [0.0, 3.0] {
            check::<bf16>(unit, dims, mean);
            check::<half::f16>(unit, dims, mean);
            check::<f32>(unit, dims, mean);
        }
    }
}
