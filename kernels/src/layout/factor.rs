//! Scales as whole numbers of 8 bits times a common factor, where they are exactly that.
//!
//! GGUF's Q4_K, Q5_K and Q6_K make each scale of a super-block as a 16-bit float times a small whole number. Loaders hand
//! over the products; here the factor is found again as their greatest common divisor, and every product is compared.

/// A factor and numbers, such that `factor * number` has exactly the bits of each value; `None` if there are none.
/// Zeros may have either sign, but all the same.
pub(super) fn factor<const N: usize>(values: &[f32]) -> Option<(f32, [i8; N])> {
    let negative_zero = values.iter().any(|v| v.to_bits() == (-0.0f32).to_bits());
    let mut numbers = [0; N];
    let Some(lowest) = values.iter().filter(|v| **v != 0.0).map(|v| parts(*v).1).min() else {
        let zero = if negative_zero { -0.0 } else { 0.0 };
        return is_exact(zero, &numbers, values).then_some((zero, numbers));
    };
    let mut divisor = 0;
    for &value in values.iter().filter(|v| **v != 0.0) {
        let (mantissa, exponent) = parts(value);
        if !value.is_finite() || exponent - lowest > 36 {
            return None;
        }
        divisor = gcd(divisor, mantissa << (exponent - lowest));
    }
    // Exact in a double; f32 rounding shows in the comparison.
    let factor = (divisor as f64 * 2.0f64.powi(lowest)) as f32;
    // A zero takes the factor's sign.
    let factor = if negative_zero { -factor } else { factor };
    for (number, &value) in numbers.iter_mut().zip(values) {
        *number = (value / factor).round() as i8;
    }
    is_exact(factor, &numbers, values).then_some((factor, numbers))
}

fn is_exact(factor: f32, numbers: &[i8], values: &[f32]) -> bool {
    values.iter().zip(numbers).all(|(v, n)| (factor * f32::from(*n)).to_bits() == v.to_bits())
}

/// Odd mantissa and exponent of a number that is not 0: |v| = mantissa * 2^exponent.
fn parts(v: f32) -> (u64, i32) {
    let (exponent, fraction) = ((v.to_bits() >> 23 & 0xff) as i32, v.to_bits() & 0x7f_ffff);
    let mantissa = if exponent == 0 { fraction } else { fraction | 0x80_0000 };
    let zeros = mantissa.trailing_zeros();
    (u64::from(mantissa >> zeros), exponent.max(1) - 150 + zeros as i32)
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_a_half_and_small_numbers_are_factored() {
        for (d, numbers) in [
            (0.001_234f32, [0, 1, 5, 63, 17, 2, 0, 44]),
            (-0.25, [3, 6, 9, 12, 0, 63, 33, 0]),
            (6e-8, [0, 0, 0, 0, 0, 0, 0, 1]),
            (1000.0, [127, 125, 1, 2, 3, 4, 5, 6]),
            (0.5, [-127, 125, -1, 2, -3, 4, 5, 6]),
            (0.0, [0; 8]),
            (-0.0, [0; 8]),
        ] {
            let d = half::f16::from_f32(d).to_f32();
            let values = numbers.map(|n| d * n as f32);
            let (factor, found) = factor::<8>(&values).expect("made as a product");
            for (value, n) in values.iter().zip(found) {
                assert_eq!((factor * f32::from(n)).to_bits(), value.to_bits(), "{d} {numbers:?}");
            }
        }
        let (short, numbers) = factor::<8>(&[3.0, 6.0]).expect("fewer than 8");
        assert_eq!((short, numbers), (3.0, [1, 2, 0, 0, 0, 0, 0, 0]));
    }

    #[test]
    fn other_numbers_are_not() {
        for values in [
            [0.1f32, 0.2, 0.3, 0.7],
            [1.0, 129.0, 0.0, 0.0],
            [0.0, -0.0, 1.0, 2.0],
            [f32::NAN, 1.0, 1.0, 1.0],
            [f32::INFINITY, 1.0, 1.0, 1.0],
            [1e30, 1e-30, 1.0, 1.0],
        ] {
            assert_eq!(factor::<8>(&values), None, "{values:?}");
        }
    }
}
