//! Wrong input of every kind: the right exit code, one line that names what is wrong, and no file touched.

mod common;
use common::{Bench, Contents, Tensor};
use safetensors::Dtype;

/// Runs `attend` on a file's bytes and holds what happens against the rules.
fn refused(bytes: &[u8], args: &[&str], code: i32, words: &[&str]) {
    let bench = Bench::new();
    bench.put("in.safetensors", bytes);
    let mut all = vec!["attend", "in.safetensors"];
    if !args.contains(&"-o") {
        all.extend(["-o", "out.safetensors"]);
    }
    all.extend(args);
    for existing in [false, true] {
        if existing {
            bench.put("out.safetensors", b"precious");
        }
        let names = bench.names();
        let output = bench.run(&all);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.ends_with('\n'), "{args:?}: {stderr:?}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(!stderr.contains("panicked") && !stderr.contains('\u{1b}'), "{stderr}");
        for word in words {
            assert!(stderr.contains(word), "{args:?}: {word:?} is not in {stderr}");
        }
        assert!(output.stdout.is_empty(), "{args:?}");
        assert_eq!(bench.names(), names, "{args:?}");
        assert_eq!(std::fs::read(bench.path("in.safetensors")).unwrap(), bytes);
        if existing {
            assert_eq!(std::fs::read(bench.path("out.safetensors")).unwrap(), b"precious");
        }
    }
}

fn sample() -> Contents {
    Contents::sample()
}

fn header(json: &str) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat()
}

#[test]
fn files_that_are_none() {
    let good = sample().bytes();
    for bytes in [
        &b""[..],
        b"1234567",
        b"neither long nor a tensor file",
        &[0xff; 64],
        &good[..good.len() - 1],
        &good[..20],
        &[&good[..], b"x"].concat(),
        &header("{"),
        &header("[]"),
        &header("\u{1b}[31m\n\n"),
        &header(r#"{"q\nq":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#),
        &header(r#"{"q":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}"#),
        &header(r#"{"q":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}"#),
        &header(r#"{"q":{"dtype":"F99","shape":[],"data_offsets":[0,0]}}"#),
        &header(&"[".repeat(100_000)),
    ] {
        refused(bytes, &[], 1, &["in.safetensors: not a safetensors file"]);
    }
}

#[test]
fn files_that_cannot_be() {
    let bench = Bench::new();
    bench.put("in.safetensors", &sample().bytes());
    std::fs::create_dir(bench.path("folder")).unwrap();
    let names = bench.names();
    for (args, code, word) in [
        (&["absent.safetensors", "-o", "out"][..], 1, "absent.safetensors"),
        (&["folder", "-o", "out"], 1, "folder"),
        (&["in.safetensors", "-o", "nowhere/out"], 1, "nowhere/out"),
        (&["in.safetensors", "-o", "folder"], 1, "folder"),
        (&["in.safetensors", "-o", "in.safetensors"], 2, "is the input"),
        (&["in.safetensors", "-o", "folder/../in.safetensors"], 2, "is the input"),
        (&["in.safetensors", "-o", ""], 2, "--output"),
    ] {
        let output = bench.run(&[&["attend"], args].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(word), "{args:?}: {stderr}");
        assert_eq!(bench.names(), names, "{args:?}");
    }
    assert_eq!(std::fs::read(bench.path("in.safetensors")).unwrap(), sample().bytes());
}

#[test]
fn tensors_that_do_not_fit() {
    let t = |shape: &[usize]| Tensor::normal(9, shape);
    let cases: &[(Contents, &[&str], &[&str])] = &[
        (sample().without("k"), &[], &["k: no such tensor", "grad_out, q, v"]),
        (sample().with_as(Dtype::I64, "v", t(&[1, 2, 12, 8])), &[], &["v: type I64", "BF16"]),
        (sample().with_as(Dtype::I64, "q", t(&[1, 2, 12, 8])), &[], &["q: type I64"]),
        (sample().with("q", t(&[12, 8])), &[], &["q: shape [12, 8]", "[batch, head, token, dim]"]),
        (sample().with("q", t(&[2, 12, 8])), &[], &["q: shape", "--layout bnd"]),
        (sample(), &["--layout", "bnd"], &["q: shape [1, 2, 12, 8]", "--layout bhnd"]),
        (sample().with("k", t(&[1, 2, 12, 7])), &[], &["k: shape [1, 2, 12, 7]", "[1, 2, 12, 8]"]),
        (sample().with("v", t(&[1, 2, 11, 8])), &[], &["v: shape [1, 2, 11, 8]"]),
        (sample().with("k", t(&[2, 2, 12, 8])), &[], &["k: shape [2, 2, 12, 8]"]),
        (sample().with("q", t(&[1, 3, 12, 8])), &[], &["kv_heads: 2", "query heads (3)"]),
        (sample().with("q", t(&[1, 2, 12, 257])), &[], &["head_dim: 257", "256"]),
        (sample().with("q", t(&[1, 2, 12, 0])), &[], &["head_dim: 0"]),
        (sample().with("q", t(&[1, 0, 12, 8])), &[], &["heads: 0"]),
        (sample().with("v", t(&[1, 2, 12, 300])), &[], &["value_dim: 300"]),
        (sample().with("ridge", t(&[3]).map(f64::abs)), &[], &["ridge: shape [3]"]),
        (sample().with("ridge", t(&[1, 2, 5]).map(f64::abs)), &[], &["ridge: shape [1, 2, 5]"]),
        (sample().with("ridge", t(&[2, 12]).map(f64::abs)), &[], &["ridge: shape [2, 12]"]),
        (sample().with("ridge", Tensor::filled(0.0, &[1])), &[], &["ridge: 0", "greater than 0"]),
        (sample().with("ridge", Tensor::filled(-1.0, &[2])), &[], &["ridge: -1"]),
        (sample().with("ridge", Tensor::filled(f64::NAN, &[])), &[], &["ridge: NaN"]),
        (sample().with("ridge", Tensor::filled(f64::INFINITY, &[1, 2, 12])), &[], &["ridge: inf"]),
        (sample().with("bias", t(&[11])), &[], &["bias: shape"]),
        (sample().with("bias", t(&[3, 12])), &[], &["bias: shape"]),
        (
            sample().with("bias", t(&[1, 2, 12, 1])),
            &[],
            &["bias: shape [1, 2, 12, 1]", "[batch, heads, keys]"],
        ),
        (sample().without("grad_out"), &["--backward"], &["grad_out: no such tensor", "--backward"]),
        (
            sample().with("grad_out", t(&[1, 2, 12, 7])),
            &["--backward"],
            &["grad_out: shape", "[1, 2, 12, 8]"],
        ),
        (sample().with("grad_out", t(&[24, 8])), &["--backward"], &["grad_out: shape [24, 8]"]),
        (sample(), &["--parallax"], &["probe: no such tensor", "--parallax"]),
        (sample().with("probe", t(&[1, 2, 11, 8])), &["--parallax"], &["probe: shape [1, 2, 11, 8]"]),
        (sample().with("q", Tensor::filled(1e5, &[1, 2, 12, 8])), &["--dtype", "f16"], &["q: 1e5", "f16"]),
    ];
    for (contents, args, words) in cases {
        refused(&contents.bytes(), args, 1, words);
    }
}

#[test]
fn metadata_that_makes_no_sense() {
    for (key, value) in [
        ("scale", "fast"),
        ("scale", "NaN"),
        ("causal", "yes please"),
        ("window", "-3"),
        ("window", "2.5"),
        ("q_offset", "later"),
        ("cu_seqlens", "0,,12"),
        ("cu_seqlens", "0;12"),
        ("leave_one_out", "2"),
        ("ridge", "-1"),
        ("ridge", "\n\u{1b}[2J"),
        ("layout", "hbnd"),
    ] {
        refused(&sample().saying(key, value).bytes(), &[], 1, &[&format!("metadata {key}"), "it must be"]);
    }
    // Sound by themselves, but not for these tensors.
    for (key, value) in [("cu_seqlens", "0,5"), ("cu_seqlens", "0,7,5,12"), ("ridge", "1,2,3")] {
        refused(&sample().saying(key, value).bytes(), &[], 1, &["in.safetensors: ", key]);
    }
    let outside = sample().saying("cu_seqlens", "0,12").saying("q_offset", "5");
    refused(&outside.bytes(), &[], 1, &["q_offset"]);
}

#[test]
fn options_that_make_no_sense() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--ridge", "0"], &["--ridge", "greater than 0"]),
        (&["--ridge", "-2"], &["--ridge", "greater than 0"]),
        (&["--ridge", "NaN"], &["--ridge"]),
        (&["--ridge", "1,2,3"], &["--ridge: shape [3]", "[2] (query heads)"]),
        (&["--scale", "inf"], &["--scale", "finite"]),
        (&["--scale", "--backward"], &["--scale", "finite"]),
        (&["--cu-seqlens", "-1,12"], &["--cu-seqlens", "0,5,9"]),
        (&["--window", "0"], &["--window", "none"]),
        (&["--window", "-1"], &["--window"]),
        (&["--q-offset", "1.5"], &["--q-offset"]),
        (&["--q-offset", "9223372036854775807"], &["--q-offset", "64 bits"]),
        (&["--cu-seqlens", "0,a"], &["--cu-seqlens", "0,5,9"]),
        (&["--cu-seqlens", "0,5"], &["--cu-seqlens", "number of keys (12)"]),
        (&["--cu-seqlens", "1,12"], &["--cu-seqlens: [1, 12]"]),
        (&["--dtype", "f8"], &["--dtype", "bf16"]),
        (&["--solver", "lu"], &["--solver", "direct"]),
        (&["--tolerance", "1"], &["--tolerance", "below 1"]),
        (&["--tolerance", "-1e-3"], &["--tolerance"]),
        (&["--max-iters", "0"], &["--max-iters"]),
        (&["--solver", "direct", "--tolerance", "1e-3"], &["--tolerance", "--solver auto or cg"]),
        (&["--solver", "direct", "--max-iters", "3"], &["--max-iters"]),
        (&["--parallax", "--ridge", "1"], &["--parallax", "--ridge"]),
        (&["--layout", "nbhd"], &["--layout", "bnhd"]),
        (&["--device", "tpu"], &["--device", "cpu"]),
        (&["--threads", "0"], &["--threads"]),
        (&["--threads", "-2"], &["--threads"]),
        (&["--max-iters", "-2"], &["--max-iters"]),
        (&["--threads", "many"], &["--threads"]),
        (&["--precision", "low"], &["--precision", "standard"]),
        (&["--frobnicate"], &["--frobnicate", "--help"]),
        (&["another.safetensors"], &["another.safetensors"]),
        (&["-o"], &["--output"]),
    ];
    for (args, words) in cases {
        refused(&sample().bytes(), args, 2, words);
    }
}
