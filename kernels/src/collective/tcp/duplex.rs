//! Frames to and from several peers at once, on non-blocking sockets: whoever can go on does, so that ranks which send
//! each other more than the sockets hold never wait for each other in a circle.

use std::{
    fmt,
    io::{ErrorKind, IoSlice, IoSliceMut, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::{AbortFlag, CollectiveError, op::Op};

/// How often a waiting rank looks for an abort and the time.
const WAKE_INTERVAL: Duration = Duration::from_millis(20);

/// Starts each frame.
const MAGIC: [u8; 4] = *b"PhFr";

const HEADER_BYTES: usize = MAGIC.len() + 8 + Op::WIRE_BYTES + 4 + 8;

/// What a frame belongs to.
#[derive(Clone, Copy)]
pub(super) struct Frame {
    pub epoch: u64,
    pub op: Op,
    /// Counts the transfers inside an operation.
    pub part: u32,
}

impl Frame {
    fn header(self, len: usize) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&MAGIC);
        header[4..12].copy_from_slice(&self.epoch.to_le_bytes());
        header[12..25].copy_from_slice(&self.op.to_wire());
        header[25..29].copy_from_slice(&self.part.to_le_bytes());
        header[29..].copy_from_slice(&(len as u64).to_le_bytes());
        header
    }
}

/// A header in words.
struct Shown<'a>(&'a [u8; HEADER_BYTES]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [magic @ .., _, _, _, _, _, _, _, _] = self.0;
        if magic[..4] != MAGIC {
            return write!(f, "something that is no frame");
        }
        fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
            let mut array = [0; N];
            array.copy_from_slice(bytes);
            array
        }
        let epoch = u64::from_le_bytes(array(&self.0[4..12]));
        let op = Op::from_wire(&array(&self.0[12..25]));
        let part = u32::from_le_bytes(array(&self.0[25..29]));
        let len = u64::from_le_bytes(array(&self.0[29..]));
        write!(f, "{op} in epoch {epoch}, part {part}, {len} bytes")
    }
}

/// A frame on its way to a peer.
pub(super) struct Outgoing<'a> {
    peer: usize,
    header: [u8; HEADER_BYTES],
    payload: &'a [u8],
    done: usize,
}

impl<'a> Outgoing<'a> {
    pub fn new(peer: usize, frame: Frame, payload: &'a [u8]) -> Self {
        Self { peer, header: frame.header(payload.len()), payload, done: 0 }
    }

    fn is_done(&self) -> bool {
        self.done == HEADER_BYTES + self.payload.len()
    }

    fn write(&mut self, mut link: &TcpStream) -> std::io::Result<usize> {
        let header = &self.header[self.done.min(HEADER_BYTES)..];
        let payload = &self.payload[self.done.saturating_sub(HEADER_BYTES)..];
        link.write_vectored(&[IoSlice::new(header), IoSlice::new(payload)])
    }
}

/// Room for a frame that a peer sends.
pub(super) struct Incoming<'a> {
    peer: usize,
    header: [u8; HEADER_BYTES],
    payload: &'a mut [u8],
    done: usize,
}

impl<'a> Incoming<'a> {
    pub fn new(peer: usize, payload: &'a mut [u8]) -> Self {
        Self { peer, header: [0; HEADER_BYTES], payload, done: 0 }
    }

    fn is_done(&self) -> bool {
        self.done == HEADER_BYTES + self.payload.len()
    }

    fn read(&mut self, mut link: &TcpStream) -> std::io::Result<usize> {
        let header = &mut self.header[self.done.min(HEADER_BYTES)..];
        let payload = &mut self.payload[self.done.saturating_sub(HEADER_BYTES)..];
        link.read_vectored(&mut [IoSliceMut::new(header), IoSliceMut::new(payload)])
    }
}

/// Where and how long frames move.
pub(super) struct Transfer<'a> {
    pub epoch: u64,
    pub links: &'a [Option<TcpStream>],
    pub abort: &'a AbortFlag,
    pub deadline: Instant,
    pub time_limit: Duration,
}

impl Transfer<'_> {
    /// Moves all frames; each incoming one must belong to `frame` and fill its room.
    pub fn run(
        &self,
        frame: Frame,
        outgoing: &mut [Outgoing<'_>],
        incoming: &mut [Incoming<'_>],
    ) -> Result<(), CollectiveError> {
        loop {
            let mut moved = 0;
            for out in outgoing.iter_mut().filter(|out| !out.is_done()) {
                let n = self.attempt(out.peer, |link| out.write(link))?;
                out.done += n;
                moved += n;
            }
            for into in incoming.iter_mut().filter(|into| !into.is_done()) {
                let n = self.attempt(into.peer, |link| into.read(link))?;
                let had_header = into.done >= HEADER_BYTES;
                into.done += n;
                moved += n;
                if !had_header && into.done >= HEADER_BYTES {
                    self.check_header(frame, into)?;
                }
            }
            let missing = incoming.iter().find(|into| !into.is_done()).map(|into| into.peer);
            let Some(missing) = missing.or_else(|| outgoing.iter().find(|out| !out.is_done()).map(|out| out.peer))
            else {
                return Ok(());
            };
            if self.abort.is_aborted() {
                return Err(CollectiveError::Aborted { epoch: self.epoch });
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CollectiveError::Timeout { epoch: self.epoch, rank: missing, after: self.time_limit });
            }
            if moved == 0 {
                let _waiting = self.abort.waiting_for(missing);
                self.sleep(outgoing, incoming, left.min(WAKE_INTERVAL));
            }
        }
    }

    /// Reads or writes once; 0 where that would block.
    fn attempt(
        &self,
        peer: usize,
        mut io: impl FnMut(&TcpStream) -> std::io::Result<usize>,
    ) -> Result<usize, CollectiveError> {
        let lost = |reason: String| CollectiveError::PeerLost { epoch: self.epoch, rank: peer, reason };
        let link = self.links[peer].as_ref().expect("every other rank has a link, and none talks to itself");
        match io(link) {
            Ok(0) => Err(lost("it closed the connection".to_owned())),
            Ok(n) => Ok(n),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
            Err(error) => Err(lost(error.to_string())),
        }
    }

    fn check_header(&self, frame: Frame, into: &Incoming<'_>) -> Result<(), CollectiveError> {
        let want = frame.header(into.payload.len());
        if into.header == want {
            return Ok(());
        }
        Err(CollectiveError::Mismatch {
            epoch: self.epoch,
            rank: into.peer,
            want: Shown(&want).to_string(),
            got: Shown(&into.header).to_string(),
        })
    }

    /// Sleeps until a socket can go on, or for `limit`.
    fn sleep(&self, outgoing: &[Outgoing<'_>], incoming: &[Incoming<'_>], limit: Duration) {
        let mut interest = vec![PollFlags::empty(); self.links.len()];
        outgoing.iter().filter(|out| !out.is_done()).for_each(|out| interest[out.peer] |= PollFlags::OUT);
        incoming.iter().filter(|into| !into.is_done()).for_each(|into| interest[into.peer] |= PollFlags::IN);
        let mut polled: Vec<_> = self
            .links
            .iter()
            .zip(interest)
            .filter_map(|(link, flags)| {
                link.as_ref().filter(|_| !flags.is_empty()).map(|link| PollFd::new(link, flags))
            })
            .collect();
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        // Whatever it says, the caller tries all sockets again.
        let _ = poll(&mut polled, Some(&limit));
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::op::OpKind, *};

    #[test]
    fn headers_say_what_they_hold() {
        let frame = Frame { epoch: 9, op: Op::new(OpKind::Broadcast, 3, 100), part: 2 };
        assert_eq!(
            Shown(&frame.header(50)).to_string(),
            "Broadcast number 3 of 100 bytes in epoch 9, part 2, 50 bytes"
        );
        assert_eq!(Shown(&[7; HEADER_BYTES]).to_string(), "something that is no frame");
    }
}
