//! Decoding of one query in one launch: moments of all its keys, the solve, the output. For contexts that are not split.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod decode_whole {
    use super::super::answer::answer::*;
    use super::super::decode::decode::*;
    use super::super::moments::moments::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// The generics are those of `lla_decode_split`.
    /// Grid (batch * kv_heads * group * t).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_whole<
        E: ElementType,
        const BN: i32,
        const D: i32,
        const PAGED: i32,
        const WIDE: i32,
    >(
        q: *mut E,            // [batch, heads, t, d], strided
        k: *mut E,            // [pages, kv_heads, page_size, d], strided
        v: *mut E,            // [pages, kv_heads, page_size, dv], strided
        table: *mut i32,      // [batch, width]; not with PAGED 0
        lengths: *mut i32,    // [batch]
        scale: *mut f32,      // [kv_heads], strided
        ridge: *mut f32,      // [batch, heads, t], strided
        out: *mut E,          // out [batch, heads, t, dv], strided
        lse: *mut f32,        // out [batch, heads, t], natural
        key_mean: *mut f32,   // out [batch, heads, t, d] if save_state
        probe: *mut f32,      // out [batch, heads, t, d] if save_state; in: the given one under option 16
        iterations: *mut i32, // out [batch, heads, t] if diagnostics
        relative: *mut f32,   // out [batch, heads, t] if diagnostics: |r| / |delta|
        todo: *mut i32,       // [batch * heads * t]: option 256 only
        options: i32,         // 1 causal, 2 window, 16 probe given, 256 only queries that `todo` names
        kv_heads: i32,
        group: i32, // query heads per KV head
        t: i32,     // new queries per sequence
        window: i32,
        most: i32, // keys that a sequence has room for
        width: i32,
        pages: i32,
        page_size: i32,
        d: i32,
        dv: i32,
        q_batch: i64,
        q_head: i64,
        q_row: i32,
        k_page: i32,
        k_head: i64,
        k_row: i32,
        v_page: i32,
        v_head: i64,
        v_row: i32,
        scale_head: i32,
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
        let row: i32 = pid.0;
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
                let q_at: i64 = wide(batch) * q_batch + wide(query_head) * q_head + wide(i) * wide(q_row);
                let ridge_at: i32 = batch * ridge_batch + query_head * ridge_head + i * ridge_row;
                let lambda: f32 = load_scalar(slice::<f32>(ridge, wide(ridge_at)));
                let (s, t, k_sum, v_sum, m, l): (
                    Tile<f32, { [D, D] }>,
                    Tile<f32, { [D, D] }>,
                    Tile<f32, { [D] }>,
                    Tile<f32, { [D] }>,
                    f32,
                    f32,
                ) = moments_of::<E, BN, D, PAGED, WIDE>(
                    q,
                    q_at,
                    k,
                    v,
                    table,
                    scale,
                    batch,
                    head,
                    lo,
                    hi,
                    lo / BN,
                    ceil_div(hi, BN),
                    width,
                    pages,
                    page_size,
                    d,
                    dv,
                    k_page,
                    k_head,
                    k_row,
                    v_page,
                    v_head,
                    v_row,
                    scale_head,
                );
                let inverse: f32 = 1.0f32 / l;
                let mean: Tile<f32, { [D] }> = k_sum * broadcast_scalar(inverse, const_shape![D]);
                let v_mean: Tile<f32, { [D] }> = v_sum * broadcast_scalar(inverse, const_shape![D]);
                let page: i32 = page_of::<PAGED>(table, width, batch, lo, page_size, pages);
                let shift: Tile<f32, { [D] }> = load_one::<E, D>(
                    k,
                    wide(page) * wide(k_page) + wide(head) * k_head + wide(lo % page_size) * wide(k_row),
                    d,
                );
                let query: Tile<f32, { [D] }> = load_one::<E, D>(q, q_at, d);
                let delta: Tile<f32, { [D] }> = mean - (query - shift);
                let mean_r: Tile<f32, { [1, D] }> = mean.reshape(const_shape![1, D]);
                let mean_r: Tile<f32, { [D, D] }> = mean_r.broadcast(const_shape![D, D]);
                let mut x: Tile<f32, { [D, 8] }> = constant(0.0f32, const_shape![D, 8]);
                let mut it: i32 = 0i32;
                let mut left: f32 = 0.0f32;
                if (options & 16i32) != 0i32 {
                    let given: Tile<f32, { [D] }> = load_one::<f32, D>(probe, wide(row) * wide(d), d);
                    x = given.reshape(const_shape![D, 1]).broadcast(const_shape![D, 8]);
                } else {
                    let mean_c: Tile<f32, { [D, 1] }> = mean.reshape(const_shape![D, 1]);
                    let c: Tile<f32, { [D, D] }> = s * broadcast_scalar(inverse, const_shape![D, D])
                        - mean_c.broadcast(const_shape![D, D]) * mean_r;
                    let unit: f32 = single(pow2_floor::<{ [1, 1] }>(number(largest::<D, D>(c))));
                    let scaled: Tile<f32, { [D, D] }> =
                        c * broadcast_scalar(1.0f32 / unit, const_shape![D, D]);
                    let first: Tile<f16, { [D, D] }> = convert_tile(scaled);
                    let second: Tile<f16, { [D, D] }> = low_part::<D, D>(scaled, first);
                    let unit: Tile<f32, { [D, 8] }> = broadcast_scalar(unit, const_shape![D, 8]);
                    let (found, steps, rest): (Tile<f32, { [D, 8] }>, i32, f32) =
                        probe_of::<D>(first, second, unit, delta, lambda, tolerance2, max_iterations);
                    x = found;
                    it = steps;
                    left = rest;
                }
                let v_c: Tile<f32, { [D, 1] }> = v_mean.reshape(const_shape![D, 1]);
                let cov: Tile<f32, { [D, D] }> = t * broadcast_scalar(inverse, const_shape![D, D])
                    - v_c.broadcast(const_shape![D, D]) * mean_r;
                let row_x: Tile<f32, { [D] }> = reduce_max(x, 1i32);
                let row_x: Tile<f32, { [1, D] }> = row_x.reshape(const_shape![1, D]);
                let along: Tile<f32, { [D] }> = reduce_sum(cov * row_x.broadcast(const_shape![D, D]), 1i32);
                write_answer::<E, D>(
                    v_mean - along,
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
