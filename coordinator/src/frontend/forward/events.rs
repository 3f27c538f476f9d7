//! Server-sent events as they pass through: whole ones, with their ids.

use bytes::{Buf, Bytes, BytesMut};

/// Comment with which a server ends a stream that should be asked for again.
const ASK_AGAIN: &[u8] = b"ask again";

/// A whole event, or a comment.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    /// As it came, blank line included.
    pub raw: Bytes,
    /// What a client would give as `Last-Event-ID` from now on, if the event says.
    pub id: Option<String>,
    /// What it is.
    pub kind: Kind,
}

/// What an event is to who passes it on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It has data.
    Data,
    /// Its data is `[DONE]`: nothing follows.
    Done,
    /// It has none.
    Comment,
    /// The server can't go on, another one may.
    AskAgain,
}

/// Cuts bytes into events.
#[derive(Default)]
pub struct Cutter {
    buffer: BytesMut,
    /// Bytes at the beginning in which no event ends.
    searched: usize,
}

impl Cutter {
    /// What came next.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event.
    pub fn next(&mut self) -> Option<Event> {
        let from = self.searched.saturating_sub(1);
        let Some(at) = self.buffer[from..].windows(2).position(|pair| pair == b"\n\n") else {
            self.searched = self.buffer.len();
            return None;
        };
        self.searched = 0;
        Some(read(self.buffer.split_to(from + at + 2).freeze()))
    }
}

fn read(raw: Bytes) -> Event {
    let mut id = None;
    let mut kind = Kind::Comment;
    for line in raw.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(value) = field(line, b"id") {
            id = std::str::from_utf8(value).ok().map(str::to_owned);
        } else if let Some(value) = field(line, b"data") {
            kind = if value == b"[DONE]" { Kind::Done } else { Kind::Data };
        } else if let Some(mut comment) = line.strip_prefix(b":") {
            while comment.first() == Some(&b' ') {
                comment.advance(1);
            }
            if comment.starts_with(ASK_AGAIN) {
                kind = Kind::AskAgain;
            }
        }
    }
    Event { raw, id, kind }
}

fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let value = line.strip_prefix(name)?.strip_prefix(b":")?;
    Some(value.strip_prefix(b" ").unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(bytes: &[u8], piece: usize) -> Vec<(String, Option<String>, Kind)> {
        let mut cutter = Cutter::default();
        let mut events = Vec::new();
        for piece in bytes.chunks(piece) {
            cutter.push(piece);
            while let Some(event) = cutter.next() {
                events.push((String::from_utf8(event.raw.to_vec()).unwrap(), event.id, event.kind));
            }
        }
        events
    }

    #[test]
    fn events_are_whole_however_they_come() {
        let text = "retry: 250\n\ndata: {\"a\":1}\nid: k:1\n\n: ping\n\nid:k:2,3\ndata: x\n\ndata: [DONE]\nid: k:2,3;d\n\n\
                    : ask again: it ends\n\ndata: cut of";
        let want = [
            ("retry: 250\n\n", None, Kind::Comment),
            ("data: {\"a\":1}\nid: k:1\n\n", Some("k:1"), Kind::Data),
            (": ping\n\n", None, Kind::Comment),
            ("id:k:2,3\ndata: x\n\n", Some("k:2,3"), Kind::Data),
            ("data: [DONE]\nid: k:2,3;d\n\n", Some("k:2,3;d"), Kind::Done),
            (": ask again: it ends\n\n", None, Kind::AskAgain),
        ];
        let want: Vec<_> = want.iter().map(|(raw, id, kind)| (raw.to_string(), id.map(str::to_owned), *kind)).collect();
        for piece in [1, 2, 3, 7, 1000] {
            assert_eq!(cut(text.as_bytes(), piece), want, "in pieces of {piece}");
        }
    }
}
