//! Plans on device pointers, as bindings use them: without diagnostics, which has other kernels run than the engine for host memory does.

use super::*;
use cudarc::driver::sys::{self, CUresult};
use flashlla::cuda::{BackwardPlan, BackwardPointers, DeviceView, ForwardPlan, ForwardPointers, PlanOptions};
use flashlla::{Element, Tensor, bf16, f16};
use std::cell::RefCell;

/// Device memory in the primary context, which is the engine's; all of it is freed together.
#[derive(Default)]
struct Device(RefCell<Vec<u64>>);

fn done(result: CUresult) -> Result<(), String> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(format!("{result:?}")) }
}

impl Device {
    /// Makes the first GPU's context current for the rest of the process.
    fn new() -> Result<Self, String> {
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver is loaded and started, there is an engine; pointers are to live locals.
        unsafe {
            done(sys::cuDevicePrimaryCtxRetain(&mut context, 0))?;
            done(sys::cuCtxSetCurrent(context))?;
        }
        Ok(Self::default())
    }

    /// So many bytes, none of them a number of use to anyone.
    fn take(&self, bytes: usize) -> Result<u64, String> {
        let mut ptr = 0;
        // SAFETY: the context is current.
        unsafe {
            done(sys::cuMemAlloc_v2(&mut ptr, bytes.max(1)))?;
            self.0.borrow_mut().push(ptr);
            done(sys::cuMemsetD8_v2(ptr, 0xff, bytes.max(1)))?;
        }
        Ok(ptr)
    }

    fn holding<T: Element>(&self, tensor: &Tensor<f64>) -> Result<DeviceView, String> {
        let tensor: Tensor<T> = cast(tensor);
        let data = tensor.data();
        let ptr = self.take(size_of_val(data))?;
        // SAFETY: as many bytes as were taken.
        done(unsafe { sys::cuMemcpyHtoD_v2(ptr, data.as_ptr().cast(), size_of_val(data)) })?;
        Ok(view(ptr, tensor.shape()))
    }

    fn empty<T>(&self, shape: &[usize]) -> Result<DeviceView, String> {
        Ok(view(self.take(shape.iter().product::<usize>() * size_of::<T>())?, shape))
    }

    /// Waits for the default stream.
    fn read<T: Element>(&self, from: u64, shape: &[usize]) -> Result<Tensor<f64>, String> {
        let mut data = vec![T::default(); shape.iter().product()];
        // SAFETY: tensors have been written with their sizes.
        done(unsafe { sys::cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), from, size_of_val(&data[..])) })?;
        Ok(cast(&Tensor::new(data, shape)))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: taken by `take`; freeing waits for the GPU. A failure shows in the next call.
        self.0.borrow().iter().for_each(|&ptr| unsafe {
            let _ = sys::cuMemFree_v2(ptr);
        });
    }
}

fn view(ptr: u64, shape: &[usize]) -> DeviceView {
    let [_, h, n, d] = <[usize; 4]>::try_from(shape).expect("four dimensions");
    DeviceView { ptr, strides: [h * n * d, n * d, d].map(|x| x as i64) }
}

/// What a run leaves: the names of results, and the results.
type Found = Vec<(&'static str, Tensor<f64>)>;

/// Forward and backward in the default stream, with or without diagnostics.
fn on_pointers<T: Element>(
    gpu: &Cuda,
    attention: &Attention,
    data: &Data,
    diagnostics: bool,
) -> Result<(Found, [Vec<String>; 2]), String> {
    let (a, device) = (attention, Device::new()?);
    let words = |error: flashlla::Error| error.to_string();
    let forward: ForwardPlan = gpu.forward_plan::<T>(a, PlanOptions::default()).map_err(words)?;
    let backward: BackwardPlan = gpu.backward_plan::<T, T, T>(a, PlanOptions::default()).map_err(words)?;
    let names = [forward.kernel_names(diagnostics), backward.kernel_names(diagnostics)]
        .map(|names| names.into_iter().map(String::from).collect());

    let (q, k, v) =
        (device.holding::<T>(&data.q)?, device.holding::<T>(&data.k)?, device.holding::<T>(&data.v)?);
    let out = device.empty::<T>(&a.out_shape())?;
    let rows = [a.batch(), a.heads(), a.queries(), 1];
    let state = forward.state_shape();
    let (lse, key_mean, probe) =
        (device.empty::<f32>(&rows)?.ptr, device.empty::<f32>(&state)?.ptr, device.empty::<f32>(&state)?.ptr);
    let told = match diagnostics {
        true => Some([device.empty::<i32>(&rows)?.ptr, device.empty::<f32>(&rows)?.ptr]),
        false => None,
    };
    let pointers = ForwardPointers {
        q,
        k,
        v,
        out,
        bias: None,
        ridge: None,
        probe: None,
        lse: Some(lse),
        key_mean: Some(key_mean),
        probe_out: Some(probe),
        diagnostics: told,
    };
    // SAFETY: all memory is of this GPU, with the sizes that the plan has.
    unsafe { forward.run(std::ptr::null_mut(), &pointers, None).map_err(words)? };
    let (dq, dk, dv) = (
        device.empty::<T>(&a.query_shape())?,
        device.empty::<T>(&a.key_shape())?,
        device.empty::<T>(&a.value_shape())?,
    );
    let pointers = BackwardPointers {
        q,
        k,
        v,
        bias: None,
        ridge: None,
        grad_out: device.holding::<T>(&data.grad_out)?,
        lse,
        key_mean,
        probe,
        dq,
        dk,
        dv,
        dridge: device.empty::<f32>(&rows)?.ptr,
        dscale: device.empty::<f32>(&rows)?.ptr,
        dbias: None,
        covariance: None,
        diagnostics: told,
    };
    // SAFETY: as above.
    unsafe { backward.run(std::ptr::null_mut(), &pointers, None).map_err(words)? };
    let found = vec![
        ("out", device.read::<T>(out.ptr, &a.out_shape())?),
        ("dq", device.read::<T>(dq.ptr, &a.query_shape())?),
        ("dk", device.read::<T>(dk.ptr, &a.key_shape())?),
        ("dv", device.read::<T>(dv.ptr, &a.value_shape())?),
    ];
    Ok((found, names))
}

fn run_pointers(
    dtype: Dtype,
    gpu: &Cuda,
    attention: &Attention,
    data: &Data,
    diagnostics: bool,
) -> Result<(Found, [Vec<String>; 2]), String> {
    match dtype {
        Dtype::Bf16 => on_pointers::<bf16>(gpu, attention, data, diagnostics),
        Dtype::F16 => on_pointers::<f16>(gpu, attention, data, diagnostics),
        _ => on_pointers::<f32>(gpu, attention, data, diagnostics),
    }
}

/// Queries, keys and mask of a problem, and whether its forward and its second solve should take tiles for long contexts.
fn shapes() -> [(usize, usize, Mask, [bool; 2]); 6] {
    [
        (700, 700, Mask::causal(), [false, false]),
        (700, 700, Mask::causal().window(200), [false, false]),
        (300, 1000, Mask::full(), [false, false]),
        (150, 3300, Mask::full(), [true, true]),
        (3301, 3301, Mask::causal(), [true, false]),
        (6300, 6300, Mask::causal(), [true, true]),
    ]
}

impl Checks {
    /// Kernels for usual calls and for long contexts, as a plan chooses them, against `f64`. Asking for diagnostics changes no bit but
    /// where it changes the tiles.
    pub fn pointers(&self, number: usize) {
        let (queries, keys, mask, long) = shapes().into_iter().nth(number).expect("a shape");
        let (mut failed, mut measured) = (0, vec![]);
        for head_dim in [64, 128].into_iter().filter(|&d| d <= self.widest) {
            for (dtype, ridge) in
                [(Dtype::Bf16, 10.0), (Dtype::Bf16, 1.0), (Dtype::F16, 1.0), (Dtype::F32, 1.0)]
            {
                if !self.dtypes.contains(&dtype) || (dtype != Dtype::Bf16 && queries * keys > 1 << 24) {
                    continue;
                }
                let attention = Attention::builder()
                    .heads(2)
                    .kv_heads(1)
                    .queries(queries)
                    .keys(keys)
                    .head_dim(head_dim)
                    .mask(mask.clone())
                    .ridge(ridge)
                    .build()
                    .unwrap();
                let data = Data::random(&attention, 17, Grid::Half);
                let launch = |diagnostics| run_pointers(dtype, &self.gpu, &attention, &data, diagnostics);
                let (found, told) = (launch(false), launch(true));
                let ((found, names), (told, _)) = match (found, told) {
                    (Ok(found), Ok(told)) => (found, told),
                    (found, told) => {
                        println!("D = {head_dim} {dtype:?} {mask:?}: {:?} {:?}", found.err(), told.err());
                        failed += 1;
                        measured.push([f64::INFINITY; 2]);
                        continue;
                    }
                };
                let mut wrong = vec![];
                let usual = mask.window_len().is_none();
                // The forward has such variants for 16-bit types only; the second solve reads none of the caller's tensors. Tiles of
                // 128 wide kernels are the same for all lengths.
                let usual = [usual && dtype != Dtype::F32, usual];
                let long = [0, 1].map(|i| long[i] && usual[i] && head_dim == 64);
                for (i, entry) in ["lla_forward_", "lla_backward_solve_"].into_iter().enumerate() {
                    let name = names[i].iter().find(|name| name.starts_with(entry));
                    let name = name.cloned().unwrap_or_default();
                    let wide = head_dim == 64 && name.contains("_m64_n128_");
                    if name.ends_with("_usual") != usual[i] || wide != long[i] {
                        wrong.push(format!("{name} was chosen"));
                    }
                }
                let want = run::<f64>(Cpu::default(), &attention, &data);
                let mut errors = [0f64; 2];
                for (name, got) in &found {
                    let error = relative_error(got.data(), want.get(name).data(), 0.0);
                    let (which, allowed) = if *name == "out" { (0, 2.5e-3) } else { (1, 6e-3) };
                    errors[which] = errors[which].max(error);
                    if error.is_nan() || error > allowed {
                        wrong.push(format!("{name} errs by {error:.1e}"));
                    }
                }
                for ((name, a), (_, b)) in found.iter().zip(&told) {
                    // Gradients of the values know nothing of the second solve.
                    let solves = if matches!(*name, "out" | "dv") { &long[..1] } else { &long[..] };
                    if !solves.contains(&true) && a.data() != b.data() {
                        wrong.push(format!("{name} changes with diagnostics"));
                    }
                }
                measured.push(errors);
                if !wrong.is_empty() {
                    failed += 1;
                    println!(
                        "{queries} x {keys} D = {head_dim} {dtype:?} ridge {ridge} {mask:?}: {}",
                        wrong.join("; ")
                    );
                }
            }
        }
        self.enter_errors("device pointers, no diagnostics", failed, measured);
    }

    /// How many parts [`Checks::pointers`] has.
    pub fn pointer_parts() -> usize {
        shapes().len()
    }
}
