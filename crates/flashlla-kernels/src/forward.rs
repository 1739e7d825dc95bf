//! The forward of a block of queries: softmax weights and mean key, solve, output.
//!
//! Keys and values come as `lla_convert` leaves them: fp16, one power of two per head, padded with zero rows and columns.
//!
//! The solve's first step costs one product in the first pass. `delta = kbar - q` points mostly along q, and
//! `C q = sum p (k - kbar) (k.q)` needs no other products with the keys than the logits have. So x starts at the best multiple of q, and
//! the first direction is what is left of the residual, made conjugate to q. What A does to q also says about how far one more
//! step, which takes no pass over the keys, would bring the residual down; where that is far enough no pass is made at all.

#[cutile::module]
pub mod forward {
    use super::super::state::state::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// The ridge of every query of a block.
    unsafe fn ridges<const BM: i32>(
        ridge: *mut f32,
        batch: i32,
        head: i32,
        first: i32,
        rows: i32,
        batch_stride: i32,
        head_stride: i32,
        row_stride: i32,
    ) -> Tile<f32, { [BM, 1] }> {
        let at: i64 = wide(batch) * wide(batch_stride)
            + wide(head) * wide(head_stride)
            + wide(first) * wide(row_stride);
        load_rowwise::<f32, BM>(slice::<f32>(ridge, at), row_stride, rows)
    }

    /// `ALIGNED` = 1: bases, strides and columns of q and out are multiples of 16 bytes. `USUAL` = 1: options 1 and 32 alone, and no
    /// diagnostics.
    /// Grid (batch * heads, blocks of BM queries).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_forward<
        E: ElementType,
        const BM: i32,
        const BN: i32,
        const D: i32,
        const HIGH: i32,
        const BIAS: i32,
        const ALIGNED: i32,
        const USUAL: i32,
    >(
        q: *mut E,            // [batch, heads, n, d], strided
        kh: *mut f16,         // [batch * kv_heads, mp, D]
        vh: *mut f16,         // [batch * kv_heads, mp, D]
        unit: *mut f32,       // [2, batch * kv_heads]: units of keys and values
        qh: *mut f16,         // scratch [batch * heads, np, D] if D is 64
        out: *mut E,          // out [batch, heads, n, dv], strided
        key_mean: *mut f32,   // out [batch * heads, np, D]
        x: *mut f32,          // out [batch * heads, np, D] if save_probe; in: the given one under option 16
        lse: *mut f32,        // out [batch * heads, n] if save_lse, natural
        ridge: *mut f32,      // [batch, heads, n], strided
        iterations: *mut i32, // out [batch * heads, n] if diagnostics
        relative: *mut f32,   // out [batch * heads, n] if diagnostics: |r| / |delta|
        options: i32,
        heads: i32,
        kv_heads: i32,
        n: i32,
        np: i32, // n rounded up to 128
        m: i32,
        mp: i32, // m rounded up to 128
        offset: i32,
        window: i32,
        lo: *mut i32, // [batch, n]: first visible key; option 4 only
        hi: *mut i32, // [batch, n]: one past the last
        range_batch: i32,
        bounds: *mut i32, // [batch, blocks of BM queries, 4]: min lo, max lo, min hi, max hi; option 4 only
        bounds_batch: i32,
        bias: *mut f32, // [batch, heads, m], strided, unit last; BIAS = 1 only
        bias_batch: i32,
        bias_head: i32,
        d: i32,
        q_batch: i64,
        q_head: i64,
        q_row: i32,
        scale: f32,
        dv: i32,
        out_batch: i64,
        out_head: i64,
        out_row: i32,
        ridge_batch: i32,
        ridge_head: i32,
        ridge_row: i32,
        tolerance2: f32, // square of the relative residual asked for
        error2: f32, // if positive, a block ends at this mean square of its outputs' expected relative errors instead
        max_iterations: i32,
        first_error2: f32, // the mean square at which no pass is made
        save_lse: i32,
        save_probe: i32,
        diagnostics: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let bh: i32 = pid.0;
        let batch: i32 = bh / heads;
        let head: i32 = bh % heads;
        let kv: i32 = batch * kv_heads + head / (heads / kv_heads);
        let kvs: i32 = grid.0 / heads * kv_heads;
        let mi: i32 = block_index(options, pid.1, grid.1);
        let first: i32 = mi * BM;
        let rows: i32 = n - first;
        let tile: i32 = bh * (np / BM) + mi;
        let pos: Tile<i32, { [BM, 1] }> = positions::<BM>(first, n, offset);
        let range_at: i64 = wide(batch) * wide(range_batch) + wide(first);
        let row_lo: Tile<i32, { [BM, 1] }> =
            first_keys::<BM, USUAL>(options, pos, m, window, lo, range_at, rows);
        let row_hi: Tile<i32, { [BM, 1] }> = end_keys::<BM, USUAL>(options, pos, m, hi, range_at, rows);
        let skip: Tile<i32, { [BM, 1] }> = skipped_keys::<BM, USUAL>(options, pos);
        let last: i32 = min(first + BM, n) - 1i32;
        let bounds_at: i64 = wide(batch * bounds_batch + mi * 4i32);
        let (begin, end, full0, full1): (i32, i32, i32, i32) =
            key_tiles::<BN, USUAL>(options, bounds, bounds_at, first, last, offset, m, window);
        let kt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(kh, kvs * mp);
        let kp: Partition<f16, { [BN, D] }> = kt0.partition(const_shape![BN, D]);
        let kv0: i32 = kv * (mp / BN);
        let ku: f32 = load_scalar(slice::<f32>(unit, wide(kv)));
        // Numbers that are needed late: 128 wide they are read here, where nothing waits for them. At 64 that was slower.
        let mut lam: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let mut vu: f32 = 0.0f32;
        if D != 64i32 {
            lam = ridges::<BM>(ridge, batch, head, first, rows, ridge_batch, ridge_head, ridge_row);
            vu = load_scalar(slice::<f32>(unit, wide(kvs + kv)));
        }
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let one: Tile<f32, { [BM, 1] }> = constant(1.0f32, const_shape![BM, 1]);
        let kun: Tile<f32, { [BM, 1] }> = broadcast_scalar(ku, const_shape![BM, 1]);
        // Times any logit scale (1e-7 or more) far below every logit, times a weight of 0 still 0.
        let never: Tile<f32, { [BM, BN] }> = constant(-3.0e38f32, const_shape![BM, BN]);
        let bias_at: i64 = wide(batch) * wide(bias_batch) + wide(head) * wide(bias_head);

        // Queries, scaled to norm 1..2 per row; the softmax scale's sign goes into them.
        let q_at: i64 = wide(batch) * q_batch + wide(head) * q_head + wide(first) * wide(q_row);
        let tq: Tile<E, { [BM, D] }> = if ALIGNED == 1i32 {
            load_rows_aligned::<E, BM, D>(slice_aligned::<E>(q, q_at), q_row, rows, d)
        } else {
            load_rows::<E, BM, D>(slice::<E>(q, q_at), q_row, rows, d)
        };
        let qf: Tile<f32, { [BM, D] }> = convert_tile(tq);
        let q_q: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(qf, qf);
        let qn: Tile<f32, { [BM, 1] }> = root_floor::<{ [BM, 1] }>(q_q);
        let mut sign: f32 = 1.0f32;
        let mut magnitude: f32 = scale;
        if scale < 0.0f32 {
            sign = 0.0f32 - 1.0f32;
            magnitude = 0.0f32 - scale;
        }
        let sign: Tile<f32, { [BM, 1] }> = broadcast_scalar(sign, const_shape![BM, 1]);
        let qu: Tile<f32, { [BM, 1] }> = sign * qn;
        let inverse_qu: Tile<f32, { [BM, 1] }> = sign * inverse_of_power::<{ [BM, 1] }>(qn);
        let mut tq: Tile<f16, { [BM, D] }> = convert_tile(qf * across::<BM, D>(inverse_qu));
        if D == 64i32 {
            // By way of memory, products read the queries where they arrive, in shared memory, and not from registers.
            let stored: Token = store_packed::<f16, BM, D>(qh, grid.0 * np, tile, tq);
            tq = load_packed_after::<f16, BM, D>(qh, grid.0 * np, tile, stored);
        }
        // exp's base is 2 inside. The floor keeps masked logits apart from the others at a scale of 0.
        let floor_scale: Tile<f32, { [BM, 1] }> = constant(1.0e-7f32, const_shape![BM, 1]);
        let sc_true: Tile<f32, { [BM, 1] }> = max_tile(
            qn * broadcast_scalar(magnitude * ku * 1.4426950408889634f32, const_shape![BM, 1]),
            floor_scale,
        );
        let mut sc: Tile<f32, { [BM, 1] }> = sc_true;
        if BIAS == 1i32 {
            sc = one;
        }
        // Weights are raised so that fp16 keeps the small ones; raised weight times product stays below its limit.
        let eight: Tile<f32, { [BM, 1] }> = constant(8.0f32, const_shape![BM, 1]);
        let mut m_i: Tile<f32, { [BM, 1] }> = constant(-1.0e30f32, const_shape![BM, 1]);
        let mut sum_p: Tile<f32, { [BM, 16] }> = constant(0.0f32, const_shape![BM, 16]);
        let ones: Tile<f16, { [BN, 16] }> = ones::<BN, 16>();
        // 128 wide, products that sum weights cost more than they save. There each column of the key tiles has a sum of its own: a row's
        // sum crosses threads and warps, with two barriers, and does so once.
        let mut by_column: Tile<f32, { [BM, BN] }> = constant(0.0f32, const_shape![BM, BN]);
        let mut sum_k: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        let mut sum_sk: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        for j in begin..end {
            let kt: Tile<f16, { [BN, D] }> = kp.load([kv0 + j, 0i32]);
            let product: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
            let mut s: Tile<f32, { [BM, BN] }> = product;
            if BIAS == 1i32 {
                s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
            }
            if (j < full0) || (j >= full1) {
                s = select(sees::<BM, BN, D, USUAL>(row_lo, row_hi, skip, j * BN), s, never);
            }
            let mx: Tile<f32, { [BM] }> = reduce_max(s, 1i32);
            let mn: Tile<f32, { [BM, 1] }> = max_tile(m_i, mx.reshape(const_shape![BM, 1]) * sc);
            let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, eight - mn);
            let al: Tile<f32, { [BM, 1] }> = exp2(m_i - mn, ftz::Enabled);
            // The sum is that of the rounded weights: kbar is then a mean of keys, with weights that are hardly others. Otherwise it would
            // err by a part of the keys' common mean, which no key's distance from kbar covers, and a small ridge does not either.
            let pb: Tile<f16, { [BM, BN] }> = convert_tile(p);
            if D == 64i32 {
                sum_p = mma(pb, ones, sum_p * across::<BM, 16>(al));
            } else {
                let pf: Tile<f32, { [BM, BN] }> = convert_tile(pb);
                by_column = fma(by_column, across::<BM, BN>(al), pf, rounding::NearestEven, ftz::Enabled);
            }
            let mut sp: Tile<f32, { [BM, BN] }> = s;
            if BIAS == 1i32 {
                sp = product;
            }
            let spb: Tile<f16, { [BM, BN] }> = convert_tile(p * sp);
            sum_k = mma(pb, kt, sum_k * across::<BM, D>(al));
            sum_sk = mma(spb, kt, sum_sk * across::<BM, D>(al));
            m_i = mn;
        }
        let l_i: Tile<f32, { [BM, 1] }> = if D == 64i32 {
            summed::<BM, 16>(sum_p)
        } else {
            let sums: Tile<f32, { [BM] }> = reduce_sum(by_column, 1i32);
            sums.reshape(const_shape![BM, 1])
        };
        let none: Tile<bool, { [BM, 1] }> = eq_tile(l_i, zero);
        let lse2: Tile<f32, { [BM, 1] }> = m_i + log2(l_i) - eight;
        let shift: Tile<f32, { [BM, 1] }> = select(none, zero, zero - lse2);
        let inv_l: Tile<f32, { [BM, 1] }> = select(none, zero, quotient::<{ [BM, 1] }>(kun, l_i));
        let kbar: Tile<f32, { [BM, D] }> = sum_k * across::<BM, D>(inv_l);
        if save_lse != 0i32 {
            let ln2: Tile<f32, { [BM, 1] }> = constant(0.6931471805599453f32, const_shape![BM, 1]);
            let minus_inf: Tile<f32, { [BM, 1] }> = constant(f32::NEG_INFINITY, const_shape![BM, 1]);
            store_column::<f32, BM>(
                slice::<f32>(lse, wide(bh) * wide(n) + wide(first)),
                rows,
                select(none, minus_inf, lse2 * ln2).reshape(const_shape![BM]),
            );
        }

        // A q = C q + ridge q, and the best multiple of q.
        if D == 64i32 {
            lam = ridges::<BM>(ridge, batch, head, first, rows, ridge_batch, ridge_head, ridge_row);
        }
        let least: Tile<f32, { [BM, 1] }> = constant(1.0e-30f32, const_shape![BM, 1]);
        let qf: Tile<f32, { [BM, D] }> = convert_tile(tq);
        let qf: Tile<f32, { [BM, D] }> = qf * across::<BM, D>(qu);
        let q_k: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(qf, kbar);
        let cq: Tile<f32, { [BM, D] }> =
            add_scaled::<BM, D>(sum_sk * across::<BM, D>(inv_l * qu * kun), zero - q_k, kbar);
        // All other products follow from these, and from that of the residual with itself, which cancels too much.
        let k_k: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(kbar, kbar);
        let q_c: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(qf, cq);
        let k_c: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(kbar, cq);
        let c_c: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(cq, cq);
        let q_aq: Tile<f32, { [BM, 1] }> = q_c + lam * q_q;
        let k_aq: Tile<f32, { [BM, 1] }> = k_c + lam * q_k;
        let aq_aq: Tile<f32, { [BM, 1] }> = c_c + lam * (q_c + q_aq);
        let q_d: Tile<f32, { [BM, 1] }> = q_k - q_q;
        let dd: Tile<f32, { [BM, 1] }> = k_k - q_k - q_d;
        // Rows past the end have nothing to solve.
        let dd: Tile<f32, { [BM, 1] }> = select(rows_there::<BM>(rows) & gt_tile(dd, least), dd, zero);
        let by_output: bool = error2 > 0.0f32;
        let thr: Tile<f32, { [BM, 1] }> = dd * broadcast_scalar(tolerance2, const_shape![BM, 1]);
        let any_q: Tile<bool, { [BM, 1] }> = gt_tile(q_aq, least) & gt_tile(q_q, least) & gt_tile(dd, zero);
        let alpha: Tile<f32, { [BM, 1] }> = select(any_q, quotient::<{ [BM, 1] }>(q_d, q_aq), zero);
        // delta - alpha A q
        let r: Tile<f32, { [BM, D] }> =
            add_scaled::<BM, D>(add_scaled::<BM, D>(kbar, zero - one - alpha * lam, qf), zero - alpha, cq);
        let rr: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(r, r);
        let r_aq: Tile<f32, { [BM, 1] }> = k_aq - q_aq - alpha * aq_aq;
        // The roundings of p (k.q) and of kbar leave about this much in A q, squared.
        let rounding2: Tile<f32, { [BM, 1] }> = constant(2.4e-7f32, const_shape![BM, 1]);
        let noise: Tile<f32, { [BM, 1] }> = alpha * alpha * q_k * q_k * k_k * rounding2;
        let quarter: Tile<f32, { [BM, 1] }> = constant(0.25f32, const_shape![BM, 1]);
        let sixteenth: Tile<f32, { [BM, 1] }> = constant(0.0625f32, const_shape![BM, 1]);
        let seeded: Tile<bool, { [BM, 1] }> =
            any_q & le_tile(rr, dd * quarter) & le_tile(noise, thr * sixteenth);
        let theta: Tile<f32, { [BM, 1] }> = quotient::<{ [BM, 1] }>(q_aq, max_tile(q_q, least));
        let beta: Tile<f32, { [BM, 1] }> = select(seeded, zero - quotient::<{ [BM, 1] }>(r_aq, q_aq), zero);
        // Length of the next step along the conjugate direction, if A acts on r as it does on q. How far the first pass finds it from that tells the
        // solve how much A varies.
        let least_part: Tile<f32, { [BM, 1] }> = constant(0.3f32, const_shape![BM, 1]);
        let least_curvature: Tile<f32, { [BM, 1] }> = theta * rr * least_part;
        let curvature: Tile<f32, { [BM, 1] }> = max_tile(theta * rr + beta * r_aq, least_curvature);
        // Where no pass is made it is the last step, and wants a better length. r is what C q has beside q. Where C is c = q.Cq / q.q along q, with
        // a variance k2 (so that |C q|^2 / q.Cq is c + k2 / c) and a third moment k3, it is c + k3 / k2 along r. For random keys k3 / k2 is k2 / c
        // if their weights are equal (Marchenko and Pastur's law), and more if they are not. Twice that left least in all.
        // (Where C is lost in A, k2 / c is made of roundings.)
        let thousandth: Tile<f32, { [BM, 1] }> = constant(1.0e-3f32, const_shape![BM, 1]);
        let not_lost: Tile<f32, { [BM, 1] }> = max_tile(max_tile(q_c, q_aq * thousandth), least);
        let beside: Tile<f32, { [BM, 1] }> =
            quotient::<{ [BM, 1] }>(max_tile(c_c - (theta - lam) * q_c, zero), not_lost);
        let better: Tile<f32, { [BM, 1] }> =
            max_tile((theta + beside + beside) * rr + beta * r_aq, least_curvature);
        let shorter: Tile<f32, { [BM, 1] }> = quotient::<{ [BM, 1] }>(curvature, max_tile(better, least));
        let step: Tile<f32, { [BM, 1] }> =
            select(seeded & gt_tile(rr, least), quotient::<{ [BM, 1] }>(rr, curvature), zero);
        // Squared spread of A about theta, relative; twice that bounds what the next step leaves of the residual, roughly.
        let spread: Tile<f32, { [BM, 1] }> =
            quotient::<{ [BM, 1] }>(aq_aq, max_tile(theta * q_aq, least)) - one;
        let four: Tile<f32, { [BM, 1] }> = constant(4.0f32, const_shape![BM, 1]);
        let by_query: Tile<f32, { [BM, 1] }> = four * rr * max_tile(spread, zero);
        // Where weights are on few keys what is left lies along these, where A is not as it is on average; a query that happens to be
        // perpendicular to their differences shows nothing of that in its spread, but in what C makes of it.
        let eigen: Tile<f32, { [BM, 1] }> = quotient::<{ [BM, 1] }>(c_c, max_tile(q_c, least));
        let apart: Tile<f32, { [BM, 1] }> =
            quotient::<{ [BM, 1] }>(max_tile(eigen + lam - theta, zero), max_tile(theta, least));
        let by_keys: Tile<f32, { [BM, 1] }> = min_tile(apart * apart, one) * rr;
        let ahead: Tile<f32, { [BM, 1] }> = select(seeded, max_tile(by_query, by_keys), dd);
        let mut allowed: Tile<f32, { [BM, 1] }> = thr;
        let mut first_allowed: Tile<f32, { [BM, 1] }> = thr;
        let mut left: Tile<f32, { [BM, 1] }> = ahead;
        if by_output {
            // A residual r leaves at most |r| / ridge of the probe. That adds as much to the output, for values of size 1, as C makes
            // of it: |C q|^2 / q.Cq, its largest eigenvalue where weights are on two keys and one that counts for more elsewhere, or 0.1
            // of A. The output's square is sum p (1 - alpha)^2 = 1 + x.C x, of which the part of the multiple of q is known. Small
            // ridges make too much of this bound: a quarter of the relative residual will do. Great ridges make too little: the probe is
            // wanted too.
            let tenth: Tile<f32, { [BM, 1] }> = constant(0.1f32, const_shape![BM, 1]);
            let of_keys: Tile<f32, { [BM, 1] }> = max_tile(max_tile(eigen, theta * tenth), least);
            let size: Tile<f32, { [BM, 1] }> = one + alpha * alpha * max_tile(q_c, zero);
            let error2: Tile<f32, { [BM, 1] }> = broadcast_scalar(error2, const_shape![BM, 1]);
            let first_error2: Tile<f32, { [BM, 1] }> = broadcast_scalar(first_error2, const_shape![BM, 1]);
            let of_probe: Tile<f32, { [BM, 1] }> = constant(1.0e-4f32, const_shape![BM, 1]);
            let of_probe: Tile<f32, { [BM, 1] }> = of_probe * dd;
            let output: Tile<f32, { [BM, 1] }> = size * lam * quotient::<{ [BM, 1] }>(lam, of_keys);
            first_allowed = max_tile(thr * sixteenth, min_tile(first_error2 * output, of_probe));
            // A pass leaves this part of the square: queries that make passes end anywhere between the bound and that part of it, and
            // it is their mean that is asked for.
            let rate_least: Tile<f32, { [BM, 1] }> = constant(1.0e-4f32, const_shape![BM, 1]);
            let rate_most: Tile<f32, { [BM, 1] }> = constant(0.5f32, const_shape![BM, 1]);
            let rate: Tile<f32, { [BM, 1] }> = min_tile(max_tile(spread + spread, rate_least), rate_most);
            let minus_ln2: Tile<f32, { [BM, 1] }> = constant(-0.6931472f32, const_shape![BM, 1]);
            let times: Tile<f32, { [BM, 1] }> = quotient::<{ [BM, 1] }>(log2(rate) * minus_ln2, one - rate);
            let output: Tile<f32, { [BM, 1] }> = error2 * output * select(seeded, times, one);
            allowed = max_tile(thr * sixteenth, min_tile(output, of_probe));
            // What was a bound, for a mean. A query that starts with delta does not know yet how A acts.
            let half: Tile<f32, { [BM, 1] }> = constant(0.5f32, const_shape![BM, 1]);
            let most: Tile<f32, { [BM, 1] }> = constant(1.0e30f32, const_shape![BM, 1]);
            left = select(seeded, max_tile(half * by_query, by_keys), most);
        }
        let gains: Tile<bool, { [BM, 1] }> = seeded & le_tile(ahead, rr);
        let tiny: Tile<f32, { [BM, 1] }> = constant(1.0e-4f32, const_shape![BM, 1]);
        let more: Tile<bool, { [BM, 1] }> = gt_tile(dd, zero) & gt_tile(left, allowed * tiny);
        let r: Tile<f32, { [BM, D] }> =
            select(seeded.broadcast(const_shape![BM, D]), r, add_scaled::<BM, D>(kbar, zero - one, qf));
        let rr: Tile<f32, { [BM, 1] }> = select(seeded, rr, dd);
        let start: Tile<f32, { [BM, 1] }> = select(seeded, alpha, zero);
        let part: Tile<f32, { [BM, 1] }> = unfinished::<BM>(left, first_allowed, by_output);
        let mut worst: f32 = together::<BM>(select(gt_tile(dd, zero), part, zero));
        let given: bool = asked::<USUAL>(options, 16i32);
        if given {
            worst = 0.0f32;
        }
        let d: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(r, beta, qf);
        // Wanted or not: a condition here, or this store behind the loop, and the compiler finds no registers for the passes.
        let stored: Token = store_packed::<f32, BM, D>(key_mean, grid.0 * np, tile, kbar);
        // r is perpendicular to q.
        let first_norm2: Tile<f32, { [BM, 1] }> = rr + beta * beta * q_q;
        let (first_hi, first_lo): (Tile<f16, { [BM, D] }>, Tile<f16, { [BM, D] }>) =
            direction::<BM, D, HIGH>(d, first_norm2);
        let record: Tile<f32, { [BM, 8] }> = new_record::<BM>(
            select(more, rr, zero),
            min_tile(ahead, rr),
            select(gains, step, zero - step),
            first_norm2,
            zero,
        );
        let record: Tile<f32, { [BM, 8] }> = put::<BM>(record, 5i32, shorter);
        let probe: Tile<f32, { [BM, D] }> = qf * across::<BM, D>(start);
        let (record, d, probe): (Tile<f32, { [BM, 8] }>, Tile<f32, { [BM, D] }>, Tile<f32, { [BM, D] }>) =
            solve::<BM, BN, D, HIGH, BIAS, USUAL>(
                record,
                first_hi,
                first_lo,
                r,
                probe,
                worst,
                max_iterations,
                lam,
                allowed,
                by_output,
                key_mean,
                grid.0 * np,
                tile,
                stored,
                sc_true,
                shift,
                tq,
                &kp,
                ku,
                kv0,
                begin,
                end,
                full0,
                full1,
                row_lo,
                row_hi,
                skip,
                bias,
                bias_at,
                m,
            );
        let free: Tile<f32, { [BM, 1] }> =
            max_tile(pick::<BM>(record, 2i32), zero) * direction_unit::<BM, HIGH>(pick::<BM>(record, 3i32));
        // A pass leaves nothing there.
        let shorter: Tile<f32, { [BM, 1] }> = pick::<BM>(record, 5i32);
        let free: Tile<f32, { [BM, 1] }> = free * select(gt_tile(shorter, zero), shorter, one);
        // Without a probe the output is softmax's.
        let mut probe: Tile<f32, { [BM, D] }> =
            if_sound::<BM, D>(add_scaled::<BM, D>(probe, free, d), record, dd);
        let two: Tile<f32, { [BM, 1] }> = constant(2.0f32, const_shape![BM, 1]);
        if given {
            probe = load_packed::<f32, BM, D>(x, grid.0 * np, tile);
        }
        if save_probe != 0i32 {
            store_packed::<f32, BM, D>(x, grid.0 * np, tile, probe);
        }
        store_diagnostics::<BM, USUAL>(diagnostics, record, dd, iterations, relative, bh, n, first);

        // The weights p a must sum to 1 with the probe that is used, not with the exact one: where the mean key is large, the
        // difference is too.
        let x_x: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(probe, probe);
        let xu: Tile<f32, { [BM, 1] }> = direction_unit::<BM, HIGH>(x_x);
        let (x_hi, x_lo): (Tile<f16, { [BM, D] }>, Tile<f16, { [BM, D] }>) =
            direction::<BM, D, HIGH>(probe, x_x);
        let kbar: Tile<f32, { [BM, D] }> =
            load_packed_after::<f32, BM, D>(key_mean, grid.0 * np, tile, stored);
        // p |alpha| <= sqrt(sum p alpha^2) <= sqrt(1 + delta.x)
        let qf: Tile<f32, { [BM, D] }> = convert_tile(tq);
        let x_delta: Tile<f32, { [BM, 1] }> =
            row_dot::<BM, D>(kbar, probe) - row_dot::<BM, D>(qf, probe) * qu;
        let mut reach: Tile<f32, { [BM, 1] }> =
            two * sqrt(max_tile(x_delta, zero), rounding::Approx, ftz::Enabled);
        if given {
            // |alpha| <= |x| |k - kbar|; keys have norm at most 2 sqrt(D) units, and x at most 2, or 32 where there are two terms.
            let mut most: f32 = 128.0f32;
            if HIGH == 1i32 {
                most = 2048.0f32;
            }
            let most: Tile<f32, { [BM, 1] }> = broadcast_scalar(most, const_shape![BM, 1]);
            reach = xu * kun * most;
        }
        let room: Tile<f32, { [BM, 1] }> = constant(32768.0f32, const_shape![BM, 1]);
        let top: Tile<f32, { [BM, 1] }> = constant(1024.0f32, const_shape![BM, 1]);
        let boost: Tile<f32, { [BM, 1] }> =
            min_tile(pow2_floor::<{ [BM, 1] }>(quotient::<{ [BM, 1] }>(room, one + reach)), top);
        let xk: Tile<f32, { [BM, 1] }> = one + with_mean_key::<BM, D, HIGH>(x_hi, x_lo, kbar, ku) * xu * kun;
        let xt: Tile<f32, { [BM, 1] }> = zero - xu * kun;
        let sh: Tile<f32, { [BM, 1] }> = shift + log2(boost);
        let undo: Tile<f32, { [BM, 1] }> = inverse_of_power::<{ [BM, 1] }>(boost);
        let vt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(vh, kvs * mp);
        let vp: Partition<f16, { [BN, D] }> = vt0.partition(const_shape![BN, D]);
        let xk_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(xk);
        let xt_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(xt);
        let mut o: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        for j in begin..end {
            let kt: Tile<f16, { [BN, D] }> = kp.load([kv0 + j, 0i32]);
            let mut s: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
            let t: Tile<f32, { [BM, BN] }> = scores2::<BM, BN, D, HIGH>(x_hi, x_lo, kt);
            let vt: Tile<f16, { [BN, D] }> = vp.load([kv0 + j, 0i32]);
            if BIAS == 1i32 {
                s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
            }
            if (j < full0) || (j >= full1) {
                s = select(sees::<BM, BN, D, USUAL>(row_lo, row_hi, skip, j * BN), s, never);
            }
            let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, sh);
            let wb: Tile<f16, { [BM, BN] }> =
                convert_tile(p * fma(t, xt_b, xk_b, rounding::NearestEven, ftz::Enabled));
            o = mma(wb, vt, o);
        }
        if D == 64i32 {
            vu = load_scalar(slice::<f32>(unit, wide(kvs + kv)));
        }
        let ob: Tile<E, { [BM, D] }> =
            convert_tile(o * across::<BM, D>(undo * broadcast_scalar(vu, const_shape![BM, 1])));
        let out_at: i64 = wide(batch) * out_batch + wide(head) * out_head + wide(first) * wide(out_row);
        if ALIGNED == 1i32 {
            store_rows_aligned::<E, BM, D>(slice_aligned::<E>(out, out_at), out_row, rows, dv, ob);
        } else {
            store_rows::<E, BM, D>(slice::<E>(out, out_at), out_row, rows, dv, ob);
        }
    }
}
