//! Decoding for queries that share a KV head: what comes between the passes over the keys, for 16 queries at once.
//!
//! Conjugate gradients whose directions are made conjugate to the last one by its product with the matrix, so that a direction may be
//! rounded or be any vector: the first one is the query (see `forward`). A query ends when the step that needs no pass brings
//! its residual far enough down, or gives up when the passes that are left will not do: then its moments are summed instead.
//!
//! A record holds 16 numbers per query: 0 minus the log-sum-exp (base 2) that its weights are raised by, 1 where products are counted
//! from, 2 their factor, 3 |r|^2, 4 |delta|^2, 5 |r|^2 that is allowed, 6 |r|^2 that counts as reached, 7 last step length, 8 unit of
//! the direction, 9 passes, 10 state (0 goes on, 1 solved, 2 gave up), 11 ridge.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod decode_step {
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Splits' sums, added up.
    pub unsafe fn added_sums<const D: i32>(
        sums: *mut f32,
        rows: i32,
        part: i32,
        used: i32,
    ) -> Tile<f32, { [D, 16] }> {
        let nothing: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
        let mut sum: Tile<f32, { [D, 16] }> = nothing;
        // Four at a time are in flight.
        for c in 0i32..ceil_div(used, 4i32) {
            let at: i32 = (part + c * 4i32) * 2i32 + 1i32;
            let last: i32 = (part + used - 1i32) * 2i32 + 1i32;
            let x0: Tile<f32, { [D, 16] }> = load_packed::<f32, D, 16>(sums, rows, at);
            let x1: Tile<f32, { [D, 16] }> = load_packed::<f32, D, 16>(sums, rows, min(at + 2i32, last));
            let x2: Tile<f32, { [D, 16] }> = load_packed::<f32, D, 16>(sums, rows, min(at + 4i32, last));
            let x3: Tile<f32, { [D, 16] }> = load_packed::<f32, D, 16>(sums, rows, min(at + 6i32, last));
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
    pub unsafe fn part_row(parts: *mut f32, part: i32, which: i32) -> Tile<f32, { [1, 16] }> {
        let at: i64 = wide(part) * wide(64i32) + wide(which * 16i32);
        let x: Tile<f32, { [16] }> = load_column::<f32, 16>(slice::<f32>(parts, at), 1i32, 16i32);
        x.reshape(const_shape![1, 16])
    }

    /// A direction or probe's power of two, and it in that unit.
    pub fn in_unit<const D: i32>(
        x: Tile<f32, { [D, 16] }>,
    ) -> (Tile<f32, { [1, 16] }>, Tile<f32, { [D, 16] }>) {
        let norm: Tile<f32, { [1, 16] }> = sqrt(column_dot::<D>(x, x), rounding::NearestEven, ftz::Disabled);
        let unit: Tile<f32, { [1, 16] }> = pow2_floor::<{ [1, 16] }>(norm);
        let one: Tile<f32, { [1, 16] }> = constant(1.0f32, const_shape![1, 16]);
        let inverse: Tile<f32, { [1, 16] }> = quotient::<{ [1, 16] }>(one, unit);
        (unit, x * inverse.broadcast(const_shape![D, 16]))
    }

    /// Grid (tiles). `KIND`: after which kind of pass.
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_step<E: ElementType, const D: i32, const KIND: i32>(
        q: *mut E,
        lengths: *mut i32,
        sums: *mut f32,       // [tiles, splits, 2, D, 16]
        parts: *mut f32,      // [tiles, splits, 4, 16]
        vectors: *mut E,      // out [tiles, 3, D, 16]: direction, or probe in three terms
        record: *mut f32,     // [tiles, 16, 16]
        kept: *mut f32,       // [tiles, 3, D, 16]: mean key, residual, solution
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
        let per: i32 = ceil_div(count, 16i32);
        let kv: i32 = tile / per;
        let start_row: i32 = tile % per * 16i32;
        let batch: i32 = kv / kv_heads;
        let head: i32 = kv % kv_heads;
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, 0i32, window);
        let hi: i32 = decode_end(options, length, t, t - 1i32);
        let used: i32 = ceil_div(hi - lo / tile_keys * tile_keys, split_keys);
        let part: i32 = tile * splits;
        let sum_rows: i32 = grid.0 * splits * 2i32 * D;
        let vector_rows: i32 = grid.0 * 3i32 * D;
        let zero: Tile<f32, { [1, 16] }> = constant(0.0f32, const_shape![1, 16]);
        let one: Tile<f32, { [1, 16] }> = constant(1.0f32, const_shape![1, 16]);
        let two: Tile<f32, { [1, 16] }> = constant(2.0f32, const_shape![1, 16]);
        let least: Tile<f32, { [1, 16] }> = constant(1.0e-30f32, const_shape![1, 16]);
        let there: Tile<i32, { [16] }> = iota(const_shape![16]);
        let there: Tile<bool, { [16] }> =
            lt_tile(there, broadcast_scalar(count - start_row, const_shape![16]));
        let there: Tile<bool, { [1, 16] }> = there.reshape(const_shape![1, 16]);
        // Weights are raised by 2^10, so that fp16 keeps the small ones.
        let ten: Tile<f32, { [1, 16] }> = constant(10.0f32, const_shape![1, 16]);
        let lowered: Tile<f32, { [D, 16] }> = constant(0.0009765625f32, const_shape![D, 16]);
        if KIND == 2i32 {
            let mut used: i32 = used;
            if load_integer(slice::<i32>(live, wide(tile))) == 2i32 {
                used = 0i32;
            }
            let found: Tile<f32, { [D, 16] }> = added_sums::<D>(sums, sum_rows, part, used) * lowered;
            // One number that is not finite: the moments say what becomes of it.
            let spoilt: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
            let spoilt: Tile<f32, { [1, 16] }> = column_dot::<D>(found, spoilt);
            let solved: Tile<bool, { [1, 16] }> =
                eq_tile(record_row(record, tile, 10i32), one) & eq_tile(spoilt, zero);
            let some: Tile<i32, { [1, 16] }> = constant(1i32, const_shape![1, 16]);
            let none: Tile<i32, { [1, 16] }> = constant(0i32, const_shape![1, 16]);
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
            let result: Tile<E, { [D, 16] }> = convert_tile(found);
            store_queries::<E, D>(slice::<E>(out, at), start_row, count, t, out_head, out_row, dv, result);
        } else {
            let mut going: i32 = 1i32;
            if KIND == 1i32 {
                going = load_integer(slice::<i32>(live, wide(tile)));
            }
            if going == 1i32 {
                let at: i64 = wide(batch) * q_batch + wide(head * group) * wide(q_head);
                let query: Tile<E, { [D, 16] }> =
                    queries::<E, D>(slice::<E>(q, at), start_row, count, t, q_head, q_row, d);
                let qf: Tile<f32, { [D, 16] }> = convert_tile(query);
                let mut kbar: Tile<f32, { [D, 16] }> = qf;
                let mut r: Tile<f32, { [D, 16] }> = qf;
                let mut x: Tile<f32, { [D, 16] }> = qf;
                let mut along: Tile<f32, { [D, 16] }> = qf;
                let mut a_along: Tile<f32, { [D, 16] }> = qf;
                let mut lam: Tile<f32, { [1, 16] }> = zero;
                let mut dd: Tile<f32, { [1, 16] }> = zero;
                let mut before: Tile<f32, { [1, 16] }> = zero;
                let mut start: Tile<f32, { [D, 16] }> = qf;
                let mut last: Tile<f32, { [1, 16] }> = zero;
                let mut unit: Tile<f32, { [1, 16] }> = one;
                let mut passes: Tile<f32, { [1, 16] }> = zero;
                let mut state: Tile<f32, { [1, 16] }> = zero;
                let zeros: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
                if KIND == 0i32 {
                    let mut m: Tile<f32, { [1, 16] }> = constant(-1.0e30f32, const_shape![1, 16]);
                    for c in 0i32..used {
                        m = max_tile(m, part_row(parts, part + c, 0i32));
                    }
                    let mut l: Tile<f32, { [1, 16] }> = zero;
                    let mut total: Tile<f32, { [1, 16] }> = zero;
                    let mut sum: Tile<f32, { [D, 16] }> = zeros;
                    let mut other: Tile<f32, { [D, 16] }> = zeros;
                    for c in 0i32..used {
                        let f: Tile<f32, { [1, 16] }> =
                            exp2(part_row(parts, part + c, 0i32) - m, ftz::Enabled);
                        l = l + f * part_row(parts, part + c, 1i32);
                        total = total + f * part_row(parts, part + c, 2i32);
                        let f: Tile<f32, { [D, 16] }> = f.broadcast(const_shape![D, 16]);
                        let y: Tile<f32, { [D, 16] }> =
                            load_packed::<f32, D, 16>(sums, sum_rows, (part + c) * 2i32);
                        sum = sum + f * y;
                        let y: Tile<f32, { [D, 16] }> =
                            load_packed::<f32, D, 16>(sums, sum_rows, (part + c) * 2i32 + 1i32);
                        other = other + f * y;
                    }
                    let none: Tile<bool, { [1, 16] }> = eq_tile(l, zero);
                    let inverse: Tile<f32, { [1, 16] }> = select(none, zero, one / l);
                    kbar = sum * inverse.broadcast(const_shape![D, 16]);
                    let log: Tile<f32, { [1, 16] }> = m + log2(l);
                    let ln2: Tile<f32, { [1, 16] }> = constant(0.6931471805599453f32, const_shape![1, 16]);
                    let minus_inf: Tile<f32, { [1, 16] }> = constant(f32::NEG_INFINITY, const_shape![1, 16]);
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
                    set_record_row(record, tile, 11i32, lam);
                    let weight: Tile<f32, { [1, 16] }> =
                        quotient::<{ [1, 16] }>(inverse, query_factor::<D>(qf));
                    a_along = (other - kbar * total.broadcast(const_shape![D, 16]))
                        * weight.broadcast(const_shape![D, 16])
                        + qf * lam.broadcast(const_shape![D, 16]);
                    r = kbar - qf;
                    dd = column_dot::<D>(r, r);
                    start = r;
                    x = zeros;
                    state = select(none | eq_tile(dd, zero), one, zero);
                } else {
                    kbar = load_packed::<f32, D, 16>(kept, vector_rows, tile * 3i32);
                    r = load_packed::<f32, D, 16>(kept, vector_rows, tile * 3i32 + 1i32);
                    x = load_packed::<f32, D, 16>(kept, vector_rows, tile * 3i32 + 2i32);
                    let direction: Tile<E, { [D, 16] }> =
                        load_packed::<E, D, 16>(vectors, vector_rows, tile * 3i32);
                    along = convert_tile(direction);
                    let mut total: Tile<f32, { [1, 16] }> = zero;
                    for c in 0i32..used {
                        total = total + part_row(parts, part + c, 2i32);
                    }
                    lam = record_row(record, tile, 11i32);
                    a_along = (added_sums::<D>(sums, sum_rows, part, used)
                        - kbar * total.broadcast(const_shape![D, 16]))
                        * lowered
                        + along * lam.broadcast(const_shape![D, 16]);
                    before = record_row(record, tile, 3i32);
                    dd = record_row(record, tile, 4i32);
                    last = record_row(record, tile, 7i32);
                    unit = record_row(record, tile, 8i32);
                    passes = record_row(record, tile, 9i32);
                    state = record_row(record, tile, 10i32);
                }
                // The step along the direction.
                let runs: Tile<bool, { [1, 16] }> = eq_tile(state, zero);
                let dad: Tile<f32, { [1, 16] }> = column_dot::<D>(along, a_along);
                let good: Tile<bool, { [1, 16] }> = runs & gt_tile(dad, zero);
                let a: Tile<f32, { [1, 16] }> =
                    select(good, column_dot::<D>(r, along) / max_tile(dad, least), zero);
                let mut r: Tile<f32, { [D, 16] }> = r - a_along * a.broadcast(const_shape![D, 16]);
                let mut x: Tile<f32, { [D, 16] }> = x + along * a.broadcast(const_shape![D, 16]);
                let mut rr: Tile<f32, { [1, 16] }> = column_dot::<D>(r, r);
                let r_a: Tile<f32, { [1, 16] }> = column_dot::<D>(r, a_along);
                let mut beta: Tile<f32, { [1, 16] }> = select(good, zero - r_a / max_tile(dad, least), zero);
                // The step along the next one that needs no pass, and what it leaves.
                let mut free: Tile<f32, { [1, 16] }> = quotient::<{ [1, 16] }>(a, unit);
                let mut ahead: Tile<f32, { [1, 16] }> = rr;
                let mut rate: Tile<f32, { [1, 16] }> = one;
                let mut allowed: Tile<f32, { [1, 16] }> = zero;
                if KIND == 0i32 {
                    // As if A acted on it as it does on q; twice the squared spread of A about that bounds what is left, roughly.
                    let aa: Tile<f32, { [1, 16] }> = column_dot::<D>(a_along, a_along);
                    let qq: Tile<f32, { [1, 16] }> = max_tile(column_dot::<D>(along, along), least);
                    let theta: Tile<f32, { [1, 16] }> = max_tile(quotient::<{ [1, 16] }>(dad, qq), least);
                    let part: Tile<f32, { [1, 16] }> = constant(0.3f32, const_shape![1, 16]);
                    free = rr / max_tile(max_tile(theta * rr + beta * r_a, theta * rr * part), least);
                    let spread: Tile<f32, { [1, 16] }> = aa / max_tile(theta * dad, least) - one;
                    rate = max_tile(spread, zero);
                    allowed = dd * broadcast_scalar(tolerance2, const_shape![1, 16]);
                    let mut times: Tile<f32, { [1, 16] }> = constant(4.0f32, const_shape![1, 16]);
                    if error2 > 0.0f32 {
                        // What the forward allows (there is the reasoning).
                        times = two;
                        let tenth: Tile<f32, { [1, 16] }> = constant(0.1f32, const_shape![1, 16]);
                        let of_keys: Tile<f32, { [1, 16] }> =
                            max_tile(max_tile(theta - lam, theta * tenth), least);
                        let curve: Tile<f32, { [1, 16] }> = max_tile(dad - lam * qq, zero);
                        let size: Tile<f32, { [1, 16] }> = one + a * a * curve;
                        let error2: Tile<f32, { [1, 16] }> = broadcast_scalar(error2, const_shape![1, 16]);
                        let of_output: Tile<f32, { [1, 16] }> = error2 * size * lam * (lam / of_keys);
                        let most: Tile<f32, { [1, 16] }> = constant(1.6e-5f32, const_shape![1, 16]);
                        let share: Tile<f32, { [1, 16] }> = constant(0.0625f32, const_shape![1, 16]);
                        allowed = max_tile(allowed * share, min_tile(of_output, dd * most));
                    }
                    ahead = times * rr * rate;
                    // Where the query is no good direction, it says nothing about the others: the first is delta then.
                    let quarter: Tile<f32, { [1, 16] }> = constant(0.25f32, const_shape![1, 16]);
                    let poor: Tile<bool, { [1, 16] }> = gt_tile(rr, dd * quarter);
                    let poor_d: Tile<bool, { [D, 16] }> = poor.broadcast(const_shape![D, 16]);
                    r = select(poor_d, start, r);
                    x = select(poor_d, zeros, x);
                    rr = select(poor, dd, rr);
                    beta = select(poor, zero, beta);
                    free = select(poor, zero, free);
                    let unknown: Tile<f32, { [1, 16] }> = constant(1.0e30f32, const_shape![1, 16]);
                    ahead = select(poor, unknown, ahead);
                    set_record_row(record, tile, 4i32, dd);
                    set_record_row(record, tile, 5i32, allowed);
                } else {
                    allowed = record_row(record, tile, 5i32);
                    rate = rr / max_tile(before, least);
                    let change: Tile<f32, { [1, 16] }> =
                        min_tile(absf(free - last) / max_tile(absf(free), least), one);
                    ahead = rr * (rate + change * change);
                }
                let gains: Tile<bool, { [1, 16] }> = le_tile(ahead, rr);
                let next: Tile<f32, { [D, 16] }> = r + along * beta.broadcast(const_shape![D, 16]);
                // What the passes that may follow will leave. The first one says too little about them, the later ones
                // a little too much (seen on normal and anisotropic keys, at ridges from 0.1 to 10).
                let left: Tile<f32, { [1, 16] }> = convert_tile(broadcast_scalar(left, const_shape![1, 16]));
                let three: Tile<f32, { [1, 16] }> = constant(3.0f32, const_shape![1, 16]);
                let slightly: Tile<f32, { [1, 16] }> = constant(1.25f32, const_shape![1, 16]);
                let faster: Tile<f32, { [1, 16] }> = select(eq_tile(passes, zero), three, slightly);
                let expected: Tile<f32, { [1, 16] }> = ahead * exp2(log2(rate) * left * faster, ftz::Enabled);
                // A tile's queries count together, as a block's do in the forward: they end when the mean of what is left is allowed, and
                // none has more than nine times as much.
                let tiny: Tile<f32, { [1, 16] }> = constant(1.0e-36f32, const_shape![1, 16]);
                let part: Tile<f32, { [1, 16] }> =
                    quotient::<{ [1, 16] }>(min_tile(ahead, rr), max_tile(allowed, tiny));
                let nine: Tile<f32, { [1, 16] }> = constant(9.0f32, const_shape![1, 16]);
                let much: Tile<f32, { [1, 16] }> = constant(1000.0f32, const_shape![1, 16]);
                let part: Tile<f32, { [1, 16] }> = select(le_tile(part, nine), part, much);
                let eight: Tile<f32, { [1, 16] }> = constant(8.0f32, const_shape![1, 16]);
                let mut hope: Tile<bool, { [1, 16] }> =
                    gt_tile(left, zero) & le_tile(expected, allowed * eight);
                if KIND == 0i32 {
                    hope = gt_tile(left, zero) & eq_tile(rr, rr);
                }
                let hope: Tile<bool, { [1, 16] }> = (hope | le_tile(part, one)) & good;
                let counted: Tile<f32, { [1, 16] }> = select(there & runs & hope, part, zero);
                let counted: Tile<f32, { [] }> = reduce_sum(counted.reshape(const_shape![16]), 0i32);
                let counted: f32 = tile_to_scalar(counted);
                let rows: i32 = min(count - start_row, 16i32);
                let rows: Tile<i32, { [1, 1] }> = broadcast_scalar(rows, const_shape![1, 1]);
                let rows: Tile<f32, { [1, 1] }> = convert_tile(rows);
                // What is hardly left stays as it is; the others go on as long as one of them has to.
                let mut enough: Tile<f32, { [1, 16] }> = constant(1.0e-4f32, const_shape![1, 16]);
                if counted <= single(rows) {
                    enough = nine;
                }
                let ended: Tile<f32, { [1, 16] }> =
                    select(hope, select(le_tile(part, enough), one, zero), two);
                let now: Tile<f32, { [1, 16] }> = select(runs, ended, state);
                let step: Tile<f32, { [1, 16] }> = select(runs & eq_tile(now, one) & gains, free, zero);
                let x: Tile<f32, { [D, 16] }> = x + next * step.broadcast(const_shape![D, 16]);
                let mut now: Tile<f32, { [1, 16] }> = now;
                let mut x: Tile<f32, { [D, 16] }> = x;
                if (options & 16i32) != 0i32 {
                    let at: i64 = wide(kv) * wide(count) * wide(d);
                    x = queries::<f32, D>(slice::<f32>(probe, at), start_row, count, t, t * d, d, d);
                    now = one;
                }
                let passes: Tile<f32, { [1, 16] }> =
                    if KIND == 0i32 { passes } else { passes + select(runs, one, zero) };
                // Products of the probe with keys are sums of f32 on tensor cores, which lose this much of it where the keys have much in common;
                // moments are those of shifted keys.
                let size: Tile<f32, { [1, 16] }> = column_dot::<D>(kbar, kbar) * column_dot::<D>(x, x);
                let most: Tile<f32, { [1, 16] }> = constant(4.4e6f32, const_shape![1, 16]);
                let lossy: Tile<bool, { [1, 16] }> = eq_tile(now, one) & gt_tile(size, most);
                now = select(lossy, two, now);
                let nobody: Tile<i32, { [1, 16] }> = constant(0i32, const_shape![1, 16]);
                let somebody: Tile<i32, { [1, 16] }> = constant(1i32, const_shape![1, 16]);
                let on: Tile<i32, { [1, 16] }> = select(there & eq_tile(now, zero), somebody, nobody);
                let on: Tile<i32, { [] }> = reduce_max(on.reshape(const_shape![16]), 0i32);
                let on: i32 = tile_to_scalar(on);
                let well: Tile<i32, { [1, 16] }> = select(there & eq_tile(now, one), somebody, nobody);
                let well: Tile<i32, { [] }> = reduce_max(well.reshape(const_shape![16]), 0i32);
                let well: i32 = tile_to_scalar(well);
                let mut what: i32 = 2i32;
                if on == 1i32 {
                    what = 1i32;
                } else {
                    if well == 1i32 {
                        what = 0i32;
                    }
                }
                store_column::<i32, 1>(
                    slice::<i32>(live, wide(tile)),
                    1i32,
                    broadcast_scalar(what, const_shape![1]),
                );
                if KIND == 0i32 {
                    let _stored: Token = store_packed::<f32, D, 16>(kept, vector_rows, tile * 3i32, kbar);
                }
                if what == 1i32 {
                    let (unit, scaled): (Tile<f32, { [1, 16] }>, Tile<f32, { [D, 16] }>) = in_unit::<D>(next);
                    let direction: Tile<E, { [D, 16] }> = convert_tile(scaled);
                    let _stored: Token =
                        store_packed::<E, D, 16>(vectors, vector_rows, tile * 3i32, direction);
                    let taken: Tile<f32, { [D, 16] }> = convert_tile(direction);
                    set_record_row(record, tile, 1i32, column_dot::<D>(kbar, taken));
                    set_record_row(record, tile, 2i32, one);
                    set_record_row(record, tile, 8i32, unit);
                    let _stored: Token = store_packed::<f32, D, 16>(kept, vector_rows, tile * 3i32 + 1i32, r);
                    let _stored: Token = store_packed::<f32, D, 16>(kept, vector_rows, tile * 3i32 + 2i32, x);
                    set_record_row(record, tile, 3i32, rr);
                    set_record_row(record, tile, 7i32, free);
                    set_record_row(record, tile, 9i32, passes);
                } else {
                    let (unit, scaled): (Tile<f32, { [1, 16] }>, Tile<f32, { [D, 16] }>) = in_unit::<D>(x);
                    let first: Tile<E, { [D, 16] }> = convert_tile(scaled);
                    let of_first: Tile<f32, { [D, 16] }> = convert_tile(first);
                    let second: Tile<E, { [D, 16] }> = convert_tile(scaled - of_first);
                    let of_second: Tile<f32, { [D, 16] }> = convert_tile(second);
                    let third: Tile<E, { [D, 16] }> = convert_tile(scaled - of_first - of_second);
                    let _stored: Token = store_packed::<E, D, 16>(vectors, vector_rows, tile * 3i32, first);
                    let _stored: Token =
                        store_packed::<E, D, 16>(vectors, vector_rows, tile * 3i32 + 1i32, second);
                    let _stored: Token =
                        store_packed::<E, D, 16>(vectors, vector_rows, tile * 3i32 + 2i32, third);
                    // 1 - x.(k - kbar) = (x.k - (1 + x.kbar)) (-1), in the probe's unit
                    let from: Tile<f32, { [1, 16] }> =
                        column_dot::<D>(kbar, scaled) + quotient::<{ [1, 16] }>(one, unit);
                    set_record_row(record, tile, 1i32, from);
                    set_record_row(record, tile, 2i32, zero - unit);
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
                let reached: Tile<f32, { [1, 16] }> = if KIND == 0i32 {
                    min_tile(ahead, rr)
                } else {
                    select(runs, min_tile(ahead, rr), record_row(record, tile, 6i32))
                };
                set_record_row(record, tile, 6i32, reached);
                set_record_row(record, tile, 10i32, now);
                if diagnostics != 0i32 {
                    let at: i64 = wide(kv) * wide(count);
                    let number: Tile<i32, { [1, 16] }> = convert_tile(passes);
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
                    let rest: Tile<f32, { [1, 16] }> = sqrt(
                        select(gt_tile(dd, zero), reached / max_tile(dd, least), zero),
                        rounding::NearestEven,
                        ftz::Disabled,
                    );
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
