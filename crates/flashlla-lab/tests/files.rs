//! Tensor files and layouts by themselves.

use flashlla::{Tensor, f16};
use flashlla_lab::files::{Entry, Target, TensorFile};
use flashlla_lab::options::Layout;
use std::collections::BTreeMap;
use std::io::Cursor;

fn sample() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let metadata = BTreeMap::from([("scale".to_string(), "0.5".to_string())]);
    let (a, b) = ([1.0f32, -2.5, 7.0], [f16::from_f32(0.5); 4]);
    let entries = vec![Entry::new("b", &[2, 2], &b), Entry::new("a", &[3, 1], &a)];
    Target::new(&path, &[]).unwrap().write(entries, &metadata).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn what_is_written_can_be_read() {
    let bytes = sample();
    let mut file = TensorFile::new(Cursor::new(&bytes), "t").unwrap();
    assert_eq!(file.metadata("scale"), Some("0.5"));
    assert_eq!(file.read::<f64>("a").unwrap(), Tensor::new(vec![1.0, -2.5, 7.0], &[3, 1]));
    assert_eq!(file.read::<f16>("b").unwrap(), Tensor::new(vec![f16::from_f32(0.5); 4], &[2, 2]));
    assert!(file.read::<f32>("c").unwrap_err().to_string().contains("the file holds a, b"));
    // The library that defined the format agrees.
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("b").unwrap().shape(), [2, 2]);
}

#[test]
fn every_truncation_and_every_changed_header_byte_is_survived() {
    let bytes = sample();
    for len in 0..bytes.len() {
        assert!(TensorFile::new(Cursor::new(&bytes[..len]), "t").is_err(), "{len} bytes");
    }
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for place in 0..header {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[place] ^= 1 << bit;
            if let Ok(mut file) = TensorFile::new(Cursor::new(&changed), "t") {
                for name in ["a", "b"] {
                    let _ = file.read::<f32>(name);
                }
            }
        }
    }
}

#[test]
fn rounding_to_infinity_is_an_error_and_infinity_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let (large, infinite) = ([1e30f64], [f64::INFINITY]);
    let entries = vec![Entry::new("large", &[1], &large), Entry::new("infinite", &[1], &infinite)];
    Target::new(&path, &[]).unwrap().write(entries, &BTreeMap::new()).unwrap();
    let mut file = TensorFile::open(&path).unwrap();
    let error = file.read::<f16>("large").unwrap_err().to_string();
    assert!(error.contains("large: 1e30 is too large for f16"), "{error}");
    assert!(file.read::<f32>("large").is_ok());
    assert_eq!(file.read::<f16>("infinite").unwrap().data(), [f16::INFINITY]);
}

#[test]
fn arranging_is_what_reading_undoes() {
    let data: Vec<f32> = (0..2 * 3 * 5 * 4).map(|x| x as f32).collect();
    let tensor = Tensor::new(data, &[2, 3, 5, 4]);
    let arranged = Layout::Bnhd.arrange(tensor.clone());
    assert_eq!(arranged.shape(), [2, 5, 3, 4]);
    let view = Layout::Bnhd.view(&arranged).unwrap();
    for (b, h, n, d) in [(0, 0, 0, 0), (1, 2, 4, 3), (1, 0, 3, 2), (0, 2, 1, 1)] {
        assert_eq!(view.at(b, h, n, d), tensor.view().at(b, h, n, d));
    }
}

#[test]
fn a_wrong_number_of_axes_names_the_layout_that_has_it() {
    let error = Layout::Bhnd.view(&Tensor::<f32>::zeros(&[2, 5, 4])).unwrap_err();
    assert!(error.contains("[2, 5, 4]") && error.contains("--layout bnd"), "{error}");
}
