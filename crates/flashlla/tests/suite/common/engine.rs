//! The engines and storage types under test, and one call that gives everything an engine computes.

use super::{Data, Grid};
use flashlla::reference::Form;
use flashlla::{
    Attention, Cpu, Diagnostics, Element, Engine, OtherGradients, Problem, Reference, Result, State, Tensor,
    View, ViewMut, bf16, f16,
};

/// Any engine, so that tests can go through a list of them.
#[derive(Clone, Copy)]
pub enum AnyEngine {
    Reference(Reference),
    Cpu(Cpu),
}

impl AnyEngine {
    /// The dense covariance form, against which the others are held.
    pub fn reference() -> Self {
        Self::Reference(Reference::default())
    }

    /// The dense form of the paper.
    pub fn uncentred() -> Self {
        Self::Reference(Reference { form: Form::Uncentred { delta_eps: 0.0 } })
    }

    pub fn cpu() -> Self {
        Self::Cpu(Cpu::default())
    }

    /// Engines that can do everything to the last digits.
    pub fn exact() -> Vec<Self> {
        vec![Self::reference(), Self::cpu()]
    }

    /// Also those that lose digits where the paper's form does, and take no probe.
    pub fn all() -> Vec<Self> {
        vec![Self::reference(), Self::uncentred(), Self::cpu()]
    }

    /// Every exact engine with the storage types that hold the grid's numbers. The reference does the same for all types
    /// but reading them: it goes through the widest and the narrowest only.
    pub fn with_types(grid: Grid) -> Vec<(Self, Dtype)> {
        let types = grid.dtypes();
        let mut pairs = vec![(Self::reference(), types[0])];
        if types.len() > 1 {
            pairs.push((Self::reference(), types[types.len() - 1]));
        }
        pairs.extend(types.iter().map(|&dtype| (Self::cpu(), dtype)));
        pairs
    }

    pub fn is_uncentred(&self) -> bool {
        matches!(self, Self::Reference(Reference { form: Form::Uncentred { .. } }))
    }
}

impl std::fmt::Debug for AnyEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu(_) => "Cpu",
            Self::Reference(_) if self.is_uncentred() => "Reference (uncentred)",
            Self::Reference(_) => "Reference",
        })
    }
}

impl Engine for AnyEngine {
    fn forward_into<T: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>> {
        match self {
            Self::Reference(engine) => engine.forward_into(problem, out),
            Self::Cpu(engine) => engine.forward_into(problem, out),
        }
    }

    fn backward_into<T: Element, G: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        state: &State<T::Acc>,
        grad_out: View<G>,
        dq: ViewMut<O>,
        dk: ViewMut<O>,
        dv: ViewMut<O>,
    ) -> Result<OtherGradients<T::Acc>> {
        match self {
            Self::Reference(engine) => engine.backward_into(problem, state, grad_out, dq, dk, dv),
            Self::Cpu(engine) => engine.backward_into(problem, state, grad_out, dq, dk, dv),
        }
    }
}

/// A storage type, chosen at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

impl Dtype {
    pub const ALL: [Self; 4] = [Self::F64, Self::F32, Self::Bf16, Self::F16];

    /// The distance from 1 to the next number of the arithmetic that goes with it.
    pub fn epsilon(self) -> f64 {
        if self == Self::F64 { f64::EPSILON } else { f32::EPSILON.into() }
    }
}

/// Everything that an engine computes for one problem, in `f64`.
#[derive(Debug, Clone)]
pub struct Results {
    pub out: Tensor<f64>,
    pub lse: Tensor<f64>,
    pub key_mean: Tensor<f64>,
    pub probe: Tensor<f64>,
    pub dq: Tensor<f64>,
    pub dk: Tensor<f64>,
    pub dv: Tensor<f64>,
    pub dridge: Tensor<f64>,
    pub dscale: Tensor<f64>,
    pub dbias: Option<Tensor<f64>>,
    pub dprobe: Option<Tensor<f64>>,
    pub solve: Diagnostics,
    pub second_solve: Diagnostics,
}

impl Results {
    /// The tensors with their names.
    pub fn named(&self) -> Vec<(&'static str, &Tensor<f64>)> {
        let mut named = vec![
            ("out", &self.out),
            ("lse", &self.lse),
            ("key_mean", &self.key_mean),
            ("probe", &self.probe),
            ("dq", &self.dq),
            ("dk", &self.dk),
            ("dv", &self.dv),
            ("dridge", &self.dridge),
            ("dscale", &self.dscale),
        ];
        named.extend(self.dbias.iter().map(|t| ("dbias", t)));
        named.extend(self.dprobe.iter().map(|t| ("dprobe", t)));
        named
    }

    pub fn get(&self, name: &str) -> &Tensor<f64> {
        self.named().into_iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no {name}")).1
    }
}

/// Forward and backward of `data` stored as `T`.
pub fn run<T: Element>(engine: impl Engine, attention: &Attention, data: &Data) -> Results {
    let (q, k, v) = (cast::<T>(&data.q), cast::<T>(&data.k), cast::<T>(&data.v));
    let grad_out = cast::<T>(&data.grad_out);
    let bias = data.bias.as_ref().map(cast::<T::Acc>);
    let probe = data.probe.as_ref().map(cast::<T::Acc>);
    let mut problem = attention.problem(q.view(), k.view(), v.view()).unwrap();
    if let Some(bias) = &bias {
        problem = problem.with_bias(bias.view()).unwrap();
    }
    if let Some(probe) = &probe {
        problem = problem.with_probe(probe.view()).unwrap();
    }
    let forward = engine.forward(&problem).unwrap();
    let gradients = engine.backward(&problem, &forward.state, grad_out.view()).unwrap();
    Results {
        out: cast(&forward.out),
        lse: cast(&forward.state.lse),
        key_mean: cast(&forward.state.key_mean),
        probe: cast(&forward.state.probe),
        dq: cast(&gradients.dq),
        dk: cast(&gradients.dk),
        dv: cast(&gradients.dv),
        dridge: cast(&gradients.other.dridge),
        dscale: Tensor::new(vec![gradients.other.dscale.to_real::<f64>()], &[]),
        dbias: gradients.other.dbias.as_ref().map(cast),
        dprobe: gradients.other.dprobe.as_ref().map(cast),
        solve: forward.state.diagnostics,
        second_solve: gradients.other.diagnostics,
    }
}

/// [`run`] with the storage type chosen at run time.
pub fn run_as(dtype: Dtype, engine: impl Engine, attention: &Attention, data: &Data) -> Results {
    match dtype {
        Dtype::F64 => run::<f64>(engine, attention, data),
        Dtype::F32 => run::<f32>(engine, attention, data),
        Dtype::Bf16 => run::<bf16>(engine, attention, data),
        Dtype::F16 => run::<f16>(engine, attention, data),
    }
}

/// The same numbers as another type, rounded once.
pub fn cast<O: Element>(tensor: &Tensor<impl Element>) -> Tensor<O> {
    let data = tensor.data().iter().map(|x| O::from_real(x.to_real::<f64>())).collect();
    Tensor::new(data, tensor.shape())
}
