//! Loaded slices that no group uses at the moment.

/// Values by key, from the one that was used longest ago to the last.
#[derive(Debug)]
pub(super) struct Shelf<K, V>(Vec<(K, V)>);

impl<K, V> Default for Shelf<K, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: PartialEq, V> Shelf<K, V> {
    /// The value, if it is here.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.0.iter_mut().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// Takes the value away.
    pub fn take(&mut self, key: &K) -> Option<V> {
        let idx = self.0.iter().position(|(k, _)| k == key)?;
        Some(self.0.remove(idx).1)
    }

    /// Puts a value here, in place of one with the same key.
    pub fn put(&mut self, key: K, value: V) {
        self.0.retain(|(k, _)| *k != key);
        self.0.push((key, value));
    }

    /// Keeps only what `wanted` says.
    pub fn retain(&mut self, wanted: impl Fn(&K) -> bool) {
        self.0.retain(|(k, _)| wanted(k));
    }

    /// Drops the value that was used longest ago among those that may go. Returns whether there was one.
    pub fn drop_oldest(&mut self, may_go: impl Fn(&K) -> bool) -> bool {
        let oldest = self.0.iter().position(|(k, _)| may_go(k));
        oldest.map(|idx| self.0.remove(idx)).is_some()
    }

    /// All values.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().map(|(_, v)| v)
    }

    /// The same, to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.0.iter_mut().map(|(_, v)| v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shelf() -> Shelf<u32, &'static str> {
        let mut shelf = Shelf::default();
        for (key, value) in [(1, "one"), (2, "two"), (3, "three")] {
            shelf.put(key, value);
        }
        shelf
    }

    fn keys(shelf: &Shelf<u32, &'static str>) -> Vec<u32> {
        (0..9).filter(|key| shelf.get(key).is_some()).collect()
    }

    #[test]
    fn a_value_is_taken_once() {
        let mut shelf = shelf();
        assert_eq!(shelf.take(&2), Some("two"));
        assert_eq!(shelf.take(&2), None);
        assert_eq!(keys(&shelf), [1, 3]);
    }

    #[test]
    fn the_oldest_that_may_go_goes_first() {
        let mut shelf = shelf();
        shelf.put(1, "one again");
        assert!(shelf.drop_oldest(|key| *key != 2));
        assert_eq!(keys(&shelf), [1, 2]);
        assert!(shelf.drop_oldest(|_| true));
        assert_eq!(keys(&shelf), [1]);
        assert!(!shelf.drop_oldest(|key| *key != 1));
    }

    #[test]
    fn equal_keys_replace() {
        let mut shelf = shelf();
        shelf.put(2, "two again");
        assert_eq!(shelf.values_mut().count(), 3);
        assert_eq!(shelf.take(&2), Some("two again"));
    }
}
