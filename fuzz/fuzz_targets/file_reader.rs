//! Any bytes as a safetensors file: everything up to the validated inputs of `attend`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| flashlla_lab::fuzzing::read_any_file(bytes));
