//! Turns strided tensors of any input type into contiguous fp16 rows padded to the head dimension, scaled by one power of two
//! per head so that the largest magnitude is in [1, 2). Two launches: `lla_range` finds each chunk's largest finite magnitude and
//! notes whether it holds a value that is no number or infinite; `lla_convert` scales, and writes zero in place of such values.
//!
//! A launch takes one tensor, a pair of the same heads and rows, or two pairs (keys and values, queries and the output's gradient).

#[cutile::module]
pub mod prepare {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `R` rows from `first` of one head as f32; zero past the tensor's end.
    unsafe fn chunk<E: ElementType, const R: i32, const D: i32, const ALIGNED: i32>(
        tensor: *mut E,
        batch: i64,
        head: i64,
        first: i32,
        rows: i32,
        cols: i32,
        batch_stride: i64,
        head_stride: i64,
        row_stride: i32,
    ) -> Tile<f32, { [R, D] }> {
        // A chunk of padding alone reads the first row, since no copy may start past the end, and drops it.
        let mut from: i32 = first;
        let mut left: i32 = rows - first;
        let mut padding: f32 = 0.0f32;
        if left <= 0i32 {
            from = 0i32;
            left = 1i32;
            padding = 1.0f32;
        }
        let at: i64 = batch * batch_stride + head * head_stride + wide(from) * wide(row_stride);
        let t: Tile<E, { [R, D] }> = if ALIGNED == 1i32 {
            load_rows_aligned::<E, R, D>(slice_aligned::<E>(tensor, at), row_stride, left, cols)
        } else {
            load_rows::<E, R, D>(slice::<E>(tensor, at), row_stride, left, cols)
        };
        let x: Tile<f32, { [R, D] }> = convert_tile(t);
        let zero: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
        let dropped: Tile<f32, { [R, D] }> = broadcast_scalar(padding, const_shape![R, D]);
        select(gt_tile(dropped, zero), zero, x)
    }

    /// `ALIGNED` = 1: base pointers, strides and columns are multiples of 16 bytes.
    /// Grid (chunks of R rows, batch * heads, tensors), the larger of the two pairs' where there are two.
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_range<E: ElementType, const R: i32, const D: i32, const ALIGNED: i32>(
        a: *mut E,         // [batch, heads, rows, cols_a], strided
        b: *mut E,         // the second of the pair
        c: *mut E,         // [batch, heads2, rows2, cols_c], strided
        e: *mut E,         // the second of that pair
        amax: *mut f32,    // out [2, batch * heads, chunks]
        bad: *mut f32,     // out [2, batch * heads, chunks]: 1 where a chunk holds NaN or an infinity
        bad_row: *mut f32, // out [2, batch * heads, chunks * R]: the same per row
        amax2: *mut f32,   // the same three of the second pair
        bad2: *mut f32,
        bad_row2: *mut f32,
        all: i32, // batch * heads of the first pair
        heads: i32,
        rows: i32,
        chunks: i32,
        all2: i32, // of the second
        heads2: i32,
        rows2: i32,
        chunks2: i32,
        cols_a: i32,
        a_batch: i64,
        a_head: i64,
        a_row: i32,
        cols_b: i32,
        b_batch: i64,
        b_head: i64,
        b_row: i32,
        cols_c: i32,
        c_batch: i64,
        c_head: i64,
        c_row: i32,
        cols_e: i32,
        e_batch: i64,
        e_head: i64,
        e_row: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let ci: i32 = pid.0;
        let bh: i32 = pid.1;
        let second: i32 = pid.2 % 2i32;
        // This block's tensor takes the first one's names.
        let mut a: *mut E = a;
        let mut cols_a: i32 = cols_a;
        let mut a_batch: i64 = a_batch;
        let mut a_head: i64 = a_head;
        let mut a_row: i32 = a_row;
        let mut all: i32 = all;
        let mut heads: i32 = heads;
        let mut rows: i32 = rows;
        let mut chunks: i32 = chunks;
        let mut amax: *mut f32 = amax;
        let mut bad: *mut f32 = bad;
        let mut bad_row: *mut f32 = bad_row;
        if pid.2 == 1i32 {
            a = b;
            cols_a = cols_b;
            a_batch = b_batch;
            a_head = b_head;
            a_row = b_row;
        }
        if pid.2 >= 2i32 {
            a = c;
            cols_a = cols_c;
            a_batch = c_batch;
            a_head = c_head;
            a_row = c_row;
            amax = amax2;
            bad = bad2;
            bad_row = bad_row2;
            all = all2;
            heads = heads2;
            rows = rows2;
            chunks = chunks2;
        }
        if pid.2 == 3i32 {
            a = e;
            cols_a = cols_e;
            a_batch = e_batch;
            a_head = e_head;
            a_row = e_row;
        }
        if (ci < chunks) && (bh < all) {
            let x: Tile<f32, { [R, D] }> = chunk::<E, R, D, ALIGNED>(
                a,
                wide(bh / heads),
                wide(bh % heads),
                ci * R,
                rows,
                cols_a,
                a_batch,
                a_head,
                a_row,
            );
            let zero: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
            let ok: Tile<bool, { [R, D] }> = finite::<{ [R, D] }>(x);
            let one: Tile<f32, { [R, D] }> = constant(1.0f32, const_shape![R, D]);
            let m: Tile<f32, { [R] }> = reduce_max(select(ok, absf(x), zero), 1i32);
            let m: Tile<f32, { [] }> = reduce_max(m, 0i32);
            let row: Tile<f32, { [R] }> = reduce_max(select(ok, zero, one), 1i32);
            let n: Tile<f32, { [] }> = reduce_max(row, 0i32);
            let at: i64 = wide((second * all + bh) * chunks + ci);
            store_column::<f32, 1>(slice::<f32>(amax, at), 1i32, m.reshape(const_shape![1]));
            store_column::<f32, 1>(slice::<f32>(bad, at), 1i32, n.reshape(const_shape![1]));
            store_column::<f32, R>(slice::<f32>(bad_row, at * wide(R)), R, row);
        }
    }

    /// The same grid and chunks.
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_convert<E: ElementType, const R: i32, const D: i32, const ALIGNED: i32>(
        a: *mut E,
        b: *mut E,
        c: *mut E,
        e: *mut E,
        amax: *mut f32, // as lla_range wrote it
        amax2: *mut f32,
        out_a: *mut f16, // out [batch * heads, padded rows = chunks * R, D]
        out_b: *mut f16,
        out_c: *mut f16,
        out_e: *mut f16,
        unit: *mut f32, // out [2, batch * heads]: tensor = unit * converted
        unit2: *mut f32,
        all: i32, // batch * heads of the first pair
        heads: i32,
        rows: i32,
        chunks: i32,
        all2: i32, // of the second
        heads2: i32,
        rows2: i32,
        chunks2: i32,
        cols_a: i32,
        a_batch: i64,
        a_head: i64,
        a_row: i32,
        cols_b: i32,
        b_batch: i64,
        b_head: i64,
        b_row: i32,
        cols_c: i32,
        c_batch: i64,
        c_head: i64,
        c_row: i32,
        cols_e: i32,
        e_batch: i64,
        e_head: i64,
        e_row: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let ci: i32 = pid.0;
        let bh: i32 = pid.1;
        let second: i32 = pid.2 % 2i32;
        // This block's tensor takes the first one's names.
        let mut a: *mut E = a;
        let mut cols_a: i32 = cols_a;
        let mut a_batch: i64 = a_batch;
        let mut a_head: i64 = a_head;
        let mut a_row: i32 = a_row;
        let mut all: i32 = all;
        let mut heads: i32 = heads;
        let mut rows: i32 = rows;
        let mut chunks: i32 = chunks;
        let mut amax: *mut f32 = amax;
        let mut unit: *mut f32 = unit;
        let mut out_a: *mut f16 = out_a;
        if pid.2 == 1i32 {
            a = b;
            cols_a = cols_b;
            a_batch = b_batch;
            a_head = b_head;
            a_row = b_row;
            out_a = out_b;
        }
        if pid.2 >= 2i32 {
            a = c;
            cols_a = cols_c;
            a_batch = c_batch;
            a_head = c_head;
            a_row = c_row;
            amax = amax2;
            unit = unit2;
            out_a = out_c;
            all = all2;
            heads = heads2;
            rows = rows2;
            chunks = chunks2;
        }
        if pid.2 == 3i32 {
            a = e;
            cols_a = cols_e;
            a_batch = e_batch;
            a_head = e_head;
            a_row = e_row;
            out_a = out_e;
        }
        if (ci < chunks) && (bh < all) {
            let x: Tile<f32, { [R, D] }> = chunk::<E, R, D, ALIGNED>(
                a,
                wide(bh / heads),
                wide(bh % heads),
                ci * R,
                rows,
                cols_a,
                a_batch,
                a_head,
                a_row,
            );
            let mut m: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
            let amax_at: i64 = wide((second * all + bh) * chunks);
            for i in 0i32..ceil_div(chunks, 64i32) {
                let t: Tile<f32, { [64] }> = load_column::<f32, 64>(
                    slice::<f32>(amax, amax_at + wide(i * 64i32)),
                    1i32,
                    chunks - i * 64i32,
                );
                m = max_tile(m, t);
            }
            let m: Tile<f32, { [] }> = reduce_max(m, 0i32);
            let u: Tile<f32, { [1, 1] }> = pow2_floor::<{ [1, 1] }>(m.reshape(const_shape![1, 1]));
            if ci == 0i32 {
                store_column::<f32, 1>(
                    slice::<f32>(unit, wide(second * all + bh)),
                    1i32,
                    u.reshape(const_shape![1]),
                );
            }
            let one: Tile<f32, { [1, 1] }> = constant(1.0f32, const_shape![1, 1]);
            let inv: Tile<f32, { [R, D] }> = (one / u).broadcast(const_shape![R, D]);
            let zero: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
            let y: Tile<f16, { [R, D] }> = convert_tile(select(finite::<{ [R, D] }>(x), x * inv, zero));
            store_packed::<f16, R, D>(out_a, chunks * all * R, bh * chunks + ci, y);
        }
    }
}
