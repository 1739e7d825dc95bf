//! Numbers per query for a pass whose tiles have keys along the rows.
//!
//! There, a number per query has to reach every row of a tile. Loaded as a vector it is moved between layouts through shared memory, in
//! every step of the loop. As three bf16 terms each (24 bits, the range of f32), 16 columns per query, the numbers are copied in bulk
//! beside the queries, and a product with a matrix of ones and zeros lays them out exactly where the tile's other products are.

#[cutile::module]
pub mod numbers {
    use cutile::core::*;

    /// Columns `3 which` to `3 which + 2`, as ones among zeros.
    pub fn terms_of<const R: i32>(which: i32) -> Tile<bool, { [R, 16] }> {
        let column: Tile<i32, { [16] }> = iota(const_shape![16]);
        let from: Tile<i32, { [16] }> = broadcast_scalar(which * 3i32, const_shape![16]);
        let to: Tile<i32, { [16] }> = broadcast_scalar(which * 3i32 + 3i32, const_shape![16]);
        let wanted: Tile<bool, { [16] }> = ge_tile(column, from) & lt_tile(column, to);
        wanted.reshape(const_shape![1, 16]).broadcast(const_shape![R, 16])
    }

    /// The tile of terms with number `which` put in. Numbers beyond 1e30 are cut to it.
    pub fn with_number<const BM: i32>(
        terms: Tile<f32, { [BM, 16] }>,
        which: i32,
        value: Tile<f32, { [BM, 1] }>,
    ) -> Tile<f32, { [BM, 16] }> {
        let most: Tile<f32, { [BM, 1] }> = constant(1.0e30f32, const_shape![BM, 1]);
        let value: Tile<f32, { [BM, 1] }> = min_tile(max_tile(value, negf(most)), most);
        let first: Tile<bf16, { [BM, 1] }> = convert_tile(value);
        let first: Tile<f32, { [BM, 1] }> = convert_tile(first);
        let second: Tile<bf16, { [BM, 1] }> = convert_tile(value - first);
        let second: Tile<f32, { [BM, 1] }> = convert_tile(second);
        let third: Tile<f32, { [BM, 1] }> = value - first - second;
        let column: Tile<i32, { [16] }> = iota(const_shape![16]);
        let column: Tile<i32, { [BM, 16] }> =
            column.reshape(const_shape![1, 16]).broadcast(const_shape![BM, 16]);
        let at: Tile<i32, { [BM, 16] }> = broadcast_scalar(which * 3i32, const_shape![BM, 16]);
        let one: Tile<i32, { [BM, 16] }> = constant(1i32, const_shape![BM, 16]);
        let terms: Tile<f32, { [BM, 16] }> =
            select(eq_tile(column, at), first.broadcast(const_shape![BM, 16]), terms);
        let terms: Tile<f32, { [BM, 16] }> =
            select(eq_tile(column, at + one), second.broadcast(const_shape![BM, 16]), terms);
        select(eq_tile(column, at + one + one), third.broadcast(const_shape![BM, 16]), terms)
    }

    /// `sums` with number `which` of every query added in every row.
    pub fn add_number<const BM: i32, const BN: i32>(
        terms: Tile<bf16, { [BM, 16] }>,
        which: i32,
        sums: Tile<f32, { [BN, BM] }>,
    ) -> Tile<f32, { [BN, BM] }> {
        let one: Tile<f32, { [BN, 16] }> = constant(1.0f32, const_shape![BN, 16]);
        let none: Tile<f32, { [BN, 16] }> = constant(0.0f32, const_shape![BN, 16]);
        let ones: Tile<bf16, { [BN, 16] }> = convert_tile(select(terms_of::<BN>(which), one, none));
        mma(ones, terms.transpose(), sums)
    }
}
