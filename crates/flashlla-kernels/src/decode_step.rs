//! Decoding for queries that share a KV head: what comes between the passes over the keys, for 16 queries at once.
//!
//! The step itself is that of `columns`; here are the sums of splits before it, and what passes and steps leave for each other.
//!
//! A record holds 16 numbers per query: 0 minus the log-sum-exp (base 2) that its weights are raised by, 1 where products are counted
//! from, 2 their factor, 3 |r|^2, 4 |delta|^2, 5 |r|^2 that is allowed, 6 |r|^2 that counts as reached, 7 last step length, 8 unit of
//! the direction, 9 passes, 10 state (0 goes on, 1 solved, 2 gave up), 11 ridge, 12 what roundings of directions have left, 13 the largest
//! curvature.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod decode_step {
    use super::super::columns::columns::*;
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Splits' sums, added up.
    pub unsafe fn added_sums<const D: i32>(
        sums: *mut f32,
        rows: i32,
        part: i32,
        used: i32,
    ) -> Tile<f32, { [16, D] }> {
        let nothing: Tile<f32, { [16, D] }> = constant(0.0f32, const_shape![16, D]);
        let mut sum: Tile<f32, { [16, D] }> = nothing;
        // Four at a time are in flight.
        for c in 0i32..ceil_div(used, 4i32) {
            let at: i32 = (part + c * 4i32) * 2i32 + 1i32;
            let last: i32 = (part + used - 1i32) * 2i32 + 1i32;
            let x0: Tile<f32, { [16, D] }> = load_packed::<f32, 16, D>(sums, rows, at);
            let x1: Tile<f32, { [16, D] }> = load_packed::<f32, 16, D>(sums, rows, min(at + 2i32, last));
            let x2: Tile<f32, { [16, D] }> = load_packed::<f32, 16, D>(sums, rows, min(at + 4i32, last));
            let x3: Tile<f32, { [16, D] }> = load_packed::<f32, 16, D>(sums, rows, min(at + 6i32, last));
            sum = sum + x0;
            if at + 2i32 <= last {
                sum = sum + x1;
            }
            if at + 4i32 <= last {
                sum = sum + x2;
            }
            if at + 6i32 <= last {
                sum = sum + x3;
            }
        }
        sum
    }

    /// Number `which` of a split's queries.
    pub unsafe fn part_row(parts: *mut f32, part: i32, which: i32) -> Tile<f32, { [16, 1] }> {
        let at: i64 = wide(part) * wide(64i32) + wide(which * 16i32);
        let x: Tile<f32, { [16] }> = load_column::<f32, 16>(slice::<f32>(parts, at), 1i32, 16i32);
        x.reshape(const_shape![16, 1])
    }

    /// Grid (tiles). `KIND`: after which kind of pass.
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_step<E: ElementType, const D: i32, const KIND: i32>(
        q: *mut E,
        lengths: *mut i32,
        sums: *mut f32,       // [tiles, splits, 2, 16, D]
        parts: *mut f32,      // [tiles, splits, 4, 16]
        vectors: *mut E,      // out [tiles, 3, 16, D]: direction, or probe in three terms
        record: *mut f32,     // [tiles, 16, 16]
        kept: *mut f32,       // [tiles, 3, 16, D]: mean key, residual, solution
        live: *mut i32,       // out [tiles]: 1 passes go on, 0 an output is wanted, 2 all queries gave up
        todo: *mut i32,       // out [rows], KIND 2: 1 where the moments have to be summed
        ridge: *mut f32,      // [batch, heads, t], strided
        out: *mut E,          // out [batch, heads, t, dv], strided
        lse: *mut f32,        // out [batch, heads, t], natural
        key_mean: *mut f32,   // out [batch, heads, t, d] if save_state
        probe: *mut f32,      // out [batch, heads, t, d] if save_state; in: the given one under option 16
        iterations: *mut i32, // out [batch, heads, t] if diagnostics: passes
        relative: *mut f32,   // out [batch, heads, t] if diagnostics: |r| / |delta|
        options: i32,         // 1 causal, 2 window, 16 probe given
        kv_heads: i32,
        group: i32,
        t: i32,
        window: i32,
        most: i32, // keys that a sequence has room for
        splits: i32,
        split_keys: i32, // keys of a split: a multiple of `tile_keys`
        tile_keys: i32,  // keys of a tile of the split
        d: i32,
        dv: i32,
        q_batch: i64,
        q_head: i32,
        q_row: i32,
        ridge_batch: i32,
        ridge_head: i32,
        ridge_row: i32,
        out_batch: i64,
        out_head: i32,
        out_row: i32,
        tolerance2: f32, // square of the relative residual asked for
        error2: f32, // if positive, the square of the outputs' expected relative error that ends a query instead
        left: i32,   // passes that may follow
        save_state: i32,
        diagnostics: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let tile: i32 = pid.0;
        let count: i32 = group * t;
        let (kv, start_row, batch, head): (i32, i32, i32, i32) = tile_place(tile, count, kv_heads);
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, 0i32, window);
        let hi: i32 = decode_end(options, length, t, t - 1i32);
        let used: i32 = ceil_div(hi - lo / tile_keys * tile_keys, split_keys);
        let part: i32 = tile * splits;
        let sum_rows: i32 = grid.0 * splits * 2i32 * 16i32;
        let vector_rows: i32 = grid.0 * 48i32;
        let zero: Tile<f32, { [16, 1] }> = constant(0.0f32, const_shape![16, 1]);
        let one: Tile<f32, { [16, 1] }> = constant(1.0f32, const_shape![16, 1]);
        let rows: i32 = min(count - start_row, 16i32);
        let there: Tile<bool, { [16, 1] }> = queries_there(rows);
        // Weights are raised by 2^10, so that fp16 keeps the small ones.
        let ten: Tile<f32, { [16, 1] }> = constant(10.0f32, const_shape![16, 1]);
        let lowered: Tile<f32, { [16, D] }> = constant(0.0009765625f32, const_shape![16, D]);
        if KIND == 2i32 {
            let mut used: i32 = used;
            if load_integer(slice::<i32>(live, wide(tile))) == 2i32 {
                used = 0i32;
            }
            let found: Tile<f32, { [16, D] }> = added_sums::<D>(sums, sum_rows, part, used) * lowered;
            let solved: Tile<bool, { [16, 1] }> = standing::<D>(found, record_row(record, tile, 10i32));
            let some: Tile<i32, { [16, 1] }> = constant(1i32, const_shape![16, 1]);
            let none: Tile<i32, { [16, 1] }> = constant(0i32, const_shape![16, 1]);
            store_queries::<i32, 1>(
                slice::<i32>(todo, wide(kv) * wide(count)),
                start_row,
                count,
                t,
                t,
                1i32,
                1i32,
                select(solved, none, some),
            );
            let at: i64 = wide(batch) * out_batch + wide(head * group) * wide(out_head);
            let result: Tile<E, { [16, D] }> = convert_tile(found);
            store_queries::<E, D>(slice::<E>(out, at), start_row, count, t, out_head, out_row, dv, result);
        } else {
            let mut going: i32 = 1i32;
            if KIND == 1i32 {
                going = load_integer(slice::<i32>(live, wide(tile)));
            }
            if going == 1i32 {
                let at: i64 = wide(batch) * q_batch + wide(head * group) * wide(q_head);
                let query: Tile<E, { [16, D] }> =
                    queries::<E, D>(slice::<E>(q, at), start_row, count, t, q_head, q_row, d);
                let qf: Tile<f32, { [16, D] }> = convert_tile(query);
                let mut kbar: Tile<f32, { [16, D] }> = qf;
                let mut r: Tile<f32, { [16, D] }> = qf;
                let mut x: Tile<f32, { [16, D] }> = qf;
                let mut along: Tile<f32, { [16, D] }> = qf;
                let mut a_along: Tile<f32, { [16, D] }> = qf;
                let mut lam: Tile<f32, { [16, 1] }> = zero;
                let mut dd: Tile<f32, { [16, 1] }> = zero;
                let mut before: Tile<f32, { [16, 1] }> = zero;
                let mut last: Tile<f32, { [16, 1] }> = zero;
                let mut unit: Tile<f32, { [16, 1] }> = one;
                let mut passes: Tile<f32, { [16, 1] }> = zero;
                let mut state: Tile<f32, { [16, 1] }> = zero;
                let mut bound: Tile<f32, { [16, 1] }> = zero;
                let mut reached: Tile<f32, { [16, 1] }> = zero;
                let mut rounded: Tile<f32, { [16, 1] }> = zero;
                let mut largest: Tile<f32, { [16, 1] }> = zero;
                let zeros: Tile<f32, { [16, D] }> = constant(0.0f32, const_shape![16, D]);
                if KIND == 0i32 {
                    let mut m: Tile<f32, { [16, 1] }> = constant(-1.0e30f32, const_shape![16, 1]);
                    for c in 0i32..used {
                        m = max_tile(m, part_row(parts, part + c, 0i32));
                    }
                    let mut l: Tile<f32, { [16, 1] }> = zero;
                    let mut total: Tile<f32, { [16, 1] }> = zero;
                    let mut sum: Tile<f32, { [16, D] }> = zeros;
                    let mut other: Tile<f32, { [16, D] }> = zeros;
                    for c in 0i32..used {
                        let f: Tile<f32, { [16, 1] }> =
                            exp2(part_row(parts, part + c, 0i32) - m, ftz::Enabled);
                        l = l + f * part_row(parts, part + c, 1i32);
                        total = total + f * part_row(parts, part + c, 2i32);
                        let f: Tile<f32, { [16, D] }> = f.broadcast(const_shape![16, D]);
                        let y: Tile<f32, { [16, D] }> =
                            load_packed::<f32, 16, D>(sums, sum_rows, (part + c) * 2i32);
                        sum = sum + f * y;
                        let y: Tile<f32, { [16, D] }> =
                            load_packed::<f32, 16, D>(sums, sum_rows, (part + c) * 2i32 + 1i32);
                        other = other + f * y;
                    }
                    let at: i64 = wide(batch) * wide(ridge_batch) + wide(head * group) * wide(ridge_head);
                    lam = queries::<f32, 1>(
                        slice::<f32>(ridge, at),
                        start_row,
                        count,
                        t,
                        ridge_head,
                        ridge_row,
                        1i32,
                    );
                    let (mean, product, log, none): (
                        Tile<f32, { [16, D] }>,
                        Tile<f32, { [16, D] }>,
                        Tile<f32, { [16, 1] }>,
                        Tile<bool, { [16, 1] }>,
                    ) = first_product::<D>(m, l, sum, other, total, qf, lam);
                    kbar = mean;
                    a_along = product;
                    let ln2: Tile<f32, { [16, 1] }> = constant(0.6931471805599453f32, const_shape![16, 1]);
                    let minus_inf: Tile<f32, { [16, 1] }> = constant(f32::NEG_INFINITY, const_shape![16, 1]);
                    let at: i64 = wide(kv) * wide(count);
                    store_queries::<f32, 1>(
                        slice::<f32>(lse, at),
                        start_row,
                        count,
                        t,
                        t,
                        1i32,
                        1i32,
                        select(none, minus_inf, log * ln2),
                    );
                    set_record_row(record, tile, 0i32, select(none, zero, ten - log));
                    set_record_row(record, tile, 11i32, lam);
                    r = kbar - qf;
                    dd = row_dot::<16, D>(r, r);
                    x = zeros;
                    state = select(none | eq_tile(dd, zero), one, zero);
                } else {
                    kbar = load_packed::<f32, 16, D>(kept, vector_rows, tile * 3i32);
                    r = load_packed::<f32, 16, D>(kept, vector_rows, tile * 3i32 + 1i32);
                    x = load_packed::<f32, 16, D>(kept, vector_rows, tile * 3i32 + 2i32);
                    let direction: Tile<E, { [16, D] }> =
                        load_packed::<E, 16, D>(vectors, vector_rows, tile * 3i32);
                    along = convert_tile(direction);
                    let mut total: Tile<f32, { [16, 1] }> = zero;
                    for c in 0i32..used {
                        total = total + part_row(parts, part + c, 2i32);
                    }
                    lam = record_row(record, tile, 11i32);
                    a_along = (added_sums::<D>(sums, sum_rows, part, used)
                        - kbar * total.broadcast(const_shape![16, D]))
                        * lowered
                        + along * lam.broadcast(const_shape![16, D]);
                    before = record_row(record, tile, 3i32);
                    dd = record_row(record, tile, 4i32);
                    last = record_row(record, tile, 7i32);
                    unit = record_row(record, tile, 8i32);
                    passes = record_row(record, tile, 9i32);
                    state = record_row(record, tile, 10i32);
                    bound = record_row(record, tile, 5i32);
                    reached = record_row(record, tile, 6i32);
                    rounded = record_row(record, tile, 12i32);
                    largest = record_row(record, tile, 13i32);
                }
                let (r, solution, next, rr, free, passes, ended, allowed, reached, rounded, largest): (
                    Tile<f32, { [16, D] }>,
                    Tile<f32, { [16, D] }>,
                    Tile<f32, { [16, D] }>,
                    Tile<f32, { [16, 1] }>,
                    Tile<f32, { [16, 1] }>,
                    Tile<f32, { [16, 1] }>,
                    Tile<f32, { [16, 1] }>,
                    Tile<f32, { [16, 1] }>,
                    Tile<f32, { [16, 1] }>,
                    Tile<f32, { [16, 1] }>,
                    Tile<f32, { [16, 1] }>,
                ) = step_along::<D, KIND>(
                    r, x, along, a_along, lam, dd, before, last, unit, passes, state, bound, reached,
                    rounded, largest, there, rows, left, tolerance2, error2,
                );
                if KIND == 0i32 {
                    set_record_row(record, tile, 4i32, dd);
                    set_record_row(record, tile, 5i32, allowed);
                }
                let mut x: Tile<f32, { [16, D] }> = solution;
                let mut now: Tile<f32, { [16, 1] }> = ended;
                let mut reached: Tile<f32, { [16, 1] }> = reached;
                if (options & 16i32) != 0i32 {
                    let at: i64 = wide(kv) * wide(count) * wide(d);
                    x = queries::<f32, D>(slice::<f32>(probe, at), start_row, count, t, t * d, d, d);
                    now = one;
                    reached = zero;
                }
                let (now, what): (Tile<f32, { [16, 1] }>, i32) = what_next::<D>(now, x, kbar, there);
                store_column::<i32, 1>(
                    slice::<i32>(live, wide(tile)),
                    1i32,
                    broadcast_scalar(what, const_shape![1]),
                );
                if KIND == 0i32 {
                    let _stored: Token = store_packed::<f32, 16, D>(kept, vector_rows, tile * 3i32, kbar);
                }
                if what == 1i32 {
                    let (unit, scaled): (Tile<f32, { [16, 1] }>, Tile<f32, { [16, D] }>) = in_unit::<D>(next);
                    let direction: Tile<E, { [16, D] }> = convert_tile(scaled);
                    let _stored: Token =
                        store_packed::<E, 16, D>(vectors, vector_rows, tile * 3i32, direction);
                    let taken: Tile<f32, { [16, D] }> = convert_tile(direction);
                    set_record_row(record, tile, 1i32, row_dot::<16, D>(kbar, taken));
                    set_record_row(record, tile, 2i32, one);
                    set_record_row(record, tile, 8i32, unit);
                    let _stored: Token = store_packed::<f32, 16, D>(kept, vector_rows, tile * 3i32 + 1i32, r);
                    let _stored: Token = store_packed::<f32, 16, D>(kept, vector_rows, tile * 3i32 + 2i32, x);
                    set_record_row(record, tile, 3i32, rr);
                    set_record_row(record, tile, 7i32, free);
                    set_record_row(record, tile, 9i32, passes);
                    set_record_row(record, tile, 12i32, rounded);
                    set_record_row(record, tile, 13i32, largest);
                } else {
                    let (first, second, third, from, factor): (
                        Tile<E, { [16, D] }>,
                        Tile<E, { [16, D] }>,
                        Tile<E, { [16, D] }>,
                        Tile<f32, { [16, 1] }>,
                        Tile<f32, { [16, 1] }>,
                    ) = probe_terms::<E, D>(x, kbar);
                    let _stored: Token = store_packed::<E, 16, D>(vectors, vector_rows, tile * 3i32, first);
                    let _stored: Token =
                        store_packed::<E, 16, D>(vectors, vector_rows, tile * 3i32 + 1i32, second);
                    let _stored: Token =
                        store_packed::<E, 16, D>(vectors, vector_rows, tile * 3i32 + 2i32, third);
                    set_record_row(record, tile, 1i32, from);
                    set_record_row(record, tile, 2i32, factor);
                    if save_state != 0i32 {
                        let at: i64 = wide(kv) * wide(count) * wide(d);
                        store_queries::<f32, D>(
                            slice::<f32>(key_mean, at),
                            start_row,
                            count,
                            t,
                            t * d,
                            d,
                            d,
                            kbar,
                        );
                        if (options & 16i32) == 0i32 {
                            store_queries::<f32, D>(
                                slice::<f32>(probe, at),
                                start_row,
                                count,
                                t,
                                t * d,
                                d,
                                d,
                                x,
                            );
                        }
                    }
                }
                set_record_row(record, tile, 6i32, reached);
                set_record_row(record, tile, 10i32, now);
                if diagnostics != 0i32 {
                    let at: i64 = wide(kv) * wide(count);
                    let number: Tile<i32, { [16, 1] }> = convert_tile(passes);
                    store_queries::<i32, 1>(
                        slice::<i32>(iterations, at),
                        start_row,
                        count,
                        t,
                        t,
                        1i32,
                        1i32,
                        number,
                    );
                    let rest: Tile<f32, { [16, 1] }> = relative_of(reached, dd);
                    store_queries::<f32, 1>(
                        slice::<f32>(relative, at),
                        start_row,
                        count,
                        t,
                        t,
                        1i32,
                        1i32,
                        rest,
                    );
                }
            }
        }
    }
}
