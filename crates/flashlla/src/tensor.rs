//! Owned, contiguous results.

use crate::{Element, View, ViewMut};

/// An owned tensor in row-major order; what the engines return.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tensor<T> {
    data: Vec<T>,
    shape: Vec<usize>,
}

impl<T: Element> Tensor<T> {
    /// All zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self { data: vec![T::default(); shape.iter().product()], shape: shape.to_vec() }
    }

    /// From elements in row-major order. Panics unless there are as many as the shape has.
    pub fn new(data: Vec<T>, shape: &[usize]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "elements for shape {shape:?}");
        Self { data, shape: shape.to_vec() }
    }

    /// The sizes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements in row-major order.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// The elements in row-major order, to be changed.
    pub fn data_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// The elements in row-major order.
    pub fn into_vec(self) -> Vec<T> {
        self.data
    }

    /// As a view `[batch, head, token, dim]`. Panics unless the tensor has four axes.
    pub fn view(&self) -> View<'_, T> {
        View::bhnd(&self.data, self.four_axes()).expect("a tensor fills its shape")
    }

    /// As a view to write. Panics unless the tensor has four axes.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        let shape = self.four_axes();
        ViewMut::bhnd(&mut self.data, shape).expect("a tensor fills its shape")
    }

    fn four_axes(&self) -> [usize; 4] {
        self.shape.as_slice().try_into().expect("a tensor of four axes")
    }

    /// As an `ndarray`.
    #[cfg(feature = "ndarray")]
    pub fn into_ndarray(self) -> ndarray::ArrayD<T> {
        ndarray::ArrayD::from_shape_vec(self.shape, self.data).expect("a tensor fills its shape")
    }
}
