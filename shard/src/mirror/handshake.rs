//! Before frames flow: both sides prove that they know the mirror's secret, and agree on the shape of pages.
//!
//! ```text
//! rank   Hello      magic, purpose, byte order, precision, term, epoch, rank, world size, ranks that copy there,
//!                   shape of pages, identity of rows, nonce
//! mirror Challenge  nonce, proof over Hello and nonce
//! rank   Answer     proof over the same, under another label
//! mirror Verdict    one byte
//! ```
//!
//! Who comes to fetch rows says whose it wants, without a number of blocks; the mirror's welcome is followed by a Hello
//! that says what it has.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::Duration,
};

use phalanx_kernels::{
    collective::auth::{self, PROOF_BYTES},
    ops::{KvShape, Precision},
    pages::row_bytes,
};
use rustix::rand::{GetRandomFlags, getrandom};

use super::frame::{Fields, Stream};

const MAGIC: [u8; 8] = *b"PhalKVM2";
const NONCE_BYTES: usize = 32;
const HELLO_BYTES: usize = MAGIC.len() + 3 + 2 * 8 + 8 * 4 + size_of::<RowsIdentity>() + NONCE_BYTES;
const MIRROR_LABEL: &str = "phalanx mirror";
const RANK_LABEL: &str = "phalanx mirrored rank";
/// Longest wait for the other side's next word.
const WORD_LIMIT: Duration = Duration::from_secs(3);

/// Most of each number of a shape that a mirror believes.
const MOST_LAYERS: u32 = 4096;
const MOST_HEADS: u32 = 4096;
const MOST_HEAD_DIM: u32 = 8192;
const MOST_BLOCK_SIZE: u32 = 8192;
const MOST_RANKS: u32 = 1024;

/// Names what rows depend on beside their tokens: model, precision, heads. Equal tokens are equal rows where it is equal.
pub type RowsIdentity = [u8; 16];

/// A rank whose rows are mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Leadership under which the group was formed.
    pub term: u64,
    /// Its epoch.
    pub epoch: u64,
    /// The rank.
    pub rank: u32,
    /// Ranks of its group.
    pub world_size: u32,
    /// Ranks that copy their rows to the same mirror.
    pub n_sources: u32,
    /// Shape of its pages; without KV heads it has none.
    pub shape: KvShape,
    /// Element of its pages.
    pub precision: Precision,
    /// Of its rows.
    pub identity: RowsIdentity,
}

impl Source {
    /// Whether its pages are of the kind that a caller wants, in whatever number.
    pub fn is_of_kind(&self, wanted: &Self) -> bool {
        let kind = |source: &Self| {
            let shape = KvShape { n_blocks: 0, ..source.shape };
            (source.epoch, source.rank, source.world_size, source.precision, source.identity, shape)
        };
        kind(self) == kind(wanted)
    }

    /// What its frames are checked against.
    pub(super) fn stream(&self) -> Stream {
        Stream {
            epoch: self.epoch,
            rank: self.rank,
            n_blocks: self.shape.n_blocks,
            block_size: self.shape.block_size,
            row_bytes: row_bytes(self.shape, self.precision),
        }
    }
}

/// What a caller comes for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Purpose {
    /// To send its rows.
    Send = b's',
    /// To fetch the rows of the rank that it takes.
    Fetch = b'f',
}

/// What a mirror says to a rank that proved itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Verdict {
    /// Frames are welcome.
    Welcome = b'w',
    /// The mirror has rows of a later epoch.
    Stale = b's',
    /// There is no memory for the rows of this epoch.
    Full = b'f',
    /// The mirror has not the rows that are wanted.
    Nothing = b'n',
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Refused(&'static str),
}

/// Calls a mirror.
pub(super) fn call(
    link: &mut TcpStream,
    secret: &[u8],
    purpose: Purpose,
    source: &Source,
) -> Result<Verdict, HandshakeError> {
    link.set_read_timeout(Some(WORD_LIMIT))?;
    link.set_write_timeout(Some(WORD_LIMIT))?;
    let hello = encode(purpose, source)?;
    link.write_all(&hello)?;
    let challenge: [u8; NONCE_BYTES + PROOF_BYTES] = read(link)?;
    let mut fields = Fields(&challenge);
    let message = [hello.as_slice(), &fields.take::<NONCE_BYTES>()].concat();
    if !auth::verify(secret, MIRROR_LABEL, &message, &fields.take()) {
        return Err(HandshakeError::Refused("the mirror does not know its secret"));
    }
    link.write_all(&auth::prove(secret, RANK_LABEL, &message))?;
    match read::<1>(link)? {
        [b'w'] => Ok(Verdict::Welcome),
        [b's'] => Ok(Verdict::Stale),
        [b'f'] => Ok(Verdict::Full),
        [b'n'] => Ok(Verdict::Nothing),
        _ => Err(HandshakeError::Refused("the mirror's verdict is none")),
    }
}

/// Hears a caller, who waits for a verdict then.
pub(super) fn hear(link: &mut TcpStream, secret: &[u8]) -> Result<(Purpose, Source), HandshakeError> {
    link.set_read_timeout(Some(WORD_LIMIT))?;
    link.set_write_timeout(Some(WORD_LIMIT))?;
    let hello: [u8; HELLO_BYTES] = read(link)?;
    let heard = decode(&hello).map_err(HandshakeError::Refused)?;
    let nonce = nonce()?;
    let message = [hello.as_slice(), &nonce].concat();
    link.write_all(&[nonce.as_slice(), &auth::prove(secret, MIRROR_LABEL, &message)].concat())?;
    let proof: [u8; PROOF_BYTES] = read(link)?;
    if auth::verify(secret, RANK_LABEL, &message, &proof) {
        Ok(heard)
    } else {
        Err(HandshakeError::Refused("the caller does not know the mirror's secret"))
    }
}

/// Tells the caller.
pub(super) fn answer(link: &mut TcpStream, verdict: Verdict) -> Result<(), HandshakeError> {
    Ok(link.write_all(&[verdict as u8])?)
}

/// Tells a caller that comes to fetch, and was welcomed, what there is.
pub(super) fn offer(link: &mut TcpStream, source: &Source) -> Result<(), HandshakeError> {
    Ok(link.write_all(&encode(Purpose::Fetch, source)?)?)
}

/// Hears what there is to fetch.
pub(super) fn hear_offer(link: &mut TcpStream) -> Result<Source, HandshakeError> {
    let (_, source) = decode(&read(link)?).map_err(HandshakeError::Refused)?;
    Ok(source)
}

/// A secret for a mirror.
pub(super) fn nonce() -> io::Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    match getrandom(&mut nonce, GetRandomFlags::empty())? {
        NONCE_BYTES => Ok(nonce),
        n => Err(io::Error::other(format!("the system gave {n} random bytes, want {NONCE_BYTES}"))),
    }
}

fn read<const N: usize>(link: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    link.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Rows travel as they lie in memory.
fn byte_order() -> u8 {
    u8::from(cfg!(target_endian = "big"))
}

fn encode(purpose: Purpose, source: &Source) -> io::Result<[u8; HELLO_BYTES]> {
    let size = |n: usize| u32::try_from(n).map_err(|_| io::Error::other(format!("pages of {n} anything")));
    let KvShape { n_layers, n_blocks, block_size, n_kv_heads, head_dim } = source.shape;
    let mut bytes = Vec::with_capacity(HELLO_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&[purpose as u8, byte_order(), u8::from(source.precision == Precision::Float32)]);
    bytes.extend_from_slice(&source.term.to_le_bytes());
    bytes.extend_from_slice(&source.epoch.to_le_bytes());
    let shape = [size(n_layers)?, size(n_blocks)?, size(block_size)?, size(n_kv_heads)?, size(head_dim)?];
    for n in [source.rank, source.world_size, source.n_sources].into_iter().chain(shape) {
        bytes.extend_from_slice(&n.to_le_bytes());
    }
    bytes.extend_from_slice(&source.identity);
    bytes.extend_from_slice(&nonce()?);
    bytes.try_into().map_err(|_| io::Error::other("a hello of another length"))
}

fn decode(hello: &[u8; HELLO_BYTES]) -> Result<(Purpose, Source), &'static str> {
    let mut fields = Fields(hello);
    if fields.take() != MAGIC {
        return Err("the caller does not speak this protocol");
    }
    let [purpose, order, precision] = fields.take();
    let purpose = match purpose {
        b's' => Purpose::Send,
        b'f' => Purpose::Fetch,
        _ => return Err("the caller's purpose is none"),
    };
    if order != byte_order() {
        return Err("the caller has another byte order");
    }
    let precision = match precision {
        0 => Precision::Auto,
        1 => Precision::Float32,
        _ => return Err("the caller's precision is none"),
    };
    let (term, epoch) = (fields.u64(), fields.u64());
    let (rank, world_size, n_sources) = (fields.u32(), fields.u32(), fields.u32());
    let [n_layers, n_blocks, block_size, n_kv_heads, head_dim] = [(); 5].map(|()| fields.u32());
    let identity = fields.take();
    if world_size > MOST_RANKS || rank >= world_size || epoch == 0 {
        return Err("the caller's epoch, rank or world size is none");
    }
    let most = [MOST_LAYERS, u32::MAX, MOST_BLOCK_SIZE, MOST_HEADS, MOST_HEAD_DIM];
    let sizes = [n_layers, n_blocks, block_size, n_kv_heads, head_dim];
    if sizes.iter().zip(most).any(|(size, most)| *size > most) || block_size == 0 {
        return Err("the caller's pages are beyond all measure");
    }
    let [n_layers, n_blocks, block_size, n_kv_heads, head_dim] = sizes.map(|size| size as usize);
    let shape = KvShape { n_layers, n_blocks, block_size, n_kv_heads, head_dim };
    Ok((purpose, Source { term, epoch, rank, world_size, n_sources, shape, precision, identity }))
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use proptest::prelude::*;

    use super::*;

    fn source() -> Source {
        let shape = KvShape { n_layers: 2, n_blocks: 8, block_size: 16, n_kv_heads: 1, head_dim: 8 };
        let (precision, identity) = (Precision::Auto, [7; 16]);
        Source { term: 1, epoch: 3, rank: 1, world_size: 2, n_sources: 2, shape, precision, identity }
    }

    type Heard = Result<(Purpose, Source), HandshakeError>;

    fn meet(callers: &[u8], listeners: &[u8]) -> (Result<Verdict, HandshakeError>, Heard) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let callers = callers.to_vec();
        let caller = thread::spawn(move || {
            let mut link = TcpStream::connect(address).expect("a listener");
            call(&mut link, &callers, Purpose::Fetch, &source())
        });
        let (mut link, _) = listener.accept().expect("a caller");
        let heard = hear(&mut link, listeners);
        if heard.is_ok() {
            answer(&mut link, Verdict::Full).expect("the caller waits");
        }
        drop(link);
        (caller.join().expect("no panic"), heard)
    }

    #[test]
    fn both_sides_must_know_the_secret() {
        let (verdict, heard) = meet(b"secret", b"secret");
        assert_eq!(verdict.expect("a verdict"), Verdict::Full);
        assert_eq!(heard.expect("a caller"), (Purpose::Fetch, source()));
        let (verdict, heard) = meet(b"secret", b"other");
        assert!(verdict.is_err() && heard.is_err());
    }

    #[test]
    fn sizes_beyond_measure_are_refused() {
        let refused =
            |source: Source| decode(&encode(Purpose::Send, &source).expect("sizes that fit")).expect_err("a bad hello");
        let shape = source().shape;
        refused(Source { rank: 2, ..source() });
        refused(Source { world_size: 1 << 20, ..source() });
        refused(Source { epoch: 0, ..source() });
        refused(Source { shape: KvShape { n_layers: 1 << 20, ..shape }, ..source() });
        refused(Source { shape: KvShape { block_size: 0, ..shape }, ..source() });
        refused(Source { shape: KvShape { head_dim: 1 << 20, ..shape }, ..source() });
    }

    proptest! {
        #[test]
        fn hostile_hellos_are_no_panic(tail in prop::collection::vec(any::<u8>(), HELLO_BYTES - 8)) {
            let mut hello = [0; HELLO_BYTES];
            hello[..8].copy_from_slice(&MAGIC);
            hello[8..].copy_from_slice(&tail);
            if let Ok((_, source)) = decode(&hello) {
                prop_assert!(source.rank < source.world_size && source.shape.block_size > 0);
            }
        }
    }
}
