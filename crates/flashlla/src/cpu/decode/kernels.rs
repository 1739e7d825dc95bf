//! What happens to a tile of keys or values: read from wherever it lies, products with a few query rows, weights.

use super::rows::{FEW, RowDots, RowStep, RowSums, Sum, by_few};
use crate::cache::{CacheView, Paging};
use crate::cpu::TILE;
use crate::cpu::simd::SimdReal;
use crate::cpu::widen::Rows;
use crate::view::Run;
use crate::{Element, Real, View};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Tokens of a sequence's KV head, all less the same, if they are less by anything.
#[derive(Clone)]
pub struct Tokens<'a, C> {
    pub place: [usize; 2],
    pub range: Range<usize>,
    pub origin: Option<&'a [C]>,
}

/// What a step does with tokens beside reading them: see [`RowStep`].
pub struct Step<'a, C> {
    pub d: &'a [C],
    pub w: &'a [C],
    pub shift: C,
    pub t: &'a mut [C],
    pub out: &'a mut [C],
}

/// The keys or the values of a cache, whatever they are stored in.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // What the matrix unit alone needs.
pub trait ReadTile<C>: Sync {
    /// Reads tokens from `first` on, as many as `rows` has rows of `width`, less `origin`. What lies beyond a token's
    /// dimensions is left alone.
    fn read(&self, arch: pulp::Arch, place: [usize; 2], first: usize, rows: &mut [C], origin: &[C]);
    /// The products of tokens with `d`; whether there were any, which is so where a token's numbers lie one after the other.
    fn dots(&self, arch: pulp::Arch, tokens: Tokens<C>, d: &[C], out: &mut [C]) -> bool;
    /// Adds tokens times their weights to one sum or two with weights of their own, under the same condition. They are `fresh` if they were
    /// not looked at just before.
    fn combine<'b>(
        &self,
        arch: pulp::Arch,
        tokens: Tokens<C>,
        fresh: bool,
        sum: Sum<'b, C>,
        other: Option<Sum<'b, C>>,
    ) -> bool;
    /// A [step](RowStep) with tokens, under the same condition.
    fn step(&self, arch: pulp::Arch, tokens: Tokens<C>, step: Step<'_, C>) -> Option<C>;
    /// Asks for tokens that will be read soon.
    fn prefetch(&self, place: [usize; 2], tokens: Range<usize>);
    /// Adds the pieces of memory that tokens lie in: where each begins, and its bytes. Nothing where a token's numbers do not lie one
    /// after the other.
    fn pieces(&self, place: [usize; 2], tokens: Range<usize>, pieces: &mut Vec<(*const u8, usize)>);
    /// Adds tokens as rows where they lie, if they do so as rows.
    fn rows<'a>(&'a self, place: [usize; 2], tokens: Range<usize>, rows: &mut Rows<'a>);
}

/// One pool of a cache.
pub struct Pool<'a, T: Element> {
    pub cache: &'a CacheView<'a, T>,
    pub view: View<'a, T>,
}

impl<T: Element, C: Real> ReadTile<C> for Pool<'_, T> {
    fn read(&self, arch: pulp::Arch, place: [usize; 2], first: usize, rows: &mut [C], origin: &[C]) {
        arch.dispatch(Read { pool: self, place, first, rows, origin });
    }

    fn dots(&self, arch: pulp::Arch, tokens: Tokens<C>, d: &[C], out: &mut [C]) -> bool {
        let Tokens { place, range, origin } = tokens;
        by_few(range).all(|(at, tokens)| {
            let out = &mut out[at.start..at.start + tokens.len()];
            match self.few(place, tokens, &mut None) {
                Few::Run(rows) => arch.dispatch(RowDots { rows, d, origin, out }),
                Few::Apart(rows) => arch.dispatch(RowDots { rows, d, origin, out }),
                Few::No => return false,
            }
            true
        })
    }

    fn combine<'b>(
        &self,
        arch: pulp::Arch,
        tokens: Tokens<C>,
        fresh: bool,
        mut sum: Sum<'b, C>,
        mut other: Option<Sum<'b, C>>,
    ) -> bool {
        let Tokens { place, range, origin } = tokens;
        by_few(range).all(|(at, tokens)| {
            let here = at.start..at.start + tokens.len();
            let mut room = None;
            let rows = self.few(place, tokens, &mut room);
            let one = sum.part(here.clone());
            match &mut other {
                None => add(arch, rows, fresh, origin, [one]),
                Some(other) => add(arch, rows, fresh, origin, [one, other.part(here)]),
            }
        })
    }

    fn step(&self, arch: pulp::Arch, tokens: Tokens<C>, step: Step<'_, C>) -> Option<C> {
        let Tokens { place, range, origin } = tokens;
        let Step { d, w, shift, t, out } = step;
        let mut sum = C::ZERO;
        for (at, tokens) in by_few(range) {
            let (w, t) = (&w[at.clone()], &mut t[at]);
            sum += match self.few(place, tokens, &mut None) {
                Few::Run(rows) => arch.dispatch(RowStep { rows, origin, d, w, shift, t, out }),
                Few::Apart(rows) => arch.dispatch(RowStep { rows, origin, d, w, shift, t, out }),
                Few::No => return None,
            };
        }
        Some(sum)
    }

    fn prefetch(&self, [sequence, head]: [usize; 2], tokens: Range<usize>) {
        // Lines of 64 bytes come in pairs.
        let ask = |piece: &[T]| piece.chunks(128 / size_of::<T>()).for_each(|lines| prefetch(lines.as_ptr()));
        for_each_page(self.cache.paging(), sequence, tokens, |_, page, slot, here| {
            match self.view.rows(page, head, slot, here) {
                Some(rows) => ask(rows),
                None => (slot..slot + here)
                    .filter_map(|slot| self.view.row(page, head, slot).as_slice())
                    .for_each(ask),
            }
        });
    }

    fn pieces(
        &self,
        [sequence, head]: [usize; 2],
        tokens: Range<usize>,
        pieces: &mut Vec<(*const u8, usize)>,
    ) {
        let mut add = |piece: &[T]| pieces.push((piece.as_ptr().cast(), size_of_val(piece)));
        for_each_page(self.cache.paging(), sequence, tokens, |_, page, slot, here| {
            match self.view.rows(page, head, slot, here) {
                Some(rows) => add(rows),
                None => (slot..slot + here)
                    .filter_map(|slot| self.view.row(page, head, slot).as_slice())
                    .for_each(&mut add),
            }
        });
    }

    fn rows<'a>(&'a self, [sequence, head]: [usize; 2], tokens: Range<usize>, rows: &mut Rows<'a>) {
        for_each_page(self.cache.paging(), sequence, tokens, |_, page, slot, here| {
            match self.view.rows(page, head, slot, here) {
                Some(all) => {
                    all.chunks_exact(self.view.shape()[3]).for_each(|row| T::push(row, rows));
                }
                None => (slot..slot + here)
                    .filter_map(|slot| self.view.row(page, head, slot).as_slice())
                    .for_each(|row| T::push(row, rows)),
            }
        });
    }
}

/// A few tokens in several pages.
type Apart<'a, T> = [&'a [T]; FEW];

/// A few tokens where they lie.
enum Few<'s, 'a, T> {
    /// In one page.
    Run(Run<'a, T>),
    /// In several.
    Apart(&'s [&'a [T]]),
    /// The numbers of each are apart.
    No,
}

impl<'a, T: Element> Pool<'a, T> {
    #[inline(always)]
    fn few<'s>(
        &self,
        [sequence, head]: [usize; 2],
        tokens: Range<usize>,
        room: &'s mut Option<Apart<'a, T>>,
    ) -> Few<'s, 'a, T> {
        let (paging, count) = (self.cache.paging(), tokens.len());
        let (page, slot) = paging.place(sequence, tokens.start);
        if paging.page_size() - slot >= count {
            return self.view.run(page, head, slot, count).map_or(Few::No, Few::Run);
        }
        let (rows, mut whole) = (room.insert([&[][..]; FEW]), true);
        for_each_page(paging, sequence, tokens, |done, page, slot, here| {
            match self.view.run(page, head, slot, here) {
                Some(run) => (0..here).for_each(|i| rows[done + i] = run.row(i)),
                None => whole = false,
            }
        });
        if whole { Few::Apart(&rows[..count]) } else { Few::No }
    }
}

/// Sums over a few tokens; whether there were any.
#[inline(always)]
fn add<T: Element, C: Real, const W: usize>(
    arch: pulp::Arch,
    rows: Few<T>,
    fresh: bool,
    origin: Option<&[C]>,
    sums: [Sum<C>; W],
) -> bool {
    match rows {
        Few::Run(rows) => arch.dispatch(RowSums { rows, fresh, origin, sums }),
        Few::Apart(rows) => arch.dispatch(RowSums { rows, fresh, origin, sums }),
        Few::No => return false,
    }
    true
}

/// Calls `f` with every page that holds some of the tokens: the number of the first of those, the page, its slot, and how many.
#[inline(always)]
fn for_each_page(
    paging: &Paging,
    sequence: usize,
    tokens: Range<usize>,
    mut f: impl FnMut(usize, usize, usize, usize),
) {
    let mut done = 0;
    while done < tokens.len() {
        let (page, slot) = paging.place(sequence, tokens.start + done);
        let here = (paging.page_size() - slot).min(tokens.len() - done);
        f(done, page, slot, here);
        done += here;
    }
}

/// Calls `f` with every token's number among them, page and slot.
#[inline(always)]
fn for_each_place(
    paging: &Paging,
    sequence: usize,
    tokens: Range<usize>,
    mut f: impl FnMut(usize, usize, usize),
) {
    for_each_page(paging, sequence, tokens, |done, page, slot, here| {
        (0..here).for_each(|i| f(done + i, page, slot + i));
    });
}

struct Read<'a, T: Element, C> {
    pool: &'a Pool<'a, T>,
    place: [usize; 2],
    first: usize,
    rows: &'a mut [C],
    origin: &'a [C],
}

impl<T: Element, C: Real> WithSimd for Read<'_, T, C> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ([sequence, head], view, width) = (self.place, self.pool.view, self.origin.len());
        let count = self.rows.len() / width;
        let (paging, tokens) = (self.pool.cache.paging(), self.first..self.first + count);
        for_each_place(paging, sequence, tokens, |i, page, slot| {
            let row = view.row(page, head, slot);
            let (out, origin) = (&mut self.rows[i * width..][..width], self.origin);
            match row.as_slice() {
                Some(from) => T::widen(simd, from, origin, out),
                None => row.for_each(|d, x| out[d] = x.to_real::<C>() - origin[d]),
            }
        });
    }
}

/// Asks for the memory there, as far as the second-level cache: the first level has fewer places for what is on its way (on a
/// Zen 4 decodings took 1.2 to 1.4 times as long with it).
#[inline(always)]
pub fn prefetch<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is no access.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(place.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// `products[r, j] = rows_r · tile_j` for a tile of keys as rows.
pub struct Dots<'a, T> {
    pub rows: &'a [T],
    pub tile: &'a [T],
    pub width: usize,
    pub products: &'a mut [T],
}

impl<T: SimdReal> WithSimd for Dots<'_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, tile, width, products } = self;
        let lanes = T::lanes::<S>();
        assert!(width > 0 && width.is_multiple_of(lanes) && tile.len() >= TILE * width);
        for (row, products) in rows.chunks_exact(width).zip(products.chunks_exact_mut(TILE)) {
            for (keys, products) in tile.chunks_exact(4 * width).zip(products.chunks_exact_mut(4)) {
                // SAFETY: registers at multiples of their length below `width`, in a row and in four rows of keys.
                let sums = unsafe {
                    let d = T::load::<S>(row.as_ptr());
                    let key = |i: usize, at: usize| T::load::<S>(keys.as_ptr().add(i * width + at));
                    let mut sums = [0, 1, 2, 3].map(|i| T::v_mul(simd, d, key(i, 0)));
                    for at in (lanes..width).step_by(lanes) {
                        let d = T::load::<S>(row.as_ptr().add(at));
                        for (i, sum) in sums.iter_mut().enumerate() {
                            *sum = T::fma(simd, d, key(i, at), *sum);
                        }
                    }
                    sums
                };
                products.copy_from_slice(&T::reduce_four(simd, sums));
            }
        }
    }
}

/// `t = w (sign (t − shift) + one)` for a tile's columns or a part of them, 0 where `w` is 0; returns the sum.
pub struct Weigh<'a, T> {
    /// A row of a tile: products, which become weights.
    pub t: &'a mut [T],
    /// The softmax weights of the row.
    pub w: &'a [T],
    pub shift: T,
    pub sign: T,
    pub one: T,
}

impl<T: Real> WithSimd for Weigh<'_, T> {
    type Output = T;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> T {
        let Self { t, w, shift, sign, one } = self;
        assert!(w.len() >= t.len() && t.len().is_multiple_of(T::lanes::<S>()));
        let (shift, sign, one) = (T::splat(simd, shift), T::splat(simd, sign), T::splat(simd, one));
        let mut sum = T::splat(simd, T::ZERO);
        // SAFETY: registers at multiples of their length below that of both, as just checked.
        unsafe {
            for j in (0..t.len()).step_by(T::lanes::<S>()) {
                let w = T::load::<S>(w.as_ptr().add(j));
                let t_j = T::v_sub(simd, T::load::<S>(t.as_ptr().add(j)), shift);
                let a = T::v_mul(simd, w, T::fma(simd, sign, t_j, one));
                let a = T::where_positive(simd, w, a);
                T::store::<S>(t.as_mut_ptr().add(j), a);
                sum = T::v_add(simd, sum, a);
            }
        }
        T::reduce_sum(simd, sum)
    }
}

/// Every row of a tile times the root of its weight, whose products with each other are then weighted.
pub struct RootScaled<'a, T> {
    pub tile: &'a [T],
    pub weights: &'a [T],
    pub out: &'a mut [T],
    pub width: usize,
}

impl<T: Real> WithSimd for RootScaled<'_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { tile, weights, out, width } = self;
        for ((row, out), &weight) in tile.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(weights) {
            let root = weight.root();
            out.iter_mut().zip(row).for_each(|(out, &x)| *out = root * x);
        }
    }
}
