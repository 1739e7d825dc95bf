//! What is compiled: every kernel with its tile sizes, types and switches.

use cutile_compiler::hints::CompileOptions;

/// One kernel with everything decided.
pub struct Variant {
    /// Unique name, also the name of its cubin.
    pub name: String,
    /// Entry without the `_entry` that the compiler appends.
    pub entry: &'static str,
    module: &'static str,
    ast: fn() -> cutile_compiler::ast::Module,
    generics: Vec<String>,
    /// Input and output type, or "" where all is fp16 and f32 inside.
    pub dtype: &'static str,
    /// Query rows of a tile (chunk rows of the preparing kernels).
    pub bm: i32,
    /// Key rows of a tile, 0 where there is none.
    pub bn: i32,
    /// Padded head dimension.
    pub d: i32,
    /// Two fp16 terms for directions and probes.
    pub high: bool,
    /// A bias per key.
    pub bias: bool,
    /// Wants 16-byte multiples.
    pub aligned: bool,
    /// Finds keys and values through a block table, in pages of a multiple of so many; 0: without one.
    pub page_keys: i32,
    /// Which of a kernel's kinds, where there are several. Of kernels that have products: [`FOR_ALL`],
    /// [`FOR_USUAL`] or [`FOR_LONG`].
    pub kind: i32,
    warps: i32,
    occupancy: i32,
    /// Runs products on tensor cores and loads tiles by bulk copies: the budget demands both.
    pub tensor: bool,
}

impl Variant {
    /// Tile IR bytecode for `arch`; needs no GPU.
    pub fn bytecode(&self, arch: &str) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        Ok(cutile::compile_api::KernelCompiler::new(self.ast, self.module, self.entry)
            .generics(self.generics.clone())
            .target(arch)
            .options(CompileOptions::new().num_worker_warps_per_cta(self.warps).occupancy(self.occupancy))
            .compile()?
            .bytecode()?)
    }
}

/// The kind for any call.
const FOR_ALL: i32 = 0;
/// The kind for usual calls, without code for rarer options (the const generic `USUAL`).
const FOR_USUAL: i32 = 1;
/// The same for queries with many keys.
const FOR_LONG: i32 = 2;

/// Tile sizes (query rows, key rows), worker warps and tile blocks per SM, chosen by measurement on an H100.
fn tiles(entry: &str, d: i32) -> Tiles {
    match (entry, d) {
        ("lla_forward" | "lla_backward_solve", 128) => (64, 128, 8, 1),
        ("lla_decode_split", 128) => (64, 64, 8, 1),
        ("lla_decode_pass", 64) => (64, 64, 4, 4),
        ("lla_decode_pass", _) => (64, 64, 4, 3),
        ("lla_decode_together", _) => (64, 128, 4, 2),
        ("lla_backward_query", 128) => (64, 64, 4, 1),
        ("lla_backward_key", 64) => (64, 64, 4, 2),
        ("lla_backward_key", _) => (32, 128, 8, 1),
        _ => (64, 64, 4, 2),
    }
}

/// Tiles of `lla_forward` and `lla_backward_solve`, 64 wide, for queries with many keys: a tile of keys takes less time per key, but there is more of it behind a causal
/// mask's edge, and what runs once per pass spills more.
const LONG: Tiles = (64, 128, 4, 2);

/// Tile sizes to try in place of those that were chosen: query rows, key rows, worker warps, tile blocks per SM.
pub type Tiles = (i32, i32, i32, i32);

/// Every variant of the bundle.
pub fn all() -> Vec<Variant> {
    with_tiles(None)
}

/// Every variant, with other tile sizes for those that have products.
pub fn with_tiles(other: Option<Tiles>) -> Vec<Variant> {
    let product = |entry, dtype, d, high, bias, aligned, kind| {
        let tiles = other.unwrap_or_else(|| if kind == FOR_LONG { LONG } else { tiles(entry, d) });
        product(entry, dtype, d, high, bias, aligned, kind, tiles)
    };
    let mut list = Vec::new();
    for d in [64, 128] {
        // With other tiles these would be the same as those for usual calls.
        let long = d == 64 && other.is_none();
        for dtype in ["bf16", "f16", "f32"] {
            list.push(Variant {
                name: format!("lla_poison_{dtype}_d{d}"),
                entry: "lla_poison",
                module: "poison",
                ast: crate::poison::poison::__module_ast_self,
                generics: vec![dtype.into(), d.to_string()],
                dtype,
                bm: 64,
                bn: 0,
                d,
                high: false,
                bias: false,
                aligned: false,
                page_keys: 0,
                kind: 0,
                warps: 4,
                // Most blocks find nothing to do: many at once matter more than registers.
                occupancy: 8,
                tensor: false,
            });
            list.push(Variant {
                name: format!("lla_cache_write_{dtype}_d{d}"),
                module: "cache_write",
                ast: crate::cache_write::cache_write::__module_ast_self,
                aligned: false,
                ..decode("lla_cache_write", dtype, d, vec![dtype.into(), d.to_string()], 1, 8)
            });
            for page_keys in [0, 64, 16] {
                let (_, bn, warps, occupancy) = other.unwrap_or_else(|| tiles("lla_decode_split", d));
                let generics = vec![
                    dtype.into(),
                    bn.to_string(),
                    d.to_string(),
                    how_paged(page_keys),
                    u8::from(dtype == "f32").to_string(),
                ];
                list.push(Variant {
                    name: format!("lla_decode_split_{dtype}_n{bn}_d{d}_p{page_keys}"),
                    module: "decode_split",
                    ast: crate::decode_split::decode_split::__module_ast_self,
                    bn,
                    page_keys,
                    tensor: true,
                    ..decode("lla_decode_split", dtype, d, generics.clone(), warps, occupancy)
                });
                list.push(Variant {
                    name: format!("lla_decode_whole_{dtype}_n{bn}_d{d}_p{page_keys}"),
                    module: "decode_whole",
                    ast: crate::decode_whole::decode_whole::__module_ast_self,
                    bn,
                    page_keys,
                    tensor: true,
                    ..decode("lla_decode_whole", dtype, d, generics, warps, occupancy)
                });
            }
            if dtype != "f32" {
                list.extend(shared(dtype, d, other));
            }
            let (warps, occupancy) = if d == 64 { (4, 4) } else { (8, 2) };
            list.push(Variant {
                tensor: true,
                ..decode("lla_decode_merge", dtype, d, vec![dtype.into(), d.to_string()], warps, occupancy)
            });
            for entry in ["lla_convert", "lla_adjust"] {
                for aligned in [true, false] {
                    list.push(Variant {
                        name: format!("{entry}_{dtype}_d{d}_a{}", u8::from(aligned)),
                        entry,
                        module: "prepare",
                        ast: crate::prepare::prepare::__module_ast_self,
                        generics: vec![
                            dtype.into(),
                            "64".into(),
                            d.to_string(),
                            u8::from(aligned).to_string(),
                        ],
                        dtype,
                        bm: 64,
                        bn: 0,
                        d,
                        high: false,
                        bias: false,
                        aligned,
                        page_keys: 0,
                        kind: 0,
                        warps: 4,
                        // 128 wide, what adjusts spills with three blocks.
                        occupancy: match (entry, d) {
                            (_, 64) => 6,
                            ("lla_convert", _) => 3,
                            _ => 2,
                        },
                        tensor: false,
                    });
                }
            }
            // The aligned path is for the common types; a bias and f32 go without.
            for (bias, aligned) in [(false, true), (false, false), (true, false)] {
                if aligned && dtype == "f32" {
                    continue;
                }
                list.push(product("lla_forward", dtype, d, false, bias, aligned, FOR_ALL));
                list.push(product("lla_forward", dtype, d, true, bias, aligned, FOR_ALL));
                list.push(product("lla_backward_query", dtype, d, false, bias, aligned, FOR_ALL));
                list.push(product("lla_backward_key", dtype, d, false, bias, aligned, FOR_ALL));
            }
            // The usual calls have kernels without what they do not need. (128 wide, `lla_backward_query` spills more so.)
            if dtype != "f32" {
                list.push(product("lla_forward", dtype, d, false, false, true, FOR_USUAL));
                if d == 64 {
                    list.push(product("lla_backward_query", dtype, d, false, false, true, FOR_USUAL));
                }
                if long {
                    list.push(product("lla_forward", dtype, d, false, false, true, FOR_LONG));
                }
            }
        }
        let rows = 128 / d;
        list.push(decode("lla_decode_fold", "", d, [d, rows, d * rows].map(|x| x.to_string()).into(), 1, 16));
        for bias in [false, true] {
            list.push(product("lla_backward_solve", "", d, false, bias, false, FOR_ALL));
            list.push(product("lla_backward_solve", "", d, true, bias, false, FOR_ALL));
        }
        list.push(product("lla_backward_solve", "", d, false, false, true, FOR_USUAL));
        if long {
            list.push(product("lla_backward_solve", "", d, false, false, true, FOR_LONG));
        }
    }
    list
}

/// The const generic `PAGED` for pages of a multiple of so many keys: tiles of small ones are put together from parts of 16.
fn how_paged(page_keys: i32) -> String {
    match page_keys {
        0 => "0",
        16 => "2",
        _ => "1",
    }
    .into()
}

/// The kernels of decoding for queries that share keys.
fn shared(dtype: &'static str, d: i32, other: Option<Tiles>) -> Vec<Variant> {
    let mut list = Vec::new();
    for page_keys in [0, 64, 16] {
        let (_, mut bn, warps, occupancy) = other.unwrap_or_else(|| tiles("lla_decode_together", d));
        if page_keys != 0 {
            // A tile comes from one page, or from four parts of 16.
            bn = 64;
        }
        let generics = vec![
            dtype.into(),
            bn.to_string(),
            d.to_string(),
            how_paged(page_keys),
            u8::from(dtype == "f16").to_string(),
        ];
        list.push(Variant {
            name: format!("lla_decode_together_{dtype}_n{bn}_d{d}_p{page_keys}"),
            module: "decode_together",
            ast: crate::decode_together::decode_together::__module_ast_self,
            bn,
            page_keys,
            tensor: true,
            ..decode("lla_decode_together", dtype, d, generics, warps, occupancy)
        });
    }
    for kind in 0..3 {
        for page_keys in [0, 64, 16] {
            let (_, bn, warps, mut occupancy) = other.unwrap_or_else(|| tiles("lla_decode_pass", d));
            if page_keys == 16 {
                // Putting tiles together takes registers.
                occupancy = 2;
            }
            let generics = vec![
                dtype.into(),
                bn.to_string(),
                d.to_string(),
                how_paged(page_keys),
                kind.to_string(),
                u8::from(dtype == "f16").to_string(),
            ];
            list.push(Variant {
                name: format!("lla_decode_pass{kind}_{dtype}_n{bn}_d{d}_p{page_keys}"),
                module: "decode_pass",
                ast: crate::decode_pass::decode_pass::__module_ast_self,
                bn,
                page_keys,
                kind,
                tensor: true,
                ..decode("lla_decode_pass", dtype, d, generics, warps, occupancy)
            });
        }
        list.push(Variant {
            name: format!("lla_decode_step{kind}_{dtype}_d{d}"),
            module: "decode_step",
            ast: crate::decode_step::decode_step::__module_ast_self,
            kind,
            ..decode(
                "lla_decode_step",
                dtype,
                d,
                vec![dtype.into(), d.to_string(), kind.to_string()],
                if d == 64 { 8 } else { 16 },
                2,
            )
        });
    }
    list
}

/// A kernel of decoding: one query, aligned.
fn decode(
    entry: &'static str,
    dtype: &'static str,
    d: i32,
    generics: Vec<String>,
    warps: i32,
    occupancy: i32,
) -> Variant {
    let kind = if dtype.is_empty() { String::new() } else { format!("_{dtype}") };
    Variant {
        name: format!("{entry}{kind}_d{d}"),
        entry,
        module: "decode_merge",
        ast: crate::decode_merge::decode_merge::__module_ast_self,
        generics,
        dtype,
        bm: 1,
        bn: 0,
        d,
        high: false,
        bias: false,
        aligned: true,
        page_keys: 0,
        kind: 0,
        warps,
        occupancy,
        tensor: false,
    }
}

fn product(
    entry: &'static str,
    dtype: &'static str,
    d: i32,
    high: bool,
    bias: bool,
    aligned: bool,
    kind: i32,
    (bm, bn, warps, occupancy): Tiles,
) -> Variant {
    let (module, ast): (_, fn() -> _) = match entry {
        "lla_forward" => ("forward", crate::forward::forward::__module_ast_self),
        "lla_backward_solve" => ("backward_solve", crate::backward_solve::backward_solve::__module_ast_self),
        "lla_backward_query" => ("backward_query", crate::backward_query::backward_query::__module_ast_self),
        _ => ("backward_key", crate::backward_key::backward_key::__module_ast_self),
    };
    let flag = |x: bool| u8::from(x).to_string();
    let mut generics: Vec<String> = if dtype.is_empty() { vec![] } else { vec![dtype.into()] };
    generics.extend([bm.to_string(), bn.to_string(), d.to_string()]);
    if matches!(entry, "lla_forward" | "lla_backward_solve") {
        generics.push(flag(high));
    }
    generics.push(flag(bias));
    if !dtype.is_empty() {
        generics.push(flag(aligned));
    }
    if entry != "lla_backward_key" {
        generics.push(flag(kind != FOR_ALL));
    }
    let of_type = if dtype.is_empty() { String::new() } else { format!("_{dtype}") };
    Variant {
        name: format!(
            "{entry}{of_type}_m{bm}_n{bn}_d{d}_h{}_b{}_a{}{}",
            flag(high),
            flag(bias),
            flag(aligned),
            if kind == FOR_ALL { "" } else { "_usual" }
        ),
        entry,
        module,
        ast,
        generics,
        dtype,
        bm,
        bn,
        d,
        high,
        bias,
        aligned,
        page_keys: 0,
        kind,
        warps,
        occupancy,
        tensor: true,
    }
}
