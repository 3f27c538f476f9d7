//! What is known of grammars that were tried: the verdict alone, under a hash of the text.

use std::collections::BTreeMap;

use phalanx_cluster::grammar::Grammar;
use sha2::{Digest, Sha256};

use super::Verdict;

/// So many are remembered, the latest used ones.
const MOST: usize = 4096;

type Hash = [u8; 32];

/// Verdicts by grammar.
#[derive(Default)]
pub struct Verdicts {
    by_hash: BTreeMap<Hash, (u64, Verdict)>,
    by_use: BTreeMap<u64, Hash>,
    n_uses: u64,
}

impl Verdicts {
    /// What was said of a grammar.
    pub fn get(&mut self, grammar: &Grammar) -> Option<Verdict> {
        let hash = hash(grammar);
        let (_, verdict) = self.by_hash.get(&hash)?;
        let verdict = verdict.clone();
        self.touch(hash, verdict.clone());
        Some(verdict)
    }

    /// Remembers what was said of a grammar.
    pub fn remember(&mut self, grammar: &Grammar, verdict: Verdict) {
        self.touch(hash(grammar), verdict);
        if self.by_hash.len() > MOST
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.by_hash.remove(&oldest);
        }
    }

    fn touch(&mut self, hash: Hash, verdict: Verdict) {
        self.n_uses += 1;
        if let Some((before, _)) = self.by_hash.insert(hash, (self.n_uses, verdict)) {
            self.by_use.remove(&before);
        }
        self.by_use.insert(self.n_uses, hash);
    }
}

fn hash(grammar: &Grammar) -> Hash {
    let kind = match grammar {
        Grammar::JsonSchema(_) => 0,
        Grammar::Regex(_) => 1,
        Grammar::Lark(_) => 2,
    };
    Sha256::new().chain_update([kind]).chain_update(grammar.text()).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammars::Refusal;

    #[test]
    fn the_latest_used_are_remembered() {
        let mut verdicts = Verdicts::default();
        let of = |idx: usize| Grammar::Regex(format!("a{idx}"));
        for idx in 0..MOST {
            verdicts.remember(&of(idx), Ok(()));
        }
        assert_eq!(verdicts.get(&of(0)), Some(Ok(())));
        verdicts.remember(&of(MOST), Err(Refusal::OfGrammar("odd".to_owned())));
        assert!(verdicts.get(&of(0)).is_some(), "used since");
        assert!(verdicts.get(&of(1)).is_none(), "the oldest");
        assert_eq!(verdicts.get(&of(MOST)), Some(Err(Refusal::OfGrammar("odd".to_owned()))));
        assert!(verdicts.get(&Grammar::Lark("a0".to_owned())).is_none(), "another kind");
        assert_eq!((verdicts.by_hash.len(), verdicts.by_use.len()), (MOST, MOST));
    }
}
