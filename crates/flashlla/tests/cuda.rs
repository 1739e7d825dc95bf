//! What the GPU engine does without a GPU: bundles, and errors that say what is missing. The rest is in `tests/gpu`.

use flashlla::cuda::bundle::{Bundle, Index, Kernel, MAGIC};
use flashlla::{Cuda, Error};

fn kernel(entry: &str, arch: &str, cubin: std::ops::Range<usize>) -> Kernel {
    Kernel {
        name: format!("{entry}_{arch}"),
        entry: entry.into(),
        arch: arch.into(),
        dtype: String::new(),
        block_queries: 64,
        block_keys: 64,
        head_dim: 64,
        high: false,
        bias: false,
        page_keys: 0,
        kind: 0,
        aligned: false,
        registers: 168,
        stack: 0,
        shared: 1024,
        offset: cubin.start,
        size: cubin.len(),
    }
}

fn index(kernels: Vec<Kernel>) -> Index {
    Index { driver: 13000, toolchain: "test".into(), kernels }
}

fn frame(plain: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(plain, ruzstd::encoding::CompressionLevel::Fastest)
}

fn pack(index: &Index, cubins: &[u8]) -> Vec<u8> {
    let json = serde_json::to_vec(index).unwrap();
    frame(&[MAGIC.as_slice(), &(json.len() as u32).to_le_bytes(), &json, cubins].concat())
}

fn message(result: Result<impl Sized, Error>) -> String {
    let message = result.err().expect("an error").to_string();
    assert!(!message.contains('\n') && message.contains("; "), "one line that says what to do: {message}");
    message
}

fn parse(bytes: &[u8]) -> Result<Bundle, Error> {
    Bundle::parse(bytes, "a test".into())
}

#[test]
fn bundles_give_back_what_was_packed() {
    let cubins: Vec<u8> = (0..100_000).map(|i| (i / 7) as u8).collect();
    let kernels =
        vec![kernel("lla_forward", "sm_90", 0..70_000), kernel("lla_convert", "sm_90", 70_000..100_000)];
    let bundle = parse(&pack(&index(kernels.clone()), &cubins)).unwrap();
    assert_eq!(bundle.index(), &index(kernels.clone()));
    assert_eq!(bundle.cubin(&kernels[0]), &cubins[..70_000]);
    assert_eq!(bundle.cubin(&kernels[1]), &cubins[70_000..]);
}

/// The index as `cargo xtask kernels` writes it.
#[test]
fn the_index_reads_as_it_is_written() {
    let json = br#"{"toolchain": "13.5.37", "kernels": [{"name": "lla_forward_m64_n32_d128_h1_b0_a0", "entry": "lla_forward",
        "arch": "sm_90", "dtype": "", "bm": 64, "bn": 32, "d": 128, "high": true, "bias": false, "aligned": false,
        "page_keys": 16, "kind": 2, "registers": 200, "stack": 8, "shared": 65536, "offset": 2, "size": 3}]}"#;
    let plain = [MAGIC.as_slice(), &(json.len() as u32).to_le_bytes(), json, b"abcdef"].concat();
    let bundle = parse(&frame(&plain)).unwrap();
    let kernel = &bundle.index().kernels[0];
    assert_eq!((kernel.block_queries, kernel.block_keys, kernel.head_dim, kernel.high), (64, 32, 128, true));
    assert_eq!((kernel.page_keys, kernel.kind), (16, 2));
    assert_eq!(bundle.cubin(kernel), b"cde");
    assert_eq!(bundle.index().driver, 13000);
}

#[test]
fn an_architecture_runs_its_own_cubins_and_before_9_those_of_earlier_minor_versions() {
    let of = |archs: &[&str]| {
        let kernels: Vec<Kernel> = archs.iter().map(|arch| kernel("lla_forward", arch, 0..1)).collect();
        parse(&pack(&index(kernels), &[1])).unwrap()
    };
    let bundle = of(&["sm_90", "sm_80", "sm_120", "sm_80"]);
    assert_eq!(bundle.architectures(), ["sm_80", "sm_90", "sm_120"]);
    assert_eq!(bundle.architecture_for((8, 9)), Some("sm_80"));
    assert_eq!(bundle.architecture_for((9, 0)), Some("sm_90"));
    assert_eq!(bundle.architecture_for((12, 1)), None);
    assert_eq!(bundle.architecture_for((7, 5)), None);
    assert_eq!(of(&["sm_89"]).architecture_for((8, 6)), None);
}

#[test]
fn broken_bundles_are_refused_in_one_line() {
    let cubin: Vec<u8> = (0..5000u32).map(|i| (i * i / 3) as u8).collect();
    let good = pack(&index(vec![kernel("lla_forward", "sm_90", 0..5000)]), &cubin);
    assert!(parse(&good).is_ok());
    let with_index =
        |json: &[u8]| frame(&[MAGIC.as_slice(), &(json.len() as u32).to_le_bytes(), json].concat());
    let hollow = Kernel { block_queries: 0, ..kernel("lla_forward", "sm_90", 0..1) };
    let cases = [
        (vec![], "no bundle"),
        (b"PK\x03\x04 something else".to_vec(), "no bundle"),
        (frame(b"something else"), "no bundle"),
        (frame(b"FLLAKRN1"), "no bundle of this version"),
        (frame(MAGIC), "index is cut short"),
        (frame(&[MAGIC.as_slice(), &[255, 255, 255, 255], b"{}"].concat()), "index is cut short"),
        (with_index(b"{}"), "does not read"),
        (with_index(b"]["), "does not read"),
        (good[..good.len() / 2].to_vec(), "does not unpack"),
        (
            pack(&index(vec![kernel("lla_forward", "sm_90", 0..5001)]), &cubin),
            "cubin of lla_forward_sm_90 is cut short",
        ),
        (pack(&index(vec![kernel("lla_forward", "sm_90", usize::MAX - 1..usize::MAX)]), &cubin), "cut short"),
        (pack(&index(vec![hollow]), &cubin), "tiles of no size"),
    ];
    for (bytes, expected) in cases {
        let message = message(parse(&bytes));
        assert!(message.contains(expected) && message.contains("a test"), "{message} instead of {expected}");
    }
}

#[test]
fn a_bundle_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.kernels");
    let text = message(Cuda::with_bundle(&missing, 0));
    assert!(text.contains("none.kernels") && text.contains("cannot be read"), "{text}");
    let wrong = folder.path().join("wrong.kernels");
    std::fs::write(&wrong, "hello").unwrap();
    let text = message(Cuda::with_bundle(&wrong, 0));
    assert!(text.contains("wrong.kernels") && text.contains("no bundle"), "{text}");
}

/// On a machine with a GPU these go further, and stop at a device or an architecture that is not there.
#[test]
fn engines_say_what_they_lack() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.kernels");
    let bundle = pack(&index(vec![kernel("lla_forward", "sm_10", 0..1)]), &[1]);
    std::fs::write(&path, bundle).unwrap();
    let text = message(Cuda::with_bundle(&path, 0));
    let reasons = ["libcuda.so.1", "CUDA_ERROR", "the driver supports CUDA", "are for sm_10, but the"];
    assert!(reasons.iter().any(|reason| text.contains(reason)), "{text}");
    assert!(Cuda::with_bundle(&path, 1 << 20).is_err());
    let newer = Index { driver: u32::MAX, ..index(vec![]) };
    std::fs::write(&path, pack(&newer, &[])).unwrap();
    let text = message(Cuda::with_bundle(&path, 0));
    assert!(text.contains("libcuda.so.1") || text.contains("the driver supports CUDA"), "{text}");
    if !std::path::Path::new("/dev/nvidiactl").exists() {
        let text = message(Cuda::new());
        assert!(text.contains("libcuda.so.1") || text.contains("CUDA_ERROR"), "{text}");
    }
}
