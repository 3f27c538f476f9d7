//! The exponential function in basic arithmetic only: the same bits on every processor and C library, and loops over it
//! become vector code.

const LOG2_E: f64 = std::f64::consts::LOG2_E;
/// The natural logarithm of 2 in two parts; the first has trailing zeros, so that its multiples are exact.
const LN_2_HIGH: f64 = f64::from_bits(0x3FE6_2E42_FEFA_3800);
const LN_2_LOW: f64 = f64::from_bits(0x3D2E_F357_93C7_6730);
/// Adding it rounds to an integer, which is then in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// Below this the result is 0: it is far below what a sum of weights up to 1 can notice.
const LEAST: f64 = -700.0;

/// `e^x` for `x <= 0`, to about one unit in the last place; 0 for what is below -700, minus infinity and NaN included.
#[inline]
pub(super) fn exp(x: f64) -> f64 {
    let clamped = if x > LEAST { x } else { LEAST };
    // x = k ln 2 + r with |r| <= ln 2 / 2; then e^x = 2^k e^r, with the Taylor series for e^r: its 13th term is 2^-52.
    let shifted = clamped * LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = clamped - k * LN_2_HIGH - k * LN_2_LOW;
    let mut series = COEFFICIENTS[0];
    for coefficient in &COEFFICIENTS[1..] {
        series = series * r + coefficient;
    }
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    let result = series * power;
    if x > LEAST { result } else { 0.0 }
}

/// 1/12!, ..., 1/1!, 1/0!.
const COEFFICIENTS: [f64; 13] = {
    let mut coefficients = [1.0; 13];
    let mut factorial = 1.0;
    let mut n = 1;
    while n <= 12 {
        factorial *= n as f64;
        coefficients[12 - n] = 1.0 / factorial;
        n += 1;
    }
    coefficients
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_standard_library() {
        for step in 0..400_000 {
            let x = -f64::from(step) * 1.7e-3;
            let (got, want) = (exp(x), x.exp());
            assert!((got - want).abs() <= 4.0 * f64::EPSILON * want, "e^{x}: {got} is not {want}");
        }
    }

    #[test]
    fn the_ends_are_exact() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        for x in [-700.0, -1e300, f64::NEG_INFINITY, f64::NAN] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
        assert!(exp(-699.9) > 0.0);
    }
}
