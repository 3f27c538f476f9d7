use phalanx_kernels::{
    ops::{KvShape, Precision},
    pages::row_bytes,
};

use super::*;

fn source(epoch: u64, rank: u32) -> Source {
    let shape = KvShape { n_layers: 2, n_blocks: 8, block_size: 16, n_kv_heads: 1, head_dim: 8 };
    Source { term: 1, epoch, rank, world_size: 2, n_sources: 2, shape, precision: Precision::Auto, identity: [7; 16] }
}

fn taking(term: u64, kv_of_epoch: u64, rank: u32) -> Taking {
    Taking { term, epoch: 9, rank, kv_of_epoch, sealed_kv: false }
}

/// What a frame says.
fn says(ranges: &[KvRange], through: Option<u64>) -> Content<'_> {
    Content { step: through.unwrap_or(0), through, ranges, seals: &[] }
}

fn range(block: u32) -> KvRange {
    KvRange { block, first: 3, n_rows: 2 }
}

fn rows(fill: u8) -> Vec<u8> {
    let Source { shape, precision, .. } = source(1, 0);
    vec![fill; 2 * row_bytes(shape, precision)]
}

fn read(adopted: &mut Adopted, range: KvRange) -> Vec<u8> {
    let mut rows = Vec::new();
    adopted.pages.as_mut().expect("pages").read(&[range], &mut rows).expect("in the pages");
    rows
}

#[test]
fn progress_is_that_of_the_rank_that_lags() {
    let store = Store::new(1 << 30);
    assert_eq!(store.progress(), None);
    let first = store.begin(&source(4, 0)).expect("welcome");
    first.write(says(&[range(1)], Some(7)), &rows(1)).expect("room");
    assert_eq!(store.progress(), None);
    let second = store.begin(&source(4, 1)).expect("welcome");
    assert_eq!(store.progress(), None);
    second.write(says(&[], Some(5)), &[]).expect("room");
    assert_eq!(store.progress(), Some(Progress { epoch: 4, step: 5 }));
    // Rows of earlier steps lack, until it says that they don't.
    second.write(says(&[range(2)], None), &rows(2)).expect("room");
    assert_eq!(store.progress(), None);
    second.write(says(&[range(3)], Some(9)), &rows(2)).expect("room");
    assert_eq!(store.progress(), Some(Progress { epoch: 4, step: 7 }));
}

#[test]
fn rows_are_given_away_once_and_for_their_epoch_only() {
    let written = || {
        let store = Store::new(1 << 30);
        let writer = store.begin(&source(4, 1)).expect("welcome");
        writer.write(says(&[range(1)], Some(7)), &rows(9)).expect("room");
        (store, writer)
    };
    let (store, writer) = written();
    let mut adopted = store.adopt(taking(2, 4, 1)).expect("rows");
    assert_eq!((adopted.through_step, adopted.source), (Some(7), source(4, 1)));
    assert_eq!(read(&mut adopted, range(1)), rows(9));
    assert!(matches!(writer.write(says(&[range(1)], Some(8)), &rows(1)), Err(StoreError::Unwanted)));
    assert!(store.adopt(taking(2, 4, 1)).is_none());
    assert!(written().0.adopt(taking(2, 5, 1)).is_none());
    assert!(written().0.adopt(taking(0, 4, 1)).is_none());
    assert!(written().0.adopt(taking(2, 4, 0)).is_none(), "rank 0 sent nothing");
    assert!(written().0.adopt(taking(2, 4, 7)).is_none());
}

#[test]
fn a_later_epoch_replaces_an_earlier_one_and_never_the_other_way() {
    let store = Store::new(1 << 30);
    let old = store.begin(&source(4, 0)).expect("welcome");
    let new = store.begin(&source(5, 0)).expect("welcome");
    assert_eq!(store.begin(&source(4, 1)).err(), Some(Verdict::Stale));
    assert_eq!(store.begin(&Source { world_size: 3, ..source(5, 0) }).err(), Some(Verdict::Stale));
    old.write(says(&[], Some(100)), &[]).expect("it does no harm");
    new.write(says(&[], Some(1)), &[]).expect("room");
    store.begin(&source(5, 1)).expect("welcome").write(says(&[], Some(1)), &[]).expect("room");
    assert_eq!(store.progress(), Some(Progress { epoch: 5, step: 1 }));
}

#[test]
fn whoever_takes_a_rank_is_no_mirror_of_earlier_epochs() {
    let store = Store::new(1 << 30);
    let _writer = store.begin(&source(4, 0)).expect("welcome");
    assert!(store.adopt(taking(1, 0, 0)).is_none());
    assert_eq!(store.begin(&source(4, 0)).err(), Some(Verdict::Stale));
    assert_eq!(store.begin(&source(8, 0)).err(), Some(Verdict::Stale));
    assert!(store.begin(&source(9, 0)).is_ok(), "ranks of its own group may copy their rows to it");
    assert!(store.begin(&source(10, 0)).is_ok());
}

#[test]
fn rows_of_other_ranks_stay_until_the_next_group_serves() {
    let store = Store::new(1 << 30);
    let wanted = Source { term: 2, ..source(4, 0) };
    for rank in [0, 1] {
        store.begin(&source(4, rank)).expect("welcome").write(says(&[range(1)], Some(7)), &rows(1)).expect("room");
    }
    assert!(store.adopt(taking(2, 4, 1)).is_some());
    assert_eq!(store.progress(), None, "one is gone");
    let lent = store.lend(&wanted).expect("the other rank's");
    assert_eq!((lent.source, lent.through_step, lent.written.len()), (source(4, 0), 7, 2));
    // A formation that failed is followed by another.
    assert!(store.adopt(taking(2, 4, 1)).is_none());
    assert!(store.lend(&wanted).is_some());
    store.forget_before(4);
    assert!(store.lend(&wanted).is_some());
    store.forget_before(9);
    assert!(store.lend(&wanted).is_none());
    let mut bytes = Vec::new();
    lent.read(&[range(1)], &mut bytes).expect("it is still lent");
    assert_eq!(bytes, rows(1));
}

#[test]
fn a_mirror_of_one_rank_waits_for_no_other() {
    let store = Store::new(1 << 30);
    let writer = store.begin(&Source { n_sources: 1, ..source(4, 1) }).expect("welcome");
    assert_eq!(store.progress(), None);
    writer.write(says(&[range(1)], Some(7)), &rows(1)).expect("room");
    assert_eq!(store.progress(), Some(Progress { epoch: 4, step: 7 }));
}

#[test]
fn a_second_connection_takes_over_and_begins_anew() {
    let store = Store::new(1 << 30);
    let first = store.begin(&source(4, 0)).expect("welcome");
    first.write(says(&[range(1)], Some(3)), &rows(1)).expect("room");
    let second = store.begin(&source(4, 0)).expect("welcome");
    assert!(matches!(first.write(says(&[range(1)], Some(4)), &rows(2)), Err(StoreError::Unwanted)));
    second.write(says(&[range(2)], Some(5)), &rows(3)).expect("room");
    let mut adopted = store.adopt(taking(1, 4, 0)).expect("rows");
    assert_eq!((read(&mut adopted, range(1)), read(&mut adopted, range(2))), (rows(1), rows(3)));
}

#[test]
fn beyond_the_limit_nothing_is_mirrored() {
    let block = row_bytes(source(1, 0).shape, Precision::Auto) as u64 * 16 * 2;
    // Elements are padded to 16: a block of 8 takes half as much again, and less than twice as much.
    let store = Store::new(3 * block);
    let (first, second) = (store.begin(&source(4, 0)).expect("welcome"), store.begin(&source(4, 1)).expect("welcome"));
    first.write(says(&[range(1)], Some(3)), &rows(1)).expect("room");
    first.write(says(&[range(1)], Some(3)), &rows(1)).expect("the same block");
    second.write(says(&[range(1), range(2)], Some(3)), &[rows(1), rows(1)].concat()).expect("room");
    assert!(store.progress().is_some());
    let full = (2..8).map(|block| first.write(says(&[range(block)], Some(3)), &rows(1))).find(Result::is_err);
    assert!(matches!(full, Some(Err(StoreError::Full { epoch: 4, .. }))));
    assert_eq!(store.progress(), None);
    assert!(matches!(second.write(says(&[range(1)], Some(4)), &rows(1)), Err(StoreError::Full { .. })));
    assert_eq!(store.begin(&source(4, 0)).err(), Some(Verdict::Full));
    assert!(store.begin(&source(5, 0)).is_ok(), "another epoch may have less");
}

#[test]
fn a_rank_without_heads_has_no_pages() {
    let store = Store::new(0);
    let shape = KvShape { n_kv_heads: 0, ..source(4, 0).shape };
    let writer = store.begin(&Source { shape, ..source(4, 0) }).expect("welcome");
    writer.write(says(&[], Some(2)), &[]).expect("nothing to write");
    let adopted = store.adopt(taking(1, 4, 0)).expect("a step");
    assert!(adopted.pages.is_none() && adopted.through_step == Some(2));
}

fn seal(token: u32) -> Seal {
    Seal::of(&[token], 1)
}

#[test]
fn a_block_that_is_written_again_has_no_seal_before_it_is_told_anew() {
    let store = Store::new(1 << 30);
    let writer = store.begin(&source(4, 1)).expect("welcome");
    assert_eq!(store.copied(), None, "nothing is known of its blocks");
    let (ranges, seals) = ([range(1), range(2)], [(1, seal(1)), (2, seal(2))]);
    writer.write(Content { seals: &seals, ..says(&ranges, Some(7)) }, &[rows(1), rows(2)].concat()).expect("room");
    assert_eq!(store.copied(), Some(Copied { world_size: 2, ranks: vec![1] }));
    writer.write(says(&[range(1)], None), &rows(3)).expect("room");
    let (ranges, seals) = ([range(3)], [(3, seal(3))]);
    writer.write(Content { seals: &seals, ..says(&ranges, None) }, &rows(4)).expect("room");
    let sealed = Taking { sealed_kv: true, ..taking(2, 0, 1) };
    let adopted = store.adopt(sealed).expect("rows, though some lack");
    assert_eq!((adopted.through_step, adopted.seals), (None, [(2, seal(2)), (3, seal(3))].into()));
    assert_eq!((store.adopt(sealed).is_none(), store.copied()), (true, None));
}

#[test]
fn what_blocks_hold_is_of_use_to_later_leaders_only_and_where_memory_was_enough() {
    let written = |limit| {
        let store = Store::new(limit);
        let writer = store.begin(&source(4, 1)).expect("welcome");
        let (ranges, seals) = ([range(1)], [(1, seal(1))]);
        let is_written = writer.write(Content { seals: &seals, ..says(&ranges, Some(7)) }, &rows(1)).is_ok();
        (is_written, store)
    };
    let sealed = |term, rank| Taking { sealed_kv: true, ..taking(term, 0, rank) };
    let (is_written, store) = written(1 << 30);
    assert!(is_written && store.adopt(sealed(1, 1)).is_some_and(|adopted| adopted.through_step == Some(7)));
    assert!(written(1 << 30).1.adopt(sealed(0, 1)).is_none(), "of an earlier leader");
    assert!(written(1 << 30).1.adopt(sealed(1, 0)).is_none(), "rank 0 sent nothing");
    assert!(written(1 << 30).1.adopt(taking(1, 0, 1)).is_none(), "nobody asked for it");
    let (is_written, store) = written(10);
    assert!(!is_written && store.copied().is_none() && store.adopt(sealed(1, 1)).is_none());
}

#[test]
fn a_new_connection_tells_anew_what_blocks_hold() {
    let store = Store::new(1 << 30);
    let (ranges, seals) = ([range(1)], [(1, seal(1))]);
    let told = Content { seals: &seals, ..says(&ranges, Some(7)) };
    store.begin(&source(4, 1)).expect("welcome").write(told, &rows(1)).expect("room");
    let _second = store.begin(&source(4, 1)).expect("welcome");
    assert_eq!(store.copied(), None);
}

#[test]
fn copies_leave_the_host_some_memory() {
    let check = |free, before, taken| {
        let store = Store::bounded(Bounds { limit: 1 << 40, free });
        store.begin(&source(4, 0)).expect("welcome").check(before, taken)
    };
    let short = || Some(LEAST_FREE_BYTES - 1);
    assert!(matches!(check(short, 0, LOOK_EVERY_BYTES), Err(StoreError::Short { epoch: 4, .. })));
    assert!(check(short, 0, LOOK_EVERY_BYTES - 1).is_ok(), "it is not looked at with every row");
    assert!(check(|| Some(LEAST_FREE_BYTES), 0, LOOK_EVERY_BYTES).is_ok());
    assert!(check(|| None, 0, LOOK_EVERY_BYTES).is_ok(), "a host that says nothing");
}
