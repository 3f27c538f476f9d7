//! Rows on their way back: from a mirror to the shard that takes the rank over.
//!
//! The mirror says what it has ([`handshake::offer`]) and sends all of it in frames like those that brought it; the last
//! one is empty and says through which step rows are whole.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    net::TcpStream,
};

use phalanx_cluster::seal::Seal;
use phalanx_kernels::{collective::AbortFlag, error::KernelError, pages::KvPages, slots::KvRange};

use super::{
    frame::{self, Content, FrameError, HEADER_BYTES, Header, MOST_RANGES, MOST_SEALS, Stream, TRAILER_BYTES},
    handshake::{self, HandshakeError, Purpose, Source, Verdict},
    lane::{Target, WRITE_LIMIT},
    store::{Adopted, Lent},
};

/// Why rows could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The mirror can't be reached, or does not speak as it should.
    #[error("{0}")]
    Handshake(String),
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The mirror has other rows, or none.
    #[error("the mirror has no such rows: {0}")]
    Nothing(String),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// There is no memory for the pages.
    #[error(transparent)]
    Pages(#[from] KernelError),
    /// The formation that wanted them is over.
    #[error("the formation is over")]
    Interrupted,
}

impl From<HandshakeError> for FetchError {
    fn from(error: HandshakeError) -> Self {
        Self::Handshake(error.to_string())
    }
}

/// Reads frames of a stream.
pub(super) struct Frames {
    stream: Stream,
    bytes: Vec<u8>,
    ranges: Vec<KvRange>,
    seals: Vec<(u32, Seal)>,
}

impl Frames {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, bytes: Vec::new(), ranges: Vec::new(), seals: Vec::new() }
    }

    /// The next frame: what it says, and its rows.
    pub(super) fn next<E>(&mut self, link: &mut TcpStream) -> Result<(Content<'_>, &[u8]), E>
    where
        E: From<io::Error> + From<FrameError>,
    {
        let (mut head, mut hasher) = ([0; HEADER_BYTES], crc32fast::Hasher::new());
        frame::receive(&mut head, &mut hasher, link)?;
        let header = Header::parse(&head, &self.stream)?;
        let lens = header.lens();
        self.bytes.resize(lens.iter().sum(), 0);
        frame::receive(&mut self.bytes, &mut hasher, link)?;
        let mut trailer = [0; TRAILER_BYTES];
        link.read_exact(&mut trailer)?;
        frame::check_sum(hasher, trailer)?;
        let [of_ranges, of_seals, _] = lens;
        let (ranges, rest) = self.bytes.split_at(of_ranges);
        let (seals, rows) = rest.split_at(of_seals);
        header.parse_ranges(ranges, &self.stream, &mut self.ranges)?;
        frame::parse_seals(seals, &self.stream, &mut self.seals)?;
        let Header { step, through, .. } = header;
        Ok((Content { step, through, ranges: &self.ranges, seals: &self.seals }, rows))
    }
}

/// Sends everything that is lent.
pub(super) fn give(link: &mut TcpStream, mut lent: Lent) -> Result<(), super::receiver::End> {
    handshake::answer(link, Verdict::Welcome)?;
    handshake::offer(link, &lent.source)?;
    link.set_write_timeout(Some(WRITE_LIMIT))?;
    let stream = lent.source.stream();
    let step = lent.through_step;
    let nothing = Content { step, through: None, ranges: &[], seals: &[] };
    let (mut bytes, mut ranges) = (Vec::new(), Vec::new());
    let mut written = std::mem::take(&mut lent.written);
    while !written.is_empty() {
        ranges.clear();
        written.take(stream.most_rows().min(MOST_RANGES), &mut ranges);
        Header::begin(&stream, Content { ranges: &ranges, ..nothing }, &mut bytes);
        lent.read(&ranges, &mut bytes)?;
        frame::send(&mut bytes, link)?;
    }
    let of_seals = lent.seals.chunks(MOST_SEALS).map(|seals| Content { seals, ..nothing });
    for content in of_seals.chain([Content { through: Some(step), ..nothing }]) {
        Header::begin(&stream, content, &mut bytes);
        frame::send(&mut bytes, link)?;
    }
    Ok(())
}

/// Fetches the rows of a rank. `wanted`: of which epoch, and in pages of which shape, in whatever number.
///
/// # Errors
/// If the mirror has none, or breaks off.
pub fn fetch(target: &Target, wanted: &Source, abort: &AbortFlag) -> Result<Adopted, FetchError> {
    let (mut link, verdict) = target.call(Purpose::Fetch, wanted)?;
    if verdict != Verdict::Welcome {
        return Err(FetchError::Nothing(format!("{verdict:?}")));
    }
    let source = handshake::hear_offer(&mut link)?;
    if !source.is_of_kind(wanted) {
        return Err(FetchError::Nothing(format!("it offers {source:?}, want {wanted:?}")));
    }
    let has_pages = source.shape.n_kv_heads > 0 && source.shape.n_layers > 0;
    let mut pages = has_pages.then(|| KvPages::new(source.shape, source.precision)).transpose()?;
    let mut frames = Frames::new(source.stream());
    let mut seals = BTreeMap::new();
    loop {
        if abort.is_aborted() {
            return Err(FetchError::Interrupted);
        }
        let (content, rows) = frames.next::<FetchError>(&mut link)?;
        if let Some(pages) = pages.as_mut().filter(|_| !content.ranges.is_empty()) {
            pages.write(content.ranges, rows)?;
        }
        seals.extend(content.seals.iter().copied());
        if let Some(through_step) = content.through {
            return Ok(Adopted { source, pages, seals, through_step: Some(through_step) });
        }
    }
}
