//! Frames of the stream from a rank to its mirror: how they lie on the wire, and what a receiver believes.
//!
//! ```text
//! header   magic, number of ranges, epoch, rank, step, through, bytes of rows, number of seals    little-endian
//! ranges   block, first slot, number of rows; each                                               little-endian
//! seals    block, seal; each                                                                     little-endian
//! rows     as `phalanx_kernels::pages` says                                                      of the machine
//! trailer  CRC-32 of all that
//! ```
//!
//! A block of the ranges has no seal any more, unless the same frame has one for it: a seal says that with this frame the
//! mirror has all rows of its block.

use std::io::{self, Read, Write};

use phalanx_cluster::seal::{SEAL_BYTES, Seal};
use phalanx_kernels::slots::{self, KvRange};

const MAGIC: [u8; 4] = *b"PhKV";
/// Size of a header.
pub(super) const HEADER_BYTES: usize = 4 + 4 + 8 + 4 + 8 + 8 + 8 + 4;
/// Size of a range.
const RANGE_BYTES: usize = 12;
/// Size of a block's seal.
const SEALED_BYTES: usize = 4 + SEAL_BYTES;
/// Size of what follows the rows.
pub(super) const TRAILER_BYTES: usize = 4;

/// Most bytes of rows in a frame, unless one row has more.
pub(super) const MOST_ROW_BYTES: usize = 512 << 10;
/// What is summed up and sent or received at a time: it stays in the second-level cache in between.
const PIECE_BYTES: usize = 128 << 10;
/// Most ranges in a frame.
pub(super) const MOST_RANGES: usize = 8192;
/// Most seals in a frame.
pub(super) const MOST_SEALS: usize = 8192;

/// On the wire, for no step.
const NO_STEP: u64 = u64::MAX;

/// What is wrong with a frame. The connection is of no use after it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// It does not begin as frames do.
    #[error("a frame begins with {0:02x?}")]
    Magic([u8; 4]),
    /// A number is not what it can be.
    #[error("{what} is {got}, want {want}")]
    Number {
        /// Which number.
        what: &'static str,
        /// As it came.
        got: u64,
        /// What would do.
        want: String,
    },
    /// A range lies outside of the pages.
    #[error("a range of {} rows from slot {} of block {}: want it within {n_blocks} blocks of {block_size}", range.n_rows, range.first, range.block)]
    Range {
        /// The range.
        range: KvRange,
        /// Blocks that there are.
        n_blocks: usize,
        /// Slots in a block.
        block_size: usize,
    },
    /// A seal is of no block.
    #[error("a seal of block {block}: want one of {n_blocks}")]
    Seal {
        /// The block.
        block: u32,
        /// Blocks that there are.
        n_blocks: usize,
    },
    /// Bits were changed on the way.
    #[error("the checksum is {got:08x}, want {want:08x}")]
    Checksum {
        /// As it came.
        got: u32,
        /// Of what came.
        want: u32,
    },
}

fn number(what: &'static str, got: u64, want: impl Into<String>) -> FrameError {
    FrameError::Number { what, got, want: want.into() }
}

/// What the handshake settled about all frames of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stream {
    pub(super) epoch: u64,
    pub(super) rank: u32,
    pub(super) n_blocks: usize,
    pub(super) block_size: usize,
    /// 0 on a rank without KV heads.
    pub(super) row_bytes: usize,
}

impl Stream {
    /// Most rows of a frame.
    pub(super) fn most_rows(&self) -> usize {
        (MOST_ROW_BYTES / self.row_bytes.max(1)).max(1)
    }
}

/// A checked header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Last step before the rows were copied.
    pub(super) step: u64,
    /// With this frame, all rows of steps up to this one are there.
    pub(super) through: Option<u64>,
    n_ranges: usize,
    n_seals: usize,
    row_bytes: usize,
}

/// What a frame says, in front of the rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Content<'a> {
    /// Last step before the rows were copied.
    pub(super) step: u64,
    /// With this frame, all rows of steps up to this one are there.
    pub(super) through: Option<u64>,
    /// The slots of its rows.
    pub(super) ranges: &'a [KvRange],
    /// What blocks hold with this frame.
    pub(super) seals: &'a [(u32, Seal)],
}

impl Header {
    /// Begins a frame in an empty buffer; rows are appended to it, then [`send`] ends it.
    pub(super) fn begin(stream: &Stream, content: Content<'_>, frame: &mut Vec<u8>) {
        let Content { step, through, ranges, seals } = content;
        let row_bytes = slots::n_rows(ranges) * stream.row_bytes;
        let of_lists = ranges.len() * RANGE_BYTES + seals.len() * SEALED_BYTES;
        frame.clear();
        frame.reserve(HEADER_BYTES + of_lists + row_bytes + TRAILER_BYTES);
        frame.extend_from_slice(&MAGIC);
        frame.extend_from_slice(&(ranges.len() as u32).to_le_bytes());
        frame.extend_from_slice(&stream.epoch.to_le_bytes());
        frame.extend_from_slice(&stream.rank.to_le_bytes());
        frame.extend_from_slice(&step.to_le_bytes());
        frame.extend_from_slice(&through.unwrap_or(NO_STEP).to_le_bytes());
        frame.extend_from_slice(&(row_bytes as u64).to_le_bytes());
        frame.extend_from_slice(&(seals.len() as u32).to_le_bytes());
        for range in ranges {
            for field in [range.block, range.first, range.n_rows] {
                frame.extend_from_slice(&field.to_le_bytes());
            }
        }
        for (block, seal) in seals {
            frame.extend_from_slice(&block.to_le_bytes());
            frame.extend_from_slice(&seal.bytes());
        }
    }

    /// Checks a header that came. What it says of lengths can be allocated then.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES], stream: &Stream) -> Result<Self, FrameError> {
        let mut fields = Fields(bytes);
        let magic = fields.take::<4>();
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let n_ranges = u64::from(u32::from_le_bytes(fields.take()));
        let (epoch, rank) = (fields.u64(), u64::from(u32::from_le_bytes(fields.take())));
        let (step, through, row_bytes) = (fields.u64(), fields.u64(), fields.u64());
        let n_seals = u64::from(fields.u32());
        if epoch != stream.epoch {
            return Err(number("epoch", epoch, stream.epoch.to_string()));
        }
        if rank != u64::from(stream.rank) {
            return Err(number("rank", rank, stream.rank.to_string()));
        }
        if through != NO_STEP && through > step {
            return Err(number("through", through, format!("at most the step, {step}")));
        }
        if n_ranges > MOST_RANGES as u64 {
            return Err(number("number of ranges", n_ranges, format!("at most {MOST_RANGES}")));
        }
        if n_seals > MOST_SEALS as u64 {
            return Err(number("number of seals", n_seals, format!("at most {MOST_SEALS}")));
        }
        let most = stream.most_rows() * stream.row_bytes;
        if row_bytes > most as u64 {
            return Err(number("bytes of rows", row_bytes, format!("at most {most}")));
        }
        Ok(Self {
            step,
            through: (through != NO_STEP).then_some(through),
            n_ranges: n_ranges as usize,
            n_seals: n_seals as usize,
            row_bytes: row_bytes as usize,
        })
    }

    /// Bytes of ranges, of seals and of rows, which follow.
    pub(super) fn lens(&self) -> [usize; 3] {
        [self.n_ranges * RANGE_BYTES, self.n_seals * SEALED_BYTES, self.row_bytes]
    }

    /// Checks the ranges that came and puts them into `ranges`.
    pub(super) fn parse_ranges(
        &self,
        bytes: &[u8],
        stream: &Stream,
        ranges: &mut Vec<KvRange>,
    ) -> Result<(), FrameError> {
        ranges.clear();
        let mut n_rows = 0;
        for bytes in bytes.chunks_exact(RANGE_BYTES) {
            let mut fields = Fields(bytes);
            let mut field = || u32::from_le_bytes(fields.take());
            let range = KvRange { block: field(), first: field(), n_rows: field() };
            let end = u64::from(range.first) + u64::from(range.n_rows);
            let (n_blocks, block_size) = (stream.n_blocks, stream.block_size);
            if range.n_rows == 0 || range.block as usize >= n_blocks || end > block_size as u64 {
                return Err(FrameError::Range { range, n_blocks, block_size });
            }
            n_rows += u64::from(range.n_rows);
            ranges.push(range);
        }
        let want = n_rows.saturating_mul(stream.row_bytes as u64);
        if self.row_bytes as u64 != want || ranges.len() != self.n_ranges {
            return Err(number("bytes of rows", self.row_bytes as u64, format!("{want} for {n_rows} rows")));
        }
        Ok(())
    }
}

/// Checks the seals that came and puts them into `seals`.
pub(super) fn parse_seals(bytes: &[u8], stream: &Stream, seals: &mut Vec<(u32, Seal)>) -> Result<(), FrameError> {
    seals.clear();
    for bytes in bytes.chunks_exact(SEALED_BYTES) {
        let mut fields = Fields(bytes);
        let (block, seal) = (fields.u32(), Seal::from_bytes(fields.take()));
        if block as usize >= stream.n_blocks {
            return Err(FrameError::Seal { block, n_blocks: stream.n_blocks });
        }
        seals.push((block, seal));
    }
    Ok(())
}

/// Ends a frame and sends it.
pub(super) fn send(frame: &mut Vec<u8>, to: &mut impl Write) -> io::Result<()> {
    let mut hasher = crc32fast::Hasher::new();
    let mut sent = 0;
    while frame.len() - sent > PIECE_BYTES {
        let piece = &frame[sent..sent + PIECE_BYTES];
        hasher.update(piece);
        to.write_all(piece)?;
        sent += PIECE_BYTES;
    }
    hasher.update(&frame[sent..]);
    frame.extend_from_slice(&hasher.finalize().to_le_bytes());
    to.write_all(&frame[sent..])
}

/// Reads all of `bytes` and counts them in.
pub(super) fn receive(bytes: &mut [u8], hasher: &mut crc32fast::Hasher, from: &mut impl Read) -> io::Result<()> {
    for piece in bytes.chunks_mut(PIECE_BYTES) {
        from.read_exact(piece)?;
        hasher.update(piece);
    }
    Ok(())
}

/// Checks the trailer of a frame, whose bytes have been counted.
pub(super) fn check_sum(hasher: crc32fast::Hasher, trailer: [u8; TRAILER_BYTES]) -> Result<(), FrameError> {
    let (got, want) = (u32::from_le_bytes(trailer), hasher.finalize());
    if got == want { Ok(()) } else { Err(FrameError::Checksum { got, want }) }
}

/// Reads numbers off the front of bytes that are long enough.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    /// The next `N` bytes; zeros beyond the end.
    pub(super) fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: Stream = Stream { epoch: 7, rank: 1, n_blocks: 10, block_size: 16, row_bytes: 24 };

    type Parsed = (Header, Vec<KvRange>, Vec<(u32, Seal)>);

    fn frame(ranges: &[KvRange], seals: &[(u32, Seal)]) -> Vec<u8> {
        let mut frame = Vec::new();
        Header::begin(&STREAM, Content { step: 9, through: Some(8), ranges, seals }, &mut frame);
        frame.extend((0..slots::n_rows(ranges) * STREAM.row_bytes).map(|i| i as u8));
        let mut sent = Vec::new();
        send(&mut frame, &mut sent).expect("a vector takes all");
        sent
    }

    /// As a receiver does.
    fn parse(bytes: &[u8]) -> Result<Parsed, FrameError> {
        let short = || number("length", bytes.len() as u64, "more");
        let (head, rest) = bytes.split_first_chunk().ok_or_else(short)?;
        let header = Header::parse(head, &STREAM)?;
        let [of_ranges, of_seals, of_rows] = header.lens();
        let (body, rest) = rest.split_at_checked(of_ranges + of_seals + of_rows).ok_or_else(short)?;
        let (trailer, _) = rest.split_first_chunk().ok_or_else(short)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(head);
        hasher.update(body);
        check_sum(hasher, *trailer)?;
        let (mut ranges, mut seals) = (Vec::new(), Vec::new());
        header.parse_ranges(&body[..of_ranges], &STREAM, &mut ranges)?;
        parse_seals(&body[of_ranges..of_ranges + of_seals], &STREAM, &mut seals)?;
        Ok((header, ranges, seals))
    }

    fn seal_of(token: u32) -> Seal {
        Seal::of(&[token], 1)
    }

    fn range(block: u32, first: u32, n_rows: u32) -> KvRange {
        KvRange { block, first, n_rows }
    }

    #[test]
    fn pieces_are_summed_up_as_one() {
        for len in [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            let (mut sent, mut came) = (Vec::new(), vec![0; len]);
            send(&mut bytes.clone(), &mut sent).expect("a vector takes all");
            let (mut hasher, mut link) = (crc32fast::Hasher::new(), &sent[..]);
            receive(&mut came, &mut hasher, &mut link).expect("as long as it is");
            assert_eq!(came, bytes);
            let trailer: [u8; TRAILER_BYTES] = link.try_into().expect("the trailer is left");
            assert_eq!(u32::from_le_bytes(trailer), crc32fast::hash(&bytes));
            assert_eq!(check_sum(hasher, trailer), Ok(()));
        }
    }

    #[test]
    fn what_is_sent_is_what_comes() {
        for ranges in [vec![], vec![range(9, 15, 1)], vec![range(0, 0, 16), range(3, 2, 5)]] {
            for seals in [vec![], vec![(9, seal_of(1))], vec![(0, seal_of(2)), (7, seal_of(3))]] {
                let (header, of_frame, sealed) = parse(&frame(&ranges, &seals)).expect("a good frame");
                assert_eq!((header.step, header.through), (9, Some(8)));
                assert_eq!((of_frame, sealed), (ranges.clone(), seals));
            }
        }
    }

    #[test]
    fn lengths_are_checked_before_anything_is_allocated() {
        let good = frame(&[range(1, 0, 2)], &[]);
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            let (head, _) = bad.split_first_chunk().expect("a header");
            Header::parse(head, &STREAM).expect_err("a bad header").to_string()
        };
        assert!(with(0, b"GET ").starts_with("a frame begins"));
        assert!(with(4, &u32::MAX.to_le_bytes()).contains("number of ranges"));
        assert!(with(8, &6u64.to_le_bytes()).contains("epoch is 6, want 7"));
        assert!(with(16, &2u32.to_le_bytes()).contains("rank is 2"));
        assert!(with(28, &10u64.to_le_bytes()).contains("through is 10"));
        assert!(with(36, &(1u64 << 40).to_le_bytes()).contains("bytes of rows"));
        assert!(with(44, &u32::MAX.to_le_bytes()).contains("number of seals"));
    }

    #[test]
    fn ranges_lie_in_the_pages_and_fit_the_rows() {
        let refused = |ranges: &[KvRange]| parse(&frame(ranges, &[])).expect_err("a bad range").to_string();
        assert!(refused(&[range(10, 0, 1)]).contains("block 10"));
        assert!(refused(&[range(0, 15, 2)]).contains("slot 15"));
        assert!(refused(&[range(0, 0, 0)]).contains("0 rows"));
        let of_no_block = parse(&frame(&[], &[(10, seal_of(1))])).expect_err("a bad seal").to_string();
        assert!(of_no_block.contains("block 10"), "{of_no_block}");
        let mut long = frame(&[range(1, 0, 2)], &[]);
        long[36..44].copy_from_slice(&24u64.to_le_bytes());
        let (head, rest) = long.split_first_chunk().expect("a header");
        let header = Header::parse(head, &STREAM).expect("a good header");
        assert!(header.parse_ranges(&rest[..RANGE_BYTES], &STREAM, &mut Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse(&bytes).is_err());
        }

        #[test]
        fn no_changed_frame_is_taken(
            (at, change) in (0..200usize, 1..=255u8),
            ranges in prop::collection::vec((0..10u32, 0..15u32), 0..4),
            sealed in prop::collection::vec(0..10u32, 0..3),
        ) {
            let ranges: Vec<KvRange> = ranges.into_iter().map(|(block, first)| range(block, first, 1)).collect();
            let seals: Vec<(u32, Seal)> = sealed.into_iter().map(|block| (block, seal_of(block))).collect();
            let mut bytes = frame(&ranges, &seals);
            let at = at % bytes.len();
            bytes[at] ^= change;
            prop_assert!(parse(&bytes).is_err());
        }
    }
}
