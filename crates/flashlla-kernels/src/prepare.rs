//! Turns strided tensors of any input type into contiguous fp16 rows padded to the head dimension, scaled by one power of two
//! per head so that all magnitudes are below 2, and the largest is mostly not far below. Values that are no number or infinite
//! become zeros, and their rows are marked.
//!
//! Two launches. `lla_convert` reads everything once: it scales by a guess, which a head's first 16 rows give, and finds the largest
//! magnitude of every chunk. `lla_adjust` compares the two, and converts the heads again whose guess was too small: those with numbers
//! two to four times as large as any of the first rows, or more.
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
        // A chunk of padding alone has no rows to read.
        let mut from: i32 = first;
        let mut left: i32 = rows - first;
        if left <= 0i32 {
            from = 0i32;
            left = 0i32;
        }
        let at: i64 = batch * batch_stride + head * head_stride + wide(from) * wide(row_stride);
        let t: Tile<E, { [R, D] }> = if ALIGNED == 1i32 {
            load_rows_aligned::<E, R, D>(slice_aligned::<E>(tensor, at), row_stride, left, cols)
        } else {
            load_rows::<E, R, D>(slice::<E>(tensor, at), row_stride, left, cols)
        };
        convert_tile(t)
    }

    /// The number of this block's tensor among those of four.
    fn one_of(which: i32, a: i32, b: i32, c: i32, e: i32) -> i32 {
        let mut x: i32 = a;
        if which == 1i32 {
            x = b;
        }
        if which == 2i32 {
            x = c;
        }
        if which == 3i32 {
            x = e;
        }
        x
    }

    /// The same of 64 bits.
    fn long_of(which: i32, a: i64, b: i64, c: i64, e: i64) -> i64 {
        let mut x: i64 = a;
        if which == 1i32 {
            x = b;
        }
        if which == 2i32 {
            x = c;
        }
        if which == 3i32 {
            x = e;
        }
        x
    }

    /// The same of addresses.
    fn tensor_of<E: ElementType>(which: i32, a: *mut E, b: *mut E, c: *mut E, e: *mut E) -> *mut E {
        let mut x: *mut E = a;
        if which == 1i32 {
            x = b;
        }
        if which == 2i32 {
            x = c;
        }
        if which == 3i32 {
            x = e;
        }
        x
    }

    /// Writes chunk `index` of `count` in a unit.
    unsafe fn store_scaled<const R: i32, const D: i32>(
        out: *mut f16,
        count: i32,
        index: i32,
        x: Tile<f32, { [R, D] }>,
        unit: Tile<f32, { [1, 1] }>,
    ) {
        let one: Tile<f32, { [1, 1] }> = constant(1.0f32, const_shape![1, 1]);
        let inverse: Tile<f32, { [R, D] }> = (one / unit).broadcast(const_shape![R, D]);
        let zero: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
        let y: Tile<f16, { [R, D] }> = convert_tile(select(finite::<{ [R, D] }>(x), x * inverse, zero));
        store_packed::<f16, R, D>(out, count * R, index, y);
    }

    /// Writes number `at` of the units.
    unsafe fn store_unit(units: *mut f32, at: i32, x: Tile<f32, { [1, 1] }>) {
        store_column::<f32, 1>(slice::<f32>(units, wide(at)), 1i32, x.reshape(const_shape![1]));
    }

    /// `ALIGNED` = 1: base pointers, strides and columns are multiples of 16 bytes.
    /// Grid (chunks of R rows, batch * heads, tensors), the larger of the two pairs' where there are two.
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_convert<E: ElementType, const R: i32, const D: i32, const ALIGNED: i32>(
        a: *mut E,       // [batch, heads, rows, cols_a], strided
        b: *mut E,       // the second of the pair
        c: *mut E,       // [batch, heads2, rows2, cols_c], strided
        e: *mut E,       // the second of that pair
        amax: *mut f32,  // out [2, batch * heads, chunks]: below zero where a chunk holds NaN or an infinity
        marks: *mut f32, // out [2, batch * heads, chunks * R]: 1 where a row does
        unit: *mut f32,  // out [6, batch * heads]: the last two, guesses
        amax2: *mut f32, // the same three of the second pair
        marks2: *mut f32,
        unit2: *mut f32,
        out_a: *mut f16, // out [batch * heads, padded rows = chunks * R, D]
        out_b: *mut f16,
        out_c: *mut f16,
        out_e: *mut f16,
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
        let (ci, bh, which): (i32, i32, i32) = pid;
        let second: i32 = which % 2i32;
        let all: i32 = one_of(which, all, all, all2, all2);
        let heads: i32 = one_of(which, heads, heads, heads2, heads2);
        let rows: i32 = one_of(which, rows, rows, rows2, rows2);
        let chunks: i32 = one_of(which, chunks, chunks, chunks2, chunks2);
        if (ci < chunks) && (bh < all) {
            let amax: *mut f32 = tensor_of(which, amax, amax, amax2, amax2);
            let unit: *mut f32 = tensor_of(which, unit, unit, unit2, unit2);
            let out: *mut f16 = tensor_of(which, out_a, out_b, out_c, out_e);
            let tensor: *mut E = tensor_of(which, a, b, c, e);
            let batch: i64 = wide(bh / heads);
            let head: i64 = wide(bh % heads);
            let cols: i32 = one_of(which, cols_a, cols_b, cols_c, cols_e);
            let batch_stride: i64 = long_of(which, a_batch, b_batch, c_batch, e_batch);
            let head_stride: i64 = long_of(which, a_head, b_head, c_head, e_head);
            let row_stride: i32 = one_of(which, a_row, b_row, c_row, e_row);
            let index: i32 = second * all + bh;
            let x: Tile<f32, { [R, D] }> = chunk::<E, R, D, ALIGNED>(
                tensor,
                batch,
                head,
                ci * R,
                rows,
                cols,
                batch_stride,
                head_stride,
                row_stride,
            );
            let first: Tile<f32, { [16, D] }> = chunk::<E, 16, D, ALIGNED>(
                tensor,
                batch,
                head,
                0i32,
                rows,
                cols,
                batch_stride,
                head_stride,
                row_stride,
            );
            let most: Tile<f32, { [1, 1] }> = broadcast_scalar(largest::<16, D>(first), const_shape![1, 1]);
            let two: Tile<f32, { [1, 1] }> = constant(2.0f32, const_shape![1, 1]);
            let guess: Tile<f32, { [1, 1] }> = two * pow2_floor::<{ [1, 1] }>(most);
            store_scaled::<R, D>(out, chunks * all, bh * chunks + ci, x, guess);
            if ci == 0i32 {
                store_unit(unit, 4i32 * all + index, guess);
            }
            // As integers, magnitudes are in the numbers' order, infinity is above all finite ones, and NaN above that.
            let bits: Tile<i32, { [R, D] }> = bitcast(x);
            let but_sign: Tile<i32, { [R, D] }> = constant(0x7FFF_FFFFi32, const_shape![R, D]);
            let most: Tile<i32, { [R] }> = reduce_max(bits & but_sign, 1i32);
            let most: Tile<i32, { [] }> = reduce_max(most, 0i32);
            let most_bits: i32 = tile_to_scalar(most);
            let most: Tile<f32, { [] }> = bitcast(most);
            let mut most: f32 = tile_to_scalar(most);
            let mut row: Tile<f32, { [R] }> = constant(0.0f32, const_shape![R]);
            if most_bits >= 0x7F80_0000i32 {
                // So small that it is no unit.
                most = 0.0f32 - max(largest::<R, D>(x), 1.0e-35f32);
                let zero: Tile<f32, { [R, D] }> = constant(0.0f32, const_shape![R, D]);
                let one: Tile<f32, { [R, D] }> = constant(1.0f32, const_shape![R, D]);
                row = reduce_max(select(finite::<{ [R, D] }>(x), zero, one), 1i32);
            }
            let at: i64 = wide(index * chunks + ci);
            store_number(amax, at, most);
            let marks: *mut f32 = tensor_of(which, marks, marks, marks2, marks2);
            store_column::<f32, R>(slice::<f32>(marks, at * wide(R)), R, row);
        }
    }

    /// The same grid, or one with fewer blocks for the chunks of a head: most of them find nothing to do where there are guesses.
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_adjust<E: ElementType, const R: i32, const D: i32, const ALIGNED: i32>(
        a: *mut E,
        b: *mut E,
        c: *mut E,
        e: *mut E,
        amax: *mut f32, // as lla_convert wrote it
        unit: *mut f32, // out [6, batch * heads]: tensor = unit * converted; then 1 of marked heads, 0 of others; in: guesses
        amax2: *mut f32,
        unit2: *mut f32,
        out_a: *mut f16, // as lla_convert wrote them; out where the guess did not fit
        out_b: *mut f16,
        out_c: *mut f16,
        out_e: *mut f16,
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
        guessed: i32, // 0: there are no guesses, and nothing is converted yet
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let (ci, bh, which): (i32, i32, i32) = pid;
        let second: i32 = which % 2i32;
        let all: i32 = one_of(which, all, all, all2, all2);
        let heads: i32 = one_of(which, heads, heads, heads2, heads2);
        let rows: i32 = one_of(which, rows, rows, rows2, rows2);
        let chunks: i32 = one_of(which, chunks, chunks, chunks2, chunks2);
        if (ci < chunks) && (bh < all) {
            let amax: *mut f32 = tensor_of(which, amax, amax, amax2, amax2);
            let unit: *mut f32 = tensor_of(which, unit, unit, unit2, unit2);
            let out: *mut f16 = tensor_of(which, out_a, out_b, out_c, out_e);
            let tensor: *mut E = tensor_of(which, a, b, c, e);
            let batch: i64 = wide(bh / heads);
            let head: i64 = wide(bh % heads);
            let cols: i32 = one_of(which, cols_a, cols_b, cols_c, cols_e);
            let batch_stride: i64 = long_of(which, a_batch, b_batch, c_batch, e_batch);
            let head_stride: i64 = long_of(which, a_head, b_head, c_head, e_head);
            let row_stride: i32 = one_of(which, a_row, b_row, c_row, e_row);
            let index: i32 = second * all + bh;
            let mut most: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
            let mut least: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
            for i in 0i32..ceil_div(chunks, 64i32) {
                let t: Tile<f32, { [64] }> = load_column::<f32, 64>(
                    slice::<f32>(amax, wide(index * chunks + i * 64i32)),
                    1i32,
                    chunks - i * 64i32,
                );
                most = max_tile(most, absf(t));
                least = min_tile(least, t);
            }
            let most: Tile<f32, { [] }> = reduce_max(most, 0i32);
            let mut u: Tile<f32, { [1, 1] }> = pow2_floor::<{ [1, 1] }>(most.reshape(const_shape![1, 1]));
            let mut again: bool = true;
            if guessed != 0i32 {
                let guess: f32 = load_scalar(slice::<f32>(unit, wide(4i32 * all + index)));
                let most: f32 = tile_to_scalar(most);
                if most < guess + guess {
                    again = false;
                    u = broadcast_scalar(guess, const_shape![1, 1]);
                }
            }
            if ci == 0i32 {
                let least: Tile<f32, { [] }> = reduce_min(least, 0i32);
                let least: f32 = tile_to_scalar(least);
                let mut mark: f32 = 0.0f32;
                if least < 0.0f32 {
                    mark = 1.0f32;
                }
                store_unit(unit, index, u);
                store_number(unit, wide(2i32 * all + index), mark);
            }
            if again {
                let grid: (i32, i32, i32) = get_num_tile_blocks();
                for i in 0i32..ceil_div(chunks - ci, grid.0) {
                    let ci: i32 = ci + i * grid.0;
                    let x: Tile<f32, { [R, D] }> = chunk::<E, R, D, ALIGNED>(
                        tensor,
                        batch,
                        head,
                        ci * R,
                        rows,
                        cols,
                        batch_stride,
                        head_stride,
                        row_stride,
                    );
                    store_scaled::<R, D>(out, chunks * all, bh * chunks + ci, x, u);
                }
            }
        }
    }
}
