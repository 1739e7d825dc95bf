//! The bodies of the fuzz targets on random input, so that every test run does a little of what fuzzing does at length.

use flashlla_lab::files::{Entry, Target, TensorFile};
use flashlla_lab::fuzzing::{Numbers, build_any, read_any_file};
use flashlla_lab::inputs::{InputArgs, Inputs};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use std::collections::BTreeMap;
use std::io::Cursor;

/// A file that has everything that is read.
fn full_file() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let data = [0.5f32; 24];
    let four = ["q", "k", "v", "grad_out", "probe"].map(|name| Entry::new(name, &[1, 2, 3, 4], &data));
    let mut entries = Vec::from(four);
    entries.push(Entry::new("ridge", &[1, 2, 3], &data[..6]));
    entries.push(Entry::new("bias", &[2, 3], &data[..6]));
    let metadata =
        [("scale", "0.5"), ("causal", "1"), ("window", "2"), ("q_offset", "0"), ("cu_seqlens", "0,1,3")];
    let metadata: BTreeMap<_, _> = metadata.map(|(k, v)| (k.to_string(), v.to_string())).into();
    Target::new(&path, &[]).unwrap().write(entries, &metadata).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn changed_files_are_read_or_refused() {
    let good = full_file();
    let mut file = TensorFile::new(Cursor::new(&good), "file").unwrap();
    let args = InputArgs { backward: true, parallax: true, ..Default::default() };
    Inputs::<f32>::read(&mut file, &args).expect("the unchanged file is sound");
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut rng = StdRng::seed_from_u64(0);
    for _ in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..4) {
            // Digits and words of the header lead further than its brackets.
            let place = rng.random_range(0..header + 40);
            bytes[place] = match bytes[place] {
                b'0'..=b'9' => rng.random_range(b'0'..=b'9'),
                _ if rng.random_range(0..4) > 0 => continue,
                _ => rng.random(),
            };
        }
        read_any_file(&bytes);
    }
}

#[test]
fn any_numbers_are_described_or_refused() {
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..100_000 {
        let mut bytes = [0; 64];
        rng.fill_bytes(&mut bytes);
        build_any(&Numbers::decode(&bytes));
    }
}
