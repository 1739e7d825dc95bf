//! Any numbers as a description: the builder, and what a description promises.
#![no_main]

use flashlla_lab::fuzzing::{Numbers, build_any};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| build_any(&Numbers::decode(bytes)));
