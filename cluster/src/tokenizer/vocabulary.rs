//! Every token's bytes, in one piece of memory.

/// Tokens by id: the bytes each adds to a text, and whether it is a control token.
#[derive(Default)]
pub(super) struct Vocabulary {
    bytes: Vec<u8>,
    /// Where token i ends in `bytes`; it begins where its predecessor ends.
    ends: Vec<usize>,
    special: Vec<bool>,
}

impl Vocabulary {
    /// Adds the next id.
    pub(super) fn push(&mut self, bytes: &[u8], special: bool) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.special.push(special);
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let begin = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[begin..end]
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

/// How vocabulary entries spell bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's alphabet: one printable character for each of the 256 bytes.
    ByteLevel,
    /// SentencePiece's: U+2581 for a space, `<0x0A>` for a byte.
    SentencePiece,
}

impl Spelling {
    /// The bytes that an ordinary entry stands for.
    pub(super) fn bytes(self, entry: &str) -> Vec<u8> {
        match self {
            // An entry outside the alphabet stands for itself.
            Self::ByteLevel => {
                entry.chars().map(byte_level_byte).collect::<Option<_>>().unwrap_or_else(|| entry.into())
            }
            Self::SentencePiece => match byte_entry(entry) {
                Some(byte) => vec![byte],
                None => entry.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

/// The byte that `<0xNN>` stands for.
fn byte_entry(entry: &str) -> Option<u8> {
    let digits = entry.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The byte that a character of GPT-2's alphabet stands for. Printable Latin-1 characters are their own bytes; the other
/// 68 bytes, in order, are the characters from U+0100 on.
fn byte_level_byte(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(), // 0x00 to 0x20
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(), // 0x7F to 0xA0
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn byte_level_alphabet_covers_every_byte_once() {
        let bytes: BTreeSet<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_level_byte).collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!((0..0x200).filter_map(char::from_u32).filter_map(byte_level_byte).count(), 256);
        assert_eq!(Spelling::ByteLevel.bytes("ĠÃ©Ċ"), " é\n".as_bytes());
        assert_eq!(Spelling::ByteLevel.bytes("a b"), b"a b");
    }

    #[test]
    fn sentence_piece_spells_spaces_and_bytes() {
        assert_eq!(Spelling::SentencePiece.bytes("▁a▁b"), b" a b");
        assert_eq!(Spelling::SentencePiece.bytes("<0xF0>"), [0xF0]);
        assert_eq!(Spelling::SentencePiece.bytes("<0x+1>"), b"<0x+1>");
        assert_eq!(Spelling::SentencePiece.bytes("<0xé>"), "<0xé>".as_bytes());
    }

    #[test]
    fn ids_outside_the_vocabulary_are_empty() {
        let mut vocabulary = Vocabulary::default();
        vocabulary.push(b"a", false);
        vocabulary.push(b"", true);
        vocabulary.push(b"bc", false);
        assert_eq!((vocabulary.bytes(0), vocabulary.bytes(1), vocabulary.bytes(2)), (&b"a"[..], &b""[..], &b"bc"[..]));
        assert_eq!(vocabulary.bytes(3), b"");
        assert!(vocabulary.is_special(1) && !vocabulary.is_special(2) && !vocabulary.is_special(u32::MAX));
    }
}
