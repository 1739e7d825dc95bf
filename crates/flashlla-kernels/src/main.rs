use flashlla_kernels::*;
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::env::args().nth(1).expect("OUT_DIR");
    let filter = std::env::args().nth(2).unwrap_or_default();
    let mut emit = |name: String, ast: fn() -> _, module: &str, e: &str, g: Vec<String>, w: i32, o: i32| -> Result<(), Box<dyn std::error::Error>> {
        if !name.contains(&filter) { return Ok(()); }
        let b = cutile::compile_api::KernelCompiler::new(ast, module, e)
            .generics(g).target("sm_90")
            .options(cutile_compiler::hints::CompileOptions::new().num_worker_warps_per_cta(w).occupancy(o)).compile()?.bytecode()?;
        std::fs::write(format!("{out}/{name}.bc"), &b)?;
        Ok(())
    };
    for d in [64, 128] {
        for t in ["bf16", "f16", "f32"] {
            emit(format!("lla_poison_{t}_{d}"), poison::poison::__module_ast_self, "poison", "lla_poison", vec![t.into(), d.to_string()], 4, 1)?;
            for e in ["lla_range", "lla_convert"] {
                for a in [1, 0] {
                    emit(format!("{e}_{t}_{d}_a{a}"), prepare::prepare::__module_ast_self, "prepare", e, vec![t.into(), "64".into(), d.to_string(), a.to_string()], 4, 1)?;
                }
            }
        }
    }
    for (bm, bn, d, w, o) in [(64, 64, 64, 4, 2), (64, 128, 64, 4, 2), (64, 64, 128, 4, 2), (64, 64, 64, 4, 1), (64, 64, 128, 4, 1), (64, 128, 128, 4, 1)] {
        let n = |k: &str| format!("{k}_m{bm}_n{bn}_d{d}_w{w}_o{o}_h0_b0");
        let (bm, bn, d, z) = (bm.to_string(), bn.to_string(), d.to_string(), "0".to_string());
        emit(n("weights_bf16"), weights::weights::__module_ast_self, "weights", "lla_weights", vec!["bf16".into(), bm.clone(), bn.clone(), d.clone(), z.clone(), "1".into()], w, o)?;
        emit(n("solve"), solve::solve::__module_ast_self, "solve", "lla_solve", vec![bm.clone(), bn.clone(), d.clone(), z.clone(), z.clone()], w, o)?;
        emit(n("output_bf16"), output::output::__module_ast_self, "output", "lla_output", vec!["bf16".into(), bm.clone(), bn.clone(), d.clone(), z.clone(), z.clone(), "1".into()], w, o)?;
    }
    for (bm, bn, d, w, o) in [(64, 64, 64, 4, 1), (64, 64, 128, 4, 1), (64, 32, 128, 4, 1), (32, 64, 128, 4, 1), (32, 64, 64, 4, 1), (64, 128, 64, 4, 1)] {
        let n = |k: &str| format!("{k}_m{bm}_n{bn}_d{d}_w{w}_o{o}_h0_b0");
        let (bm, bn, d, z, one) = (bm.to_string(), bn.to_string(), d.to_string(), "0".to_string(), "1".to_string());
        emit(n("mix"), backward_mix::backward_mix::__module_ast_self, "backward_mix", "lla_mix", vec![bm.clone(), bn.clone(), d.clone(), z.clone()], w, o)?;
        emit(n("bquery_bf16"), backward_query::backward_query::__module_ast_self, "backward_query", "lla_backward_query", vec!["bf16".into(), bm.clone(), bn.clone(), d.clone(), z.clone(), one.clone()], w, o)?;
        emit(n("bkey_bf16"), backward_key::backward_key::__module_ast_self, "backward_key", "lla_backward_key", vec!["bf16".into(), bm.clone(), bn.clone(), d.clone(), z.clone(), one.clone()], w, o)?;
    }
    Ok(())
}
