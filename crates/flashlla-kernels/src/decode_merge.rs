//! The end of decoding: splits folded into one, the solve, the output.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod decode_merge {
    use super::super::answer::answer::*;
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Folds the parts of one query (up to 64), in a fixed order, into what the solve's products take: the covariances of keys with keys
    /// and of values with keys, each row in two fp16 terms and a unit of its own.
    ///
    /// Grid (batch * kv_heads * group * t, any number): every tile block takes R rows of the covariances at a time, one the means. One warp,
    /// each thread of which has some of R D = 128 = W columns of every part, so that nothing crosses threads but the rows' sizes.
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_fold<const D: i32, const R: i32, const W: i32>(
        lengths: *mut i32,
        moments: *mut f32, // [rows, splits, 2 D + 2, D], and memory for 8 more parts behind
        state: *mut f32,   // [rows, splits, 2]
        folded: *mut f16, // out [rows, 4 D, D]: first and second terms of the one covariance, then of the other
        sums: *mut f32, // out [rows, 4 D + 16]: mean key, mean value, the rows' units, largest logit (base 2), sum of weights
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
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let row: i32 = first_row + pid.0;
        let (i, _g, batch, _head): (i32, i32, i32, i32) = row_place(row, t, group, kv_heads);
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, i, window);
        let hi: i32 = decode_end(options, length, t, i);
        if (hi > lo) && is_wanted(options, todo, row) {
            let used: i32 = ceil_div(hi - lo / tile * tile, split_keys);
            let part: i32 = pid.0 * splits;
            let logits: Tile<f32, { [64] }> = part_logits(state, part, used);
            let all: Tile<f32, { [] }> = reduce_max(logits, 0i32);
            let m: f32 = tile_to_scalar(all);
            let weights: Tile<f32, { [64] }> =
                load_column::<f32, 64>(slice::<f32>(state, wide(part) * wide(2i32) + wide(1i32)), 2i32, used);
            let f: Tile<f32, { [64] }> = exp2(logits - broadcast_scalar(m, const_shape![64]), ftz::Enabled);
            let all: Tile<f32, { [] }> = reduce_sum(weights * f, 0i32);
            let l: f32 = tile_to_scalar(all);
            let inverse: f32 = 1.0f32 / l;
            // Numbers of a part: its matrices, its sums of keys and of values.
            let size: i32 = 2i32 * D * D + 2i32 * D;
            let from: i64 = wide(part) * wide(size);
            let means: i64 = from + wide(2i32 * D * D);
            let to: i64 = wide(pid.0) * wide(4i32 * D + 16i32);
            for n in 0i32..ceil_div(2i32 * D / R + 1i32 - pid.1, grid.1) {
                let turn: i32 = pid.1 + n * grid.1;
                let mut right: Tile<f32, { [D] }> = constant(0.0f32, const_shape![D]);
                if turn * R == 2i32 * D {
                    let mut v_mean: Tile<f32, { [D] }> = right;
                    for c in 0i32..ceil_div(used, 8i32) {
                        let f: Tile<f32, { [8] }> = factors(state, part, c * 8i32, used, m);
                        right = right + eight_parts::<D>(moments, means, size, c, used, f);
                        v_mean = v_mean + eight_parts::<D>(moments, means + wide(D), size, c, used, f);
                    }
                    let of: Tile<f32, { [D] }> = broadcast_scalar(inverse, const_shape![D]);
                    store_column::<f32, D>(slice::<f32>(sums, to), D, right * of);
                    store_column::<f32, D>(slice::<f32>(sums, to + wide(D)), D, v_mean * of);
                    store_number(sums, to + wide(4i32 * D), m);
                    store_number(sums, to + wide(4i32 * D + 1i32), l);
                } else {
                    let mut of_values: i32 = 0i32;
                    if turn * R >= D {
                        of_values = 1i32;
                    }
                    let mut sum: Tile<f32, { [W] }> = constant(0.0f32, const_shape![W]);
                    let mut left: Tile<f32, { [R] }> = constant(0.0f32, const_shape![R]);
                    for c in 0i32..ceil_div(used, 8i32) {
                        let f: Tile<f32, { [8] }> = factors(state, part, c * 8i32, used, m);
                        sum = sum + eight_parts::<W>(moments, from + wide(turn * W), size, c, used, f);
                        right = right + eight_parts::<D>(moments, means, size, c, used, f);
                        // Sums of keys and of values lie one after the other, as the rows do.
                        left = left + eight_ends::<R>(moments, means + wide(turn * R), size, c, used, f);
                    }
                    let second_moments: Tile<f32, { [R, D] }> = sum.reshape(const_shape![R, D]);
                    let of: Tile<f32, { [R, D] }> = broadcast_scalar(inverse, const_shape![R, D]);
                    let left_mean: Tile<f32, { [R, D] }> =
                        left.reshape(const_shape![R, 1]).broadcast(const_shape![R, D]);
                    let right_mean: Tile<f32, { [R, D] }> =
                        right.reshape(const_shape![1, D]).broadcast(const_shape![R, D]);
                    let c: Tile<f32, { [R, D] }> = second_moments * of - (left_mean * of) * (right_mean * of);
                    let most: Tile<f32, { [R] }> = reduce_max(absf(c), 1i32);
                    let unit: Tile<f32, { [R, 1] }> =
                        pow2_floor::<{ [R, 1] }>(most.reshape(const_shape![R, 1]));
                    let one: Tile<f32, { [R, 1] }> = constant(1.0f32, const_shape![R, 1]);
                    let scaled: Tile<f32, { [R, D] }> =
                        c * quotient::<{ [R, 1] }>(one, unit).broadcast(const_shape![R, D]);
                    let first: Tile<f16, { [R, D] }> = convert_tile(scaled);
                    let second: Tile<f16, { [R, D] }> = low_part::<R, D>(scaled, first);
                    let at: i64 = wide(pid.0) * wide(4i32 * D * D) + wide(of_values * D * D + turn * W);
                    let first: Tile<f16, { [W] }> = first.reshape(const_shape![W]);
                    let second: Tile<f16, { [W] }> = second.reshape(const_shape![W]);
                    store_column::<f16, W>(slice::<f16>(folded, at), W, first);
                    store_column::<f16, W>(slice::<f16>(folded, at + wide(D * D)), W, second);
                    store_column::<f32, R>(
                        slice::<f32>(sums, to + wide(2i32 * D + turn * R)),
                        R,
                        unit.reshape(const_shape![R]),
                    );
                }
            }
        }
    }

    /// What the moments of parts `first` to `first` + 7 count beside the others'.
    unsafe fn factors(state: *mut f32, part: i32, first: i32, used: i32, m: f32) -> Tile<f32, { [8] }> {
        let at: i64 = wide(part + first) * wide(2i32);
        let of: Tile<f32, { [8] }> = load_column::<f32, 8>(slice::<f32>(state, at), 2i32, used - first);
        let f: Tile<f32, { [8] }> = exp2(of - broadcast_scalar(m, const_shape![8]), ftz::Enabled);
        f
    }

    /// Which of parts `8 c` to `8 c` + 7 there are.
    fn parts_there(c: i32, used: i32) -> Tile<bool, { [8] }> {
        let p: Tile<i32, { [8] }> = iota(const_shape![8]);
        lt_tile(p, broadcast_scalar(used - c * 8i32, const_shape![8]))
    }

    /// Eight parts' `C` numbers, `at` in the first and `size` apart, times their factors, added up.
    unsafe fn eight_parts<const C: i32>(
        moments: *mut f32,
        at: i64,
        size: i32,
        c: i32,
        used: i32,
        f: Tile<f32, { [8] }>,
    ) -> Tile<f32, { [C] }> {
        let shape: Shape<{ [-1, C] }> = Shape::<{ [-1, C] }> { dims: &[64i32] };
        let strides: Array<{ [-1, 1] }> = Array::<{ [-1, 1] }> { dims: &[size] };
        let view: Tensor<f32, { [-1, C] }> =
            make_tensor_view(slice_aligned::<f32>(moments, at), shape, strides, new_token_unordered());
        let view: Partition<f32, { [8, C] }> = view.partition(const_shape![8, C]);
        let (x, _token): (Tile<f32, { [8, C] }>, Token) = load_view_raw(
            &view,
            [c, 0i32],
            Some(new_token_unordered()),
            ordering::Weak,
            scope::TileBlock,
            tma::Disabled,
            None,
            [true, true],
            const_shape![8, C],
        );
        let f: Tile<f32, { [8, C] }> = f.reshape(const_shape![8, 1]).broadcast(const_shape![8, C]);
        let nothing: Tile<f32, { [8, C] }> = constant(0.0f32, const_shape![8, C]);
        let there: Tile<bool, { [8] }> = parts_there(c, used);
        let there: Tile<bool, { [8, C] }> = there.reshape(const_shape![8, 1]).broadcast(const_shape![8, C]);
        let x: Tile<f32, { [8, C] }> = select(there, x * f, nothing);
        reduce_sum(x, 0i32)
    }

    /// The same of `R` numbers.
    unsafe fn eight_ends<const R: i32>(
        moments: *mut f32,
        at: i64,
        size: i32,
        c: i32,
        used: i32,
        f: Tile<f32, { [8] }>,
    ) -> Tile<f32, { [R] }> {
        let p: Tile<i32, { [8] }> = iota(const_shape![8]);
        let p: Tile<i32, { [8] }> = p + broadcast_scalar(c * 8i32, const_shape![8]);
        let there: Tile<bool, { [8] }> = parts_there(c, used);
        let there: Tile<bool, { [8, R] }> = there.reshape(const_shape![8, 1]).broadcast(const_shape![8, R]);
        let p: Tile<i32, { [8] }> = p * broadcast_scalar(size, const_shape![8]);
        let p: Tile<i32, { [8, R] }> = p.reshape(const_shape![8, 1]).broadcast(const_shape![8, R]);
        let r: Tile<i32, { [R] }> = iota(const_shape![R]);
        let r: Tile<i32, { [8, R] }> = r.reshape(const_shape![1, R]).broadcast(const_shape![8, R]);
        let base: PointerTile<*mut f32, { [] }> = slice::<f32>(moments, at);
        let one: PointerTile<*mut f32, { [1, 1] }> = base.reshape(const_shape![1, 1]);
        let all: PointerTile<*mut f32, { [8, R] }> = one.broadcast(const_shape![8, R]);
        let ptrs: PointerTile<*mut f32, { [8, R] }> = all.offset_tile(p + r);
        let (x, _token): (Tile<f32, { [8, R] }>, Token) = load_ptr_tko(
            ptrs,
            ordering::Weak,
            None::<scope::TileBlock>,
            Some(there),
            None,
            None,
            Latency::<0>,
        );
        let f: Tile<f32, { [8, R] }> = f.reshape(const_shape![8, 1]).broadcast(const_shape![8, R]);
        let nothing: Tile<f32, { [8, R] }> = constant(0.0f32, const_shape![8, R]);
        let x: Tile<f32, { [8, R] }> = select(there, x * f, nothing);
        reduce_sum(x, 0i32)
    }

    /// Solves for one query and writes its output, from its folded parts.
    /// Grid (batch * kv_heads * group * t).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_merge<E: ElementType, const D: i32>(
        q: *mut E,
        k: *mut E,
        table: *mut i32,
        lengths: *mut i32,
        folded: *mut f16,     // [rows, 4 D, D], see `lla_decode_fold`
        sums: *mut f32,       // [rows, 4 D + 16]
        ridge: *mut f32,      // [batch, heads, t], strided
        out: *mut E,          // out [batch, heads, t, dv], strided
        lse: *mut f32,        // out [batch, heads, t], natural
        key_mean: *mut f32,   // out [batch, heads, t, d] if save_state
        probe: *mut f32,      // out [batch, heads, t, d] if save_state; in: the given one under option 16
        iterations: *mut i32, // out [batch, heads, t] if diagnostics
        relative: *mut f32,   // out [batch, heads, t] if diagnostics: |r| / |delta|
        todo: *mut i32,       // [batch * heads * t]: option 256 only
        options: i32, // 1 causal, 2 window, 16 probe given, 64 block table, 256 only queries that `todo` names
        first_row: i32, // the row of block 0
        kv_heads: i32,
        group: i32,
        t: i32,
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
                let at: i64 = wide(pid.0) * wide(4i32 * D * D);
                let shape: Shape<{ [-1, D] }> = Shape::<{ [-1, D] }> { dims: &[4i32 * D] };
                let strides: Array<{ [D, 1] }> = Array::<{ [D, 1] }> { dims: &[] };
                let view: Tensor<f16, { [-1, D] }> =
                    make_tensor_view(slice_aligned::<f16>(folded, at), shape, strides, new_token_unordered());
                let terms: Partition<f16, { [D, D] }> = view.partition(const_shape![D, D]);
                let first: Tile<f16, { [D, D] }> = terms.load([0i32, 0i32]);
                let second: Tile<f16, { [D, D] }> = terms.load([1i32, 0i32]);
                let at: i64 = wide(pid.0) * wide(4i32 * D + 16i32);
                let mean: Tile<f32, { [D] }> = load_one::<f32, D>(sums, at, D);
                let v_mean: Tile<f32, { [D] }> = load_one::<f32, D>(sums, at + wide(D), D);
                let unit: Tile<f32, { [D] }> = load_one::<f32, D>(sums, at + wide(2i32 * D), D);
                let v_unit: Tile<f32, { [D] }> = load_one::<f32, D>(sums, at + wide(3i32 * D), D);
                let m: f32 = load_scalar(slice::<f32>(sums, at + wide(4i32 * D)));
                let l: f32 = load_scalar(slice::<f32>(sums, at + wide(4i32 * D + 1i32)));
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
                let mut x: Tile<f32, { [D, 8] }> = constant(0.0f32, const_shape![D, 8]);
                let mut it: i32 = 0i32;
                let mut left: f32 = 0.0f32;
                if (options & 16i32) != 0i32 {
                    let given: Tile<f32, { [D] }> = load_one::<f32, D>(probe, wide(row) * wide(d), d);
                    x = given.reshape(const_shape![D, 1]).broadcast(const_shape![D, 8]);
                } else {
                    let ridge_at: i32 = batch * ridge_batch + query_head * ridge_head + i * ridge_row;
                    let lambda: f32 = load_scalar(slice::<f32>(ridge, wide(ridge_at)));
                    let unit: Tile<f32, { [D, 8] }> =
                        unit.reshape(const_shape![D, 1]).broadcast(const_shape![D, 8]);
                    let (found, steps, rest): (Tile<f32, { [D, 8] }>, i32, f32) =
                        probe_of::<D>(first, second, unit, delta, lambda, tolerance2, max_iterations);
                    x = found;
                    it = steps;
                    left = rest;
                }
                let first: Tile<f16, { [D, D] }> = terms.load([2i32, 0i32]);
                let second: Tile<f16, { [D, D] }> = terms.load([3i32, 0i32]);
                // The probe in two terms as well, in a unit of its own.
                let size: Tile<f32, { [8] }> = reduce_max(absf(x), 0i32);
                let size: Tile<f32, { [1, 8] }> = size.reshape(const_shape![1, 8]);
                let size: Tile<f32, { [1, 8] }> = pow2_floor::<{ [1, 8] }>(size);
                let one: Tile<f32, { [1, 8] }> = constant(1.0f32, const_shape![1, 8]);
                let scaled: Tile<f32, { [D, 8] }> =
                    x * quotient::<{ [1, 8] }>(one, size).broadcast(const_shape![D, 8]);
                let x1: Tile<f16, { [D, 8] }> = convert_tile(scaled);
                let x2: Tile<f16, { [D, 8] }> = low_part::<D, 8>(scaled, x1);
                let zero: Tile<f32, { [D, 8] }> = constant(0.0f32, const_shape![D, 8]);
                let along: Tile<f32, { [D, 8] }> = mma(second, x1, zero);
                let along: Tile<f32, { [D, 8] }> = mma(first, x2, along);
                let along: Tile<f32, { [D, 8] }> = mma(first, x1, along);
                let along: Tile<f32, { [D, 8] }> = along * size.broadcast(const_shape![D, 8]);
                let along: Tile<f32, { [D] }> = reduce_max(along, 1i32);
                write_answer::<E, D>(
                    v_mean - along * v_unit,
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
