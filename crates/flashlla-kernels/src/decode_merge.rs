//! The end of decoding: splits folded into one, the solve, the output.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod decode_merge {
    use super::super::answer::answer::*;
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Folds the parts of one query (up to 64) into the first, in a fixed order.
    /// Grid (batch * kv_heads * group * t, D + 1).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_fold<const D: i32, const W: i32>(
        lengths: *mut i32,
        moments: *mut f32, // [rows, splits, 2 D + 2, D], and memory for 16 more parts behind
        state: *mut f32,
        todo: *mut i32, // [batch * heads * t]: option 256 only
        options: i32,   // 1 causal, 2 window, 256 only queries that `todo` names
        first_row: i32, // the row of block 0
        kv_heads: i32,
        group: i32,
        t: i32,
        window: i32,
        most: i32, // keys that a sequence has room for
        splits: i32,
        split_keys: i32, // keys of a split: a multiple of `tile`
        tile: i32,       // keys of a tile of the split
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let row: i32 = first_row + pid.0;
        let (i, _g, batch, _head): (i32, i32, i32, i32) = row_place(row, t, group, kv_heads);
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, i, window);
        let hi: i32 = decode_end(options, length, t, i);
        let used: i32 = ceil_div(hi - lo / tile * tile, split_keys);
        if (used > 1i32) && is_wanted(options, todo, row) {
            let all: Tile<f32, { [] }> = reduce_max(part_logits(state, pid.0 * splits, used), 0i32);
            let m: f32 = tile_to_scalar(all);
            let mut sum: Tile<f32, { [W] }> = constant(0.0f32, const_shape![W]);
            let at: i64 = wide(pid.0 * splits) * wide(2i32 * D * D + 2i32 * D) + wide(pid.1 * W);
            let base: PointerTile<*mut f32, { [] }> = slice_aligned::<f32>(moments, at);
            let shape: Shape<{ [-1, W] }> = Shape::<{ [-1, W] }> { dims: &[64i32] };
            let strides: Array<{ [-1, 1] }> = Array::<{ [-1, 1] }> { dims: &[2i32 * D * D + 2i32 * D] };
            let view: Tensor<f32, { [-1, W] }> =
                make_tensor_view(base, shape, strides, new_token_unordered());
            let view: Partition<f32, { [16, W] }> = view.partition(const_shape![16, W]);
            let nothing: Tile<f32, { [16, W] }> = constant(0.0f32, const_shape![16, W]);
            for c in 0i32..ceil_div(used, 16i32) {
                let (x, _token): (Tile<f32, { [16, W] }>, Token) = load_view_raw(
                    &view,
                    [c, 0i32],
                    Some(new_token_unordered()),
                    ordering::Weak,
                    scope::TileBlock,
                    tma::Disabled,
                    None,
                    [true, true],
                    const_shape![16, W],
                );
                let at: i64 = wide(pid.0 * splits + c * 16i32) * wide(2i32);
                let of: Tile<f32, { [16] }> =
                    load_column::<f32, 16>(slice::<f32>(state, at), 2i32, used - c * 16i32);
                let f: Tile<f32, { [16] }> = exp2(of - broadcast_scalar(m, const_shape![16]), ftz::Enabled);
                let there: Tile<i32, { [16] }> = iota(const_shape![16]);
                let there: Tile<bool, { [16] }> =
                    lt_tile(there, broadcast_scalar(used - c * 16i32, const_shape![16]));
                let there: Tile<bool, { [16, W] }> =
                    there.reshape(const_shape![16, 1]).broadcast(const_shape![16, W]);
                let f: Tile<f32, { [16, W] }> = f.reshape(const_shape![16, 1]).broadcast(const_shape![16, W]);
                let part: Tile<f32, { [W] }> = reduce_sum(select(there, x * f, nothing), 0i32);
                sum = sum + part;
            }
            store_column::<f32, W>(base, W, sum);
        }
    }

    /// Solves for one query and writes its output, from its folded parts.
    /// Grid (batch * kv_heads * group * t).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_merge<E: ElementType, const D: i32>(
        q: *mut E,
        k: *mut E,
        table: *mut i32,
        lengths: *mut i32,
        moments: *mut f32,
        state: *mut f32,
        ridge: *mut f32,      // [batch, heads, t], strided
        out: *mut E,          // out [batch, heads, t, dv], strided
        lse: *mut f32,        // out [batch, heads, t], natural
        key_mean: *mut f32,   // out [batch, heads, t, d] if save_state
        probe: *mut f32,      // out [batch, heads, t, d] if save_state; in: the given one under option 16
        iterations: *mut i32, // out [batch, heads, t] if diagnostics
        relative: *mut f32,   // out [batch, heads, t] if diagnostics: |r| / |delta|
        todo: *mut i32,       // [batch * heads * t]: option 256 only
        options: i32, // 1 causal, 2 window, 16 probe given, 64 block table, 128 not folded yet, 256 only queries that `todo` names
        first_row: i32, // the row of block 0
        kv_heads: i32,
        group: i32,
        t: i32,
        window: i32,
        most: i32, // keys that a sequence has room for
        width: i32,
        pages: i32,
        page_size: i32,
        splits: i32,
        split_keys: i32, // keys of a split: a multiple of `tile`
        tile: i32,       // keys of a tile of the split
        d: i32,
        dv: i32,
        q_batch: i64,
        q_head: i64,
        q_row: i32,
        k_page: i32,
        k_head: i64,
        k_row: i32,
        ridge_batch: i32,
        ridge_head: i32,
        ridge_row: i32,
        out_batch: i64,
        out_head: i64,
        out_row: i32,
        tolerance2: f32, // square of the relative residual asked for
        max_iterations: i32,
        save_state: i32,
        diagnostics: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let row: i32 = first_row + pid.0;
        let (i, g, batch, head): (i32, i32, i32, i32) = row_place(row, t, group, kv_heads);
        let query_head: i32 = head * group + g;
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, i, window);
        let hi: i32 = decode_end(options, length, t, i);
        let out_at: i64 = wide(batch) * out_batch + wide(query_head) * out_head + wide(i) * wide(out_row);
        if is_wanted(options, todo, row) {
            if hi <= lo {
                write_nothing::<E, D>(
                    out,
                    out_at,
                    lse,
                    key_mean,
                    probe,
                    iterations,
                    relative,
                    row,
                    d,
                    dv,
                    options,
                    save_state,
                    diagnostics,
                );
            } else {
                let used: i32 = ceil_div(hi - lo / tile * tile, split_keys);
                let part: i32 = pid.0 * splits;
                let logits: Tile<f32, { [64] }> = part_logits(state, part, used);
                let all: Tile<f32, { [] }> = reduce_max(logits, 0i32);
                let m: f32 = tile_to_scalar(all);
                let weights: Tile<f32, { [64] }> = load_column::<f32, 64>(
                    slice::<f32>(state, wide(part) * wide(2i32) + wide(1i32)),
                    2i32,
                    used,
                );
                let f: Tile<f32, { [64] }> =
                    exp2(logits - broadcast_scalar(m, const_shape![64]), ftz::Enabled);
                let all: Tile<f32, { [] }> = reduce_sum(weights * f, 0i32);
                let l: f32 = tile_to_scalar(all);
                // Few splits are folded right here.
                let mut parts: i32 = 1i32;
                if (options & 128i32) != 0i32 {
                    parts = used;
                }
                let mut s: Tile<f32, { [D, D] }> = constant(0.0f32, const_shape![D, D]);
                let mut k_sum: Tile<f32, { [D] }> = constant(0.0f32, const_shape![D]);
                let mut v_sum: Tile<f32, { [D] }> = constant(0.0f32, const_shape![D]);
                for c in 0i32..parts {
                    let f: f32 = part_factor(options, state, part + c, m);
                    let x: Tile<f32, { [D, D] }> = load_square::<D>(moments, part + c, 0i32);
                    s = s + x * broadcast_scalar(f, const_shape![D, D]);
                    let at: i64 = wide(part + c) * wide(2i32 * D * D + 2i32 * D) + wide(2i32 * D * D);
                    let x: Tile<f32, { [D] }> = load_one::<f32, D>(moments, at, D);
                    k_sum = k_sum + x * broadcast_scalar(f, const_shape![D]);
                    let x: Tile<f32, { [D] }> = load_one::<f32, D>(moments, at + wide(D), D);
                    v_sum = v_sum + x * broadcast_scalar(f, const_shape![D]);
                }
                let inverse: f32 = 1.0f32 / l;
                let mean: Tile<f32, { [D] }> = k_sum * broadcast_scalar(inverse, const_shape![D]);
                let v_mean: Tile<f32, { [D] }> = v_sum * broadcast_scalar(inverse, const_shape![D]);
                let mut page: i32 = batch;
                if (options & 64i32) != 0i32 {
                    page = page_of::<1>(table, width, batch, lo, page_size, pages);
                }
                let shift: Tile<f32, { [D] }> = load_one::<E, D>(
                    k,
                    wide(page) * wide(k_page) + wide(head) * k_head + wide(lo % page_size) * wide(k_row),
                    d,
                );
                let at: i64 = wide(batch) * q_batch + wide(query_head) * q_head + wide(i) * wide(q_row);
                let query: Tile<f32, { [D] }> = load_one::<E, D>(q, at, d);
                let delta: Tile<f32, { [D] }> = mean - (query - shift);
                let mut x: Tile<f32, { [1, D] }> = constant(0.0f32, const_shape![1, D]);
                let mut it: i32 = 0i32;
                let mut left: f32 = 0.0f32;
                if (options & 16i32) != 0i32 {
                    let given: Tile<f32, { [D] }> = load_one::<f32, D>(probe, wide(row) * wide(d), d);
                    x = given.reshape(const_shape![1, D]);
                } else {
                    let ridge_at: i32 = batch * ridge_batch + query_head * ridge_head + i * ridge_row;
                    let lambda: f32 = load_scalar(slice::<f32>(ridge, wide(ridge_at)));
                    let (found, steps, rest): (Tile<f32, { [1, D] }>, i32, f32) =
                        probe_of::<D>(s, mean, delta, inverse, lambda, tolerance2, max_iterations);
                    x = found;
                    it = steps;
                    left = rest;
                }
                let mut cov: Tile<f32, { [D, D] }> = constant(0.0f32, const_shape![D, D]);
                for c in 0i32..parts {
                    let f: f32 = part_factor(options, state, part + c, m);
                    let x: Tile<f32, { [D, D] }> = load_square::<D>(moments, part + c, 1i32);
                    cov = cov + x * broadcast_scalar(f, const_shape![D, D]);
                }
                write_answer::<E, D>(
                    cov,
                    v_mean,
                    mean,
                    shift,
                    x,
                    m,
                    l,
                    it,
                    left,
                    out,
                    out_at,
                    lse,
                    key_mean,
                    probe,
                    iterations,
                    relative,
                    row,
                    d,
                    dv,
                    options,
                    save_state,
                    diagnostics,
                );
            }
        }
    }
}
