//! Decoding for queries that share a KV head in one launch: a tile block makes all passes over a context for up to 16 queries.
//!
//! The passes and the steps are those of `columns`; nothing is launched between them. For short contexts, which would not be split.
//!
//! What a turn leaves to the next one goes by way of memory, ordered by tokens: a loop that carries it in registers makes all products in
//! it wait for each other. It has two places, for even and odd turns, so that nothing is overwritten that another thread may still have
//! to read. Sums have one: what is next put there needs `what`, which is made of all of them.
//!
//! A record holds 16 numbers per query: 0 |r|^2, 1 last step length, 2 passes, 3 state (0 goes on, 1 solved, 2 gave up), 4 |r|^2 that counts
//! as reached, 11 what roundings of directions have left, 12 the largest curvature; that of even turns also 5 |delta|^2, 6 |r|^2 that is
//! allowed; that of odd turns, at D = 64, 8 largest logit and 9 sum of weights of the first pass, 10 sum of the other weights of the last.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod decode_together {
    use super::super::columns::columns::*;
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Stores what a turn leaves to the next one.
    unsafe fn keep<const D: i32>(
        kept: *mut f32,
        record: *mut f32,
        tiles: i32,
        slot: i32, // 2 tile + the next turn's parity
        r: Tile<f32, { [16, D] }>,
        x: Tile<f32, { [16, D] }>,
        next: Tile<f32, { [16, D] }>,
        rr: Tile<f32, { [16, 1] }>,
        free: Tile<f32, { [16, 1] }>,
        passes: Tile<f32, { [16, 1] }>,
        now: Tile<f32, { [16, 1] }>,
        reached: Tile<f32, { [16, 1] }>,
        rounded: Tile<f32, { [16, 1] }>,
        largest: Tile<f32, { [16, 1] }>,
    ) -> Token {
        let rows: i32 = tiles * 128i32;
        let t0: Token = store_packed::<f32, 16, D>(kept, rows, slot * 4i32, r);
        let t1: Token = store_packed::<f32, 16, D>(kept, rows, slot * 4i32 + 1i32, x);
        let t2: Token = store_packed::<f32, 16, D>(kept, rows, slot * 4i32 + 2i32, next);
        let t3: Token = keep_row(record, slot, 0i32, rr);
        let t4: Token = keep_row(record, slot, 1i32, free);
        let t5: Token = keep_row(record, slot, 2i32, passes);
        let t6: Token = keep_row(record, slot, 3i32, now);
        let t7: Token = keep_row(record, slot, 4i32, reached);
        let t8: Token = keep_row(record, slot, 11i32, rounded);
        let t9: Token = keep_row(record, slot, 12i32, largest);
        let t: Token = join_tokens(&[t0, t1, t2, t3, t4, t5, t6, t7, t8, t9]);
        t
    }

    /// Where number `which` of a record lies.
    unsafe fn row_at(record: *mut f32, slot: i32, which: i32) -> PointerTile<*mut f32, { [16] }> {
        let at: i64 = wide(slot) * wide(256i32) + wide(which * 16i32);
        let base: PointerTile<*mut f32, { [] }> = slice::<f32>(record, at);
        let one: PointerTile<*mut f32, { [1] }> = base.reshape(const_shape![1]);
        let all: PointerTile<*mut f32, { [16] }> = one.broadcast(const_shape![16]);
        let r: Tile<i32, { [16] }> = iota(const_shape![16]);
        let ptrs: PointerTile<*mut f32, { [16] }> = all.offset_tile(r);
        ptrs
    }

    /// Stores number `which` of a record.
    unsafe fn keep_row(record: *mut f32, slot: i32, which: i32, x: Tile<f32, { [16, 1] }>) -> Token {
        let ptrs: PointerTile<*mut f32, { [16] }> = row_at(record, slot, which);
        let token: Token = store_ptr_tko(
            ptrs,
            x.reshape(const_shape![16]),
            ordering::Weak,
            None::<scope::TileBlock>,
            None,
            None,
            Latency::<0>,
        );
        token
    }

    /// Reads it.
    unsafe fn kept_row(record: *mut f32, slot: i32, which: i32, stored: Token) -> Tile<f32, { [16, 1] }> {
        let ptrs: PointerTile<*mut f32, { [16] }> = row_at(record, slot, which);
        let (x, _token): (Tile<f32, { [16] }>, Token) = load_ptr_tko(
            ptrs,
            ordering::Weak,
            None::<scope::TileBlock>,
            None,
            None,
            Some(stored),
            Latency::<0>,
        );
        x.reshape(const_shape![16, 1])
    }

    /// The generics are those of `lla_decode_pass`.
    /// Grid (tiles), a tile being up to 16 queries of a KV head.
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_together<
        E: ElementType,
        const BN: i32,
        const D: i32,
        const PAGED: i32,
        const NARROW: i32, // 1: fp16, whose largest number is small
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
        iterations: *mut i32, // out [batch, heads, t] if diagnostics: passes
        relative: *mut f32,   // out [batch, heads, t] if diagnostics: |r| / |delta|
        todo: *mut i32,       // out [rows]: 1 where the moments have to be summed
        kept: *mut f32, // [tiles, 8, 16, D]: residual, solution, next direction, mean key; again those of odd turns, sums
        record: *mut f32, // [tiles, 2, 16, 16]: numbers per query, of even and of odd turns
        options: i32,   // 1 causal, 2 window, 16 probe given
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
        q_head: i32,
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
        out_head: i32,
        out_row: i32,
        tolerance2: f32, // as in `lla_decode_step`
        error2: f32,
        limit: i32, // passes of conjugate gradients
        save_state: i32,
        diagnostics: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let count: i32 = group * t;
        let (kv, start, batch, head): (i32, i32, i32, i32) = tile_place(pid.0, count, kv_heads);
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, 0i32, window);
        let hi: i32 = decode_end(options, length, t, t - 1i32);
        let first: i32 = lo / BN;
        let end: i32 = ceil_div(hi, BN);
        let keys: Tensor<E, { [-1, -1, -1] }> =
            pool::<E>(k, wide(head) * k_head, pages, page_size, d, k_page, k_row);
        let kp: Partition<E, { [1, BN, D] }> = keys.partition(const_shape![1, BN, D]);
        let key_parts: Partition<E, { [1, 16, D] }> = keys.partition(const_shape![1, 16, D]);
        let values: Tensor<E, { [-1, -1, -1] }> =
            pool::<E>(v, wide(head) * v_head, pages, page_size, dv, v_page, v_row);
        let vp: Partition<E, { [1, BN, D] }> = values.partition(const_shape![1, BN, D]);
        let value_parts: Partition<E, { [1, 16, D] }> = values.partition(const_shape![1, 16, D]);
        let at: i64 = wide(batch) * q_batch + wide(head * group) * wide(q_head);
        let query: Tile<E, { [16, D] }> =
            queries::<E, D>(slice::<E>(q, at), start, count, t, q_head, q_row, d);
        let qf: Tile<f32, { [16, D] }> = convert_tile(query);
        let ridge_at: i64 = wide(batch) * wide(ridge_batch) + wide(head * group) * wide(ridge_head);
        let lam: Tile<f32, { [16, 1] }> =
            queries::<f32, 1>(slice::<f32>(ridge, ridge_at), start, count, t, ridge_head, ridge_row, 1i32);
        let scale: f32 = load_scalar(slice::<f32>(scale, wide(head * scale_head)));
        let rows: i32 = min(count - start, 16i32);
        let there: Tile<bool, { [16, 1] }> = queries_there(rows);
        // What each query sees; all of them see all of keys full0 to full1.
        let row_lo: Tile<i32, { [1, 16] }> = first_seen(options, start, length, t, window);
        let row_hi: Tile<i32, { [1, 16] }> = end_seen(options, start, length, t, count);
        let full0: i32 = decode_first(options, length, t, t - 1i32, window);
        let full1: i32 = decode_end(options, length, t, 0i32);
        let zero: Tile<f32, { [16, 1] }> = constant(0.0f32, const_shape![16, 1]);
        let one: Tile<f32, { [16, 1] }> = constant(1.0f32, const_shape![16, 1]);
        let zeros: Tile<f32, { [16, D] }> = constant(0.0f32, const_shape![16, D]);
        let nothing: Tile<f32, { [1, 16] }> = constant(-1.0e30f32, const_shape![1, 16]);

        let page: i32 = page_of::<PAGED>(table, width, batch, lo, page_size, pages);
        let at: i64 = wide(page) * wide(k_page) + wide(head) * k_head + wide(lo % page_size) * wide(k_row);
        let (from, factor): (Tile<f32, { [16, 1] }>, Tile<f32, { [16, 1] }>) =
            first_counts::<E, D>(k, at, d, query);
        let from: Tile<f32, { [1, 16] }> = as_columns(from);
        let factor: Tile<f32, { [1, 16] }> = as_columns(factor);
        let (m, sum, other, l, total): (
            Tile<f32, { [1, 16] }>,
            Tile<f32, { [D, 16] }>,
            Tile<f32, { [D, 16] }>,
            Tile<f32, { [1, 16] }>,
            Tile<f32, { [1, 16] }>,
        ) = pass_over::<E, BN, D, PAGED, 0, NARROW>(
            &kp,
            &key_parts,
            &vp,
            &value_parts,
            table,
            width,
            batch,
            pages,
            page_size,
            first,
            end,
            full0,
            full1,
            row_lo,
            row_hi,
            scale,
            query,
            nothing,
            from,
            factor,
            query,
            query,
            query,
        );
        let tile_rows: i32 = grid.0 * 128i32;
        let even: i32 = pid.0 * 2i32;
        let odd: i32 = even + 1i32;
        let mean_at: i32 = even * 4i32 + 3i32;
        let sum_at: i32 = odd * 4i32 + 3i32;
        let mut sum: Tile<f32, { [16, D] }> = sum.transpose();
        let mut other: Tile<f32, { [16, D] }> = other.transpose();
        let mut m: Tile<f32, { [16, 1] }> = as_rows(m);
        let mut l: Tile<f32, { [16, 1] }> = as_rows(l);
        let mut total: Tile<f32, { [16, 1] }> = as_rows(total);
        if D == 64i32 {
            // By way of memory: in steps made of what products left in registers every reduction crosses warps. 128 wide, it takes longer.
            let t0: Token = store_packed::<f32, 16, D>(kept, tile_rows, odd * 4i32, sum);
            let t1: Token = store_packed::<f32, 16, D>(kept, tile_rows, sum_at, other);
            let t2: Token = keep_row(record, odd, 8i32, m);
            let t3: Token = keep_row(record, odd, 9i32, l);
            let t4: Token = keep_row(record, odd, 10i32, total);
            let summed: Token = join_tokens(&[t0, t1, t2, t3, t4]);
            sum = load_packed_after::<f32, 16, D>(kept, tile_rows, odd * 4i32, summed);
            other = load_packed_after::<f32, 16, D>(kept, tile_rows, sum_at, summed);
            m = kept_row(record, odd, 8i32, summed);
            l = kept_row(record, odd, 9i32, summed);
            total = kept_row(record, odd, 10i32, summed);
        }
        let (kbar, product, log, none): (
            Tile<f32, { [16, D] }>,
            Tile<f32, { [16, D] }>,
            Tile<f32, { [16, 1] }>,
            Tile<bool, { [16, 1] }>,
        ) = first_product::<D>(m, l, sum, other, total, qf, lam);
        let delta: Tile<f32, { [16, D] }> = kbar - qf;
        let dd: Tile<f32, { [16, 1] }> = row_dot::<16, D>(delta, delta);
        let state: Tile<f32, { [16, 1] }> = select(none | eq_tile(dd, zero), one, zero);
        let (r, x, next, rr, free, passes, now, allowed, reached, rounded, largest): (
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
        ) = step_along::<D, 0>(
            delta, zeros, qf, product, lam, dd, zero, zero, one, zero, state, zero, zero, zero, zero, there,
            rows, limit, tolerance2, error2,
        );
        let mut x: Tile<f32, { [16, D] }> = x;
        let mut now: Tile<f32, { [16, 1] }> = now;
        let mut reached: Tile<f32, { [16, 1] }> = reached;
        if (options & 16i32) != 0i32 {
            let at: i64 = wide(kv) * wide(count) * wide(d);
            x = queries::<f32, D>(slice::<f32>(probe, at), start, count, t, t * d, d, d);
            now = one;
            reached = zero;
        }
        let (now, what): (Tile<f32, { [16, 1] }>, i32) = what_next::<D>(now, x, kbar, there);
        let mut what: i32 = what;
        // Weights are raised by 2^10, so that fp16 keeps the small ones.
        let ten: Tile<f32, { [16, 1] }> = constant(10.0f32, const_shape![16, 1]);
        let lowered: Tile<f32, { [16, D] }> = constant(0.0009765625f32, const_shape![16, D]);
        let shift: Tile<f32, { [1, 16] }> = as_columns(select(none, zero, log - ten));
        let mut slot: i32 = even;
        let t0: Token = store_packed::<f32, 16, D>(kept, tile_rows, mean_at, kbar);
        let t1: Token = keep_row(record, slot, 5i32, dd);
        let t2: Token = keep_row(record, slot, 6i32, allowed);
        let t3: Token = keep::<D>(
            kept, record, grid.0, slot, r, x, next, rr, free, passes, now, reached, rounded, largest,
        );
        let fixed: Token = join_tokens(&[t0, t1, t2]);
        let mut stored: Token = t3;
        let ones: Tile<f32, { [1, 16] }> = constant(1.0f32, const_shape![1, 16]);
        for turn in 0i32..limit {
            if what == 1i32 {
                let kbar: Tile<f32, { [16, D] }> =
                    load_packed_after::<f32, 16, D>(kept, tile_rows, mean_at, fixed);
                let next: Tile<f32, { [16, D] }> =
                    load_packed_after::<f32, 16, D>(kept, tile_rows, slot * 4i32 + 2i32, stored);
                let (_unit, scaled): (Tile<f32, { [16, 1] }>, Tile<f32, { [16, D] }>) = in_unit::<D>(next);
                let direction: Tile<E, { [16, D] }> = convert_tile(scaled);
                let along: Tile<f32, { [16, D] }> = convert_tile(direction);
                let from: Tile<f32, { [16, 1] }> = row_dot::<16, D>(kbar, along);
                let from: Tile<f32, { [1, 16] }> = as_columns(from);
                let (_m, _sum, other, _l, total): (
                    Tile<f32, { [1, 16] }>,
                    Tile<f32, { [D, 16] }>,
                    Tile<f32, { [D, 16] }>,
                    Tile<f32, { [1, 16] }>,
                    Tile<f32, { [1, 16] }>,
                ) = pass_over::<E, BN, D, PAGED, 1, NARROW>(
                    &kp,
                    &key_parts,
                    &vp,
                    &value_parts,
                    table,
                    width,
                    batch,
                    pages,
                    page_size,
                    first,
                    end,
                    full0,
                    full1,
                    row_lo,
                    row_hi,
                    scale,
                    query,
                    shift,
                    from,
                    ones,
                    direction,
                    direction,
                    direction,
                );
                let kbar: Tile<f32, { [16, D] }> =
                    load_packed_after::<f32, 16, D>(kept, tile_rows, mean_at, fixed);
                let next: Tile<f32, { [16, D] }> =
                    load_packed_after::<f32, 16, D>(kept, tile_rows, slot * 4i32 + 2i32, stored);
                let r: Tile<f32, { [16, D] }> =
                    load_packed_after::<f32, 16, D>(kept, tile_rows, slot * 4i32, stored);
                let x: Tile<f32, { [16, D] }> =
                    load_packed_after::<f32, 16, D>(kept, tile_rows, slot * 4i32 + 1i32, stored);
                let rr: Tile<f32, { [16, 1] }> = kept_row(record, slot, 0i32, stored);
                let free: Tile<f32, { [16, 1] }> = kept_row(record, slot, 1i32, stored);
                let passes: Tile<f32, { [16, 1] }> = kept_row(record, slot, 2i32, stored);
                let now: Tile<f32, { [16, 1] }> = kept_row(record, slot, 3i32, stored);
                let reached: Tile<f32, { [16, 1] }> = kept_row(record, slot, 4i32, stored);
                let rounded: Tile<f32, { [16, 1] }> = kept_row(record, slot, 11i32, stored);
                let largest: Tile<f32, { [16, 1] }> = kept_row(record, slot, 12i32, stored);
                let dd: Tile<f32, { [16, 1] }> = kept_row(record, even, 5i32, fixed);
                let allowed: Tile<f32, { [16, 1] }> = kept_row(record, even, 6i32, fixed);
                let lam: Tile<f32, { [16, 1] }> = queries::<f32, 1>(
                    slice::<f32>(ridge, ridge_at),
                    start,
                    count,
                    t,
                    ridge_head,
                    ridge_row,
                    1i32,
                );
                let (unit, scaled): (Tile<f32, { [16, 1] }>, Tile<f32, { [16, D] }>) = in_unit::<D>(next);
                let direction: Tile<E, { [16, D] }> = convert_tile(scaled);
                let along: Tile<f32, { [16, D] }> = convert_tile(direction);
                let mut other: Tile<f32, { [16, D] }> = other.transpose();
                let mut total: Tile<f32, { [16, 1] }> = as_rows(total);
                if D == 64i32 {
                    let t0: Token = store_packed::<f32, 16, D>(kept, tile_rows, sum_at, other);
                    let t1: Token = keep_row(record, odd, 10i32, total);
                    let summed: Token = join_tokens(&[t0, t1]);
                    other = load_packed_after::<f32, 16, D>(kept, tile_rows, sum_at, summed);
                    total = kept_row(record, odd, 10i32, summed);
                }
                let product: Tile<f32, { [16, D] }> = (other - kbar * total.broadcast(const_shape![16, D]))
                    * lowered
                    + along * lam.broadcast(const_shape![16, D]);
                // Passes cost little here beside moments: they are given up later.
                let left: i32 = (limit - 1i32 - turn) * 2i32;
                let (r1, x1, next1, rr1, free1, passes1, now1, _allowed, reached1, rounded1, largest1): (
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
                ) = step_along::<D, 1>(
                    r, x, along, product, lam, dd, rr, free, unit, passes, now, allowed, reached, rounded,
                    largest, there, rows, left, tolerance2, error2,
                );
                let (now2, what2): (Tile<f32, { [16, 1] }>, i32) = what_next::<D>(now1, x1, kbar, there);
                slot = even + (turn + 1i32) % 2i32;
                stored = keep::<D>(
                    kept, record, grid.0, slot, r1, x1, next1, rr1, free1, passes1, now2, reached1, rounded1,
                    largest1,
                );
                what = what2;
            }
        }
        let kbar: Tile<f32, { [16, D] }> = load_packed_after::<f32, 16, D>(kept, tile_rows, mean_at, fixed);
        let x: Tile<f32, { [16, D] }> =
            load_packed_after::<f32, 16, D>(kept, tile_rows, slot * 4i32 + 1i32, stored);
        let (x1, x2, x3, from, factor): (
            Tile<E, { [16, D] }>,
            Tile<E, { [16, D] }>,
            Tile<E, { [16, D] }>,
            Tile<f32, { [16, 1] }>,
            Tile<f32, { [16, 1] }>,
        ) = probe_terms::<E, D>(x, kbar);
        let from: Tile<f32, { [1, 16] }> = as_columns(from);
        let factor: Tile<f32, { [1, 16] }> = as_columns(factor);
        // Where all have given up there is no output to make.
        let mut end: i32 = end;
        if what == 2i32 {
            end = first;
        }
        let (_m, _sum, found, _l, _total): (
            Tile<f32, { [1, 16] }>,
            Tile<f32, { [D, 16] }>,
            Tile<f32, { [D, 16] }>,
            Tile<f32, { [1, 16] }>,
            Tile<f32, { [1, 16] }>,
        ) = pass_over::<E, BN, D, PAGED, 2, NARROW>(
            &kp,
            &key_parts,
            &vp,
            &value_parts,
            table,
            width,
            batch,
            pages,
            page_size,
            first,
            end,
            full0,
            full1,
            row_lo,
            row_hi,
            scale,
            query,
            shift,
            from,
            factor,
            x1,
            x2,
            x3,
        );
        let now: Tile<f32, { [16, 1] }> = kept_row(record, slot, 3i32, stored);
        let mut found: Tile<f32, { [16, D] }> = found.transpose();
        found = found * lowered;
        if D == 64i32 {
            let summed: Token = store_packed::<f32, 16, D>(kept, tile_rows, sum_at, found);
            found = load_packed_after::<f32, 16, D>(kept, tile_rows, sum_at, summed);
        }
        let solved: Tile<bool, { [16, 1] }> = standing::<D>(found, now);
        let some: Tile<i32, { [16, 1] }> = constant(1i32, const_shape![16, 1]);
        let no: Tile<i32, { [16, 1] }> = constant(0i32, const_shape![16, 1]);
        let of_row: i64 = wide(kv) * wide(count);
        store_queries::<i32, 1>(
            slice::<i32>(todo, of_row),
            start,
            count,
            t,
            t,
            1i32,
            1i32,
            select(solved, no, some),
        );
        let at: i64 = wide(batch) * out_batch + wide(head * group) * wide(out_head);
        let result: Tile<E, { [16, D] }> = convert_tile(found);
        store_queries::<E, D>(slice::<E>(out, at), start, count, t, out_head, out_row, dv, result);
        let ln2: Tile<f32, { [16, 1] }> = constant(0.6931471805599453f32, const_shape![16, 1]);
        let minus_inf: Tile<f32, { [16, 1] }> = constant(f32::NEG_INFINITY, const_shape![16, 1]);
        let log: Tile<f32, { [16, 1] }> = select(none, minus_inf, log * ln2);
        store_queries::<f32, 1>(slice::<f32>(lse, of_row), start, count, t, t, 1i32, 1i32, log);
        if save_state != 0i32 {
            let at: i64 = of_row * wide(d);
            let kbar: Tile<f32, { [16, D] }> =
                load_packed_after::<f32, 16, D>(kept, tile_rows, mean_at, fixed);
            let x: Tile<f32, { [16, D] }> =
                load_packed_after::<f32, 16, D>(kept, tile_rows, slot * 4i32 + 1i32, stored);
            store_queries::<f32, D>(slice::<f32>(key_mean, at), start, count, t, t * d, d, d, kbar);
            if (options & 16i32) == 0i32 {
                store_queries::<f32, D>(slice::<f32>(probe, at), start, count, t, t * d, d, d, x);
            }
        }
        if diagnostics != 0i32 {
            let passes: Tile<f32, { [16, 1] }> = kept_row(record, slot, 2i32, stored);
            let reached: Tile<f32, { [16, 1] }> = kept_row(record, slot, 4i32, stored);
            let dd: Tile<f32, { [16, 1] }> = kept_row(record, even, 5i32, fixed);
            let number: Tile<i32, { [16, 1] }> = convert_tile(passes);
            store_queries::<i32, 1>(slice::<i32>(iterations, of_row), start, count, t, t, 1i32, 1i32, number);
            let rest: Tile<f32, { [16, 1] }> = relative_of(reached, dd);
            store_queries::<f32, 1>(slice::<f32>(relative, of_row), start, count, t, t, 1i32, 1i32, rest);
        }
    }
}
