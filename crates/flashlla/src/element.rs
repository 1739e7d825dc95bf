//! The number types a tensor can be stored in, and those the arithmetic is done in.

use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f64 {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// A storage type: `f64`, `f32`, [`bf16`] or [`struct@f16`].
pub trait Element:
    sealed::Sealed + crate::cpu::Widen + Copy + Default + Send + Sync + std::fmt::Debug + 'static
{
    /// The type that sums are kept in: `f64` for `f64`, `f32` for the others.
    type Acc: Real;
    /// The type's name as tensor libraries spell it.
    const NAME: &'static str;
    /// The value in one of the types of arithmetic (exact, except from `f64` to `f32`).
    fn to_real<R: Real>(self) -> R;
    /// The nearest representable value.
    fn from_real<R: Real>(value: R) -> Self;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
}

/// A type arithmetic is done in: `f64` or `f32`.
pub trait Real:
    Element<Acc = Self>
    + crate::cpu::SimdReal
    + faer::traits::ComplexField
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
    + std::iter::Sum
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Not a number.
    const NAN: Self;
    /// Minus infinity.
    const NEG_INFINITY: Self;
    /// The distance from 1 to the next larger number.
    const EPSILON: Self;
    /// From `f32` (exact).
    fn of_f32(value: f32) -> Self;
    /// From `f64` (rounded to nearest where needed).
    fn of_f64(value: f64) -> Self;
    /// To `f64` (exact).
    fn as_f64(self) -> f64;
    /// To `f32` (rounded to nearest where needed).
    fn as_f32(self) -> f32;
    /// Square root.
    fn root(self) -> Self;
    /// Exponential function.
    fn exponential(self) -> Self;
    /// Natural logarithm.
    fn logarithm(self) -> Self;
}

macro_rules! real {
    ($t:ident, $to:ident) => {
        impl Element for $t {
            type Acc = $t;
            const NAME: &'static str = stringify!($t);
            #[inline(always)]
            fn to_real<R: Real>(self) -> R {
                R::$to(self)
            }
            #[inline(always)]
            fn from_real<R: Real>(value: R) -> Self {
                Self::of_real(value)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                $t::is_finite(self)
            }
        }
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NAN: Self = $t::NAN;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            const EPSILON: Self = $t::EPSILON;
            #[inline(always)]
            fn of_f32(value: f32) -> Self {
                value as Self
            }
            #[inline(always)]
            fn of_f64(value: f64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn as_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn as_f32(self) -> f32 {
                self as f32
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn exponential(self) -> Self {
                self.exp()
            }
            #[inline(always)]
            fn logarithm(self) -> Self {
                self.ln()
            }
        }
    };
}

/// `Element::from_real` for the two types of arithmetic, which differ in the way through.
trait OfReal {
    fn of_real<R: Real>(value: R) -> Self;
}
impl OfReal for f64 {
    #[inline(always)]
    fn of_real<R: Real>(value: R) -> Self {
        value.as_f64()
    }
}
impl OfReal for f32 {
    #[inline(always)]
    fn of_real<R: Real>(value: R) -> Self {
        value.as_f32()
    }
}
real!(f64, of_f64);
real!(f32, of_f32);

macro_rules! half {
    ($t:ident) => {
        impl Element for $t {
            type Acc = f32;
            const NAME: &'static str = stringify!($t);
            #[inline(always)]
            fn to_real<R: Real>(self) -> R {
                R::of_f32(self.to_f32())
            }
            #[inline(always)]
            fn from_real<R: Real>(value: R) -> Self {
                // From f64 directly: going through f32 would round twice.
                $t::from_f64(value.as_f64())
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                $t::is_finite(self)
            }
        }
    };
}
half!(bf16);
half!(f16);
