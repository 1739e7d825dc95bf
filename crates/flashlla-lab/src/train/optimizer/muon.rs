//! Muon's update: momentum, brought near the closest orthogonal matrix by Newton-Schulz iterations.
//!
//! Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. The factor `0.2 √max(rows, columns)` is that
//! of Liu et al., "Muon is Scalable for LLM Training", 2025: it makes entries of the update as large as AdamW's usually are, so
//! that both rules can share one learning rate.

use candle_core::{Result, Tensor};

/// How fast the momentum forgets.
const MOMENTUM: f64 = 0.95;
/// Coefficients of `aX + bXXᵀX + c(XXᵀ)²X`, chosen by Jordan et al. to move small singular values fast; they end in about
/// 0.7 to 1.2, not at 1.
const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
const ITERATIONS: usize = 5;

/// The update, without the learning rate, after taking up a gradient (Nesterov's momentum).
pub(super) fn update(momentum: &mut Tensor, gradient: &Tensor) -> Result<Tensor> {
    *momentum = ((&*momentum * MOMENTUM)? + (gradient * (1.0 - MOMENTUM))?)?;
    let ahead = ((gradient * (1.0 - MOMENTUM))? + (&*momentum * MOMENTUM)?)?;
    let (rows, columns) = ahead.dims2()?;
    orthogonalised(&ahead)? * (0.2 * (rows.max(columns) as f64).sqrt())
}

/// About `U Vᵀ` of a matrix `U S Vᵀ`.
fn orthogonalised(matrix: &Tensor) -> Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    // The products are smaller for a wide matrix.
    let wide = if rows > columns { matrix.t()?.contiguous()? } else { matrix.clone() };
    let norm = (super::squares(std::iter::once(&wide))?.sqrt()? + 1e-7)?;
    let mut x = wide.broadcast_div(&norm)?;
    let (a, b, c) = COEFFICIENTS;
    for _ in 0..ITERATIONS {
        let square = x.matmul(&x.t()?)?;
        let polynomial = ((&square * b)? + (square.matmul(&square)? * c)?)?;
        x = ((&x * a)? + polynomial.matmul(&x)?)?;
    }
    if rows > columns { x.t()?.contiguous() } else { Ok(x) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use faer::Mat;

    /// Random, with singular values over two decades.
    fn matrix(rows: usize, columns: usize) -> Tensor {
        let mut rng = crate::experiments::random::stream(7, (rows * columns) as u64);
        let mut x = crate::experiments::random::normals(&mut rng, rows * columns);
        for (i, x) in x.iter_mut().enumerate() {
            *x *= 10f64.powf(-2.0 * (i % columns) as f64 / columns as f64);
        }
        Tensor::from_vec(x.iter().map(|x| *x as f32).collect::<Vec<_>>(), (rows, columns), &Device::Cpu)
            .unwrap()
    }

    fn to_faer(tensor: &Tensor) -> Mat<f64> {
        let rows = tensor.to_vec2::<f32>().unwrap();
        Mat::from_fn(rows.len(), rows[0].len(), |i, j| rows[i][j].into())
    }

    #[test]
    fn it_is_near_the_closest_orthogonal_matrix() {
        for (rows, columns) in [(12, 12), (8, 20), (20, 8)] {
            let matrix = matrix(rows, columns);
            let out = to_faer(&orthogonalised(&matrix).unwrap());
            let svd = to_faer(&matrix).thin_svd().unwrap();
            // In the matrix's own bases the result is diagonal, and its diagonal near 1.
            let inside = svd.U().transpose() * &out * svd.V();
            for i in 0..inside.nrows() {
                for j in 0..inside.ncols() {
                    let x = inside[(i, j)];
                    let fine = if i == j { (0.3..1.3).contains(&x) } else { x.abs() < 1e-3 };
                    assert!(fine, "{rows} x {columns}: ({i}, {j}) is {x}");
                }
            }
            let diagonal: f64 = (0..inside.nrows()).map(|i| inside[(i, i)]).sum();
            assert!((0.75..1.2).contains(&(diagonal / inside.nrows() as f64)));
        }
    }

    #[test]
    fn an_update_is_the_published_sequence_of_products() {
        // The same in f64, written out for a wide matrix.
        let gradients = [matrix(6, 9), (matrix(6, 9).affine(0.3, 0.1)).unwrap()];
        let mut momentum = gradients[0].zeros_like().unwrap();
        let mut plain = Mat::<f64>::zeros(6, 9);
        for gradient in &gradients {
            let out = to_faer(&update(&mut momentum, gradient).unwrap());
            let g = to_faer(gradient);
            plain = &plain * faer::Scale(0.95) + &g * faer::Scale(0.05);
            let mut x = &g * faer::Scale(0.05) + &plain * faer::Scale(0.95);
            x = &x * faer::Scale(1.0 / x.norm_l2());
            for _ in 0..5 {
                let xxt = &x * x.transpose();
                x = &x * faer::Scale(3.4445)
                    + (&xxt * &x) * faer::Scale(-4.7750)
                    + (&xxt * &xxt * &x) * faer::Scale(2.0315);
            }
            let off = (&x * faer::Scale(0.2 * 3.0) - &out).norm_l2() / out.norm_l2();
            assert!(off < 1e-4, "{off}");
        }
    }

    #[test]
    fn no_gradient_is_no_update() {
        let zeros = matrix(4, 4).zeros_like().unwrap();
        let out = update(&mut zeros.clone(), &zeros).unwrap();
        assert_eq!(out.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
    }
}
