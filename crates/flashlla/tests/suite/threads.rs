//! The same bits whatever the number of threads.

use crate::common::*;
use flashlla::Solver;
use proptest::prelude::*;

fn with_threads(threads: usize, dtype: Dtype, case: &Case, solver: Solver) -> Results {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let attention = case.builder().solver(solver).build().unwrap();
    pool.install(|| run_as(dtype, AnyEngine::cpu(), &attention, &case.data()))
}

fn bits(results: &Results) -> Vec<(&'static str, Vec<u64>)> {
    results
        .named()
        .into_iter()
        .map(|(name, t)| (name, t.data().iter().map(|x| x.to_bits()).collect()))
        .collect()
}

proptest! {
    #![proptest_config(cases(25))]

    #[test]
    fn results_do_not_depend_on_the_number_of_threads(
        mut case in case(1_500_000),
        solver in prop::sample::select(&[
            Solver::Auto { tolerance: None, max_iters: None }, Solver::Direct, Solver::Cg { tolerance: 1e-4, max_iters: 20 },
        ][..]),
    ) {
        case.grid = Grid::Half;
        for dtype in [Dtype::F32, Dtype::F64, Dtype::Bf16] {
            let one = with_threads(1, dtype, &case, solver);
            for threads in [2, 3, 5] {
                let more = with_threads(threads, dtype, &case, solver);
                for ((name, one), (_, more)) in bits(&one).into_iter().zip(bits(&more)) {
                    prop_assert!(one == more, "{name} differs between 1 and {threads} threads in {dtype:?}");
                }
                prop_assert_eq!(&one.solve, &more.solve);
                prop_assert_eq!(&one.second_solve, &more.second_solve);
            }
        }
    }
}

/// Long enough that several threads add to the gradient of the same key.
#[test]
fn shared_keys_are_summed_in_a_fixed_order() {
    let case = Case {
        batch: 1,
        kv_heads: 1,
        group: 3,
        queries: 400,
        keys: 513,
        head_dim: 8,
        value_dim: 11,
        mask: flashlla::Mask::full(),
        scale: 1.0,
        ridge: 1.0,
        ridge_kind: RidgeKind::Scalar,
        bias: Some(Bias { batched: false, heads: 0 }),
        probe: false,
        grid: Grid::F32,
        seed: 1,
    };
    let one = bits(&with_threads(1, Dtype::F32, &case, Solver::default()));
    for threads in [2, 3, 5] {
        for _ in 0..3 {
            assert!(
                one == bits(&with_threads(threads, Dtype::F32, &case, Solver::default())),
                "{threads} threads"
            );
        }
    }
}
