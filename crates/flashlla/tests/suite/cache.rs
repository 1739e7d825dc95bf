//! Caches: any pattern of appends, forks, truncations and frees against plain lists, and wrong input.

use crate::common::*;
use flashlla::cache::{Paging, Sharing};
use flashlla::{Attention, CacheShape, CacheView, Cpu, Engine, Error, KvCache, Mask, Result, Tensor, View};
use proptest::prelude::*;
use std::fmt::Debug;

#[derive(Debug, Clone)]
enum Step {
    Append(usize),
    AppendTo(usize, usize),
    Fork(usize, usize),
    Truncate(usize, usize),
    Free(usize),
}

const SEQUENCES: usize = 3;

fn step() -> impl Strategy<Value = Step> {
    let sequence = 0..SEQUENCES;
    prop_oneof![
        3 => (0usize..20).prop_map(Step::Append),
        3 => (sequence.clone(), 0usize..50).prop_map(|(s, n)| Step::AppendTo(s, n)),
        3 => (sequence.clone(), sequence.clone()).prop_map(|(from, to)| Step::Fork(from, to)),
        2 => (sequence.clone(), 0usize..80).prop_map(|(s, n)| Step::Truncate(s, n)),
        2 => sequence.prop_map(Step::Free),
    ]
}

/// Token number `n` of all that were ever made, as a tensor of so many sequences and tokens.
fn tokens(made: &mut usize, sequences: usize, count: usize) -> (Tensor<f32>, Vec<Vec<f32>>) {
    let mut tensor = Tensor::zeros(&[sequences, 2, count, 4]);
    let ids: Vec<Vec<f32>> = (0..sequences)
        .map(|_| {
            (0..count)
                .map(|_| {
                    *made += 1;
                    *made as f32
                })
                .collect()
        })
        .collect();
    for (row, values) in tensor.data_mut().chunks_mut(4).enumerate() {
        let (sequence, head, token) = (row / (2 * count), row / count % 2, row % count);
        values
            .iter_mut()
            .enumerate()
            .for_each(|(d, x)| *x = ids[sequence][token] + 0.25 * d as f32 + 0.1 * head as f32);
    }
    (tensor, ids)
}

/// What a cache holds of a sequence: the numbers of its tokens, each checked in all heads and dims.
fn held(cache: &KvCache<f32>, sequence: usize) -> Vec<f32> {
    let view = cache.view();
    (0..cache.len(sequence))
        .map(|j| {
            let (page, slot) = view.paging().place(sequence, j);
            let first = view.k().at(page, 0, slot, 0);
            for head in 0..2 {
                for d in 0..4 {
                    let want = first + 0.25 * d as f32 + 0.1 * head as f32;
                    assert_eq!(view.k().at(page, head, slot, d), want);
                    assert_eq!(view.v().at(page, head, slot, d), want);
                }
            }
            first
        })
        .collect()
}

fn shape(max_len: usize) -> CacheShape {
    CacheShape { sequences: SEQUENCES, kv_heads: 2, head_dim: 4, value_dim: 4, max_len }
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn any_pattern_of_use_holds_what_lists_would(
        steps in prop::collection::vec(step(), 1..40),
        page_size in prop::option::of(prop::sample::select(vec![16usize, 32])),
        pages in 0usize..12,
    ) {
        let mut cache = match page_size {
            None => KvCache::contiguous(shape(90)),
            Some(size) => KvCache::paged(shape(90), size, pages),
        }.unwrap();
        let mut lists: Vec<Vec<f32>> = vec![vec![]; SEQUENCES];
        let mut made = 0;
        for step in steps {
            let before = cache.clone();
            let done = match step {
                Step::Append(n) => {
                    let (new, ids) = tokens(&mut made, SEQUENCES, n);
                    cache.append(new.view(), new.view())
                        .map(|()| lists.iter_mut().zip(ids).for_each(|(list, ids)| list.extend(ids)))
                }
                Step::AppendTo(s, n) => {
                    let (new, ids) = tokens(&mut made, 1, n);
                    cache.append_to(s, new.view(), new.view()).map(|()| lists[s].extend(&ids[0]))
                }
                Step::Fork(from, to) => cache.fork(from, to).map(|()| lists[to] = lists[from].clone()),
                Step::Truncate(s, n) => cache.truncate(s, n).map(|()| lists[s].truncate(n)),
                Step::Free(s) => cache.free(s).map(|()| lists[s].clear()),
            };
            match done {
                Ok(()) => {}
                Err(Error::CacheFull { .. }) => {
                    // Full is not said lightly: the longest would not fit, or there are not the pages.
                    let extra = match step { Step::Append(n) | Step::AppendTo(_, n) => n, _ => 0 };
                    let longest = lists.iter().map(Vec::len).max().unwrap() + extra;
                    let needed = page_size.map_or(0, |size| SEQUENCES * (extra.div_ceil(size) + 1));
                    prop_assert!(longest > cache.shape().max_len || needed > cache.pages_free(), "{step:?}");
                    prop_assert_eq!(cache.bookkeeping(), before.bookkeeping());
                }
                Err(error) => {
                    let expected = match step {
                        Step::Fork(_, to) => !lists[to].is_empty(),
                        Step::Truncate(s, n) => n > lists[s].len(),
                        _ => false,
                    };
                    prop_assert!(expected, "{step:?}: {error}");
                }
            }
            for (s, list) in lists.iter().enumerate() {
                prop_assert_eq!(&held(&cache, s), list, "sequence {} after {:?}", s, step);
            }
            if page_size.is_some() {
                let view = cache.view();
                let mut used: Vec<i32> = (0..SEQUENCES).flat_map(|s| view.paging().pages_of(s)).copied().collect();
                // As many users as sequences that hold it, and no page lost.
                for page in 0..cache.pages() {
                    let users = used.iter().filter(|&&p| p as usize == page).count();
                    prop_assert_eq!(cache.bookkeeping().users(page), users);
                }
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(used.len(), cache.pages_used());
                // What a caller could hand in.
                let table = view.paging().table();
                prop_assert!(Paging::paged(table, view.lengths(), cache.page_size(), cache.pages(), Sharing::Prefix).is_ok());
            }
        }
        for s in 0..SEQUENCES {
            cache.free(s).unwrap();
        }
        prop_assert!(cache.is_empty() && (page_size.is_none() || cache.pages_free() == cache.pages()));
    }
}

/// However tokens came to be in a cache, decoding from it gives the same bits.
#[test]
fn forks_and_truncations_decode_as_if_they_had_not_been() {
    let (h, d, n) = (2, 8, 45);
    let attention =
        Attention::builder().heads(h).queries(n).head_dim(d).mask(Mask::causal()).build().unwrap();
    let data = Data::random(&attention, 4, Grid::Half);
    let [q, k, v] = [&data.q, &data.k, &data.v].map(cast::<f32>);
    let part = |tensor: &Tensor<f32>, first: usize, count: usize| -> Tensor<f32> {
        let rows = (0..h).flat_map(|head| {
            let at = (head * n + first) * d;
            tensor.data()[at..at + count * d].to_vec()
        });
        Tensor::new(rows.collect(), &[1, h, count, d])
    };
    let shape = CacheShape { sequences: 2, kv_heads: h, head_dim: d, value_dim: d, max_len: 64 };
    let decode = |cache: &KvCache<f32>, sequence: usize| {
        let queries = part(&q, n - 3, 3);
        // Both sequences get the same queries; one is looked at.
        let both = Tensor::new([queries.data(), queries.data()].concat(), &[2, h, 3, d]);
        let (both, view) = (both.view(), cache.view());
        let attention = Attention::builder_for_cache(&both, &view).ridge(0.5).build().unwrap();
        let out = Cpu::new().decode(&attention.decoding(both, &view).unwrap()).unwrap().out;
        out.data()[sequence * h * 3 * d..][..h * 3 * d].to_vec()
    };
    let mut plain = KvCache::contiguous(shape).unwrap();
    plain.append_to(0, k.view(), v.view()).unwrap();
    let want = decode(&plain, 0);
    for mut cache in [KvCache::contiguous(shape).unwrap(), KvCache::paged(shape, 16, 6).unwrap()] {
        // A beam that goes astray, and one that continues from what they had in common.
        let append = |cache: &mut KvCache<f32>, sequence, first, count| {
            cache.append_to(sequence, part(&k, first, count).view(), part(&v, first, count).view()).unwrap();
        };
        append(&mut cache, 0, 0, 21);
        cache.fork(0, 1).unwrap();
        append(&mut cache, 0, 3, 9);
        for first in 21..30 {
            append(&mut cache, 1, first, 1);
        }
        // A speculation that does not hold.
        append(&mut cache, 1, 2, 7);
        cache.truncate(1, 30).unwrap();
        append(&mut cache, 1, 30, 15);
        assert_eq!(cache.lengths(), [30, 45]);
        assert_eq!(decode(&cache, 1), want);
    }
}

#[test]
fn memory_is_accounted_for() {
    let mut cache = KvCache::<f32>::paged(shape(100), 16, 10).unwrap();
    assert_eq!((cache.capacity(), cache.pages(), cache.shape().max_len), (160, 10, 112));
    assert_eq!(cache.bytes(), 160 * 2 * 8 * 4);
    assert_eq!((cache.bytes_used(), cache.pages_free()), (0, 10));
    let new = tokens(&mut 0, 1, 17).0;
    cache.append_to(0, new.view(), new.view()).unwrap();
    cache.fork(0, 2).unwrap();
    assert_eq!((cache.bytes_used(), cache.pages_used()), (32 * 2 * 8 * 4, 2));
    assert_eq!(cache.view().bytes_in_use(), 34 * 2 * 8 * 4);
    let cache = KvCache::<f32>::contiguous(shape(100)).unwrap();
    assert_eq!((cache.capacity(), cache.bytes(), cache.bytes_used()), (300, 300 * 2 * 8 * 4, 0));
}

#[track_caller]
fn refused<T: Debug>(what: &str, result: Result<T>, parts: &[&str]) {
    let message = result.expect_err(what).to_string();
    assert!(!message.contains('\n') && message.len() < 400, "{what}: {message}");
    for part in parts {
        assert!(message.contains(part), "{what}: no {part:?} in {message:?}");
    }
    assert!(message.starts_with(parts[0]), "{what}: the message begins with the argument: {message}");
}

#[test]
fn full_caches_say_so_and_stay_as_they_were() {
    let mut paged = KvCache::<f32>::paged(shape(48), 16, 4).unwrap();
    let new = |sequences, n| tokens(&mut 0, sequences, n).0;
    let sixteen = new(3, 16);
    paged.append(sixteen.view(), sixteen.view()).unwrap();
    let one = new(3, 1);
    refused("pages", paged.append(one.view(), one.view()), &["cache", "3 more pages", "1 free, of 4"]);
    let many = new(1, 33);
    refused(
        "room",
        paged.append_to(1, many.view(), many.view()),
        &["cache", "sequence 1", "16 tokens", "33 more", "32", "48"],
    );
    assert_eq!((paged.lengths(), paged.pages_free()), (&[16, 16, 16][..], 1));
    let mut contiguous = KvCache::<f32>::contiguous(shape(20)).unwrap();
    contiguous.append(sixteen.view(), sixteen.view()).unwrap();
    let five = new(3, 5);
    refused(
        "contiguous",
        contiguous.append(five.view(), five.view()),
        &["cache", "sequence 0", "5 more", "4"],
    );
    assert_eq!(contiguous.lengths(), [16; 3]);
}

#[test]
fn wrong_use_is_refused() {
    let mut cache = KvCache::<f32>::paged(shape(48), 16, 6).unwrap();
    let new = tokens(&mut 0, 1, 4).0;
    let view = new.view();
    cache.append_to(0, view, view).unwrap();
    refused("no such sequence", cache.append_to(3, view, view), &["sequence", "3", "0 to 2"]);
    refused("for all", cache.append(view, view), &["k", "[1, 2, 4, 4]", "[3, 2, 4, 4]"]);
    let short = Tensor::<f32>::zeros(&[1, 2, 3, 4]);
    refused("fewer values", cache.append_to(0, view, short.view()), &["v", "[1, 2, 3, 4]", "[1, 2, 4, 4]"]);
    let narrow = Tensor::<f32>::zeros(&[1, 2, 4, 3]);
    refused("dims", cache.append_to(0, narrow.view(), view), &["k", "[1, 2, 4, 3]", "[1, 2, 4, 4]"]);
    refused("fork onto", cache.fork(1, 0), &["to", "4 tokens", "empty"]);
    refused("fork onto itself", cache.fork(0, 0), &["to", "empty"]);
    refused("fork from none", cache.fork(9, 1), &["from", "9", "0 to 2"]);
    refused("truncate", cache.truncate(0, 5), &["length", "5", "4"]);
    refused("free", cache.free(4), &["sequence", "4"]);
    for size in [0, 8, 24, usize::MAX] {
        let size_text = size.to_string();
        refused(
            "page size",
            KvCache::<f32>::paged(shape(48), size, 6),
            &["page_size", &size_text, "power of two from 16"],
        );
    }
    refused(
        "dim",
        KvCache::<f32>::contiguous(CacheShape { head_dim: 257, ..shape(4) }),
        &["head_dim", "257", "256"],
    );
    refused("heads", KvCache::<f32>::contiguous(CacheShape { kv_heads: 0, ..shape(4) }), &["kv_heads", "0"]);
    refused("memory", KvCache::<f32>::contiguous(shape(1 << 50)), &["cache"]);
    refused("addresses", KvCache::<f32>::contiguous(shape(usize::MAX / 2)), &["cache"]);
}

#[test]
fn wrong_tables_and_lengths_are_refused() {
    let pool = vec![0f32; 5 * 16 * 2];
    let view = || View::bnhd(&pool, [5, 16, 1, 2]).unwrap();
    let paged = |table: &[i32], lengths: &[usize]| CacheView::paged(view(), view(), table, lengths);
    assert!(paged(&[0, 1, 2, 3], &[32, 17]).is_ok());
    assert!(paged(&[0, 99, 2, -7], &[16, 1]).is_ok(), "what lies beyond a length is not looked at");
    refused("too long", paged(&[0, 1, 2, 3], &[32, 33]), &["lengths", "33", "sequence 1", "32"]);
    refused("no such page", paged(&[0, 5, 2, 3], &[32, 1]), &["block_table", "[0, 1] = 5", "0 to 4"]);
    refused("negative", paged(&[0, -1, 2, 3], &[17, 1]), &["block_table", "[0, 1] = -1", "0 to 4"]);
    refused(
        "twice",
        paged(&[0, 1, 2, 1], &[32, 32]),
        &["block_table", "[1, 1] = 1", "[0, 1] is the same", "shared"],
    );
    refused(
        "twice in one",
        paged(&[3, 3, 2, 1], &[32, 32]),
        &["block_table", "[0, 1] = 3", "[0, 0] is the same"],
    );
    refused("ragged", paged(&[0, 1, 2], &[16, 16]), &["block_table", "[3]", "2"]);
    let shared = |table: &[i32], lengths: &[usize]| CacheView::paged_shared(view(), view(), table, lengths);
    assert!(shared(&[0, 1, 0, 2], &[32, 32]).is_ok());
    refused("other parts", shared(&[0, 1, 1, 2], &[32, 32]), &["block_table", "[1, 0] = 1", "[0, 1]"]);
    refused("twice in one", shared(&[3, 3, 2, 1], &[32, 32]), &["block_table", "[0, 1] = 3"]);
    let contiguous = |lengths: &[usize]| CacheView::contiguous(view(), view(), lengths);
    refused("too long", contiguous(&[16, 0, 17, 0, 0]), &["lengths", "17", "sequence 2", "16"]);
    refused("too few", contiguous(&[16, 0]), &["lengths", "[2]", "[5]"]);
    let other = View::bnhd(&pool, [5, 8, 1, 4]).unwrap();
    refused("pools", CacheView::paged(view(), other, &[0], &[1]), &["v", "[5, 1, 8, 4]", "[5, 1, 16, 4]"]);
    refused("page size", CacheView::paged(other, other, &[0], &[1]), &["page_size", "8", "16"]);
}

#[test]
fn wrong_decodings_are_refused() {
    let pool = vec![0f32; 2 * 2 * 32 * 4];
    let pool = View::bhnd(&pool, [2, 2, 32, 4]).unwrap();
    let cache = CacheView::contiguous(pool, pool, &[20, 9]).unwrap();
    let q = vec![0f32; 2 * 4 * 17 * 4];
    let q = |n: usize| View::bhnd(&q[..2 * 4 * n * 4], [2, 4, n, 4]).unwrap();
    let build = |n: usize| Attention::builder_for_cache(&q(n), &cache);
    assert!(build(9).build().unwrap().decoding(q(9), &cache).is_ok());
    for n in [0, 17] {
        let given = n.to_string();
        refused("queries", build(n).build().unwrap().decoding(q(n), &cache), &["queries", &given, "1 to 16"]);
    }
    refused(
        "a length that lies",
        build(10).build().unwrap().decoding(q(10), &cache),
        &["lengths", "9", "sequence 1", "10"],
    );
    refused(
        "other queries",
        build(2).build().unwrap().decoding(q(3), &cache),
        &["q", "[2, 4, 3, 4]", "[2, 4, 2, 4]"],
    );
    for (what, builder, parts) in [
        ("dims", build(1).head_dim(5), &["q", "[2, 4, 1, 4]"][..]),
        ("heads", build(1).kv_heads(4), &["cache", "[2, 2, 32, 4]", "[2, 4, 32, 4]"]),
        ("keys", build(1).keys(31), &["cache", "32", "31"]),
        ("values", build(1).value_dim(3), &["cache", "value_dim 4", "3"]),
        ("offset", build(1).mask(Mask::causal().q_offset(3)), &["q_offset", "3", "0"]),
        ("sequences", build(1).mask(Mask::causal().cu_seqlens([0, 32])), &["cu_seqlens"]),
    ] {
        refused(what, builder.build().unwrap().decoding(q(1), &cache), parts);
    }
    let attention = build(1).build().unwrap();
    let decoding = attention.decoding(q(1), &cache).unwrap();
    let bias = Tensor::<f32>::zeros(&[1, 1, 20, 1]);
    refused("bias", decoding.clone().with_bias(bias.view()), &["bias", "[1, 1, 20, 1]", "32"]);
    refused("probe", decoding.clone().with_probe(q(2)), &["probe", "[2, 4, 2, 4]", "[2, 4, 1, 4]"]);
    let mut out = Tensor::<f32>::zeros(&[2, 4, 1, 5]);
    refused(
        "out",
        Cpu::new().decode_into(&decoding, out.view_mut()),
        &["out", "[2, 4, 1, 5]", "[2, 4, 1, 4]"],
    );
    assert!(out.data().iter().all(|&x| x == 0.0));
}
