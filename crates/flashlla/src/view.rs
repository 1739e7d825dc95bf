//! Borrowed tensors of four axes with any strides.
//!
//! Every tensor of this crate has the logical axes `[batch, head, token, dim]`. A view says where each of them lies in
//! memory, so `[B, H, N, D]`, `[B, N, H, D]`, `[B, N, D]` and slices of larger tensors are all read and written in place.

use crate::{Element, Error, Result};
use std::marker::PhantomData;

/// Sizes of the logical axes `[batch, head, token, dim]`.
pub type Shape = [usize; 4];
/// Distances between neighbours along each logical axis, in elements.
pub type Strides = [isize; 4];

/// A read-only tensor `[batch, head, token, dim]` that borrows its elements.
///
/// ```
/// use flashlla::View;
/// let data: Vec<f32> = (0..24).map(|i| i as f32).collect();
/// // The same memory as one batch of 2 heads, 3 tokens, 4 dims; and with tokens before heads.
/// assert_eq!(View::bhnd(&data, [1, 2, 3, 4])?.at(0, 1, 0, 0), 12.0);
/// assert_eq!(View::bnhd(&data, [1, 3, 2, 4])?.at(0, 1, 0, 0), 4.0);
/// # Ok::<(), flashlla::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    /// Element (0, 0, 0, 0). Every element that shape and strides describe lies in memory borrowed for `'a`.
    origin: *const T,
    shape: Shape,
    strides: Strides,
    borrow: PhantomData<&'a [T]>,
}

// SAFETY: a view is a shared borrow of elements that are themselves `Sync` and have no interior mutability.
unsafe impl<T: Sync> Send for View<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for View<'_, T> {}

/// The strides of a contiguous tensor whose axes lie in memory in their order.
fn contiguous<const R: usize>(shape: [usize; R]) -> [isize; R] {
    let mut strides = [1isize; R];
    for i in (0..R.saturating_sub(1)).rev() {
        strides[i] =
            strides[i + 1].saturating_mul(isize::try_from(shape[i + 1].max(1)).unwrap_or(isize::MAX));
    }
    strides
}

/// Checks that everything shape and strides describe lies in `0..len`.
fn check_bounds(
    argument: &'static str,
    shape: &[usize],
    strides: &[isize],
    offset: usize,
    len: usize,
) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let (mut first, mut last) = (offset as i128, offset as i128);
    for (&size, &stride) in shape.iter().zip(strides) {
        let reach = (size as i128 - 1).saturating_mul(stride as i128);
        if reach < 0 { first = first.saturating_add(reach) } else { last = last.saturating_add(reach) }
    }
    if first < 0 || last >= len as i128 {
        let (shape, strides) = (shape.to_vec(), strides.to_vec());
        return Err(Error::Buffer { argument, shape, strides, offset, first, last, len });
    }
    Ok(())
}

/// Checks that no two index tuples share a place. Sufficient, and exact for every tensor made by slicing, transposing or
/// stepping through a contiguous one: from the finest stride up, each must step over all that the finer ones reach.
fn check_disjoint(argument: &'static str, shape: &[usize], strides: &[isize]) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut axes: Vec<(u128, u128)> = shape
        .iter()
        .zip(strides)
        .filter(|(size, _)| **size > 1)
        .map(|(&size, &stride)| (stride.unsigned_abs() as u128, size as u128))
        .collect();
    axes.sort_unstable();
    let mut reach = 0u128;
    for (stride, size) in axes {
        if stride <= reach {
            return Err(Error::Overlap { argument, shape: shape.to_vec(), strides: strides.to_vec() });
        }
        reach += stride * (size - 1);
    }
    Ok(())
}

macro_rules! layouts {
    ($slice:ty) => {
        /// Contiguous memory `[B, H, N, D]`; `shape` in that order.
        pub fn bhnd(data: $slice, shape: [usize; 4]) -> Result<Self> {
            Self::strided(data, 0, shape, contiguous(shape))
        }

        /// Contiguous memory `[B, N, H, D]`; `shape` in that order.
        pub fn bnhd(data: $slice, shape: [usize; 4]) -> Result<Self> {
            let ([b, n, h, d], [sb, sn, sh, sd]) = (shape, contiguous(shape));
            Self::strided(data, 0, [b, h, n, d], [sb, sh, sn, sd])
        }

        /// Contiguous memory `[B, N, D]` (one head); `shape` in that order.
        pub fn bnd(data: $slice, shape: [usize; 3]) -> Result<Self> {
            let ([b, n, d], [sb, sn, sd]) = (shape, contiguous(shape));
            Self::strided(data, 0, [b, 1, n, d], [sb, 0, sn, sd])
        }

        /// The shape `[batch, head, token, dim]`.
        pub fn shape(&self) -> Shape {
            self.shape
        }

        /// The strides of `[batch, head, token, dim]`, in elements.
        pub fn strides(&self) -> Strides {
            self.strides
        }
    };
}

impl<'a, T: Element> View<'a, T> {
    layouts!(&'a [T]);

    /// Any strides, in elements: element `(b, h, n, d)` is `data[offset + b·s0 + h·s1 + n·s2 + d·s3]`. Strides may be
    /// zero (broadcasting) or negative.
    pub fn strided(data: &'a [T], offset: usize, shape: Shape, strides: Strides) -> Result<Self> {
        check_bounds("view", &shape, &strides, offset, data.len())?;
        let origin = if shape.contains(&0) { data.as_ptr() } else { data[offset..].as_ptr() };
        Ok(Self { origin, shape, strides, borrow: PhantomData })
    }

    /// Element `(b, h, n, d)`. Panics when an index is out of range.
    #[inline]
    pub fn at(&self, b: usize, h: usize, n: usize, d: usize) -> T {
        let index = [b, h, n, d];
        assert!(
            index.iter().zip(self.shape).all(|(&i, s)| i < s),
            "index {index:?} outside shape {:?}",
            self.shape
        );
        self.row(b, h, n).at(d)
    }

    /// The `dim`s of one token. Panics when an index is out of range.
    #[inline]
    pub(crate) fn row(&self, b: usize, h: usize, n: usize) -> Row<'a, T> {
        let [sb, sh, sn, sd] = self.strides;
        assert!(b < self.shape[0] && h < self.shape[1] && n < self.shape[2]);
        // SAFETY: the constructors checked that every index below `shape` leads into the borrowed memory.
        let start = unsafe { self.origin.offset(b as isize * sb + h as isize * sh + n as isize * sn) };
        Row { start, stride: sd, len: self.shape[3], borrow: PhantomData }
    }

    /// Rows `n..n + count` as one slice, when they follow each other and so do their elements.
    pub(crate) fn rows(&self, b: usize, h: usize, n: usize, count: usize) -> Option<&'a [T]> {
        assert!(count > 0 && n + count <= self.shape[2]);
        let first = self.row(b, h, n).as_slice()?;
        let close = count == 1 || self.strides[2] == first.len() as isize;
        // SAFETY: each of these rows is borrowed memory, and one begins where another ends.
        close.then(|| unsafe { std::slice::from_raw_parts(first.as_ptr(), count * first.len()) })
    }

    /// Rows `n..n + count`, when the elements of each follow each other.
    pub(crate) fn run(&self, b: usize, h: usize, n: usize, count: usize) -> Option<Run<'a, T>> {
        assert!(count > 0 && n + count <= self.shape[2]);
        let first = self.row(b, h, n).as_slice()?;
        Some(Run { first, step: self.strides[2], count })
    }

    /// The address of element (0, 0, 0, 0), for engines that hand it to another device.
    pub fn as_ptr(&self) -> *const T {
        self.origin
    }
}

/// Some rows of a [`View`] that follow each other, each contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run<'a, T> {
    first: &'a [T],
    step: isize,
    count: usize,
}

impl<'a, T: Element> Run<'a, T> {
    /// How many rows there are.
    #[inline(always)]
    pub fn count(&self) -> usize {
        self.count
    }

    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [T] {
        assert!(i < self.count);
        // SAFETY: `View::run` checked that so many rows are inside the view, whose rows are borrowed memory `step` apart.
        unsafe { std::slice::from_raw_parts(self.start(i), self.first.len()) }
    }

    /// Where a row begins.
    ///
    /// # Safety
    /// There must be such a row.
    #[inline(always)]
    pub unsafe fn start(&self, i: usize) -> *const T {
        // SAFETY: the caller's promise.
        unsafe { self.first.as_ptr().offset(i as isize * self.step) }
    }
}

/// One row of a [`View`].
#[derive(Clone, Copy)]
pub(crate) struct Row<'a, T> {
    start: *const T,
    stride: isize,
    len: usize,
    borrow: PhantomData<&'a [T]>,
}

impl<'a, T: Element> Row<'a, T> {
    /// The elements as a slice, when they are neighbours.
    #[inline(always)]
    pub fn as_slice(&self) -> Option<&'a [T]> {
        // SAFETY: `View::row` made `len` elements from `start` valid for `'a`; with stride 1 they are contiguous.
        (self.stride == 1 || self.len == 1)
            .then(|| unsafe { std::slice::from_raw_parts(self.start, self.len) })
    }

    #[inline(always)]
    pub fn at(&self, d: usize) -> T {
        assert!(d < self.len);
        // SAFETY: `d` is below the size that the view was checked for.
        unsafe { *self.start.offset(d as isize * self.stride) }
    }

    /// Calls `f` with every index and element.
    #[inline(always)]
    pub fn for_each(&self, mut f: impl FnMut(usize, T)) {
        match self.as_slice() {
            Some(slice) => slice.iter().enumerate().for_each(|(i, &x)| f(i, x)),
            None => (0..self.len).for_each(|i| f(i, self.at(i))),
        }
    }
}

/// A tensor `[batch, head, token, dim]` to be written, which borrows its elements and never overlaps itself.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    origin: *mut T,
    shape: Shape,
    strides: Strides,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a mutable view is an exclusive borrow of `Send` elements.
unsafe impl<T: Send> Send for ViewMut<'_, T> {}
// SAFETY: through a shared reference to it elements are only written by `write_row`, whose contract excludes races.
unsafe impl<T: Send> Sync for ViewMut<'_, T> {}

impl<'a, T: Element> ViewMut<'a, T> {
    layouts!(&'a mut [T]);

    /// Any strides under which no two elements share a place; see [`View::strided`].
    pub fn strided(data: &'a mut [T], offset: usize, shape: Shape, strides: Strides) -> Result<Self> {
        check_bounds("view", &shape, &strides, offset, data.len())?;
        check_disjoint("view", &shape, &strides)?;
        let origin = if shape.contains(&0) { data.as_mut_ptr() } else { data[offset..].as_mut_ptr() };
        Ok(Self { origin, shape, strides, borrow: PhantomData })
    }

    /// The address of element (0, 0, 0, 0), for engines that hand it to another device.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.origin
    }

    /// Writes the `dim`s of one token, rounded to `T`.
    ///
    /// # Safety
    /// No other thread may write the same token at the same time.
    #[inline]
    pub(crate) unsafe fn write_row<R: crate::Real>(&self, b: usize, h: usize, n: usize, values: &[R]) {
        let [sb, sh, sn, sd] = self.strides;
        assert!(b < self.shape[0] && h < self.shape[1] && n < self.shape[2] && values.len() == self.shape[3]);
        for (d, &value) in values.iter().enumerate() {
            let offset = b as isize * sb + h as isize * sh + n as isize * sn + d as isize * sd;
            // SAFETY: the indices are below the sizes that the constructors checked; distinct indices are distinct places,
            // and the caller keeps other threads away from this token.
            unsafe { self.origin.offset(offset).write(T::from_real(value)) };
        }
    }
}

#[cfg(feature = "ndarray")]
mod from_ndarray {
    use super::*;
    use ndarray::{ArrayView3, ArrayView4, ArrayViewMut3, ArrayViewMut4};

    macro_rules! conversions {
        ($view:ident, $four:ident, $three:ident, $ptr:ident $(, $check:ident)?) => {
            impl<'a, T: Element> TryFrom<$four<'a, T>> for $view<'a, T> {
                type Error = Error;
                /// Axes `[batch, head, token, dim]`, wherever they lie: permute the array's axes to read another layout.
                #[allow(unused_mut)]
                fn try_from(mut array: $four<'a, T>) -> Result<Self> {
                    let shape: Shape = array.shape().try_into().expect("four axes");
                    let strides: Strides = array.strides().try_into().expect("four axes");
                    $($check("view", &shape, &strides)?;)?
                    // The array view borrows every element for 'a, and its pointer is that of element (0, 0, 0, 0).
                    Ok(Self { origin: array.$ptr(), shape, strides, borrow: PhantomData })
                }
            }
            impl<'a, T: Element> TryFrom<$three<'a, T>> for $view<'a, T> {
                type Error = Error;
                /// Axes `[batch, token, dim]`, one head.
                fn try_from(array: $three<'a, T>) -> Result<Self> {
                    array.insert_axis(ndarray::Axis(1)).try_into()
                }
            }
        };
    }
    conversions!(View, ArrayView4, ArrayView3, as_ptr);
    conversions!(ViewMut, ArrayViewMut4, ArrayViewMut3, as_mut_ptr, check_disjoint);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_buffers_are_refused_with_the_numbers() {
        let data = vec![0f32; 23];
        let error = View::bhnd(&data, [1, 2, 3, 4]).unwrap_err().to_string();
        assert!(error.contains("0..=23") && error.contains("23"), "{error}");
        assert!(View::strided(&data, 0, [1, 1, 2, 4], [0, 0, -4, 1]).is_err());
        assert!(View::strided(&data, 4, [1, 1, 2, 4], [0, 0, -4, 1]).is_ok());
        assert!(View::strided(&data, usize::MAX, [1, 1, 1, 1], [0; 4]).is_err());
        assert!(View::strided(&data, 0, [usize::MAX; 4], [isize::MAX; 4]).is_err());
        assert!(View::strided(&data, 99, [0, 1, 1, 1], [0; 4]).is_ok());
    }

    #[test]
    fn overlapping_outputs_are_refused() {
        let mut data = vec![0f32; 64];
        assert!(ViewMut::strided(&mut data, 0, [1, 2, 3, 4], [0, 0, 4, 1]).is_err());
        assert!(ViewMut::strided(&mut data, 0, [1, 2, 3, 4], [0, 3, 6, 1]).is_err());
        assert!(ViewMut::strided(&mut data, 0, [1, 2, 3, 4], [0, 4, 8, 1]).is_ok());
        assert!(ViewMut::strided(&mut data, 0, [1, 2, 3, 4], [0, 1, 8, 2]).is_ok());
        assert!(ViewMut::strided(&mut data, 40, [1, 2, 3, 4], [0, -4, -8, -1]).is_ok());
        assert!(ViewMut::strided(&mut data, 0, [1, 2, 0, 4], [0; 4]).is_ok());
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn ndarray_views_keep_their_strides() {
        let array = ndarray::Array4::from_shape_fn((2, 5, 3, 4), |(b, n, h, d)| {
            (b * 1000 + n * 100 + h * 10 + d) as f64
        });
        let mut view = array.view();
        view.swap_axes(1, 2);
        view.invert_axis(ndarray::Axis(2));
        let view = View::try_from(view).unwrap();
        assert_eq!(view.shape(), [2, 3, 5, 4]);
        assert_eq!(view.at(1, 2, 0, 3), 1423.0);
    }
}
