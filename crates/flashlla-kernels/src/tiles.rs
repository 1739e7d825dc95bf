//! Tile pieces that the kernels share: strided rows in and out, power-of-two scales, visibility, weights.
//!
//! Shapes: `BM` query rows, `BN` key rows, `D` the padded head dimension.
#![allow(clippy::too_many_arguments)]

#[cutile::module]
pub mod tiles {
    use cutile::core::*;

    /// The same number in 64 bits.
    pub fn wide(x: i32) -> i64 {
        let t: Tile<i32, { [] }> = scalar_to_tile(x);
        let w: Tile<i64, { [] }> = exti(t);
        let x: i64 = tile_to_scalar(w);
        x
    }

    /// Base of one (batch, head) slice: `ptr + offset` elements.
    pub unsafe fn slice<E: ElementType>(ptr: *mut E, offset: i64) -> PointerTile<*mut E, { [] }> {
        let base: PointerTile<*mut E, { [] }> = pointer_to_tile(ptr);
        let off: Tile<i64, { [] }> = scalar_to_tile(offset);
        let at: PointerTile<*mut E, { [] }> = addptr_tile(base, off);
        at
    }

    /// `slice` where pointer and offset are multiples of 16 bytes.
    pub unsafe fn slice_aligned<E: ElementType>(ptr: *mut E, offset: i64) -> PointerTile<*mut E, { [] }> {
        let ptr: *mut E = assume_div_by::<_, 16>(ptr);
        let offset: i64 = assume_div_by::<_, 8>(offset);
        let base: PointerTile<*mut E, { [] }> = pointer_to_tile(ptr);
        let off: Tile<i64, { [] }> = scalar_to_tile(offset);
        let at: PointerTile<*mut E, { [] }> = addptr_tile(base, off);
        at
    }

    /// Tile `index` of the rows, which must be inside: where each access is checked, each waits for the one before.
    pub unsafe fn load_inside<E: ElementType, const R: i32, const D: i32>(
        part: &Partition<E, { [R, D] }>,
        index: i32,
    ) -> Tile<E, { [R, D] }> {
        load_inside_after::<E, R, D>(part, index, new_token_unordered())
    }

    /// The same of what this tile block has stored.
    pub unsafe fn load_inside_after<E: ElementType, const R: i32, const D: i32>(
        part: &Partition<E, { [R, D] }>,
        index: i32,
        stored: Token,
    ) -> Tile<E, { [R, D] }> {
        let (tile, _token): (Tile<E, { [R, D] }>, Token) = load_view_raw(
            part,
            [index, 0i32],
            Some(stored),
            ordering::Weak,
            scope::TileBlock,
            tma::Disabled,
            None,
            [true, true],
            const_shape![R, D],
        );
        tile
    }

    /// Writes such a tile. A load of it by this tile block has to wait for the token.
    pub unsafe fn store_inside<E: ElementType, const R: i32, const D: i32>(
        part: &PartitionMut<E, { [R, D] }>,
        index: i32,
        value: Tile<E, { [R, D] }>,
    ) -> Token {
        let stored: Token = store_view_raw(
            part,
            value,
            [index, 0i32],
            Some(new_token_unordered()),
            ordering::Weak,
            scope::TileBlock,
            tma::Disabled,
            None,
            [true, true],
        );
        stored
    }

    /// `load_rows` where base, stride and columns are multiples of 16 bytes.
    pub unsafe fn load_rows_aligned<E: ElementType, const R: i32, const D: i32>(
        base: PointerTile<*mut E, { [] }>,
        stride: i32,
        rows: i32,
        cols: i32,
    ) -> Tile<E, { [R, D] }> {
        let stride: i32 = assume_div_by::<_, 8>(stride);
        let cols: i32 = assume_div_by::<_, 8>(cols);
        let tile: Tile<E, { [R, D] }> = if (rows >= R) && (cols >= D) {
            let shape: Shape<{ [-1, -1] }> = Shape::<{ [-1, -1] }> { dims: &[rows, cols] };
            let strides: Array<{ [-1, 1] }> = Array::<{ [-1, 1] }> { dims: &[stride] };
            let view: Tensor<E, { [-1, -1] }> = make_tensor_view(base, shape, strides, new_token_unordered());
            let part: Partition<E, { [R, D] }> = view.partition(const_shape![R, D]);
            load_inside::<E, R, D>(&part, 0i32)
        } else {
            load_rows::<E, R, D>(base, stride, rows, cols)
        };
        tile
    }

    /// `R` rows of `D` elements, `stride` apart; zero outside the first `rows` rows and `cols` columns.
    pub unsafe fn load_rows<E: ElementType, const R: i32, const D: i32>(
        base: PointerTile<*mut E, { [] }>,
        stride: i32,
        rows: i32,
        cols: i32,
    ) -> Tile<E, { [R, D] }> {
        let shape: Shape<{ [-1, -1] }> = Shape::<{ [-1, -1] }> { dims: &[rows, cols] };
        let strides: Array<{ [-1, 1] }> = Array::<{ [-1, 1] }> { dims: &[stride] };
        let view: Tensor<E, { [-1, -1] }> = make_tensor_view(base, shape, strides, new_token_unordered());
        let part: Partition<E, { [R, D] }> = view.partition(const_shape![R, D]);
        let tile: Tile<E, { [R, D] }> =
            load_view_tko(&part, [0i32, 0i32], ordering::Weak, scope::TileBlock, None, tma::Disabled);
        tile
    }

    /// Writes the first `rows` rows and `cols` columns.
    pub unsafe fn store_rows<E: ElementType, const R: i32, const D: i32>(
        base: PointerTile<*mut E, { [] }>,
        stride: i32,
        rows: i32,
        cols: i32,
        value: Tile<E, { [R, D] }>,
    ) {
        let shape: Shape<{ [-1, -1] }> = Shape::<{ [-1, -1] }> { dims: &[rows, cols] };
        let strides: Array<{ [-1, 1] }> = Array::<{ [-1, 1] }> { dims: &[stride] };
        let view: Tensor<E, { [-1, -1] }> = make_tensor_view(base, shape, strides, new_token_unordered());
        let mut part: PartitionMut<E, { [R, D] }> = view.partition_full_mut(const_shape![R, D]);
        store_view_tko_mut(
            &mut part,
            value,
            [0i32, 0i32],
            ordering::Weak,
            scope::TileBlock,
            None,
            tma::Disabled,
        );
    }

    /// `store_rows` where base, stride and columns are multiples of 16 bytes.
    pub unsafe fn store_rows_aligned<E: ElementType, const R: i32, const D: i32>(
        base: PointerTile<*mut E, { [] }>,
        stride: i32,
        rows: i32,
        cols: i32,
        value: Tile<E, { [R, D] }>,
    ) {
        let stride: i32 = assume_div_by::<_, 8>(stride);
        let cols: i32 = assume_div_by::<_, 8>(cols);
        store_rows::<E, R, D>(base, stride, rows, cols, value);
    }

    /// `a / b`, to about one unit in the last place.
    pub fn quotient<const S: [i32; 2]>(a: Tile<f32, S>, b: Tile<f32, S>) -> Tile<f32, S> {
        divf(a, b, rounding::Approx, ftz::Enabled)
    }

    /// A number as a tile.
    pub fn number(x: f32) -> Tile<f32, { [1, 1] }> {
        broadcast_scalar(x, const_shape![1, 1])
    }

    /// A tile of one number as that number.
    pub fn single(x: Tile<f32, { [1, 1] }>) -> f32 {
        let x: Tile<f32, { [] }> = x.reshape(const_shape![]);
        let x: f32 = tile_to_scalar(x);
        x
    }

    /// `a / b`, to about one unit in the last place: exact division is a dozen instructions and a branch.
    pub fn ratio(a: f32, b: f32) -> f32 {
        single(quotient::<{ [1, 1] }>(number(a), number(b)))
    }

    /// A 16-byte aligned array of `rows` contiguous rows of `D` elements.
    pub unsafe fn packed<E: ElementType, const D: i32>(ptr: *mut E, rows: i32) -> Tensor<E, { [-1, D] }> {
        let base: *mut E = assume_div_by::<_, 16>(ptr);
        let shape: Shape<{ [-1, D] }> = Shape::<{ [-1, D] }> { dims: &[rows] };
        let strides: Array<{ [D, 1] }> = Array::<{ [D, 1] }> { dims: &[] };
        let view: Tensor<E, { [-1, D] }> =
            make_tensor_view(pointer_to_tile(base), shape, strides, new_token_unordered());
        view
    }

    /// Writes tile `index` of such an array. A load of it by this tile block has to wait for the token.
    pub unsafe fn store_packed<E: ElementType, const R: i32, const D: i32>(
        ptr: *mut E,
        rows: i32,
        index: i32,
        value: Tile<E, { [R, D] }>,
    ) -> Token {
        let view: Tensor<E, { [-1, D] }> = packed::<E, D>(ptr, rows);
        let part: PartitionMut<E, { [R, D] }> = view.partition_full_mut(const_shape![R, D]);
        store_inside::<E, R, D>(&part, index, value)
    }

    /// Tile `index` of such an array, where one tile is all that a tile block reads of it: a bulk copy would first have to build
    /// a descriptor of the array, which takes longer than the copy.
    pub unsafe fn load_packed<E: ElementType, const R: i32, const D: i32>(
        ptr: *mut E,
        rows: i32,
        index: i32,
    ) -> Tile<E, { [R, D] }> {
        load_packed_after::<E, R, D>(ptr, rows, index, new_token_unordered())
    }

    /// The same of what this tile block has stored.
    pub unsafe fn load_packed_after<E: ElementType, const R: i32, const D: i32>(
        ptr: *mut E,
        rows: i32,
        index: i32,
        stored: Token,
    ) -> Tile<E, { [R, D] }> {
        let view: Tensor<E, { [-1, D] }> = packed::<E, D>(ptr, rows);
        let part: Partition<E, { [R, D] }> = view.partition(const_shape![R, D]);
        load_inside_after::<E, R, D>(&part, index, stored)
    }

    /// One value per row, `stride` apart (0: the same for all); zero past `rows`.
    pub unsafe fn load_column<E: ElementType, const R: i32>(
        base: PointerTile<*mut E, { [] }>,
        stride: i32,
        rows: i32,
    ) -> Tile<E, { [R] }> {
        let r: Tile<i32, { [R] }> = iota(const_shape![R]);
        let mask: Tile<bool, { [R] }> = lt_tile(r, broadcast_scalar(rows, const_shape![R]));
        let off: Tile<i32, { [R] }> = r * broadcast_scalar(stride, const_shape![R]);
        let one: PointerTile<*mut E, { [1] }> = base.reshape(const_shape![1]);
        let all: PointerTile<*mut E, { [R] }> = one.broadcast(const_shape![R]);
        let ptrs: PointerTile<*mut E, { [R] }> = all.offset_tile(off);
        let zero: Tile<E, { [R] }> = constant(E::ZERO, const_shape![R]);
        let (t, _tok): (Tile<E, { [R] }>, Token) = load_ptr_tko(
            ptrs,
            ordering::Weak,
            None::<scope::TileBlock>,
            Some(mask),
            None,
            None,
            Latency::<0>,
        );
        select(mask, t, zero)
    }

    /// The same as a column.
    pub unsafe fn load_rowwise<E: ElementType, const R: i32>(
        base: PointerTile<*mut E, { [] }>,
        stride: i32,
        rows: i32,
    ) -> Tile<E, { [R, 1] }> {
        let t: Tile<E, { [R] }> = load_column::<E, R>(base, stride, rows);
        t.reshape(const_shape![R, 1])
    }

    /// Writes the first `rows` values of a contiguous column.
    pub unsafe fn store_column<E: ElementType, const R: i32>(
        base: PointerTile<*mut E, { [] }>,
        rows: i32,
        value: Tile<E, { [R] }>,
    ) {
        let r: Tile<i32, { [R] }> = iota(const_shape![R]);
        let mask: Tile<bool, { [R] }> = lt_tile(r, broadcast_scalar(rows, const_shape![R]));
        let one: PointerTile<*mut E, { [1] }> = base.reshape(const_shape![1]);
        let all: PointerTile<*mut E, { [R] }> = one.broadcast(const_shape![R]);
        let ptrs: PointerTile<*mut E, { [R] }> = all.offset_tile(r);
        store_ptr_tko(ptrs, value, ordering::Weak, None::<scope::TileBlock>, Some(mask), None, Latency::<0>);
    }

    /// One scalar of a device array.
    pub unsafe fn load_scalar(base: PointerTile<*mut f32, { [] }>) -> f32 {
        let (t, _tok): (Tile<f32, { [] }>, Token) =
            load_ptr_tko(base, ordering::Weak, None::<scope::TileBlock>, None, None, None, Latency::<0>);
        let x: f32 = tile_to_scalar(t);
        x
    }

    /// One integer of a device array.
    pub unsafe fn load_integer(base: PointerTile<*mut i32, { [] }>) -> i32 {
        let (t, _tok): (Tile<i32, { [] }>, Token) =
            load_ptr_tko(base, ordering::Weak, None::<scope::TileBlock>, None, None, None, Latency::<0>);
        let x: i32 = tile_to_scalar(t);
        x
    }

    /// Writes one number of a device array.
    pub unsafe fn store_number(base: *mut f32, at: i64, x: f32) {
        store_column::<f32, 1>(slice::<f32>(base, at), 1i32, broadcast_scalar(x, const_shape![1]));
    }

    /// The largest finite magnitude of a tile.
    pub fn largest<const R: i32, const C: i32>(x: Tile<f32, { [R, C] }>) -> f32 {
        let zero: Tile<f32, { [R, C] }> = constant(0.0f32, const_shape![R, C]);
        let rows: Tile<f32, { [R] }> = reduce_max(select(finite::<{ [R, C] }>(x), absf(x), zero), 1i32);
        let all: Tile<f32, { [] }> = reduce_max(rows, 0i32);
        let x: f32 = tile_to_scalar(all);
        x
    }

    /// The largest power of two not above `x`, for x in f32's normal range (clamped into 2^-100 .. 2^100 first).
    pub fn pow2_floor<const S: [i32; 2]>(x: Tile<f32, S>) -> Tile<f32, S> {
        let least: Tile<f32, S> = constant(7.888609e-31f32, x.shape());
        let most: Tile<f32, S> = constant(1.2676506e30f32, x.shape());
        let x: Tile<f32, S> = min_tile(max_tile(x, least), most);
        let bits: Tile<i32, S> = bitcast(x);
        let field: Tile<i32, S> = constant(0x7F80_0000i32, x.shape());
        let exponent: Tile<i32, S> = bits & field;
        let y: Tile<f32, S> = bitcast(exponent);
        y
    }

    /// The largest power of two not above the root of `x` (clamped into 2^-126 .. 2^126 first).
    pub fn root_floor<const S: [i32; 2]>(x: Tile<f32, S>) -> Tile<f32, S> {
        let least: Tile<f32, S> = constant(1.1754944e-38f32, x.shape());
        let most: Tile<f32, S> = constant(8.507059e37f32, x.shape());
        let x: Tile<f32, S> = min_tile(max_tile(x, least), most);
        // Half the exponent, whose zero is at 127.
        let bits: Tile<i32, S> = bitcast(x);
        let one: Tile<i32, S> = constant(1i32, x.shape());
        let half_of_127: Tile<i32, S> = constant(0x1FC0_0000i32, x.shape());
        let field: Tile<i32, S> = constant(0x7F80_0000i32, x.shape());
        let exponent: Tile<i32, S> = (shri(bits, one) + half_of_127) & field;
        let y: Tile<f32, S> = bitcast(exponent);
        y
    }

    /// `1 / x` of powers of two from 2^-126 to 2^126.
    pub fn inverse_of_power<const S: [i32; 2]>(x: Tile<f32, S>) -> Tile<f32, S> {
        let bits: Tile<i32, S> = bitcast(x);
        let twice_127: Tile<i32, S> = constant(0x7F00_0000i32, x.shape());
        let y: Tile<f32, S> = bitcast(twice_127 - bits);
        y
    }

    /// True for finite values.
    pub fn finite<const S: [i32; 2]>(x: Tile<f32, S>) -> Tile<bool, S> {
        let largest: Tile<f32, S> = constant(3.4028235e38f32, x.shape());
        le_tile(absf(x), largest)
    }

    /// A row value for every column.
    pub fn across<const R: i32, const C: i32>(x: Tile<f32, { [R, 1] }>) -> Tile<f32, { [R, C] }> {
        x.broadcast(const_shape![R, C])
    }

    /// `a + f b`, one factor per row.
    pub fn add_scaled<const R: i32, const C: i32>(
        a: Tile<f32, { [R, C] }>,
        f: Tile<f32, { [R, 1] }>,
        b: Tile<f32, { [R, C] }>,
    ) -> Tile<f32, { [R, C] }> {
        fma(across::<R, C>(f), b, a, rounding::NearestEven, ftz::Disabled)
    }

    /// Row-wise dot product.
    pub fn row_dot<const R: i32, const C: i32>(
        a: Tile<f32, { [R, C] }>,
        b: Tile<f32, { [R, C] }>,
    ) -> Tile<f32, { [R, 1] }> {
        let sum: Tile<f32, { [R] }> = reduce_sum(a * b, 1i32);
        sum.reshape(const_shape![R, 1])
    }

    /// Which of `BN` keys from `first` each query sees: `lo <= key < hi` and `key != skip`.
    pub fn visible<const BM: i32, const BN: i32>(
        lo: Tile<i32, { [BM, 1] }>,
        hi: Tile<i32, { [BM, 1] }>,
        skip: Tile<i32, { [BM, 1] }>,
        first: i32,
    ) -> Tile<bool, { [BM, BN] }> {
        let key: Tile<i32, { [BN] }> = iota(const_shape![BN]);
        let key: Tile<i32, { [BM, BN] }> = (key + broadcast_scalar(first, const_shape![BN]))
            .reshape(const_shape![1, BN])
            .broadcast(const_shape![BM, BN]);
        let lo: Tile<i32, { [BM, BN] }> = lo.broadcast(const_shape![BM, BN]);
        let hi: Tile<i32, { [BM, BN] }> = hi.broadcast(const_shape![BM, BN]);
        let skip: Tile<i32, { [BM, BN] }> = skip.broadcast(const_shape![BM, BN]);
        ge_tile(key, lo) & lt_tile(key, hi) & ne_tile(key, skip)
    }

    /// `visible` as a kernel needs it. Usual calls see keys from 0 to `hi`; at D = 64 the compiler does worse with one comparison.
    pub fn sees<const BM: i32, const BN: i32, const D: i32, const USUAL: i32>(
        lo: Tile<i32, { [BM, 1] }>,
        hi: Tile<i32, { [BM, 1] }>,
        skip: Tile<i32, { [BM, 1] }>,
        first: i32,
    ) -> Tile<bool, { [BM, BN] }> {
        let seen: Tile<bool, { [BM, BN] }> = if (USUAL == 1i32) && (D == 128i32) {
            let key: Tile<i32, { [BN] }> = iota(const_shape![BN]);
            let key: Tile<i32, { [BM, BN] }> =
                key.reshape(const_shape![1, BN]).broadcast(const_shape![BM, BN]);
            let end: Tile<i32, { [BM, 1] }> = hi - broadcast_scalar(first, const_shape![BM, 1]);
            lt_tile(key, end.broadcast(const_shape![BM, BN]))
        } else {
            visible::<BM, BN>(lo, hi, skip, first)
        };
        seen
    }

    /// `exp2(s * scale + shift)`, scale and shift one per row.
    pub fn weights<const BM: i32, const BN: i32>(
        s: Tile<f32, { [BM, BN] }>,
        scale: Tile<f32, { [BM, 1] }>,
        shift: Tile<f32, { [BM, 1] }>,
    ) -> Tile<f32, { [BM, BN] }> {
        let sc: Tile<f32, { [BM, BN] }> = across::<BM, BN>(scale);
        let sh: Tile<f32, { [BM, BN] }> = across::<BM, BN>(shift);
        exp2(fma(s, sc, sh, rounding::NearestEven, ftz::Enabled), ftz::Enabled)
    }

    /// Products of every query row with every key row: `[BM, D] x [BN, D]^T`.
    pub fn scores<const BM: i32, const BN: i32, const D: i32>(
        a: Tile<f16, { [BM, D] }>,
        b: Tile<f16, { [BN, D] }>,
    ) -> Tile<f32, { [BM, BN] }> {
        let zero: Tile<f32, { [BM, BN] }> = constant(0.0f32, const_shape![BM, BN]);
        mma(a, b.transpose(), zero)
    }

    /// Products with a vector in two terms.
    pub fn scores2<const BM: i32, const BN: i32, const D: i32, const HIGH: i32>(
        hi: Tile<f16, { [BM, D] }>,
        lo: Tile<f16, { [BM, D] }>,
        b: Tile<f16, { [BN, D] }>,
    ) -> Tile<f32, { [BM, BN] }> {
        let zero: Tile<f32, { [BM, BN] }> = constant(0.0f32, const_shape![BM, BN]);
        let t: Tile<f32, { [BM, BN] }> = if HIGH == 1i32 {
            let low: Tile<f32, { [BM, BN] }> = mma(lo, b.transpose(), zero);
            mma(hi, b.transpose(), low)
        } else {
            mma(hi, b.transpose(), zero)
        };
        t
    }

    /// What fp16 leaves of `x`.
    pub fn low_part<const R: i32, const D: i32>(
        x: Tile<f32, { [R, D] }>,
        hi: Tile<f16, { [R, D] }>,
    ) -> Tile<f16, { [R, D] }> {
        let h: Tile<f32, { [R, D] }> = convert_tile(hi);
        let y: Tile<f16, { [R, D] }> = convert_tile(x - h);
        y
    }

    /// `s * scale + bias` (base 2) of `BN` keys from `first`.
    pub unsafe fn add_bias<const BM: i32, const BN: i32>(
        s: Tile<f32, { [BM, BN] }>,
        scale: Tile<f32, { [BM, 1] }>,
        bias: *mut f32,
        at: i64,
        first: i32,
        keys: i32,
    ) -> Tile<f32, { [BM, BN] }> {
        let b: Tile<f32, { [BN] }> =
            load_column::<f32, BN>(slice::<f32>(bias, at + wide(first)), 1i32, keys - first);
        let log2e: Tile<f32, { [BN] }> = constant(1.4426950408889634f32, const_shape![BN]);
        let b: Tile<f32, { [BN] }> = b * log2e;
        let b: Tile<f32, { [BM, BN] }> = b.reshape(const_shape![1, BN]).broadcast(const_shape![BM, BN]);
        let sc: Tile<f32, { [BM, BN] }> = across::<BM, BN>(scale);
        fma(s, sc, b, rounding::NearestEven, ftz::Enabled)
    }

    /// Options of a launch: bits of one i32.
    /// 1 causal, 2 window, 4 ranges, 8 leave one out, 16 probe given, 32 heavy blocks first.
    ///
    /// Which block of queries a tile block takes.
    pub fn block_index(options: i32, pid: i32, blocks: i32) -> i32 {
        let mut i: i32 = pid;
        if (options & 32i32) != 0i32 {
            i = blocks - 1i32 - pid;
        }
        i
    }

    /// Whether a rarer option is asked for. Kernels with `USUAL` = 1 have no code for these: code that is not run takes time too, for blocks of
    /// few keys run more instructions than the cache of them holds.
    pub fn asked<const USUAL: i32>(options: i32, option: i32) -> bool {
        let mut yes: bool = false;
        if USUAL == 0i32 {
            yes = (options & option) != 0i32;
        }
        yes
    }

    /// Position of each query among the keys. Rows past the end stand for the last one; nothing of theirs is kept.
    pub fn positions<const BM: i32>(first: i32, n: i32, offset: i32) -> Tile<i32, { [BM, 1] }> {
        let row: Tile<i32, { [BM] }> = iota(const_shape![BM]);
        let row: Tile<i32, { [BM, 1] }> = row.reshape(const_shape![BM, 1]);
        let last: Tile<i32, { [BM, 1] }> = broadcast_scalar(n - 1i32, const_shape![BM, 1]);
        let start: Tile<i32, { [BM, 1] }> = broadcast_scalar(first, const_shape![BM, 1]);
        let shift: Tile<i32, { [BM, 1] }> = broadcast_scalar(offset, const_shape![BM, 1]);
        min_tile(row + start, last) + shift
    }

    /// First key that each query sees.
    pub unsafe fn first_keys<const BM: i32, const USUAL: i32>(
        options: i32,
        pos: Tile<i32, { [BM, 1] }>,
        m: i32,
        window: i32,
        lo: *mut i32,
        at: i64,
        rows: i32,
    ) -> Tile<i32, { [BM, 1] }> {
        let zero: Tile<i32, { [BM, 1] }> = constant(0i32, const_shape![BM, 1]);
        let one: Tile<i32, { [BM, 1] }> = constant(1i32, const_shape![BM, 1]);
        let keys: Tile<i32, { [BM, 1] }> = broadcast_scalar(m, const_shape![BM, 1]);
        let mut x: Tile<i32, { [BM, 1] }> = zero;
        if asked::<USUAL>(options, 2i32) {
            let w: Tile<i32, { [BM, 1] }> = broadcast_scalar(window, const_shape![BM, 1]);
            x = pos - w + one;
        }
        if asked::<USUAL>(options, 4i32) {
            x = load_rowwise::<i32, BM>(slice::<i32>(lo, at), 1i32, rows);
        }
        min_tile(max_tile(x, zero), keys)
    }

    /// One past the last key that each query sees.
    pub unsafe fn end_keys<const BM: i32, const USUAL: i32>(
        options: i32,
        pos: Tile<i32, { [BM, 1] }>,
        m: i32,
        hi: *mut i32,
        at: i64,
        rows: i32,
    ) -> Tile<i32, { [BM, 1] }> {
        let zero: Tile<i32, { [BM, 1] }> = constant(0i32, const_shape![BM, 1]);
        let one: Tile<i32, { [BM, 1] }> = constant(1i32, const_shape![BM, 1]);
        let keys: Tile<i32, { [BM, 1] }> = broadcast_scalar(m, const_shape![BM, 1]);
        let mut x: Tile<i32, { [BM, 1] }> = keys;
        if (options & 1i32) != 0i32 {
            x = pos + one;
        }
        if asked::<USUAL>(options, 4i32) {
            x = load_rowwise::<i32, BM>(slice::<i32>(hi, at), 1i32, rows);
        }
        min_tile(max_tile(x, zero), keys)
    }

    /// The key that each query leaves out, or -1.
    pub fn skipped_keys<const BM: i32, const USUAL: i32>(
        options: i32,
        pos: Tile<i32, { [BM, 1] }>,
    ) -> Tile<i32, { [BM, 1] }> {
        let mut x: Tile<i32, { [BM, 1] }> = constant(-1i32, const_shape![BM, 1]);
        if asked::<USUAL>(options, 8i32) {
            x = pos;
        }
        x
    }

    /// Bounds of a block's visible keys, as scalars: 0 least first key, 1 greatest first key, 2 least end, 3 greatest end.
    /// The engine gives them for ranges; otherwise the first and last query have them.
    pub unsafe fn bound<const USUAL: i32>(
        which: i32,
        options: i32,
        bounds: *mut i32,
        at: i64,
        first: i32,
        last: i32,
        offset: i32,
        m: i32,
        window: i32,
    ) -> i32 {
        let mut x: i32 = 0i32;
        if which >= 2i32 {
            x = m;
        }
        let mut pos: i32 = first + offset;
        if (which == 1i32) || (which == 3i32) {
            pos = last + offset;
        }
        if (which < 2i32) && asked::<USUAL>(options, 2i32) {
            x = pos - window + 1i32;
        }
        if (which >= 2i32) && ((options & 1i32) != 0i32) {
            x = pos + 1i32;
        }
        if asked::<USUAL>(options, 4i32) {
            x = load_integer(slice::<i32>(bounds, at + wide(which)));
        }
        min(max(x, 0i32), m)
    }

    /// Key tiles that a block of queries looks at, `[begin, end)`, and those that all of its queries see as a whole, `[full0, full1)`.
    pub unsafe fn key_tiles<const BN: i32, const USUAL: i32>(
        options: i32,
        bounds: *mut i32,
        at: i64,
        first: i32,
        last: i32,
        offset: i32,
        m: i32,
        window: i32,
    ) -> (i32, i32, i32, i32) {
        let begin: i32 = bound::<USUAL>(0i32, options, bounds, at, first, last, offset, m, window) / BN;
        let end: i32 = bound::<USUAL>(3i32, options, bounds, at, first, last, offset, m, window);
        let end: i32 = max(ceil_div(end, BN), begin);
        let full0: i32 = bound::<USUAL>(1i32, options, bounds, at, first, last, offset, m, window);
        let mut full0: i32 = ceil_div(full0, BN);
        let mut full1: i32 = bound::<USUAL>(2i32, options, bounds, at, first, last, offset, m, window) / BN;
        if full1 <= full0 {
            full0 = begin;
            full1 = begin;
        }
        if asked::<USUAL>(options, 8i32) {
            full0 = begin;
            full1 = begin;
        }
        (begin, end, full0, full1)
    }

    /// What turns a product of scaled queries and keys into a logit of base 2. Positive, so that -inf stays -inf under it (the
    /// engine refuses a negative scale in the backward), and no less than what changes a weight: products are below 1e6.
    pub fn logit_scale(scale: f32, unit: f32) -> f32 {
        max(scale * unit * 1.4426950408889634f32, 1.0e-20f32)
    }

    /// What turns a product of scaled probes and keys into its part of `1 + x.(kbar - k)`: no smaller than what changes the sum.
    pub fn probe_factor(unit: f32) -> f32 {
        0.0f32 - max(unit, 1.0e-20f32)
    }

    /// `-lse` in base 2, 0 where no key is seen.
    pub fn base2_shift<const BM: i32>(lse: Tile<f32, { [BM, 1] }>) -> Tile<f32, { [BM, 1] }> {
        let none: Tile<f32, { [BM, 1] }> = constant(f32::NEG_INFINITY, const_shape![BM, 1]);
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let log2e: Tile<f32, { [BM, 1] }> = constant(-1.4426950408889634f32, const_shape![BM, 1]);
        select(eq_tile(lse, none), zero, lse * log2e)
    }

    /// `-x`.
    pub fn zero_minus<const R: i32, const C: i32>(x: Tile<f32, { [R, C] }>) -> Tile<f32, { [R, C] }> {
        negf(x)
    }

    /// `visible` with keys along the rows; queries past the end see nothing.
    pub fn visible_across<const BM: i32, const BN: i32>(
        lo: Tile<i32, { [BM, 1] }>,
        hi: Tile<i32, { [BM, 1] }>,
        skip: Tile<i32, { [BM, 1] }>,
        first: i32,
        rows: i32,
    ) -> Tile<bool, { [BN, BM] }> {
        let key: Tile<i32, { [BN] }> = iota(const_shape![BN]);
        let key: Tile<i32, { [BN, BM] }> = (key + broadcast_scalar(first, const_shape![BN]))
            .reshape(const_shape![BN, 1])
            .broadcast(const_shape![BN, BM]);
        let query: Tile<i32, { [BM] }> = iota(const_shape![BM]);
        let query: Tile<i32, { [BN, BM] }> =
            query.reshape(const_shape![1, BM]).broadcast(const_shape![BN, BM]);
        let lo: Tile<i32, { [BN, BM] }> = lo.reshape(const_shape![1, BM]).broadcast(const_shape![BN, BM]);
        let hi: Tile<i32, { [BN, BM] }> = hi.reshape(const_shape![1, BM]).broadcast(const_shape![BN, BM]);
        let skip: Tile<i32, { [BN, BM] }> = skip.reshape(const_shape![1, BM]).broadcast(const_shape![BN, BM]);
        let rows: Tile<i32, { [BN, BM] }> = broadcast_scalar(rows, const_shape![BN, BM]);
        ge_tile(key, lo) & lt_tile(key, hi) & ne_tile(key, skip) & lt_tile(query, rows)
    }

    /// What a product with weights, as fp16 has them, takes to sum them in each of `C` columns (8 or more). The sum is that of what other
    /// products with these weights see. It mostly costs less than adding them up: no conversion back, nothing crosses threads.
    pub fn ones<const BN: i32, const C: i32>() -> Tile<f16, { [BN, C] }> {
        constant(f16::ONE, const_shape![BN, C])
    }

    /// Sums per row, from such columns.
    pub fn summed<const BM: i32, const C: i32>(columns: Tile<f32, { [BM, C] }>) -> Tile<f32, { [BM, 1] }> {
        let sums: Tile<f32, { [BM] }> = reduce_max(columns, 1i32);
        sums.reshape(const_shape![BM, 1])
    }

    /// The same sums added up.
    pub fn added<const BM: i32, const BN: i32>(weights: Tile<f16, { [BM, BN] }>) -> Tile<f32, { [BM, 1] }> {
        let weights: Tile<f32, { [BM, BN] }> = convert_tile(weights);
        let sums: Tile<f32, { [BM] }> = reduce_sum(weights, 1i32);
        sums.reshape(const_shape![BM, 1])
    }

    /// Scores with keys along the rows, `never` where a query of a causal mask, or none, does not see the key, or is none.
    pub fn hide_across<const BM: i32, const BN: i32>(
        s: Tile<f32, { [BN, BM] }>,
        never: Tile<f32, { [BN, BM] }>,
        causal: bool,
        first_key: i32,
        first_pos: i32,
        rows: i32,
    ) -> Tile<f32, { [BN, BM] }> {
        let mut s: Tile<f32, { [BN, BM] }> = s;
        let query: Tile<i32, { [BM] }> = iota(const_shape![BM]);
        let query: Tile<i32, { [BN, BM] }> =
            query.reshape(const_shape![1, BM]).broadcast(const_shape![BN, BM]);
        if causal {
            let key: Tile<i32, { [BN] }> = iota(const_shape![BN]);
            let key: Tile<i32, { [BN, BM] }> = (key
                + broadcast_scalar(first_key - first_pos, const_shape![BN]))
            .reshape(const_shape![BN, 1])
            .broadcast(const_shape![BN, BM]);
            s = select(le_tile(key, query), s, never);
        }
        if rows < BM {
            s = select(lt_tile(query, broadcast_scalar(rows, const_shape![BN, BM])), s, never);
        }
        s
    }
}
