//! What steps came to, read when it is wanted.

use super::candle;
use crate::Result;
use candle_core::Tensor;

/// Losses and gradient norms since the last line of the log.
///
/// They stay on their device until they are read. A GPU has the next step to do meanwhile: to read a number is to wait for all
/// that it was given, and leaves it with nothing to do until it is given more.
pub(super) struct Tally {
    /// Of the steps that were read: sums of loss and norm.
    pub sums: (f64, f64),
    /// Steps that were added.
    pub count: u64,
    /// The last loss that was read.
    pub loss: f64,
    /// Steps that were not read, each with loss and norm.
    unread: Vec<(u64, Tensor)>,
}

/// The first step whose loss or gradient norm is not finite, and its loss.
pub(super) type Diverged = Option<(u64, f64)>;

impl Tally {
    /// Goes on from sums over so many steps.
    pub fn new(sums: (f64, f64), count: u64) -> Self {
        Self { sums, count, loss: f64::NAN, unread: vec![] }
    }

    /// Takes up a step with its loss and norm, `[2]`.
    pub fn add(&mut self, step: u64, told: Tensor) {
        self.unread.push((step, told));
        self.count += 1;
    }

    /// Waits for the numbers of the steps that were not read.
    pub fn read(&mut self) -> Result<Diverged> {
        if self.unread.is_empty() {
            return Ok(None);
        }
        let (steps, told): (Vec<u64>, Vec<Tensor>) = self.unread.drain(..).unzip();
        let told = Tensor::stack(&told, 0).and_then(|told| told.to_vec2::<f32>()).map_err(candle)?;
        for (step, told) in steps.into_iter().zip(told) {
            let (loss, norm) = (f64::from(told[0]), f64::from(told[1]));
            if !(loss.is_finite() && norm.is_finite()) {
                return Ok(Some((step, loss)));
            }
            self.sums = (self.sums.0 + loss, self.sums.1 + norm);
            self.loss = loss;
        }
        Ok(None)
    }

    /// Means of loss and norm over the steps since the last call; all must have been read.
    pub fn means(&mut self) -> (f64, f64) {
        debug_assert!(self.unread.is_empty());
        let of = self.count as f64;
        let means = (self.sums.0 / of, self.sums.1 / of);
        (self.sums, self.count) = ((0.0, 0.0), 0);
        means
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn told(loss: f32, norm: f32) -> Tensor {
        Tensor::new(&[loss, norm], &Device::Cpu).unwrap()
    }

    #[test]
    fn means_are_of_all_steps_and_begin_anew() {
        let mut tally = Tally::new((6.0, 1.0), 2);
        tally.add(2, told(3.0, 0.5));
        tally.add(3, told(7.0, 0.5));
        assert_eq!(tally.read().unwrap(), None);
        assert_eq!(tally.read().unwrap(), None, "read once");
        assert_eq!((tally.means(), tally.loss), ((4.0, 0.5), 7.0));
        tally.add(4, told(5.0, 2.0));
        assert_eq!(tally.read().unwrap(), None);
        assert_eq!((tally.means(), tally.loss), ((5.0, 2.0), 5.0));
    }

    #[test]
    fn the_first_step_that_is_not_finite_is_named() {
        for (loss, norm) in [(f32::NAN, 1.0), (2.0, f32::INFINITY), (2.0, f32::NAN)] {
            let mut tally = Tally::new((0.0, 0.0), 0);
            tally.add(40, told(1.0, 1.0));
            tally.add(41, told(loss, norm));
            tally.add(42, told(f32::INFINITY, f32::INFINITY));
            let (step, told) = tally.read().unwrap().unwrap();
            assert!(step == 41 && (told == f64::from(loss) || loss.is_nan() && told.is_nan()));
        }
    }
}
