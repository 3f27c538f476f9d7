//! A stream against what it was without the fault.

use super::stream::{Choice, Record};

/// What differs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Difference {
    /// Tokens that came although they were not due.
    pub duplicated: usize,
    /// Tokens that did not come.
    pub missing: usize,
    /// Tokens, or their scores, that are other ones; texts, finish reasons and counts that are.
    pub different: usize,
}

impl Difference {
    /// Whether nothing differs.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            duplicated: self.duplicated + other.duplicated,
            missing: self.missing + other.missing,
            different: self.different + other.different,
        }
    }
}

/// Compares a stream with its reference. A stream whose client vanished must be a beginning of it.
pub fn compare(reference: &Record, record: &Record) -> Difference {
    let mut sum = Difference::default();
    for (expected, got) in reference.choices.iter().zip(&record.choices) {
        sum = sum.plus(if record.vanished { beginning(expected, got) } else { whole(expected, got) });
    }
    if !record.vanished && reference.usage != record.usage {
        sum.different += 1;
    }
    sum
}

fn beginning(expected: &Choice, got: &Choice) -> Difference {
    let cut = Choice { tokens: expected.tokens.iter().copied().take(got.tokens.len()).collect(), ..Choice::default() };
    edits(&cut.tokens, &got.tokens)
}

fn whole(expected: &Choice, got: &Choice) -> Difference {
    let mut difference = edits(&expected.tokens, &got.tokens);
    if difference.is_none() && expected != got {
        difference.different += 1;
    }
    difference
}

/// The least insertions, deletions and replacements that turn one into the other (Levenshtein).
fn edits(expected: &[u32], got: &[u32]) -> Difference {
    let cost = |d: &Difference| d.duplicated + d.missing + d.different;
    let mut above: Vec<Difference> =
        (0..=got.len()).map(|n| Difference { duplicated: n, ..Difference::default() }).collect();
    for (row, token) in expected.iter().enumerate() {
        let mut line = vec![Difference { missing: row + 1, ..Difference::default() }];
        for (column, other) in got.iter().enumerate() {
            let mut replaced = above[column];
            replaced.different += usize::from(token != other);
            let mut missing = above[column + 1];
            missing.missing += 1;
            let mut duplicated = line[column];
            duplicated.duplicated += 1;
            let best = [replaced, missing, duplicated].into_iter().min_by_key(cost).unwrap_or(replaced);
            line.push(best);
        }
        above = line;
    }
    above.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_token_a_gap_and_another_token_are_told_apart() {
        let expected = [1, 2, 3, 4, 5, 6];
        let difference = |duplicated, missing, different| Difference { duplicated, missing, different };
        assert_eq!(edits(&expected, &expected), difference(0, 0, 0));
        assert_eq!(edits(&expected, &[1, 2, 3, 3, 4, 5, 6]), difference(1, 0, 0));
        assert_eq!(edits(&expected, &[1, 2, 5, 6]), difference(0, 2, 0));
        assert_eq!(edits(&expected, &[1, 2, 9, 4, 5, 6]), difference(0, 0, 1));
        assert_eq!(edits(&expected, &[]), difference(0, 6, 0));
    }
}
