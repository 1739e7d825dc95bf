//! Conjugate gradients of a block of queries. Vectors stay in registers between the passes over the keys; numbers per query are in one tile.
//!
//! A record, f32 `[BM, 8]`, holds the numbers per query that change from pass to pass: 0 |r|^2 (0 once nothing is to be gained), 1
//! |r|^2 that counts as reached, 2 last step length, negative if the free step that ends the solve would not gain, 3 |d|^2 of the
//! direction, 4 passes, 5 what shortens the free step before the first pass (the forward's alone), 6 what roundings have left of r
//! along the direction of the largest curvature, squared, 7 that curvature. One tile takes fewer registers than eight.
//!
//! The loops over passes are counted (`for`), with what ends them early inside: what a loop with a condition (`while`) carries, the
//! compiler keeps in another layout than products have, and moves all of it through shared memory, with some sixty barriers, before
//! and after each pass. Rounds of four passes, and turns of four rounds, keep those few that find nothing left to do: the 32 rounds of 128
//! passes took 1 % of a forward at 1024.

#[cutile::module]
pub mod state {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Which elements of a record are number `which`.
    pub fn at_number<const BM: i32>(which: i32) -> Tile<bool, { [BM, 8] }> {
        let column: Tile<i32, { [8] }> = iota(const_shape![8]);
        let wanted: Tile<bool, { [8] }> = eq_tile(column, broadcast_scalar(which, const_shape![8]));
        wanted.reshape(const_shape![1, 8]).broadcast(const_shape![BM, 8])
    }

    /// Number `which` of every query.
    pub fn pick<const BM: i32>(record: Tile<f32, { [BM, 8] }>, which: i32) -> Tile<f32, { [BM, 1] }> {
        let zero: Tile<f32, { [BM, 8] }> = constant(0.0f32, const_shape![BM, 8]);
        let sum: Tile<f32, { [BM] }> = reduce_sum(select(at_number::<BM>(which), record, zero), 1i32);
        sum.reshape(const_shape![BM, 1])
    }

    /// The record with another number `which`.
    pub fn put<const BM: i32>(
        record: Tile<f32, { [BM, 8] }>,
        which: i32,
        value: Tile<f32, { [BM, 1] }>,
    ) -> Tile<f32, { [BM, 8] }> {
        select(at_number::<BM>(which), value.broadcast(const_shape![BM, 8]), record)
    }

    /// Whether a row is one of the first `rows`.
    pub fn rows_there<const BM: i32>(rows: i32) -> Tile<bool, { [BM, 1] }> {
        let r: Tile<i32, { [BM] }> = iota(const_shape![BM]);
        lt_tile(r.reshape(const_shape![BM, 1]), broadcast_scalar(rows, const_shape![BM, 1]))
    }

    /// Squared relative change of the step length, which tells how far a step of the same length along the next direction would
    /// miss; 1 where there is no earlier step.
    pub fn step_change<const BM: i32>(
        a: Tile<f32, { [BM, 1] }>,
        last: Tile<f32, { [BM, 1] }>,
    ) -> Tile<f32, { [BM, 1] }> {
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let one: Tile<f32, { [BM, 1] }> = constant(1.0f32, const_shape![BM, 1]);
        let known: Tile<bool, { [BM, 1] }> = gt_tile(a, zero) & gt_tile(last, zero);
        let change: Tile<f32, { [BM, 1] }> =
            select(known, min_tile(quotient::<{ [BM, 1] }>(absf(a - last), a), one), one);
        change * change
    }

    /// A query's part of a block's need of another pass, which there is as long as the parts sum to more than 1.
    ///
    /// `left` is the square of what is expected to be left of a residual, `allowed` of what may be. With `shared` the queries of a
    /// block count together: the mean of the squares' ratios may be 1, none may be 25. Otherwise none may be more than 1.
    pub fn unfinished<const BM: i32>(
        left: Tile<f32, { [BM, 1] }>,
        allowed: Tile<f32, { [BM, 1] }>,
        shared: bool,
    ) -> Tile<f32, { [BM, 1] }> {
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let least: Tile<f32, { [BM, 1] }> = constant(1.0e-36f32, const_shape![BM, 1]);
        let too_much: Tile<f32, { [BM, 1] }> = constant(2.0f32, const_shape![BM, 1]);
        let rows: Tile<i32, { [BM, 1] }> = broadcast_scalar(BM, const_shape![BM, 1]);
        let rows: Tile<f32, { [BM, 1] }> = convert_tile(rows);
        let mut most: Tile<f32, { [BM, 1] }> = allowed;
        let mut part: Tile<f32, { [BM, 1] }> = zero;
        if shared {
            let times: Tile<f32, { [BM, 1] }> = constant(25.0f32, const_shape![BM, 1]);
            most = allowed * times;
            part = quotient::<{ [BM, 1] }>(left, max_tile(allowed, least) * rows);
        }
        // What is no number counts as nothing: it must not end the others' solve.
        select(gt_tile(left, most), too_much, select(le_tile(left, most), part, zero))
    }

    /// The sum of a block's parts.
    pub fn together<const BM: i32>(parts: Tile<f32, { [BM, 1] }>) -> f32 {
        let parts: Tile<f32, { [BM] }> = parts.reshape(const_shape![BM]);
        let sum: Tile<f32, { [] }> = reduce_sum(parts, 0i32);
        let sum: f32 = tile_to_scalar(sum);
        sum
    }

    /// The unit of a direction: the power of two below its norm, or a sixteenth of it where there are two terms.
    pub fn direction_unit<const BM: i32, const HIGH: i32>(
        norm2: Tile<f32, { [BM, 1] }>,
    ) -> Tile<f32, { [BM, 1] }> {
        let mut unit: Tile<f32, { [BM, 1] }> = root_floor::<{ [BM, 1] }>(norm2);
        if HIGH == 1i32 {
            let sixteenth: Tile<f32, { [BM, 1] }> = constant(0.0625f32, const_shape![BM, 1]);
            unit = unit * sixteenth;
        }
        unit
    }

    /// A direction in fp16 as the products take it: in its unit, in one term or two. The square of its norm decides the unit alone: a
    /// quarter of it more or less does no harm.
    pub fn direction<const BM: i32, const D: i32, const HIGH: i32>(
        d: Tile<f32, { [BM, D] }>,
        norm2: Tile<f32, { [BM, 1] }>,
    ) -> (Tile<f16, { [BM, D] }>, Tile<f16, { [BM, D] }>) {
        let unit: Tile<f32, { [BM, 1] }> = direction_unit::<BM, HIGH>(norm2);
        // Below this the square of the norm underflows, and so does what its unit says: such a direction is none.
        let least: Tile<f32, { [BM, 1] }> = constant(1.0e-36f32, const_shape![BM, 1]);
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let inverse: Tile<f32, { [BM, 1] }> =
            select(lt_tile(norm2, least), zero, inverse_of_power::<{ [BM, 1] }>(unit));
        let scaled: Tile<f32, { [BM, D] }> = d * across::<BM, D>(inverse);
        let hi: Tile<f16, { [BM, D] }> = convert_tile(scaled);
        let mut lo: Tile<f16, { [BM, D] }> = hi;
        if HIGH == 1i32 {
            lo = low_part::<BM, D>(scaled, hi);
        }
        (hi, lo)
    }

    /// The product of such a direction, in its unit, with the mean key in the keys' unit: of what the products with keys use of it.
    pub fn with_mean_key<const BM: i32, const D: i32, const HIGH: i32>(
        hi: Tile<f16, { [BM, D] }>,
        lo: Tile<f16, { [BM, D] }>,
        kbar: Tile<f32, { [BM, D] }>,
        ku: f32,
    ) -> Tile<f32, { [BM, 1] }> {
        let inverse_ku: Tile<f32, { [BM, 1] }> = inverse_of_unit::<BM>(ku);
        row_dot::<BM, D>(direction_in_unit::<BM, D, HIGH>(hi, lo), kbar) * inverse_ku
    }

    /// One over a tensor's unit, for every row.
    fn inverse_of_unit<const BM: i32>(unit: f32) -> Tile<f32, { [BM, 1] }> {
        inverse_of_power::<{ [BM, 1] }>(broadcast_scalar(unit, const_shape![BM, 1]))
    }

    /// That direction in f32, in its unit.
    pub fn direction_in_unit<const BM: i32, const D: i32, const HIGH: i32>(
        hi: Tile<f16, { [BM, D] }>,
        lo: Tile<f16, { [BM, D] }>,
    ) -> Tile<f32, { [BM, D] }> {
        let mut d: Tile<f32, { [BM, D] }> = convert_tile(hi);
        if HIGH == 1i32 {
            let tail: Tile<f32, { [BM, D] }> = convert_tile(lo);
            d = d + tail;
        }
        d
    }

    /// The pass over the keys: `sum p ((k - kbar).d) k`, raised by 2^10 (2^6 where there are two terms), in units; and, where there are
    /// two terms, the sum of these weights of the keys as they were rounded.
    pub unsafe fn pass<
        const BM: i32,
        const BN: i32,
        const D: i32,
        const HIGH: i32,
        const BIAS: i32,
        const USUAL: i32,
    >(
        sc_true: Tile<f32, { [BM, 1] }>,
        shift: Tile<f32, { [BM, 1] }>,
        along: Tile<f32, { [BM, 1] }>,
        tq: Tile<f16, { [BM, D] }>,
        d_hi: Tile<f16, { [BM, D] }>,
        d_lo: Tile<f16, { [BM, D] }>,
        kp: &Partition<f16, { [BN, D] }>,
        kv0: i32,
        begin: i32,
        end: i32,
        full0: i32,
        full1: i32,
        row_lo: Tile<i32, { [BM, 1] }>,
        row_hi: Tile<i32, { [BM, 1] }>,
        skip: Tile<i32, { [BM, 1] }>,
        bias: *mut f32,
        bias_at: i64,
        m: i32,
    ) -> (Tile<f32, { [BM, D] }>, Tile<f32, { [BM, 1] }>) {
        let mut lift: Tile<f32, { [BM, 1] }> = constant(10.0f32, const_shape![BM, 1]);
        if HIGH == 1i32 {
            lift = constant(6.0f32, const_shape![BM, 1]);
        }
        let sh: Tile<f32, { [BM, 1] }> = shift + lift;
        let mut sc: Tile<f32, { [BM, 1] }> = sc_true;
        if BIAS == 1i32 {
            sc = constant(1.0f32, const_shape![BM, 1]);
        }
        let never: Tile<f32, { [BM, BN] }> = constant(f32::NEG_INFINITY, const_shape![BM, BN]);
        let dk_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(along);
        let mut acc: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        let mut total: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        for j in begin..end {
            // Where registers are short, the default pipelines the loop so that its products wait for each other.
            let kt: Tile<f16, { [BN, D] }> = if (D == 128i32) || (HIGH == 1i32) {
                kp.load_pipelined::<1>([kv0 + j, 0i32])
            } else {
                kp.load([kv0 + j, 0i32])
            };
            let mut s: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
            let t: Tile<f32, { [BM, BN] }> = scores2::<BM, BN, D, HIGH>(d_hi, d_lo, kt);
            if BIAS == 1i32 {
                s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
            }
            if (j < full0) || (j >= full1) {
                s = select(sees::<BM, BN, D, USUAL>(row_lo, row_hi, skip, j * BN), s, never);
            }
            let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, sh);
            let wb: Tile<f16, { [BM, BN] }> = convert_tile(p * (t - dk_b));
            if HIGH == 1i32 {
                total = total + added::<BM, BN>(wb);
            }
            acc = mma(wb, kt, acc);
        }
        (acc, total)
    }

    /// The step along the direction whose pass gave `acc`: the next record, direction, residual and solution.
    ///
    /// The last step, along the next direction and of this step's length, needs no pass ("free"). Its residual is |r|^2 times what
    /// this step left of it, plus what the change of the length says, plus what it makes of roundings: a step of length a multiplies
    /// a part of r that has curvature c by 1 - a c. Where one key has much of the weight, c along it is many times that of the rest: a
    /// pass along it leaves the roundings of its products there, and every further one multiplies them until they are seen. A free
    /// step does so unseen.
    pub fn advance<const BM: i32, const D: i32, const HIGH: i32>(
        record: Tile<f32, { [BM, 8] }>,
        acc: Tile<f32, { [BM, D] }>,
        d_hi: Tile<f16, { [BM, D] }>,
        d_lo: Tile<f16, { [BM, D] }>,
        r: Tile<f32, { [BM, D] }>,
        x: Tile<f32, { [BM, D] }>,
        lam: Tile<f32, { [BM, 1] }>,
        allowed: Tile<f32, { [BM, 1] }>,
        shared: bool,
        ku: f32,
    ) -> (
        Tile<f32, { [BM, 8] }>,
        Tile<f16, { [BM, D] }>,
        Tile<f16, { [BM, D] }>,
        Tile<f32, { [BM, D] }>,
        Tile<f32, { [BM, D] }>,
        f32,
    ) {
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let one: Tile<f32, { [BM, 1] }> = constant(1.0f32, const_shape![BM, 1]);
        let tiny: Tile<f32, { [BM, 1] }> = constant(1.0e-4f32, const_shape![BM, 1]);
        let mut lowered: f32 = 9.765625e-4f32;
        if HIGH == 1i32 {
            lowered = 0.015625f32;
        }
        let rr: Tile<f32, { [BM, 1] }> = pick::<BM>(record, 0i32);
        let last: Tile<f32, { [BM, 1] }> = pick::<BM>(record, 2i32);
        let d_d: Tile<f32, { [BM, 1] }> = pick::<BM>(record, 3i32);
        let ds: Tile<f32, { [BM, 1] }> = direction_unit::<BM, HIGH>(d_d);
        let d: Tile<f32, { [BM, D] }> = direction_in_unit::<BM, D, HIGH>(d_hi, d_lo) * across::<BM, D>(ds);
        let coef: Tile<f32, { [BM, 1] }> = ds * broadcast_scalar(ku * ku * lowered, const_shape![BM, 1]);
        let ad: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(acc * across::<BM, D>(coef), lam, d);
        let dad: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(d, ad);
        let good: Tile<bool, { [BM, 1] }> = gt_tile(rr, zero) & gt_tile(dad, zero);
        let a: Tile<f32, { [BM, 1] }> = select(good, quotient::<{ [BM, 1] }>(rr, dad), zero);
        let r: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(r, zero - a, ad);
        let rn: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(r, r);
        let be: Tile<f32, { [BM, 1] }> = select(good, quotient::<{ [BM, 1] }>(rn, rr), zero);
        let curvature: Tile<f32, { [BM, 1] }> = select(good, quotient::<{ [BM, 1] }>(dad, rr), zero);
        let largest: Tile<f32, { [BM, 1] }> = max_tile(pick::<BM>(record, 7i32), curvature);
        let grows: Tile<f32, { [BM, 1] }> = a * largest - one;
        let most: Tile<f32, { [BM, 1] }> = constant(1.0e6f32, const_shape![BM, 1]);
        let grows: Tile<f32, { [BM, 1] }> = min_tile(grows * grows, most);
        let rounding2: Tile<f32, { [BM, 1] }> = constant(1.0e-6f32, const_shape![BM, 1]);
        let made: Tile<f32, { [BM, 1] }> = select(le_tile(grows, one), rr * rounding2, zero);
        let rounded: Tile<f32, { [BM, 1] }> = min_tile(max_tile(pick::<BM>(record, 6i32) * grows, made), rn);
        let ahead: Tile<f32, { [BM, 1] }> = rn * (be + step_change::<BM>(a, absf(last))) + rounded * grows;
        let gains: Tile<bool, { [BM, 1] }> = le_tile(ahead, rn);
        let more: Tile<bool, { [BM, 1] }> = good & gt_tile(ahead, allowed * tiny);
        let x: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(x, a, d);
        // A row that has nothing more to gain stays as it is: solution, residual and direction no longer change.
        let good_d: Tile<bool, { [BM, D] }> = good.broadcast(const_shape![BM, D]);
        let next: Tile<f32, { [BM, D] }> = select(good_d, add_scaled::<BM, D>(r, be, d), d);
        // r is perpendicular to d.
        let next2: Tile<f32, { [BM, 1] }> = select(good, rn + be * be * d_d, d_d);
        let reached: Tile<f32, { [BM, 1] }> = select(good, min_tile(ahead, rn), pick::<BM>(record, 1i32));
        let step: Tile<f32, { [BM, 1] }> = select(good, select(gains, a, zero - a), last);
        let passes: Tile<f32, { [BM, 1] }> = pick::<BM>(record, 4i32) + select(good, one, zero);
        let part: Tile<f32, { [BM, 1] }> = unfinished::<BM>(min_tile(ahead, rn), allowed, shared);
        let worst: f32 = together::<BM>(select(good, part, zero));
        let (hi, lo): (Tile<f16, { [BM, D] }>, Tile<f16, { [BM, D] }>) =
            direction::<BM, D, HIGH>(next, next2);
        let record: Tile<f32, { [BM, 8] }> =
            new_record::<BM>(select(more, rn, zero), reached, step, next2, passes);
        let record: Tile<f32, { [BM, 8] }> = put::<BM>(record, 6i32, rounded);
        let record: Tile<f32, { [BM, 8] }> = put::<BM>(record, 7i32, largest);
        (record, hi, lo, r, x, worst)
    }

    /// Passes until nothing is left to do: record, direction in its unit, and solution, from what they begin with. The mean keys lie in
    /// `key_mean`, `[rows, D]`, in the block's tile.
    pub unsafe fn solve<
        const BM: i32,
        const BN: i32,
        const D: i32,
        const HIGH: i32,
        const BIAS: i32,
        const USUAL: i32,
    >(
        record: Tile<f32, { [BM, 8] }>,
        d_hi: Tile<f16, { [BM, D] }>,
        d_lo: Tile<f16, { [BM, D] }>,
        r: Tile<f32, { [BM, D] }>,
        x: Tile<f32, { [BM, D] }>,
        worst: f32, // above 1: something is left
        max_iterations: i32,
        lam: Tile<f32, { [BM, 1] }>,
        allowed: Tile<f32, { [BM, 1] }>,
        shared: bool,
        key_mean: *mut f32,
        mean_rows: i32,
        tile: i32,
        stored: Token, // of the mean keys
        sc_true: Tile<f32, { [BM, 1] }>,
        shift: Tile<f32, { [BM, 1] }>,
        tq: Tile<f16, { [BM, D] }>,
        kp: &Partition<f16, { [BN, D] }>,
        ku: f32,
        kv0: i32,
        begin: i32,
        end: i32,
        full0: i32,
        full1: i32,
        row_lo: Tile<i32, { [BM, 1] }>,
        row_hi: Tile<i32, { [BM, 1] }>,
        skip: Tile<i32, { [BM, 1] }>,
        bias: *mut f32,
        bias_at: i64,
        m: i32,
    ) -> (Tile<f32, { [BM, 8] }>, Tile<f32, { [BM, D] }>, Tile<f32, { [BM, D] }>) {
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let mut record: Tile<f32, { [BM, 8] }> = record;
        let mut d_hi: Tile<f16, { [BM, D] }> = d_hi;
        let mut d_lo: Tile<f16, { [BM, D] }> = d_lo;
        let mut r: Tile<f32, { [BM, D] }> = r;
        let mut x: Tile<f32, { [BM, D] }> = x;
        let mut worst: f32 = worst;
        for turn in 0i32..ceil_div(max_iterations, 16i32) {
            let mut rounds: i32 = 0i32;
            if worst > 1.0f32 {
                rounds = ceil_div(min(max_iterations - turn * 16i32, 16i32), 4i32);
            }
            for round in 0i32..rounds {
                let mut passes: i32 = 0i32;
                if worst > 1.0f32 {
                    passes = min(max_iterations - turn * 16i32 - round * 4i32, 4i32);
                }
                for _pass in 0i32..passes {
                    let mut stop: i32 = begin;
                    let mut along: Tile<f32, { [BM, 1] }> = zero;
                    if worst > 1.0f32 {
                        stop = end;
                        let kbar: Tile<f32, { [BM, D] }> =
                            load_packed_after::<f32, BM, D>(key_mean, mean_rows, tile, stored);
                        along = with_mean_key::<BM, D, HIGH>(d_hi, d_lo, kbar, ku);
                    }
                    let (sum, total): (Tile<f32, { [BM, D] }>, Tile<f32, { [BM, 1] }>) =
                        pass::<BM, BN, D, HIGH, BIAS, USUAL>(
                            sc_true, shift, along, tq, d_hi, d_lo, kp, kv0, begin, stop, full0, full1,
                            row_lo, row_hi, skip, bias, bias_at, m,
                        );
                    let mut acc: Tile<f32, { [BM, D] }> = sum;
                    if HIGH == 1i32 {
                        // The weights sum to 0 but for their roundings, of which what the keys have in common makes much.
                        let kbar: Tile<f32, { [BM, D] }> =
                            load_packed_after::<f32, BM, D>(key_mean, mean_rows, tile, stored);
                        let inverse_ku: Tile<f32, { [BM, 1] }> = inverse_of_unit::<BM>(ku);
                        acc = add_scaled::<BM, D>(acc, zero - total * inverse_ku, kbar);
                    }
                    if worst > 1.0f32 {
                        let (next_record, next_hi, next_lo, next_r, next_x, next_worst): (
                            Tile<f32, { [BM, 8] }>,
                            Tile<f16, { [BM, D] }>,
                            Tile<f16, { [BM, D] }>,
                            Tile<f32, { [BM, D] }>,
                            Tile<f32, { [BM, D] }>,
                            f32,
                        ) = advance::<BM, D, HIGH>(record, acc, d_hi, d_lo, r, x, lam, allowed, shared, ku);
                        record = next_record;
                        d_hi = next_hi;
                        d_lo = next_lo;
                        r = next_r;
                        x = next_x;
                        worst = next_worst;
                    }
                }
            }
        }
        let d: Tile<f32, { [BM, D] }> = direction_in_unit::<BM, D, HIGH>(d_hi, d_lo);
        (record, d, x)
    }

    /// The numbers of every query that change from pass to pass.
    pub fn new_record<const BM: i32>(
        rr: Tile<f32, { [BM, 1] }>,
        reached: Tile<f32, { [BM, 1] }>,
        step: Tile<f32, { [BM, 1] }>,
        norm2: Tile<f32, { [BM, 1] }>,
        passes: Tile<f32, { [BM, 1] }>,
    ) -> Tile<f32, { [BM, 8] }> {
        let record: Tile<f32, { [BM, 8] }> = constant(0.0f32, const_shape![BM, 8]);
        let record: Tile<f32, { [BM, 8] }> = put::<BM>(record, 0i32, rr);
        let record: Tile<f32, { [BM, 8] }> = put::<BM>(record, 1i32, reached);
        let record: Tile<f32, { [BM, 8] }> = put::<BM>(record, 2i32, step);
        let record: Tile<f32, { [BM, 8] }> = put::<BM>(record, 3i32, norm2);
        put::<BM>(record, 4i32, passes)
    }

    /// What a solve found, and nothing where it went wrong: where it ended ten times as far from its equation as it began, or with
    /// no number. (Residuals of a solve that goes well may rise above where they began on their way.)
    pub fn if_sound<const BM: i32, const D: i32>(
        found: Tile<f32, { [BM, D] }>,
        record: Tile<f32, { [BM, 8] }>,
        initial: Tile<f32, { [BM, 1] }>, // |r|^2 of no solution
    ) -> Tile<f32, { [BM, D] }> {
        let nothing: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        let hundred: Tile<f32, { [BM, 1] }> = constant(100.0f32, const_shape![BM, 1]);
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        // What began with nothing to solve keeps what it has: no numbers, if its query is none.
        let sound: Tile<bool, { [BM, 1] }> =
            le_tile(pick::<BM>(record, 1i32), initial * hundred) | le_tile(initial, zero);
        select(sound.broadcast(const_shape![BM, D]), found, nothing)
    }

    /// Passes and relative residual of every query, if wanted.
    pub unsafe fn store_diagnostics<const BM: i32, const USUAL: i32>(
        wanted: i32,
        record: Tile<f32, { [BM, 8] }>,
        initial: Tile<f32, { [BM, 1] }>, // |r|^2 of no solution
        iterations: *mut i32,
        relative: *mut f32,
        bh: i32,
        n: i32,
        first: i32, // query of the block
    ) {
        if USUAL == 0i32 {
            if wanted != 0i32 {
                let at: i64 = wide(bh) * wide(n) + wide(first);
                let rows: i32 = n - first;
                let least: Tile<f32, { [BM, 1] }> = constant(1.0e-30f32, const_shape![BM, 1]);
                let left: Tile<f32, { [BM, 1] }> = sqrt(
                    pick::<BM>(record, 1i32) / max_tile(initial, least),
                    rounding::NearestEven,
                    ftz::Disabled,
                );
                let count: Tile<i32, { [BM, 1] }> = convert_tile(pick::<BM>(record, 4i32));
                store_column::<i32, BM>(slice::<i32>(iterations, at), rows, count.reshape(const_shape![BM]));
                store_column::<f32, BM>(slice::<f32>(relative, at), rows, left.reshape(const_shape![BM]));
            }
        }
    }
}
