//! Random descriptions, which proptest can shrink.

use super::{Data, Grid};
use flashlla::{Attention, AttentionBuilder, Mask, Ridge, Solver};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Sizes around the edges of tiles of 6, 16, 48, 64, 96, 128, 192 and 256.
pub const TILE_EDGES: [usize; 38] = [
    1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 50, 63, 64, 65, 95, 96, 97, 127, 128,
    129, 130, 191, 192, 193, 255, 256, 257, 300, 513,
];

/// How a ridge is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RidgeKind {
    Scalar,
    PerHead,
    PerQuery,
    /// Per batch and query, the same for all heads.
    Broadcast,
}

/// How a bias is given: whether it has a batch axis, and which heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bias {
    pub batched: bool,
    /// 0: shared by all heads, 1: per KV head, 2: per query head.
    pub heads: u8,
}

/// A random problem.
#[derive(Debug, Clone)]
pub struct Case {
    pub batch: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub queries: usize,
    pub keys: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub mask: Mask,
    /// Relative to the default.
    pub scale: f64,
    /// The middle of the ridges.
    pub ridge: f64,
    pub ridge_kind: RidgeKind,
    pub bias: Option<Bias>,
    pub probe: bool,
    pub grid: Grid,
    pub seed: u64,
}

impl Case {
    pub fn builder(&self) -> AttentionBuilder {
        Attention::builder()
            .batch(self.batch)
            .heads(self.kv_heads * self.group)
            .kv_heads(self.kv_heads)
            .queries(self.queries)
            .keys(self.keys)
            .head_dim(self.head_dim)
            .value_dim(self.value_dim)
            .mask(self.mask.clone())
            .scale(self.grid.round(self.scale * (self.head_dim as f64).powf(-0.5)))
            .ridge(self.ridge())
            .solver(Solver::default())
    }

    pub fn attention(&self) -> Attention {
        self.builder().build().unwrap()
    }

    fn ridge(&self) -> Ridge {
        let rng = &mut StdRng::seed_from_u64(self.seed ^ 0x51d9e);
        let (b, h, n) = (self.batch, self.kv_heads * self.group, self.queries);
        let mut draw = |len: usize| -> Vec<f64> {
            (0..len).map(|_| self.grid.round(self.ridge * rng.random_range(0.5..2.0))).collect()
        };
        match self.ridge_kind {
            RidgeKind::Scalar => Ridge::scalar(self.grid.round(self.ridge)),
            RidgeKind::PerHead => Ridge::per_head(draw(h)),
            RidgeKind::PerQuery => Ridge::per_query(draw(b * h * n), [b, h, n]),
            RidgeKind::Broadcast => Ridge::broadcast(draw(b * n), [b, 1, n]),
        }
    }

    pub fn data(&self) -> Data {
        let mut data = Data::random(&self.attention(), self.seed, self.grid);
        if let Some(bias) = self.bias {
            let heads = [1, self.kv_heads, self.kv_heads * self.group][bias.heads as usize];
            let batch = if bias.batched { self.batch } else { 1 };
            data = data.with_bias([batch, heads, self.keys, 1], self.seed, self.grid);
        }
        if self.probe {
            data = data.with_probe(self.seed, self.grid);
        }
        data
    }
}

/// A number of tokens: mostly small or at a tile's edge.
fn tokens() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 1usize..40, 3 => prop::sample::select(TILE_EDGES.as_slice()), 1 => 40usize..300]
}

fn dim() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 1usize..10, 4 => 10usize..70, 2 => 70usize..=256, 1 => prop::sample::select(&[8, 16, 32, 64, 128, 256][..])]
}

/// A random mask, from numbers that do not depend on the sizes.
#[derive(Debug, Clone)]
struct RawMask {
    causal: bool,
    leave_one_out: bool,
    window: Option<f64>,
    offset: Option<f64>,
    /// Boundaries between packed sequences, as parts of the keys; the same one twice makes an empty sequence.
    boundaries: Option<Vec<(f64, bool)>>,
}

impl RawMask {
    fn fit(&self, queries: usize, keys: usize) -> Mask {
        let mut mask = if self.causal { Mask::causal() } else { Mask::full() };
        if self.leave_one_out {
            mask = mask.leave_one_out();
        }
        if let Some(window) = self.window {
            mask = mask.window(1 + (window * window * (keys as f64 + 2.0)) as usize);
        }
        match &self.boundaries {
            Some(boundaries) if queries <= keys => {
                let mut cu: Vec<usize> = vec![0, keys];
                for &(part, twice) in boundaries {
                    let boundary = (part * (keys + 1) as f64) as usize;
                    cu.extend(vec![boundary.min(keys); 1 + usize::from(twice)]);
                }
                cu.sort_unstable();
                let offset = (self.offset.unwrap_or(0.0) * (keys - queries + 1) as f64) as usize;
                mask.cu_seqlens(cu).q_offset(offset.min(keys - queries) as i64)
            }
            _ => {
                // From before all keys to beyond them.
                let (n, m) = (queries as f64, keys as f64);
                mask.q_offset(self.offset.map_or(0, |part| (part * (m + n) - n).round() as i64))
            }
        }
    }
}

fn raw_mask() -> impl Strategy<Value = RawMask> {
    (
        any::<bool>(),
        prop::bool::weighted(0.3),
        prop::option::weighted(0.4, 0.0..1.0),
        prop::option::weighted(0.4, 0.0..1.0),
        prop::option::weighted(0.35, prop::collection::vec((0.0..1.0, prop::bool::weighted(0.3)), 0..8)),
    )
        .prop_map(|(causal, leave_one_out, window, offset, boundaries)| RawMask {
            causal,
            leave_one_out,
            window,
            offset,
            boundaries,
        })
}

/// A random mask with sizes that it fits: queries, keys.
pub fn mask() -> impl Strategy<Value = (usize, usize, Mask)> {
    (raw_mask(), tokens(), prop::option::weighted(0.4, tokens())).prop_map(|(mask, keys, queries)| {
        let queries = queries.unwrap_or(keys);
        let mask = mask.fit(queries, keys);
        (queries, keys, mask)
    })
}

fn ridge_kind() -> impl Strategy<Value = RidgeKind> {
    prop::sample::select(
        &[RidgeKind::Scalar, RidgeKind::PerHead, RidgeKind::PerQuery, RidgeKind::Broadcast][..],
    )
}

fn bias() -> impl Strategy<Value = Option<Bias>> {
    prop::option::weighted(0.4, (any::<bool>(), 0u8..3).prop_map(|(batched, heads)| Bias { batched, heads }))
}

/// A random problem for which the dense engine needs at most about `budget` multiplications in its matrices.
pub fn case(budget: usize) -> impl Strategy<Value = Case> {
    let sizes =
        (1usize..=2, 1usize..=2, 1usize..=3, tokens(), prop::option::weighted(0.4, tokens()), dim(), dim());
    let numbers = (-1.5f64..0.7, -1.3f64..2.0, any::<u64>(), prop::sample::select(&Grid::ALL[..]));
    let parts = (raw_mask(), ridge_kind(), bias(), prop::bool::weighted(0.2));
    (sizes, numbers, parts).prop_map(move |(sizes, numbers, parts)| {
        let (mut batch, mut kv_heads, mut group, keys, queries, mut head_dim, value_dim) = sizes;
        let (scale, ridge, seed, grid) = numbers;
        let (mask, ridge_kind, bias, probe) = parts;
        let mut queries = queries.unwrap_or(keys);
        // Long sequences get few heads and narrow keys, wide keys few queries.
        if keys > 100 {
            (batch, kv_heads) = (1, 1);
            group = group.min(2);
            if queries > 100 {
                head_dim = head_dim.min(20);
            }
        }
        let per_query = head_dim * head_dim * (keys + head_dim) * batch * kv_heads * group;
        queries = queries.min((budget / per_query).max(2));
        Case {
            batch,
            kv_heads,
            group,
            queries,
            keys,
            head_dim,
            value_dim,
            mask: mask.fit(queries, keys),
            scale: 10f64.powf(scale),
            ridge: 10f64.powf(ridge),
            ridge_kind,
            bias,
            probe,
            grid,
            seed,
        }
    })
}

/// Settings for a property test of so many cases, which leaves no files behind. `FLASHLLA_TEST_EFFORT=50` runs fifty
/// times as many: a tolerance that one run in a hundred exceeds shows in a few minutes.
pub fn cases(cases: u32) -> ProptestConfig {
    let effort = std::env::var("FLASHLLA_TEST_EFFORT")
        .map_or(1, |text| text.parse().expect("FLASHLLA_TEST_EFFORT: a whole number of times"));
    ProptestConfig {
        cases: cases * effort,
        failure_persistence: None,
        max_shrink_iters: 400,
        ..ProptestConfig::default()
    }
}
