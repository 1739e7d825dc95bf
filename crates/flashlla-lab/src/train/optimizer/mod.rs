//! What turns gradients into steps: AdamW, or Muon for the matrices inside the layers and AdamW for the rest.
//!
//! `candle_nn::AdamW` keeps its moments to itself, so that a run could not go on after a stop; ours is tested against it.
//!
//! Nothing here waits for a GPU: what gradients decide, their norm and whether they are finite, stays on it. (Waits for
//! every weight were not seen to cost time in the models of the experiments.)

mod adamw;
mod muon;

use super::TrainingSpec;
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Result, Tensor, Var};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// Which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019) for all weights.
    Adamw,
    /// Orthogonalised momentum (Jordan et al., 2024) for the matrices inside the layers, AdamW for all else.
    Muon,
}

/// How one weight is updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Adamw,
    Muon,
}

/// One weight and what is remembered of it.
struct Slot {
    name: String,
    var: Var,
    rule: Rule,
    /// Matrices decay; biases, norms and the numbers that heads learn do not.
    decays: bool,
    /// AdamW: mean of the gradient and of its square; Muon: momentum.
    moments: Vec<Tensor>,
}

/// An optimiser of a set of weights.
pub struct Optimizer {
    slots: Vec<Slot>,
    weight_decay: f64,
    clip: f64,
    /// Steps made.
    step: u64,
    /// On the device: 0, or NaN after a loss or a norm that was not finite.
    spoilt: Option<Tensor>,
}

/// Whether a weight is a matrix of a layer, rather than one that meets tokens or answers.
fn hidden(name: &str, var: &Var) -> bool {
    var.rank() == 2 && name.starts_with("blocks.") && name.ends_with(".weight")
}

/// The sum of the squares of all numbers in these, on their device.
///
/// Row by row first: Candle leaves each sum to one block of threads, which takes long over a whole matrix.
fn squares<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Tensor> {
    let rows = |x: &Tensor| {
        if x.rank() == 0 { x.sqr()?.reshape(1) } else { x.sqr()?.sum_keepdim(D::Minus1)?.flatten_all() }
    };
    Tensor::cat(&tensors.map(rows).collect::<Result<Vec<_>>>()?, 0)?.sum_all()
}

impl Optimizer {
    /// For these weights, in this order.
    pub fn new(training: &TrainingSpec, weights: &BTreeMap<String, Var>) -> Result<Self> {
        let slot = |(name, var): (&String, &Var)| -> Result<Slot> {
            let rule = match training.optimizer {
                OptimizerKind::Muon if hidden(name, var) => Rule::Muon,
                _ => Rule::Adamw,
            };
            let zeros = Tensor::zeros(var.shape(), DType::F32, var.device())?;
            let moments = vec![zeros; if rule == Rule::Muon { 1 } else { 2 }];
            Ok(Slot { name: name.clone(), var: var.clone(), rule, decays: var.rank() >= 2, moments })
        };
        let slots = weights.iter().map(slot).collect::<Result<_>>()?;
        Ok(Self { slots, weight_decay: training.weight_decay, clip: training.clip, step: 0, spoilt: None })
    }

    /// Makes a step at this learning rate; returns the loss and the gradients' norm before it is clipped, `[2]`, on their
    /// device.
    ///
    /// From the first step on where one of them is not finite the weights stay as they are, for whoever reads that later; what
    /// is remembered of the gradients is spoilt then.
    pub fn step(&mut self, loss: &Tensor, gradients: &GradStore, rate: f64) -> Result<Tensor> {
        // A weight that the loss does not depend on has no gradient. The graph behind one would stay in memory with the moments.
        let of = |slot: &Slot| gradients.get(slot.var.as_tensor()).map(Tensor::detach);
        let found: Vec<Option<Tensor>> = self.slots.iter().map(of).collect();
        let norm = squares(found.iter().flatten())?.sqrt()?;
        let factor = (norm.recip()? * self.clip)?.minimum(1.0)?;
        let told = Tensor::stack(&[loss.detach(), norm], 0)?;
        // 0, or NaN for ever.
        let mut spoilt = (told.sum_all()? * 0.0)?;
        if let Some(before) = &self.spoilt {
            spoilt = (spoilt + before)?;
        }
        let sound = spoilt.lt(1.0)?;
        self.spoilt = Some(spoilt);
        self.step += 1;
        for (slot, gradient) in self.slots.iter_mut().zip(found) {
            let Some(gradient) = gradient else { continue };
            let gradient = gradient.broadcast_mul(&factor)?;
            let before = slot.var.as_detached_tensor();
            let decay = if slot.decays { self.weight_decay } else { 0.0 };
            let update = match slot.rule {
                Rule::Adamw => adamw::update(&mut slot.moments, &gradient, self.step)?,
                Rule::Muon => muon::update(&mut slot.moments[0], &gradient)?,
            };
            let after = ((&before * (1.0 - rate * decay))? - (update * rate)?)?;
            slot.var.set(&sound.broadcast_as(after.shape())?.where_cond(&after, &before)?)?;
        }
        Ok(told)
    }

    /// Everything that [`Optimizer::restore`] needs besides the weights.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![];
        for slot in &self.slots {
            let moments = slot.moments.iter().enumerate();
            state.extend(moments.map(|(i, moment)| (format!("moment{i}.{}", slot.name), moment.clone())));
        }
        state
    }

    /// Goes on where another optimiser of the same weights was after `step` steps.
    pub fn restore(&mut self, step: u64, state: &HashMap<String, Tensor>) -> Result<()> {
        let take = |name: String, like: &Tensor| -> Result<Tensor> {
            match state.get(&name) {
                Some(tensor) if tensor.shape() == like.shape() => tensor.to_device(like.device()),
                Some(tensor) => candle_core::bail!("{name} has the shape {:?}", tensor.shape()),
                None => candle_core::bail!("{name} is missing"),
            }
        };
        for slot in &mut self.slots {
            for (i, moment) in slot.moments.iter_mut().enumerate() {
                *moment = take(format!("moment{i}.{}", slot.name), moment)?;
            }
        }
        self.step = step;
        self.spoilt = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Precision;
    use candle_core::Device;
    use candle_nn::Optimizer as _;

    fn training(optimizer: OptimizerKind) -> TrainingSpec {
        TrainingSpec {
            steps: 10,
            batch: 1,
            optimizer,
            learning_rate: 0.01,
            warmup: 0,
            final_rate: 1.0,
            weight_decay: 0.1,
            clip: 1e9,
            precision: Precision::F32,
            evaluate_every: 1,
            evaluate_batches: 1,
            log_every: 1,
        }
    }

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    fn var(shape: (usize, usize)) -> Var {
        Var::from_vec(numbers(shape.0 * shape.1), shape, &Device::Cpu).unwrap()
    }

    fn weights(name: &str, var: &Var) -> BTreeMap<String, Var> {
        [(name.to_owned(), var.clone())].into()
    }

    /// A loss whose gradient changes with the weight.
    fn loss(var: &Var) -> Tensor {
        let target = Tensor::from_vec(numbers(12), (3, 4), &Device::Cpu).unwrap().affine(2.0, 0.3).unwrap();
        let off = (var.as_tensor() - target).unwrap();
        off.sqr().unwrap().sqr().unwrap().sum_all().unwrap()
    }

    fn gradients(var: &Var) -> GradStore {
        loss(var).backward().unwrap()
    }

    /// A step; returns the loss and the norm.
    fn step(optimizer: &mut Optimizer, loss: &Tensor, rate: f64) -> [f32; 2] {
        let told = optimizer.step(loss, &loss.backward().unwrap(), rate).unwrap();
        told.to_vec1().unwrap().try_into().unwrap()
    }

    fn number(tensor: &Tensor) -> f64 {
        tensor.to_scalar::<f32>().unwrap().into()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn adamw_is_candles() {
        let (ours, theirs) = (var((3, 4)), var((3, 4)));
        let mut optimizer = Optimizer::new(&training(OptimizerKind::Adamw), &weights("w", &ours)).unwrap();
        let params = candle_nn::ParamsAdamW {
            lr: 0.01,
            beta1: adamw::BETAS.0,
            beta2: adamw::BETAS.1,
            eps: adamw::EPSILON,
            weight_decay: 0.1,
        };
        let mut reference = candle_nn::AdamW::new(vec![theirs.clone()], params).unwrap();
        for _ in 0..20 {
            step(&mut optimizer, &loss(&ours), 0.01);
            reference.step(&gradients(&theirs)).unwrap();
        }
        for (a, b) in values(&ours).iter().zip(values(&theirs)) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
        assert!(values(&ours).iter().zip(numbers(12)).all(|(a, b)| (a - b).abs() > 0.01));
    }

    #[test]
    fn gradients_are_clipped_together_and_their_norm_is_told() {
        let (free, held) = (var((3, 4)), var((3, 4)));
        let norm = {
            let gradients = gradients(&free);
            values(gradients.get(free.as_tensor()).unwrap())
                .iter()
                .map(|x| f64::from(x * x))
                .sum::<f64>()
                .sqrt()
        };
        // Adam does not care for the scale of gradients, Muon's momentum neither: look at what is remembered.
        let spec = TrainingSpec { clip: norm / 4.0, ..training(OptimizerKind::Adamw) };
        let mut clipped = Optimizer::new(&spec, &weights("w", &held)).unwrap();
        let before = loss(&held);
        let told = step(&mut clipped, &before, 0.01).map(f64::from);
        assert_eq!(told[0], number(&before));
        assert!((told[1] - norm).abs() < 1e-4 * norm);
        let mut whole = Optimizer::new(&training(OptimizerKind::Adamw), &weights("w", &free)).unwrap();
        step(&mut whole, &loss(&free), 0.01);
        for (a, b) in values(&clipped.state()[0].1).iter().zip(values(&whole.state()[0].1)) {
            assert!((4.0 * a - b).abs() < 1e-5 * (1.0 + b.abs()), "{a} {b}");
        }
    }

    #[test]
    fn gradients_below_the_clip_are_left_to_the_bit() {
        // A clip just above the norm, and one far above: the same steps.
        let (near, far) = (var((3, 4)), var((3, 4)));
        let norm =
            number(&squares([gradients(&near).get(near.as_tensor()).unwrap()].into_iter()).unwrap()).sqrt();
        for (var, clip) in [(&near, norm * 1.001), (&far, 1e9)] {
            let spec = TrainingSpec { clip, ..training(OptimizerKind::Adamw) };
            step(&mut Optimizer::new(&spec, &weights("w", var)).unwrap(), &loss(var), 0.01);
        }
        assert_eq!(values(&near), values(&far));
    }

    #[test]
    fn squares_of_all_ranks_are_added() {
        let tensors = [
            Tensor::new(2f32, &Device::Cpu).unwrap(),
            Tensor::new(&[1f32, -3.0], &Device::Cpu).unwrap(),
            Tensor::new(&[[1f32, 2.0, -1.0], [0.5, 0.0, 4.0]], &Device::Cpu).unwrap(),
        ];
        assert_eq!(number(&squares(tensors.iter()).unwrap()), 4.0 + 10.0 + 22.25);
    }

    #[test]
    fn gradients_that_are_not_finite_change_no_weight() {
        for (kind, bad) in [
            (OptimizerKind::Adamw, f64::INFINITY),
            (OptimizerKind::Adamw, f64::NAN),
            (OptimizerKind::Muon, f64::NEG_INFINITY),
            (OptimizerKind::Muon, f64::NAN),
        ] {
            // Of two weights only the second's gradient is bad, and in one place.
            let (sound, spoilt) = (var((3, 4)), var((3, 4)));
            let all = [("blocks.0.a.weight", &sound), ("blocks.0.b.weight", &spoilt)];
            let all = all.map(|(name, var)| (name.to_owned(), var.clone())).into();
            let mut optimizer = Optimizer::new(&training(kind), &all).unwrap();
            let mut one = vec![1f32; 12];
            one[5] = bad as f32;
            let factors = Tensor::from_vec(one, (3, 4), &Device::Cpu).unwrap();
            let loss =
                (sound.as_tensor() + (spoilt.as_tensor() * factors).unwrap()).unwrap().sum_all().unwrap();
            assert!(!step(&mut optimizer, &loss, 0.1)[1].is_finite());
            let as_before = || {
                assert_eq!(values(&sound), numbers(12), "{kind:?} {bad}");
                assert_eq!(values(&spoilt), numbers(12), "{kind:?} {bad}");
            };
            as_before();
            // Nor do later steps, though nobody has read of the first yet.
            let fine = (sound.as_tensor() + spoilt.as_tensor()).unwrap().sum_all().unwrap();
            assert!(step(&mut optimizer, &fine, 0.1).iter().all(|x| x.is_finite()));
            as_before();
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_changes_no_weight() {
        let var = var((3, 4));
        let mut optimizer = Optimizer::new(&training(OptimizerKind::Adamw), &weights("w", &var)).unwrap();
        let loss = (loss(&var) + f64::INFINITY).unwrap();
        let [told, norm] = step(&mut optimizer, &loss, 0.1);
        assert!(told == f32::INFINITY && norm.is_finite());
        assert_eq!(values(&var), numbers(12));
    }

    #[test]
    fn a_restored_optimiser_goes_on_to_the_bit() {
        for kind in [OptimizerKind::Adamw, OptimizerKind::Muon] {
            let through = var((3, 4));
            let mut optimizer =
                Optimizer::new(&training(kind), &weights("blocks.0.weight", &through)).unwrap();
            for _ in 0..3 {
                step(&mut optimizer, &loss(&through), 0.01);
            }
            let later = Var::from_tensor(&through.as_tensor().copy().unwrap()).unwrap();
            let mut second = Optimizer::new(&training(kind), &weights("blocks.0.weight", &later)).unwrap();
            second.restore(3, &optimizer.state().into_iter().collect()).unwrap();
            step(&mut optimizer, &loss(&through), 0.01);
            step(&mut second, &loss(&later), 0.01);
            assert_eq!(values(&through), values(&later), "{kind:?}");
            assert!(second.restore(3, &HashMap::new()).is_err());
        }
    }

    #[test]
    fn muon_takes_the_matrices_inside_the_layers() {
        let matrix = var((3, 4));
        let vector = Var::from_vec(numbers(4), 4, &Device::Cpu).unwrap();
        for (name, var, expected) in [
            ("blocks.0.mixer.query.weight", &matrix, true),
            ("blocks.0.mixer_norm.weight", &vector, false),
            ("embedding.weight", &matrix, false),
            ("head.weight", &matrix, false),
        ] {
            assert_eq!(hidden(name, var), expected, "{name}");
        }
    }
}
