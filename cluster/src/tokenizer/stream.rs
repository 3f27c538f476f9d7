//! Text of a growing sequence.

use super::Tokenizer;

/// Turns tokens into text as they come, in pieces of whole characters.
///
/// A piece is held back while it ends inside a UTF-8 character, whole: a client that shows pieces never sees half of
/// one. Bytes that can no longer become a character are U+FFFD at once. The pieces and [`StreamDecoder::finish`] together
/// are what [`Tokenizer::decode`] gives for all tokens, but for one thing: a leading space, which some models want
/// removed at the start of a text, stays, because a stream continues a prompt.
///
/// Each byte is looked at once or twice, however long the sequence: the cost of a token does not grow.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    shown: Vec<u32>,
    held: Vec<u8>,
    /// So many of the held bytes are known to be whole characters, or never to become one.
    settled: usize,
}

impl StreamDecoder {
    /// `skip_special` leaves control tokens out of the text.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, shown: Vec::new(), held: Vec::new(), settled: 0 }
    }

    /// Leaves these control tokens in the text all the same.
    #[must_use]
    pub fn showing(self, shown: &[u32]) -> Self {
        Self { shown: shown.to_vec(), ..self }
    }

    /// Adds a token. Text, if it now ends at a character's end and there is any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let bytes = self.tokenizer.streamed_bytes(id, self.skip_special && !self.shown.contains(&id));
        if bytes.is_empty() {
            return None;
        }
        self.held.extend_from_slice(bytes);
        loop {
            match std::str::from_utf8(&self.held[self.settled..]) {
                Ok(_) => return self.take(),
                Err(error) => {
                    self.settled += error.valid_up_to();
                    // No length: the bytes end inside a character.
                    self.settled += error.error_len()?;
                }
            }
        }
    }

    /// What is still held back: U+FFFD stands for the character that never was completed.
    pub fn finish(&mut self) -> Option<String> {
        self.take()
    }

    fn take(&mut self) -> Option<String> {
        self.settled = 0;
        if self.held.is_empty() {
            return None;
        }
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        Some(text)
    }
}
