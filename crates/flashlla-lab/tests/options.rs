//! Options by themselves: what is understood, and what mistakes are answered with.

use clap::CommandFactory;
use flashlla::Mask;
use flashlla_lab::cli::{Cli, Stop};
use flashlla_lab::error::one_line;
use flashlla_lab::options::{MaskArgs, Resolved, Setting};
use std::collections::HashMap;
use std::ffi::OsString;

fn resolve(args: &MaskArgs, metadata: &[(&str, &'static str)]) -> Result<Resolved, String> {
    let metadata: HashMap<&str, &'static str> = metadata.iter().copied().collect();
    args.resolve(|key| metadata.get(key).copied())
}

#[test]
fn defaults_metadata_and_options_in_that_order() {
    let none = MaskArgs::default();
    let default = resolve(&none, &[]).unwrap();
    assert_eq!(default, Resolved { mask: Mask::causal(), scale: None });

    let said =
        [("causal", "0"), ("window", "3"), ("q_offset", "-2"), ("cu_seqlens", "0,4, 9"), ("scale", "0.5")];
    let from_file = resolve(&none, &said).unwrap();
    let mask = Mask::full().window(3).q_offset(-2).cu_seqlens([0, 4, 9]);
    assert_eq!(from_file, Resolved { mask, scale: Some(0.5) });

    let args = MaskArgs {
        causal: true,
        window: Some(Setting::Off),
        q_offset: Some(1),
        cu_seqlens: Some(Setting::On(vec![0, 9])),
        scale: Some(-1.0),
        leave_one_out: true,
        ..none
    };
    let mask = Mask::causal().q_offset(1).cu_seqlens([0, 9]).leave_one_out();
    assert_eq!(resolve(&args, &said).unwrap(), Resolved { mask, scale: Some(-1.0) });
}

#[test]
fn nothing_written_as_files_write_it_is_nothing() {
    let said = [("window", "0"), ("cu_seqlens", ""), ("leave_one_out", "False")];
    assert_eq!(resolve(&MaskArgs::default(), &said).unwrap().mask, Mask::causal());
}

#[test]
fn bad_metadata_is_named() {
    for (key, bad) in [
        ("causal", "maybe"),
        ("window", "-1"),
        ("q_offset", "1.5"),
        ("cu_seqlens", "0,x"),
        ("scale", "inf"),
        ("leave_one_out", "2"),
    ] {
        let error = resolve(&MaskArgs::default(), &[(key, bad)]).unwrap_err();
        assert!(error.contains(key) && error.contains(bad), "{error}");
    }
}

#[test]
fn the_description_of_the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

fn mistake(args: &[&str]) -> String {
    match Cli::read(["flashlla"].iter().chain(args).map(OsString::from)) {
        Err(Stop::Mistake(error)) => error.to_string(),
        _ => panic!("{args:?} is accepted"),
    }
}

#[test]
fn mistakes_are_one_line_with_the_way_out() {
    for (args, wanted) in [
        (&["attend"][..], "--output <OUT.safetensors>"),
        (&["atend"], "attend"),
        (&["attend", "a", "-o", "b", "--dtype", "f8"], "f64, f32, bf16, f16"),
        (&["attend", "a", "-o", "b", "--ridge", "-1"], "greater than 0"),
        (&["attend", "a", "-o", "b", "--windw", "2"], "--window"),
        (&["bench", "--threads", "0"], "0"),
    ] {
        let line = mistake(args);
        assert!(line.contains(wanted) && line.contains("--help") && !line.contains('\n'), "{line}");
    }
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    assert_eq!(one_line("a\nb\u{1b}[31mλ"), "a\\nb\\u{1b}[31mλ");
}
