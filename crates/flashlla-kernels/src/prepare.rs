//! Turns a strided tensor of any input type into contiguous fp16 rows padded to the head dimension, scaled by one power of two
//! per head so that the largest magnitude is in [1, 2). Two launches: `lla_range` finds each chunk's largest finite magnitude and
//! notes whether it holds a value that is no number or infinite; `lla_convert` scales, and writes zero in place of such values.

#[cutile::module]
pub mod prepare {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `ALIGNED` = 1: base pointers, strides and columns are multiples of 16 bytes.
    /// Grid (chunks of R rows, batch * heads, tensors <= 2).
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_range<E: ElementType, const R: i32, const D: i32, const ALIGNED: i32>(
        a: *mut E,         // [batch, heads, rows, cols_a], strided
        b: *mut E,         // the second tensor, or any pointer if grid.z = 1
        amax: *mut f32,    // [2, batch * heads, chunks]
        bad: *mut f32,     // [2, batch * heads, chunks]: 1 where a chunk holds NaN or an infinity
        bad_row: *mut f32, // [2, batch * heads, chunks * R]: the same per row
        heads: i32,
        rows: i32,
        cols_a: i32,
        cols_b: i32,
        a_batch: i64,
        a_head: i64,
        a_row: i32,
        b_batch: i64,
        b_head: i64,
        b_row: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let bi: i64 = wide(pid.1 / heads);
        let hi: i64 = wide(pid.1 % heads);
        // A chunk of padding alone reads the first row, since no copy may start past the end, and drops it.
        let mut first: i64 = wide(pid.0 * R);
        let mut left: i32 = rows - pid.0 * R;
        let mut padding: f32 = 0.0f32;
        if left <= 0i32 {
            first = wide(0i32);
            left = 1i32;
            padding = 1.0f32;
        }
        let mut x: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
        if pid.2 == 0i32 {
            let from: i64 = bi * a_batch + hi * a_head + first * wide(a_row);
            if ALIGNED == 1i32 {
                let t: Tile<E, { [R, D] }> =
                    load_rows_aligned::<E, R, D>(slice_aligned::<E>(a, from), a_row, left, cols_a);
                x = convert_tile(t);
            } else {
                let t: Tile<E, { [R, D] }> = load_rows::<E, R, D>(slice::<E>(a, from), a_row, left, cols_a);
                x = convert_tile(t);
            }
        } else {
            let from: i64 = bi * b_batch + hi * b_head + first * wide(b_row);
            if ALIGNED == 1i32 {
                let t: Tile<E, { [R, D] }> =
                    load_rows_aligned::<E, R, D>(slice_aligned::<E>(b, from), b_row, left, cols_b);
                x = convert_tile(t);
            } else {
                let t: Tile<E, { [R, D] }> = load_rows::<E, R, D>(slice::<E>(b, from), b_row, left, cols_b);
                x = convert_tile(t);
            }
        }
        let zero: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
        let dropped: Tile<f32, { [R, D] }> = broadcast_scalar(padding, const_shape![R, D]);
        let x: Tile<f32, { [R, D] }> = select(gt_tile(dropped, zero), zero, x);
        let ok: Tile<bool, { [R, D] }> = finite::<{ [R, D] }>(x);
        let one: Tile<f32, { [R, D] }> = constant(1.0f32, const_shape![R, D]);
        let m: Tile<f32, { [R] }> = reduce_max(select(ok, absf(x), zero), 1i32);
        let m: Tile<f32, { [] }> = reduce_max(m, 0i32);
        let row: Tile<f32, { [R] }> = reduce_max(select(ok, zero, one), 1i32);
        let n: Tile<f32, { [] }> = reduce_max(row, 0i32);
        let at: i64 = wide((pid.2 * grid.1 + pid.1) * grid.0 + pid.0);
        store_column::<f32, 1>(slice::<f32>(amax, at), 1i32, m.reshape(const_shape![1]));
        store_column::<f32, 1>(slice::<f32>(bad, at), 1i32, n.reshape(const_shape![1]));
        store_column::<f32, R>(slice::<f32>(bad_row, at * wide(R)), R, row);
    }

    /// The same grid, and the chunks must be the same.
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_convert<E: ElementType, const R: i32, const D: i32, const ALIGNED: i32>(
        a: *mut E,
        b: *mut E,
        amax: *mut f32,  // as lla_range wrote it
        out_a: *mut f16, // [batch * heads, padded rows = chunks * R, D]
        out_b: *mut f16,
        unit: *mut f32, // [2, batch * heads]: tensor = unit * converted
        heads: i32,
        rows: i32,
        cols_a: i32,
        cols_b: i32,
        a_batch: i64,
        a_head: i64,
        a_row: i32,
        b_batch: i64,
        b_head: i64,
        b_row: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let bi: i64 = wide(pid.1 / heads);
        let hi: i64 = wide(pid.1 % heads);
        // A chunk of padding alone reads the first row, since no copy may start past the end, and drops it.
        let mut first: i64 = wide(pid.0 * R);
        let mut left: i32 = rows - pid.0 * R;
        let mut padding: f32 = 0.0f32;
        if left <= 0i32 {
            first = wide(0i32);
            left = 1i32;
            padding = 1.0f32;
        }
        let mut x: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
        if pid.2 == 0i32 {
            let from: i64 = bi * a_batch + hi * a_head + first * wide(a_row);
            if ALIGNED == 1i32 {
                let t: Tile<E, { [R, D] }> =
                    load_rows_aligned::<E, R, D>(slice_aligned::<E>(a, from), a_row, left, cols_a);
                x = convert_tile(t);
            } else {
                let t: Tile<E, { [R, D] }> = load_rows::<E, R, D>(slice::<E>(a, from), a_row, left, cols_a);
                x = convert_tile(t);
            }
        } else {
            let from: i64 = bi * b_batch + hi * b_head + first * wide(b_row);
            if ALIGNED == 1i32 {
                let t: Tile<E, { [R, D] }> =
                    load_rows_aligned::<E, R, D>(slice_aligned::<E>(b, from), b_row, left, cols_b);
                x = convert_tile(t);
            } else {
                let t: Tile<E, { [R, D] }> = load_rows::<E, R, D>(slice::<E>(b, from), b_row, left, cols_b);
                x = convert_tile(t);
            }
        }
        let mut m: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
        let amax_at: i64 = wide((pid.2 * grid.1 + pid.1) * grid.0);
        for c in 0i32..ceil_div(grid.0, 64i32) {
            let t: Tile<f32, { [64] }> = load_column::<f32, 64>(
                slice::<f32>(amax, amax_at + wide(c * 64i32)),
                1i32,
                grid.0 - c * 64i32,
            );
            m = max_tile(m, t);
        }
        let m: Tile<f32, { [] }> = reduce_max(m, 0i32);
        let u: Tile<f32, { [1, 1] }> = pow2_floor::<{ [1, 1] }>(m.reshape(const_shape![1, 1]));
        if pid.0 == 0i32 {
            store_column::<f32, 1>(
                slice::<f32>(unit, wide(pid.2 * grid.1 + pid.1)),
                1i32,
                u.reshape(const_shape![1]),
            );
        }
        let one: Tile<f32, { [1, 1] }> = constant(1.0f32, const_shape![1, 1]);
        let inv: Tile<f32, { [R, D] }> = (one / u).broadcast(const_shape![R, D]);
        let dropped: Tile<f32, { [R, D] }> = broadcast_scalar(padding, const_shape![R, D]);
        let zero: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
        let y: Tile<f16, { [R, D] }> =
            convert_tile(select(finite::<{ [R, D] }>(x) & eq_tile(dropped, zero), x * inv, zero));
        let at: i32 = pid.1 * grid.0 + pid.0;
        if pid.2 == 0i32 {
            store_packed::<f16, R, D>(out_a, grid.0 * grid.1 * R, at, y);
        } else {
            store_packed::<f16, R, D>(out_b, grid.0 * grid.1 * R, at, y);
        }
    }
}
