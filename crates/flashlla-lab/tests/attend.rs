//! What `attend` reads and writes.

mod common;
use common::{Bench, Contents, Tensor, program};
use safetensors::Dtype;

/// `q [2, 4, 9, 8]`, `k` and `v` with 2 heads and 11 keys, values of 5 dims.
fn grouped() -> Contents {
    Contents::default()
        .with("q", Tensor::normal(1, &[2, 4, 9, 8]))
        .with("k", Tensor::normal(2, &[2, 2, 11, 8]))
        .with("v", Tensor::normal(3, &[2, 2, 11, 5]))
        .with("grad_out", Tensor::normal(4, &[2, 4, 9, 5]))
}

const GRADIENTS: [&str; 5] = ["dq", "dk", "dv", "dridge", "dscale"];

#[test]
fn writes_the_results_and_the_gradients_when_asked() {
    let bench = Bench::new();
    let got = bench.attend(&grouped(), &[]);
    assert_eq!(got.tensors.keys().collect::<Vec<_>>(), ["key_mean", "lse", "out", "probe"]);
    assert_eq!(got.get("out").shape, [2, 4, 9, 5]);
    assert_eq!(got.get("lse").shape, [2, 4, 9]);
    assert_eq!(got.get("key_mean").shape, [2, 4, 9, 8]);

    let got = bench.attend(&grouped(), &["--backward"]);
    for (name, shape) in GRADIENTS.iter().zip([&[2, 4, 9, 8][..], &[2, 2, 11, 8], &[2, 2, 11, 5], &[1], &[1]])
    {
        assert_eq!(got.get(name).shape, shape, "{name}");
        assert!(got.get(name).data.iter().any(|x| *x != 0.0), "{name} is zero");
    }
    assert_eq!(bench.names(), ["in.safetensors", "out.safetensors"]);
}

#[test]
fn results_are_f64_for_f64_and_f32_for_the_rest() {
    let bench = Bench::new();
    for (option, wanted) in
        [("f64", Dtype::F64), ("f32", Dtype::F32), ("bf16", Dtype::F32), ("f16", Dtype::F32)]
    {
        let got = bench.attend(&grouped(), &["--backward", "--dtype", option]);
        assert!(got.tensors.values().all(|(dtype, _)| *dtype == wanted), "{option}");
        assert_eq!(got.metadata["dtype"], option);
    }
    // Unless told, the type is that of the file's q.
    for (stored, wanted) in
        [(Dtype::F64, "f64"), (Dtype::F32, "f32"), (Dtype::BF16, "bf16"), (Dtype::F16, "f16")]
    {
        let mut contents = grouped();
        for name in ["q", "k", "v"] {
            contents.tensors.get_mut(name).unwrap().0 = stored;
        }
        let got = bench.attend(&contents, &["--backward"]);
        assert_eq!(got.metadata["dtype"], wanted);
        // A file's rounded numbers and rounding a file's numbers are the same.
        let rounded = bench.attend(&grouped(), &["--backward", "--dtype", wanted]);
        assert_eq!(got.get("out"), rounded.get("out"), "{wanted}");
    }
}

#[test]
fn layouts_give_the_same_numbers() {
    let bench = Bench::new();
    let args = ["--backward", "--parallax"];
    let with_probe = grouped().with("probe", Tensor::normal(5, &[2, 4, 9, 8]));
    for (contents, args) in [(grouped(), &args[..1]), (with_probe, &args[..])] {
        let plain = bench.attend(&contents, args);
        let swapped = contents.map(|_, tensor| tensor.swapped());
        let got = bench.attend(&swapped, &[args, &["--layout", "bnhd"]].concat());
        for (name, (_, tensor)) in &plain.tensors {
            let wanted = if tensor.shape.len() == 4 { tensor.swapped() } else { tensor.clone() };
            assert_eq!(*got.get(name), wanted, "{name}");
        }
        // The metadata may say so instead.
        let got_again = bench.attend(&swapped.saying("layout", "bnhd"), args);
        assert_eq!(got_again.tensors, got.tensors);
    }

    let one_head = Contents::default()
        .with("q", Tensor::normal(1, &[3, 1, 7, 8]))
        .with("k", Tensor::normal(2, &[3, 1, 7, 8]))
        .with("v", Tensor::normal(3, &[3, 1, 7, 8]))
        .with("grad_out", Tensor::normal(4, &[3, 1, 7, 8]))
        .with("ridge", Tensor::normal(5, &[3, 1, 7]).map(|x| x.abs() + 0.1))
        .with("bias", Tensor::normal(6, &[3, 1, 7]));
    let plain = bench.attend(&one_head, &["--backward"]);
    let without_heads = |_: &str, t: Tensor| {
        let shape: Vec<usize> =
            t.shape.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, &s)| s).collect();
        t.reshaped(&shape)
    };
    let got = bench.attend(&one_head.map(without_heads), &["--backward", "--layout", "bnd"]);
    for (name, (_, tensor)) in &plain.tensors {
        let wanted =
            if tensor.shape.len() > 1 { without_heads(name, tensor.clone()) } else { tensor.clone() };
        assert_eq!(*got.get(name), wanted, "{name}");
    }
}

#[test]
fn options_override_metadata_which_overrides_defaults() {
    let bench = Bench::new();
    let contents = Contents::sample();
    let default = bench.attend(&contents, &[]);
    for (key, value) in
        [("causal", "1"), ("window", "0"), ("q_offset", "0"), ("cu_seqlens", ""), ("ridge", "10.0")]
    {
        assert_eq!(default.metadata[key], value, "{key}");
    }
    let default_scale = &default.metadata["scale"];
    assert_eq!(default_scale.parse::<f64>().unwrap(), 8f64.powf(-0.5));

    // Each setting from the metadata, from an option, from an option against other metadata, and switched off.
    for (key, value, other, option, off) in [
        ("causal", "0", "1", &["--no-causal"][..], &["--causal"][..]),
        ("window", "3", "5", &["--window", "3"], &["--window", "none"]),
        ("q_offset", "-2", "1", &["--q-offset", "-2"], &["--q-offset", "0"]),
        ("cu_seqlens", "0,5,12", "0,1,12", &["--cu-seqlens", "0,5,12"], &["--cu-seqlens", "none"]),
        ("leave_one_out", "1", "0", &["--leave-one-out"], &["--no-leave-one-out"]),
        ("scale", "-0.01", "0.1", &["--scale", "-1e-2"], &["--scale", default_scale]),
        ("scale", "0.7", "0.1", &["--scale", "0.7"], &["--scale", default_scale]),
        ("ridge", "0.5", "3", &["--ridge", "0.5"], &["--ridge", "10"]),
        ("ridge", "0.5,2.0", "3", &["--ridge", "0.5,2"], &["--ridge", "10"]),
    ] {
        let said = bench.attend(&contents.clone().saying(key, value), &[]);
        assert_ne!(said.get("out"), default.get("out"), "{key} has no effect");
        assert_eq!(said.metadata[key], value);
        let asked = bench.attend(&contents, option);
        assert_eq!((&asked.tensors, &asked.metadata), (&said.tensors, &said.metadata), "{key}");
        let both = bench.attend(&contents.clone().saying(key, other), option);
        assert_eq!((&both.tensors, &both.metadata), (&said.tensors, &said.metadata), "{key}");
        let switched_off = bench.attend(&contents.clone().saying(key, value), off);
        assert_eq!(switched_off.tensors, default.tensors, "{key}");
    }
}

#[test]
fn a_ridge_may_be_constant_along_any_axis() {
    let bench = Bench::new();
    let full = |f: fn(usize, usize, usize) -> f64| {
        let index = (0..2).flat_map(|b| (0..4).flat_map(move |h| (0..9).map(move |n| (b, h, n))));
        Tensor::new(&[2, 4, 9], index.map(|(b, h, n)| f(b, h, n)).collect())
    };
    let ridge = |shape: &[usize], values: Vec<f64>| Tensor::new(shape, values);
    let steps = |count: usize| (0..count).map(|i| 0.5 + i as f64).collect::<Vec<_>>();
    for (given, spread) in [
        (ridge(&[], vec![0.5]), full(|_, _, _| 0.5)),
        (ridge(&[1], vec![0.5]), full(|_, _, _| 0.5)),
        (ridge(&[4], steps(4)), full(|_, h, _| 0.5 + h as f64)),
        (ridge(&[2, 1, 1], steps(2)), full(|b, _, _| 0.5 + b as f64)),
        (ridge(&[1, 4, 1], steps(4)), full(|_, h, _| 0.5 + h as f64)),
        (ridge(&[1, 1, 9], steps(9)), full(|_, _, n| 0.5 + n as f64)),
    ] {
        let got = bench.attend(&grouped().with("ridge", given.clone()), &["--backward"]);
        let wanted = bench.attend(&grouped().with("ridge", spread), &["--backward"]);
        assert_eq!(got.get("out"), wanted.get("out"), "{:?}", given.shape);
        assert_eq!(got.get("dridge").shape, given.shape);
        let (sum, sum_wanted): (f64, f64) =
            (got.get("dridge").data.iter().sum(), wanted.get("dridge").data.iter().sum());
        assert!((sum - sum_wanted).abs() < 1e-12 * sum_wanted.abs().max(1.0), "{:?}", given.shape);
        assert!(!got.metadata.contains_key("ridge"), "a tensor is no metadata");
    }
    // An option overrides the tensor, and the tensor the metadata.
    let contents = grouped().with("ridge", ridge(&[], vec![0.5]));
    let wanted = bench.attend(&grouped(), &["--ridge", "2"]);
    assert_eq!(bench.attend(&contents, &["--ridge", "2"]).tensors, wanted.tensors);
    let said = contents.clone().saying("ridge", "7");
    assert_eq!(bench.attend(&said, &[]).tensors, bench.attend(&contents, &[]).tensors);
}

#[test]
fn a_bias_may_be_shared_and_its_gradient_has_its_shape() {
    let bench = Bench::new();
    let plain = bench.attend(&grouped(), &["--backward"]);
    for shape in [&[11][..], &[1, 11], &[2, 11], &[4, 11], &[2, 1, 11], &[1, 2, 11], &[2, 4, 11]] {
        let got = bench.attend(&grouped().with("bias", Tensor::normal(9, shape)), &["--backward"]);
        assert_eq!(got.get("dbias").shape, shape);
        assert_ne!(got.get("out"), plain.get("out"));
        // A constant bias changes nothing but lse.
        let constant = bench.attend(&grouped().with("bias", Tensor::filled(0.75, shape)), &["--backward"]);
        assert!(constant.get("out").error(plain.get("out")) < 1e-12);
        let lse = plain.get("lse").map(|x| x + 0.75);
        assert!(constant.get("lse").error(&lse) < 1e-12);
    }
}

#[test]
fn a_given_probe_is_used_only_when_asked_for() {
    let bench = Bench::new();
    let solved = bench.attend(&grouped(), &["--backward"]);
    // Results may lie in the same file as inputs, as in the golden cases: a probe there is no request.
    let with_probe = grouped().with("probe", Tensor::normal(5, &[2, 4, 9, 8]));
    assert_eq!(bench.attend(&with_probe, &["--backward"]).tensors, solved.tensors);
    // The solution, given, gives the same outputs.
    let given_back = grouped().with("probe", solved.get("probe").clone());
    let got = bench.attend(&given_back, &["--backward", "--parallax"]);
    assert!(got.get("out").error(solved.get("out")) < 1e-12);
    assert_eq!(got.get("dprobe").shape, [2, 4, 9, 8]);
    assert!(got.get("dridge").data.iter().all(|x| *x == 0.0));
    assert!(!got.metadata.contains_key("ridge"));
}

#[test]
fn solvers_agree() {
    let bench = Bench::new();
    let direct = bench.attend(&grouped(), &["--backward", "--solver", "direct"]);
    for args in [
        &["--solver", "cg"][..],
        &["--solver", "cg", "--tolerance", "1e-13", "--max-iters", "500"],
        &["--solver", "auto", "--precision", "high"],
    ] {
        let got = bench.attend(&grouped(), &[args, &["--backward"]].concat());
        for name in ["out", "dq", "dk", "dv"] {
            assert!(got.get(name).error(direct.get(name)) < 1e-9, "{name} {args:?}");
        }
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_run_or_the_threads() {
    let bench = Bench::new();
    let mut files = vec![];
    for threads in ["1", "2", "3"] {
        bench.attend(&grouped(), &["--backward", "--threads", threads]);
        files.push(std::fs::read(bench.path("out.safetensors")).unwrap());
    }
    assert!(files.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn the_summary_is_for_people_or_for_programs() {
    let bench = Bench::new();
    bench.put("in.safetensors", &Contents::sample().bytes());
    let run = |args: &[&str]| {
        let output = bench.run(&[&["attend", "in.safetensors", "-o", "out.safetensors"], args].concat());
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&["--backward"]);
    for word in
        ["[1, 2, 12, 8]", "f64", "causal", "ridge 10", "forward", "backward", "iterations median", "residual"]
    {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    assert!(!text.contains('\u{1b}'));
    let json: serde_json::Value = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!(json["q"], serde_json::json!([1, 2, 12, 8]));
    assert_eq!(json["backward"], serde_json::Value::Null);
    assert!(json["forward"]["seconds"].as_f64().unwrap() > 0.0);
    assert!(json["forward"]["worst_residual"].as_f64().unwrap() < 1e-9);
    assert_eq!(json["tensors"], serde_json::json!(["out", "lse", "key_mean", "probe"]));
}

#[test]
fn non_finite_inputs_are_counted_where_they_are_seen() {
    let bench = Bench::new();
    let mut contents = Contents::sample();
    let q = &mut contents.tensors.get_mut("q").unwrap().1;
    q.data[3 * 8] = f64::NAN;
    bench.put("in.safetensors", &contents.bytes());
    let output = bench.run(&["attend", "in.safetensors", "-o", "out.safetensors", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["nonfinite_queries"], 1);
    let out = Contents::read(&bench.path("out.safetensors"));
    let bad = out.get("out").data.chunks(8).position(|row| row.iter().any(|x| !x.is_finite()));
    assert_eq!(bad, Some(3));
}

#[test]
fn an_empty_set_of_queries_is_no_error() {
    let bench = Bench::new();
    let contents = Contents::default()
        .with("q", Tensor::normal(1, &[1, 2, 0, 8]))
        .with("k", Tensor::normal(2, &[1, 2, 4, 8]))
        .with("v", Tensor::normal(3, &[1, 2, 4, 8]))
        .with("grad_out", Tensor::normal(4, &[1, 2, 0, 8]));
    let got = bench.attend(&contents, &["--backward"]);
    assert_eq!(got.get("out").shape, [1, 2, 0, 8]);
    assert!(got.get("dk").data.iter().all(|x| *x == 0.0));
}

#[cfg(unix)]
#[test]
fn results_replace_a_file_and_go_through_links() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let bench = Bench::new();
    bench.put("real.safetensors", b"old");
    symlink("real.safetensors", bench.path("out.safetensors")).unwrap();
    bench.attend(&Contents::sample(), &[]);
    assert!(bench.path("out.safetensors").is_symlink());
    assert!(Contents::read(&bench.path("real.safetensors")).tensors.contains_key("out"));
    // As readable as any other new file.
    bench.put("plain", b"");
    let mode = |name: &str| std::fs::metadata(bench.path(name)).unwrap().mode();
    assert_eq!(mode("real.safetensors"), mode("plain"));
}

#[cfg(unix)]
#[test]
fn a_reader_that_stops_is_no_error() {
    let bench = Bench::new();
    bench.put("in.safetensors", &Contents::sample().bytes());
    let mut child = program()
        .args(["attend", "in.safetensors", "-o", "out.safetensors"])
        .current_dir(bench.path(""))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
    assert!(bench.path("out.safetensors").exists());
}
