//! Numbers that are not finite: the kernels read them as zeros, because a weight of 0 does not keep a NaN out of a product.
//! What they spoil is found here, on the host, as the CPU engine has it.

use crate::cpu::Bad;
use crate::{Attention, Element};

/// The tokens with a number that is not finite, by batch and head.
pub fn bad_tokens<T: Element>(data: &[T], [b, h, n, d]: [usize; 4]) -> Vec<Bad> {
    let head = |i: usize| {
        let tokens = data[i * n * d..][..n * d].chunks_exact(d);
        Bad::new(tokens.map(|token| token.iter().any(|x| !x.is_finite())))
    };
    (0..b * h).map(head).collect()
}

/// The tokens of a problem that hold a number that is not finite.
pub struct Spoilt {
    q: Vec<Bad>,
    k: Vec<Bad>,
    v: Vec<Bad>,
    /// Keys and biases together, by batch and query head, when there is a bias: one that it hides does no harm.
    biased: Vec<Bad>,
}

impl Spoilt {
    /// Of contiguous tensors, and a bias `[batch, query head, M]` with the strides of the first two.
    pub fn new<T: Element>(a: &Attention, [q, k, v]: [&[T]; 3], bias: Option<(&[f32], [i32; 2])>) -> Self {
        let k = bad_tokens(k, a.key_shape());
        let mut biased = vec![];
        if let Some((values, strides)) = bias {
            for row in 0..a.batch() * a.heads() {
                let (b, h) = (row / a.heads(), row % a.heads());
                let bias = &values[b * strides[0] as usize + h * strides[1] as usize..][..a.keys()];
                let k = &k[b * a.kv_heads() + h / a.group()];
                let bad = |(j, x): (usize, &f32)| *x != f32::NEG_INFINITY && (!x.is_finite() || k.at(j));
                biased.push(Bad::new(bias.iter().enumerate().map(bad)));
            }
        }
        Self { q: bad_tokens(q, a.query_shape()), v: bad_tokens(v, a.value_shape()), k, biased }
    }

    /// Whether query `i` of a batch's head, or a key that it sees, is not finite; and whether a value that it sees is not.
    pub fn at(&self, a: &Attention, batch: usize, head: usize, i: usize) -> [bool; 2] {
        let visible = a.mask().visible(i, a.keys());
        if visible.count() == 0 {
            return [false, false];
        }
        let (row, kv) = (batch * a.heads() + head, batch * a.kv_heads() + head / a.group());
        let keys = self.biased.get(row).unwrap_or(&self.k[kv]);
        [self.q[row].at(i) || keys.seen(&visible), self.v[kv].seen(&visible)]
    }
}

/// Every query's batch, head and place, in the order of the outputs.
pub fn rows(a: &Attention) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let (batch, heads, queries) = (a.batch(), a.heads(), a.queries());
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..queries).map(move |i| (b, h, i))))
}

/// Which keys of every KV head are seen by a query that is marked.
pub fn seen_by_marked(a: &Attention, marked: &[bool]) -> Vec<bool> {
    let (keys, heads) = (a.keys(), a.batch() * a.kv_heads());
    let mut seen = vec![false; heads * keys];
    for head in 0..heads {
        // Queries come and go with every key: what a query sees is a range, less at most its own place.
        let (mut change, mut skipped) = (vec![0i64; keys + 1], vec![0i64; keys]);
        let (batch, kv) = (head / a.kv_heads(), head % a.kv_heads());
        for h in kv * a.group()..(kv + 1) * a.group() {
            let rows = &marked[(batch * a.heads() + h) * a.queries()..][..a.queries()];
            for (i, _) in rows.iter().enumerate().filter(|(_, marked)| **marked) {
                let visible = a.mask().visible(i, keys);
                change[visible.start] += 1;
                change[visible.end] -= 1;
                visible.skip.into_iter().for_each(|own| skipped[own] += 1);
            }
        }
        let mut count = 0;
        for j in 0..keys {
            count += change[j];
            seen[head * keys + j] = count > skipped[j];
        }
    }
    seen
}
