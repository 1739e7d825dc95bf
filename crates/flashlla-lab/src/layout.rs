//! How a file's axes become the library's `[batch, head, token, dim]`, and back.

use crate::files::Stored;
use crate::options::Layout;
use flashlla::{Element, Tensor, View, ViewMut};

impl Layout {
    /// The axes, for messages.
    pub fn axes(self) -> &'static str {
        match self {
            Self::Bhnd => "[batch, head, token, dim]",
            Self::Bnhd => "[batch, token, head, dim]",
            Self::Bnd => "[batch, token, dim]",
        }
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bhnd => "bhnd",
            Self::Bnhd => "bnhd",
            Self::Bnd => "bnd",
        }
    }

    /// A tensor in this layout, read where it lies. The error says what does not fit and what to do.
    pub fn view<T: Element>(self, tensor: &Tensor<T>) -> Result<View<'_, T>, String> {
        let (data, shape) = (tensor.data(), tensor.shape());
        let view = match (self, shape) {
            (Self::Bhnd, &[b, h, n, d]) => View::bhnd(data, [b, h, n, d]),
            (Self::Bnhd, &[b, n, h, d]) => View::bnhd(data, [b, n, h, d]),
            (Self::Bnd, &[b, n, d]) => View::bnd(data, [b, n, d]),
            _ => {
                let other = match shape.len() {
                    3 => "; --layout bnd reads tensors of 3 axes",
                    4 => "; --layout bhnd or bnhd reads tensors of 4 axes",
                    _ => "",
                };
                return Err(format!(
                    "shape {shape:?} does not fit; layout {} is {}{other}",
                    self.name(),
                    self.axes()
                ));
            }
        };
        view.map_err(|error| error.to_string())
    }

    /// The shape that `[batch, head, token, dim]` has in this layout.
    pub fn shape(self, [b, h, n, d]: [usize; 4]) -> Vec<usize> {
        match self {
            Self::Bhnd => vec![b, h, n, d],
            Self::Bnhd => vec![b, n, h, d],
            Self::Bnd => vec![b, n, d],
        }
    }

    /// The shape of one number per query, `[batch, head, query]` whatever the order of heads and tokens.
    pub fn query_shape(self, [b, h, n, _]: [usize; 4]) -> Vec<usize> {
        if self == Self::Bnd { vec![b, n] } else { vec![b, h, n] }
    }

    /// A place for the elements of `[batch, head, token, dim]`, to be written through [`Layout::view_mut`].
    pub fn zeros<T: Element>(self, shape: [usize; 4]) -> Tensor<T> {
        Tensor::zeros(&self.shape(shape))
    }

    /// A tensor made by [`Layout::zeros`], to be written.
    pub fn view_mut<T: Element>(self, tensor: &mut Tensor<T>) -> ViewMut<'_, T> {
        let shape = tensor.shape().to_vec();
        let data = tensor.data_mut();
        match (self, shape.as_slice()) {
            (Self::Bnhd, &[b, n, h, d]) => ViewMut::bnhd(data, [b, n, h, d]),
            (Self::Bnd, &[b, n, d]) => ViewMut::bnd(data, [b, n, d]),
            (_, &[b, h, n, d]) => ViewMut::bhnd(data, [b, h, n, d]),
            _ => unreachable!("Layout::zeros gives as many axes as the layout has"),
        }
        .expect("a tensor fills its shape")
    }

    /// Brings a result `[batch, head, token, dim]` into this layout.
    pub fn arrange<T: Stored>(self, tensor: Tensor<T>) -> Tensor<T> {
        let shape: [usize; 4] = tensor.shape().try_into().expect("a result of four axes");
        let [b, h, n, d] = shape;
        let rows = tensor.data();
        let data = if self == Self::Bnhd && h > 1 {
            let order = (0..b).flat_map(|b| (0..n).flat_map(move |n| (0..h).map(move |h| (b, h, n))));
            order
                .flat_map(|(b, head, token)| &rows[((b * h + head) * n + token) * d..][..d])
                .copied()
                .collect()
        } else {
            tensor.into_vec()
        };
        Tensor::new(data, &self.shape(shape))
    }
}
