//! New keys and values into a cache's pages.

#[cutile::module]
pub mod cache_write {
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Copies one row, as it is.
    pub unsafe fn copy_row<E: ElementType, const D: i32>(
        from: *mut E,
        at: i64,
        to: *mut E,
        place: i64,
        cols: i32,
    ) {
        let x: Tile<E, { [D] }> = load_column::<E, D>(slice::<E>(from, at), 1i32, cols);
        store_column::<E, D>(slice::<E>(to, place), cols, x);
    }

    /// Grid (sequences * n, kv_heads): the last `n` tokens of each of the sequences from `first` on.
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_cache_write<E: ElementType, const D: i32>(
        k: *mut E,         // [sequences, kv_heads, n, d], strided
        v: *mut E,         // [sequences, kv_heads, n, dv], strided
        k_pool: *mut E,    // out [pages, kv_heads, page_size, d], strided
        v_pool: *mut E,    // out [pages, kv_heads, page_size, dv], strided
        table: *mut i32,   // [batch, width]
        lengths: *mut i32, // [batch], the new tokens counted
        first: i32,
        n: i32,
        width: i32,
        pages: i32,
        page_size: i32,
        d: i32,
        dv: i32,
        k_batch: i64,
        k_head: i64,
        k_row: i32,
        v_batch: i64,
        v_head: i64,
        v_row: i32,
        k_page: i64,
        k_page_head: i64,
        k_slot: i32,
        v_page: i64,
        v_page_head: i64,
        v_slot: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let sequence: i32 = pid.0 / n;
        let i: i32 = pid.0 % n;
        let head: i32 = pid.1;
        let length: i32 = length_of(lengths, first + sequence, width * page_size);
        let key: i32 = max(length - n + i, 0i32);
        let page: i32 = page_of::<1>(table, width, first + sequence, key, page_size, pages);
        let slot: i32 = key % page_size;
        copy_row::<E, D>(
            k,
            wide(sequence) * k_batch + wide(head) * k_head + wide(i) * wide(k_row),
            k_pool,
            wide(page) * k_page + wide(head) * k_page_head + wide(slot) * wide(k_slot),
            d,
        );
        copy_row::<E, D>(
            v,
            wide(sequence) * v_batch + wide(head) * v_head + wide(i) * wide(v_row),
            v_pool,
            wide(page) * v_page + wide(head) * v_page_head + wide(slot) * wide(v_slot),
            dv,
        );
    }
}
