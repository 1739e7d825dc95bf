//! What steps came to, read one step late.

use super::candle;
use crate::Result;
use candle_core::Tensor;

/// Losses and gradient norms since the last line of the log.
///
/// Those of a step are read from its device when the step after it has been put there, so that a GPU never stands still while
/// they are on their way.
pub(super) struct Tally {
    /// Of these steps: sums of what was read.
    pub sums: (f64, f64),
    /// Steps that were added.
    pub count: u64,
    /// The last loss that was read.
    pub loss: f64,
    /// The last step that was added and its loss and norm, unless they were read.
    unread: Option<(u64, Tensor)>,
}

/// The step and its loss where loss or gradient norm is not finite.
pub(super) type Diverged = Option<(u64, f64)>;

impl Tally {
    /// Goes on from sums over so many steps.
    pub fn new(sums: (f64, f64), count: u64) -> Self {
        Self { sums, count, loss: f64::NAN, unread: None }
    }

    /// Takes up a step, which is read later; the one before must have been read.
    pub fn add(&mut self, step: u64, loss: &Tensor, norm: &Tensor) -> Result<()> {
        debug_assert!(self.unread.is_none());
        let both = Tensor::stack(&[loss.detach(), norm.detach()], 0).map_err(candle)?;
        self.unread = Some((step, both));
        self.count += 1;
        Ok(())
    }

    /// Waits for the last step's numbers, if they were not read.
    pub fn read(&mut self) -> Result<Diverged> {
        let Some((step, both)) = self.unread.take() else { return Ok(None) };
        let both = both.to_vec1::<f32>().map_err(candle)?;
        let (loss, norm) = (f64::from(both[0]), f64::from(both[1]));
        if !(loss.is_finite() && norm.is_finite()) {
            return Ok(Some((step, loss)));
        }
        self.sums = (self.sums.0 + loss, self.sums.1 + norm);
        self.loss = loss;
        Ok(None)
    }

    /// Means of loss and norm over the steps since the last call; all must have been read.
    pub fn means(&mut self) -> (f64, f64) {
        debug_assert!(self.unread.is_none());
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

    fn number(x: f32) -> Tensor {
        Tensor::new(x, &Device::Cpu).unwrap()
    }

    #[test]
    fn means_are_of_all_steps_and_begin_anew() {
        let mut tally = Tally::new((6.0, 1.0), 2);
        tally.add(2, &number(3.0), &number(0.5)).unwrap();
        assert_eq!(tally.read().unwrap(), None);
        assert_eq!(tally.read().unwrap(), None, "read once");
        assert_eq!(tally.means(), (3.0, 0.5));
        tally.add(3, &number(7.0), &number(2.0)).unwrap();
        assert_eq!(tally.read().unwrap(), None);
        assert_eq!((tally.means(), tally.loss), ((7.0, 2.0), 7.0));
    }

    #[test]
    fn a_step_that_is_not_finite_is_named() {
        for (loss, norm) in [(f32::NAN, 1.0), (2.0, f32::INFINITY), (2.0, f32::NAN)] {
            let mut tally = Tally::new((0.0, 0.0), 0);
            tally.add(41, &number(loss), &number(norm)).unwrap();
            let (step, told) = tally.read().unwrap().unwrap();
            assert!(step == 41 && (told == f64::from(loss) || loss.is_nan() && told.is_nan()));
        }
    }
}
