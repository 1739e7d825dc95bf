//! Tensors as Python hands them over: an address, a dtype, a shape and strides.

use crate::raised;
use flashlla::{Element, Tensor, View, ViewMut};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// A storage type's name, as in [`Element::NAME`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

impl FromPyObject<'_, '_> for Dtype {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        match object.extract::<&str>()? {
            "f64" => Ok(Self::F64),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            other => Err(PyTypeError::new_err(format!(
                "dtype: {other} is not allowed; it must be f64, f32, bf16 or f16"
            ))),
        }
    }
}

/// Calls `$body` with the type `$t` that a [`Dtype`] names.
macro_rules! with_type {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::Dtype::F64 => {
                type $t = f64;
                $body
            }
            $crate::tensor::Dtype::F32 => {
                type $t = f32;
                $body
            }
            $crate::tensor::Dtype::Bf16 => {
                type $t = flashlla::bf16;
                $body
            }
            $crate::tensor::Dtype::F16 => {
                type $t = flashlla::f16;
                $body
            }
        }
    };
}
pub(crate) use with_type;

/// A tensor in host memory: `(address, dtype, shape, strides in elements)` from Python, with up to four axes; missing ones are
/// put in front.
#[derive(Debug, Clone)]
pub struct HostTensor {
    address: usize,
    pub dtype: Dtype,
    pub shape: [usize; 4],
    strides: [isize; 4],
}

impl FromPyObject<'_, '_> for HostTensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let (address, dtype, given, steps): (usize, Dtype, Vec<usize>, Vec<isize>) = object.extract()?;
        if given.len() > 4 || given.len() != steps.len() {
            return Err(PyValueError::new_err(format!(
                "shape: {given:?} is not allowed; it must have up to 4 axes"
            )));
        }
        let (mut shape, mut strides) = ([1; 4], [0; 4]);
        shape[4 - given.len()..].copy_from_slice(&given);
        strides[4 - given.len()..].copy_from_slice(&steps);
        Ok(Self { address, dtype, shape, strides })
    }
}

impl HostTensor {
    /// The offsets, in elements, of the lowest and one past the highest place that shape and strides reach.
    fn reach(&self) -> (isize, isize) {
        if self.shape.contains(&0) {
            return (0, 0);
        }
        let (mut low, mut high) = (0, 1);
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            let reach = (size as isize - 1) * stride;
            if reach < 0 { low += reach } else { high += reach }
        }
        (low, high)
    }

    /// As a view.
    ///
    /// # Safety
    /// The memory must hold what the tensor says, for as long as the view lives.
    pub unsafe fn view<'a, T: Element>(&self) -> PyResult<View<'a, T>> {
        assert_eq!(std::mem::size_of::<T>(), self.dtype.bytes());
        let (low, high) = self.reach();
        let data: &[T] = if low == high {
            &[]
        } else {
            // SAFETY: the caller's.
            unsafe {
                std::slice::from_raw_parts((self.address as *const T).offset(low), (high - low) as usize)
            }
        };
        View::strided(data, low.unsigned_abs(), self.shape, self.strides).map_err(raised)
    }

    /// As a view to be written.
    ///
    /// # Safety
    /// As for [`HostTensor::view`], and nothing else may use the memory meanwhile.
    pub unsafe fn view_mut<'a, T: Element>(&self) -> PyResult<ViewMut<'a, T>> {
        assert_eq!(std::mem::size_of::<T>(), self.dtype.bytes());
        let (low, high) = self.reach();
        let data: &mut [T] = if low == high {
            &mut []
        } else {
            // SAFETY: the caller's.
            unsafe {
                std::slice::from_raw_parts_mut((self.address as *mut T).offset(low), (high - low) as usize)
            }
        };
        ViewMut::strided(data, low.unsigned_abs(), self.shape, self.strides).map_err(raised)
    }

    /// The elements in row-major order.
    ///
    /// # Safety
    /// As for [`HostTensor::view`].
    pub unsafe fn values<T: Element, R: flashlla::Real>(&self) -> PyResult<Vec<R>> {
        // SAFETY: the caller's.
        let view = unsafe { self.view::<T>()? };
        let [b, h, n, d] = self.shape;
        let mut values = Vec::with_capacity(b * h * n * d);
        for i in 0..b {
            for j in 0..h {
                for k in 0..n {
                    values.extend((0..d).map(|l| view.at(i, j, k, l).to_real::<R>()));
                }
            }
        }
        Ok(values)
    }

    /// Copies row-major elements into it.
    ///
    /// # Safety
    /// As for [`HostTensor::view_mut`]; the tensor must be contiguous.
    pub unsafe fn fill<T: Copy>(&self, values: &[T]) -> PyResult<()> {
        let len: usize = self.shape.iter().product();
        if len != values.len() || std::mem::size_of::<T>() != self.dtype.bytes() {
            return Err(PyValueError::new_err(format!(
                "output: shape {:?} does not fit; {} elements are to be written",
                self.shape,
                values.len()
            )));
        }
        // SAFETY: the caller's; the lengths agree.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.address as *mut T, len) };
        Ok(())
    }

    /// The elements as a library's tensor of that shape.
    ///
    /// # Safety
    /// As for [`HostTensor::view`].
    pub unsafe fn owned<T: Element<Acc = T> + flashlla::Real>(&self, shape: &[usize]) -> PyResult<Tensor<T>> {
        let len: usize = shape.iter().product();
        if self.shape.iter().product::<usize>() != len {
            return Err(PyValueError::new_err(format!(
                "state: shape {:?} does not fit; it must be {shape:?}",
                self.shape
            )));
        }
        assert_eq!(std::mem::size_of::<T>(), self.dtype.bytes());
        let mut next = 1;
        let in_order = self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == next;
            next *= size as isize;
            fits
        });
        // SAFETY: the caller's; in row-major order the elements are neighbours.
        let values = unsafe {
            match in_order && len > 0 {
                true => std::slice::from_raw_parts(self.address as *const T, len).to_vec(),
                false => self.values::<T, T>()?,
            }
        };
        Ok(Tensor::new(values, shape))
    }
}

impl Dtype {
    fn bytes(self) -> usize {
        with_type!(self, T => std::mem::size_of::<T>())
    }
}
