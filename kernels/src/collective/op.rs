//! What ranks tell each other about the operation they are in, to notice when they disagree.

use std::{fmt, ops::Range};

use super::CollectiveError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpKind {
    AllReduce = 1,
    AllGather = 2,
    Gather = 3,
    Broadcast = 4,
    AllReduceInto = 5,
}

/// One operation, or one part of it. Equal on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Op {
    /// An [`OpKind`], or what a confused peer sent.
    kind: u8,
    /// Counts the operations of the epoch; wraps.
    counter: u32,
    /// Size of the whole operation.
    bytes: u64,
}

impl Op {
    pub fn new(kind: OpKind, counter: u32, bytes: usize) -> Self {
        Self { kind: kind as u8, counter, bytes: bytes as u64 }
    }

    /// All that fits a word: the kind, the low bits of the counter and of the size.
    pub fn to_word(self) -> u64 {
        u64::from(self.kind) << 56 | u64::from(self.counter & 0xFFFF) << 40 | self.bytes & 0xFF_FFFF_FFFF
    }

    pub fn from_word(word: u64) -> Self {
        Self { kind: (word >> 56) as u8, counter: (word >> 40) as u32 & 0xFFFF, bytes: word & 0xFF_FFFF_FFFF }
    }

    pub const WIRE_BYTES: usize = 13;

    pub fn to_wire(self) -> [u8; Self::WIRE_BYTES] {
        let mut wire = [0; Self::WIRE_BYTES];
        wire[0] = self.kind;
        wire[1..5].copy_from_slice(&self.counter.to_le_bytes());
        wire[5..].copy_from_slice(&self.bytes.to_le_bytes());
        wire
    }

    pub fn from_wire(wire: &[u8; Self::WIRE_BYTES]) -> Self {
        let [kind, c0, c1, c2, c3, bytes @ ..] = *wire;
        Self { kind, counter: u32::from_le_bytes([c0, c1, c2, c3]), bytes: u64::from_le_bytes(bytes) }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use OpKind::{AllGather, AllReduce, AllReduceInto, Broadcast, Gather};
        const KINDS: [OpKind; 5] = [AllReduce, AllGather, Gather, Broadcast, AllReduceInto];
        match KINDS.into_iter().find(|kind| *kind as u8 == self.kind) {
            Some(kind) => write!(f, "{kind:?}")?,
            None => write!(f, "unknown operation {}", self.kind)?,
        }
        write!(f, " number {} of {} bytes", self.counter, self.bytes)
    }
}

/// The part of `n` numbers that a rank sums where ranks share them: whole cache lines of f32, if there is one for each.
pub(super) fn share(n: usize, rank: usize, world_size: usize) -> Range<usize> {
    let line = if n < 16 * world_size { 1 } else { 16 };
    let start = |rank: usize| if rank == world_size { n } else { n * rank / world_size / line * line };
    start(rank)..start(rank + 1)
}

/// Checks that there is a result for each sum.
pub(super) fn check_results(epoch: u64, rank: usize, values: &[i64], results: &[f32]) -> Result<(), CollectiveError> {
    if values.len() == results.len() {
        return Ok(());
    }
    let (want, got) = (format!("{} results", values.len()), format!("room for {}", results.len()));
    Err(CollectiveError::Mismatch { epoch, rank, want, got })
}

/// Checks the lengths that a caller of a gathering operation gives; returns their sum.
pub(super) fn check_lens(
    epoch: u64,
    (rank, world_size): (usize, usize),
    mine: &[u8],
    lens: &[usize],
    all: Option<&[u8]>,
) -> Result<usize, CollectiveError> {
    let mismatch = |want: String, got: String| CollectiveError::Mismatch { epoch, rank, want, got };
    if lens.len() != world_size {
        return Err(mismatch(format!("{world_size} lengths"), format!("{}", lens.len())));
    }
    if mine.len() != lens[rank] {
        return Err(mismatch(format!("{} bytes of its own", lens[rank]), format!("{}", mine.len())));
    }
    let total = lens
        .iter()
        .try_fold(0_usize, |sum, len| sum.checked_add(*len))
        .ok_or_else(|| mismatch("lengths that memory can hold".to_owned(), format!("{lens:?}")))?;
    match all {
        Some(all) if all.len() != total => {
            Err(mismatch(format!("room for {total} bytes"), format!("room for {}", all.len())))
        }
        _ => Ok(total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_and_word_keep_an_operation() {
        let op = Op::new(OpKind::Gather, 0x1234, 0x12_3456_789A);
        assert_eq!(Op::from_wire(&op.to_wire()), op);
        assert_eq!(Op::from_word(op.to_word()), op);
        assert_eq!(op.to_string(), "Gather number 4660 of 78187493530 bytes");
    }

    #[test]
    fn neighbours_differ_as_words() {
        let op = Op::new(OpKind::AllReduce, 7, 576 * 8);
        for other in [
            Op::new(OpKind::AllGather, 7, 576 * 8),
            Op::new(OpKind::AllReduce, 8, 576 * 8),
            Op::new(OpKind::AllReduce, 7, 8),
        ] {
            assert_ne!(op.to_word(), other.to_word());
        }
    }

    #[test]
    fn shares_cover_all_numbers() {
        for world_size in 1..=5 {
            for n in [0, 1, 15, 16, 79, 4608, 65_537] {
                let shares = (0..world_size).map(|rank| share(n, rank, world_size));
                let end = shares.fold(0, |end, share: Range<usize>| {
                    assert_eq!(share.start, end);
                    assert!(share.start.is_multiple_of(16) || n < 16 * world_size);
                    assert!(!share.is_empty() || n < world_size);
                    share.end
                });
                assert_eq!(end, n);
            }
        }
    }

    #[test]
    fn lengths_must_agree() {
        let check = |mine: &[u8], lens: &[usize], room: usize| check_lens(1, (0, 2), mine, lens, Some(&vec![0; room]));
        assert_eq!(check(b"ab", &[2, 3], 5).ok(), Some(5));
        assert!(check(b"ab", &[3, 3], 6).is_err());
        assert!(check(b"ab", &[2, 3], 6).is_err());
        assert!(check(b"ab", &[2], 2).is_err());
        assert!(check(b"ab", &[2, usize::MAX], 2).is_err());
    }
}
