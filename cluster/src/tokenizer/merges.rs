//! The merge list of a byte-pair model.

use tokenizers::models::bpe::{Merges, Vocab};

use super::TokenizerError;

/// Entries longer than this are refused: every cut of an entry is looked up, which is quadratic in its length.
const LONGEST_PIECE_BYTES: usize = 1024;

/// Merges as GGUF and `merges.txt` write them, `left right`, each checked against the vocabulary: the library that
/// takes them assumes that both parts and the whole are entries.
pub(super) fn parse(lines: &[String], vocab: &Vocab) -> Result<Merges, TokenizerError> {
    let mut merges = Merges::with_capacity(lines.len());
    for (rank, line) in lines.iter().enumerate() {
        // The left part has a character at least, which may be a space itself.
        let first = line.chars().next().map_or(0, char::len_utf8);
        let Some(cut) = line[first..].find(' ').map(|at| at + first) else {
            return Err(bad(format!("merge {rank} {line:?} is not two parts with a space between")));
        };
        let (left, right) = (&line[..cut], &line[cut + 1..]);
        check(rank, left, right, vocab)?;
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

/// Fails unless both parts and their concatenation are vocabulary entries.
pub(super) fn check(rank: usize, left: &str, right: &str, vocab: &Vocab) -> Result<(), TokenizerError> {
    for entry in [left, right, &format!("{left}{right}")] {
        if !vocab.contains_key(entry) {
            return Err(bad(format!("merge {rank} ({left:?}, {right:?}) needs {entry:?}, which is no entry")));
        }
    }
    Ok(())
}

/// Merges of a SentencePiece BPE model, which has a score for every piece instead: each way to cut a piece into two
/// others is a merge, pieces of higher score first, then longer left and right parts, as Hugging Face's converter
/// orders them (`generate_merges` in transformers).
///
/// `pieces` are `(id, piece, score)` of the ordinary pieces.
pub(super) fn from_scores(pieces: &[(u32, &str, f32)], vocab: &Vocab) -> Result<Merges, TokenizerError> {
    struct Candidate<'a> {
        score: f32,
        left: &'a str,
        right: &'a str,
        chars: (usize, usize),
        ids: (u32, u32, u32),
    }
    let mut candidates = Vec::new();
    for &(id, piece, score) in pieces {
        if piece.len() > LONGEST_PIECE_BYTES {
            return Err(bad(format!("token {id} has {} bytes, at most {LONGEST_PIECE_BYTES} can be", piece.len())));
        }
        let n_chars = piece.chars().count();
        for (left_chars, (cut, _)) in piece.char_indices().enumerate().skip(1) {
            let (left, right) = piece.split_at(cut);
            if let (Some(&left_id), Some(&right_id)) = (vocab.get(left), vocab.get(right)) {
                let chars = (left_chars, n_chars - left_chars);
                candidates.push(Candidate { score, left, right, chars, ids: (id, left_id, right_id) });
            }
        }
    }
    candidates.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.chars.cmp(&a.chars)).then(a.ids.cmp(&b.ids)));
    Ok(candidates.into_iter().map(|merge| (merge.left.to_owned(), merge.right.to_owned())).collect())
}

fn bad(reason: String) -> TokenizerError {
    TokenizerError::Vocabulary { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocab(entries: &[&str]) -> Vocab {
        (0u32..).zip(entries).map(|(id, entry)| ((*entry).to_owned(), id)).collect()
    }

    #[test]
    fn merges_must_be_about_the_vocabulary() {
        let vocab = vocab(&["a", "b", "ab", " ", " a"]);
        let parsed = parse(&["a b".into(), "  a".into()], &vocab).unwrap();
        assert_eq!(parsed, [("a".to_owned(), "b".to_owned()), (" ".to_owned(), "a".to_owned())]);
        for bad in ["ab", "", "b a", "a c", "é"] {
            assert!(parse(&[bad.to_owned()], &vocab).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn better_scores_and_longer_parts_come_first() {
        let entries = ["a", "b", "c", "ab", "bc", "abc"];
        let pieces: Vec<(u32, &str, f32)> =
            (0u32..).zip(entries).zip([0.0, 0.0, 0.0, -2.0, -1.0, -3.0]).map(|((i, e), s)| (i, e, s)).collect();
        let merges = from_scores(&pieces, &vocab(&entries)).unwrap();
        let merges: Vec<String> = merges.iter().map(|(left, right)| format!("{left}+{right}")).collect();
        assert_eq!(merges, ["b+c", "a+b", "ab+c", "a+bc"]);
    }

    #[test]
    fn endless_pieces_are_refused() {
        let long = "x".repeat(LONGEST_PIECE_BYTES + 1);
        assert!(from_scores(&[(7, &long, 0.0)], &vocab(&["x"])).unwrap_err().to_string().contains("token 7"));
    }
}
