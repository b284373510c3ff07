//! What a loop over vectors asks of an instruction set, so that it is written once for all of them.
#![forbid(unsafe_code)]

use std::fmt;

/// Most lanes of a vector.
pub(crate) const MAX_LANES: usize = 16;

/// Vectors of [`LANES`](Vector::LANES) floats or integers of 32 bits. The proof that the CPU has the instructions implements it,
/// so that no method is unsafe. All methods, and all functions over a `V: Vector`, are `#[inline(always)]`: only what ends up
/// inside [`Vector::run`] is compiled to the instructions that they name.
pub(crate) trait Vector: Copy + fmt::Debug + Send + Sync + 'static {
    /// 8 or 16.
    const LANES: usize;
    /// How many vectors the CPU has names for.
    const REGISTERS: usize;
    /// Floats.
    type F32: Copy;
    /// Integers.
    type I32: Copy;

    /// Compiles a kernel for the instruction set and calls it.
    fn run<R>(self, kernel: impl FnOnce(Self) -> R) -> R;

    /// The floats at `x[at..]`, bounds checked.
    fn load(self, x: &[f32], at: usize) -> Self::F32;
    /// Stores to `x[at..]`, bounds checked.
    fn store(self, x: &mut [f32], at: usize, value: Self::F32);
    /// The little-endian half floats at byte `at`, bounds checked.
    fn load_half(self, x: &[u8], at: usize) -> Self::F32;
    /// The bytes at `x[at..]`, bounds checked, as integers without a sign.
    fn load_bytes(self, x: &[u8], at: usize) -> Self::I32;
    /// [`Vector::load_bytes`] of bytes that [`Vector::store_unsigned_bytes`] stored.
    fn load_unsigned(self, x: &[i8], at: usize) -> Self::I32;
    /// Stores integers from -128 to 127 to the bytes at `x[at..]`, bounds checked, in order. Gives `total` plus all of them, spread
    /// over the lanes in any way.
    fn store_bytes(self, x: &mut [i8], at: usize, value: [Self::I32; 4], total: Self::I32) -> Self::I32;
    /// [`Vector::store_bytes`] of integers from 0 to 255.
    fn store_unsigned_bytes(self, x: &mut [i8], at: usize, value: [Self::I32; 4], total: Self::I32) -> Self::I32;
    /// `x[index]`; any value for an index beyond the last.
    fn gather(self, x: &[f32], index: Self::I32) -> Self::F32;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::F32;
    /// `a + b`
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The larger of each pair, `b` where one is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// To the nearest integer, halves to even.
    fn nearest(self, x: Self::F32) -> Self::I32;
    /// `x - whole`, `whole` being what [`Vector::nearest`] gave for `x`.
    fn rest(self, x: Self::F32, whole: Self::I32) -> Self::F32;
    /// The sum of all lanes.
    fn sum(self, x: Self::F32) -> f32;
    /// The largest lane.
    fn largest(self, x: Self::F32) -> f32;
    /// The sums over each of the first [`LANES`](Vector::LANES) vectors.
    fn sums(self, x: &[Self::F32; MAX_LANES]) -> Self::F32;

    /// `x` in every lane.
    fn splat_i32(self, x: i32) -> Self::I32;
    /// The integers at `x[at..]`, bounds checked.
    fn load_i32(self, x: &[i32], at: usize) -> Self::I32;
    /// Stores to `x[at..]`, bounds checked.
    fn store_i32(self, x: &mut [i32], at: usize, value: Self::I32);
    /// `sum` plus the products of the lower and of the upper 16 bits of each pair of integers, of which none is -2^15.
    fn add_words(self, sum: Self::I32, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a + b`, wrapping.
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a & b`
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a | b`
    fn or(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `x << count`
    fn shift_left(self, x: Self::I32, count: i32) -> Self::I32;
    /// `y`, but 0 where `x` is 0.
    fn unless_zero(self, x: Self::I32, y: Self::I32) -> Self::I32;
    /// `y`, but 0 where `x < bound`.
    fn unless_less(self, x: Self::F32, bound: Self::F32, y: Self::I32) -> Self::I32;
    /// The sum of all lanes, exact to 24 bits.
    fn sum_i32(self, x: Self::I32) -> f32;
    /// As floats.
    fn to_f32(self, x: Self::I32) -> Self::F32;
    /// The bits of floats.
    fn bits(self, x: Self::F32) -> Self::I32;
    /// Floats of these bits.
    fn of_bits(self, x: Self::I32) -> Self::F32;

    /// Scores of as many of the first query rows as there is a faster way for than
    /// [`score_rows`](super::loops::score_rows); gives how many.
    fn score_many(self, q: &[f32], rows: super::exact::ExactRows, scores: &mut [f32], columns: usize) -> usize;
    /// Little-endian half floats, a multiple of 32, to floats; what is not finite as [`finite`](crate::rows::finite) says.
    fn f16_to_f32(self, from: &[u8], to: &mut [f32]);
}

/// Dot product of two rows of a whole number of vectors.
#[inline(always)]
pub(crate) fn dot_floats<V: Vector>(v: V, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = v.splat(0.0);
    for (a, b) in a.chunks_exact(V::LANES).zip(b.chunks_exact(V::LANES)) {
        sum = v.mul_add(v.load(a, 0), v.load(b, 0), sum);
    }
    v.sum(sum)
}

/// Methods over vectors, each one expression of the instruction set's functions.
macro_rules! by_instructions {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident $(<$(const $c:ident: $ct:ty),*>)? ($($arg:ident: $type:ty),*) $(-> $out:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        $(#[$meta])*
        $vis fn $name $(<$(const $c: $ct),*>)? (self, $($arg: $type),*) $(-> $out)? {
            // SAFETY: the token proves that the CPU has the instructions.
            unsafe { $body }
        }
    )*};
}
pub(crate) use by_instructions;
