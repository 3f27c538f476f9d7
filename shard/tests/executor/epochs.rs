//! What outlives an epoch: slices that were loaded ahead, and KV pages, own and mirrored.

use phalanx_cluster::seal::Seal;
use phalanx_proto::v1::{
    Chunk, Form, HeldPages, MirrorTarget, Peer, Prepare, Retire, SealedBlocks, StepPlan,
    coordinator_message::Message as ToShard,
};

use crate::played::{Attached, File, Played, Shard, form, next, start};

/// Of two ranks.
fn of_two(epoch: u64, rank: u32, file: &File) -> Form {
    let peer = |rank| Peer { rank, host_id: "here".to_owned(), weight: 1.0, ..Peer::default() };
    Form { rank, world_size: 2, peers: vec![peer(0), peer(1)], ..form(epoch, &file.path) }
}

/// Lets two shards take the ranks and compute the first token. Says which of them loaded anything.
async fn first_token(epoch: u64, shards: [&mut Attached; 2], file: &File) -> (u32, [bool; 2]) {
    let [a, b] = shards;
    (a.has_loaded, b.has_loaded) = (false, false);
    tokio::join!(a.loaded(of_two(epoch, 0, file)), b.loaded(of_two(epoch, 1, file)));
    let loaded = [a.has_loaded, b.has_loaded];
    tokio::join!(a.serve(epoch), b.serve(epoch));
    for shard in [&*a, &*b] {
        shard.send(ToShard::StepPlan(start(epoch, &file.tokens)));
    }
    let (result, _) = tokio::join!(a.result(), b.result());
    (result.samples[0].token_id, loaded)
}

#[tokio::test]
async fn a_prepared_rank_loads_nothing() {
    let file = File::new();
    let want = file.continuation(1)[0];
    let mut coordinator = Played::start().await;
    let _first = Shard::start(&[coordinator.uri()]).await;
    let mut first = coordinator.shard(1).await;
    let _second = Shard::start(&[coordinator.uri()]).await;
    let mut second = coordinator.shard(1).await;

    // A form as the coordinator has it for a spare: of the epoch that serves, without a secret, and without a rank.
    let prepare = |ranks: &[u32]| {
        let form = Form { collective_secret: Vec::new(), ..of_two(1, 0, &file) };
        ToShard::Prepare(Prepare { form: Some(form), ranks: ranks.to_vec(), reserve_kv: true })
    };
    second.send(prepare(&[1, 0]));
    for rank in [1, 0] {
        let prepared = second.prepared().await;
        assert_eq!((prepared.epoch, prepared.rank, prepared.world_size), (1, rank, 2));
        assert!(prepared.weight_bytes > 0);
    }
    assert_eq!(first_token(2, [&mut first, &mut second], &file).await, (want, [true, false]));
    // The other slice is still there; what the first one has loaded is of no use to it now.
    assert_eq!(first_token(3, [&mut second, &mut first], &file).await, (want, [false, true]));
    // Both have both.
    assert_eq!(first_token(4, [&mut first, &mut second], &file).await, (want, [false, false]));
    // What a rank has in use is prepared, and so is what it had.
    second.send(prepare(&[0, 1]));
    assert_eq!((second.prepared().await.rank, second.prepared().await.rank), (0, 1));
}

#[tokio::test]
async fn what_cant_be_prepared_is_no_failure() {
    let file = File::new();
    let mut coordinator = Played::start().await;
    let _shard = Shard::start(&[coordinator.uri()]).await;
    let mut attached = coordinator.shard(1).await;
    let nowhere = Form { model: "/does/not/exist.gguf".into(), ..form(1, &file.path) };
    attached.send(ToShard::Prepare(Prepare { form: Some(nowhere), ranks: vec![0], reserve_kv: false }));
    attached.send(ToShard::Prepare(Prepare { form: None, ranks: vec![0], reserve_kv: false }));
    attached.send(ToShard::Prepare(Prepare { form: Some(form(1, &file.path)), ranks: vec![7, 0], reserve_kv: false }));
    // There is no rank 7 of one.
    assert_eq!(attached.prepared().await.rank, 0);
    attached.form(form(2, &file.path)).await;
    assert!(!attached.has_loaded);
}

/// A shard with one rank that has computed the first token in epoch 7.
async fn with_pages(coordinator: &mut Played, term: u64, file: &File) -> Attached {
    let mut attached = coordinator.shard(term).await;
    attached.form(Form { term, ..form(7, &file.path) }).await;
    attached.send(ToShard::StepPlan(start(7, &file.tokens)));
    attached.result().await;
    attached
}

fn wants(epoch: u64, term: u64, of: u64, file: &File) -> Form {
    Form { term, keep_kv_of_epoch: of, ..form(epoch, &file.path) }
}

/// Computes the second token from the pages that step 1 of epoch 7 left, as the first step of this one.
fn second(epoch: u64, file: &File, first: u32) -> StepPlan {
    let known: Vec<u32> = file.tokens.iter().copied().chain([first]).collect();
    let mut plan = start(epoch, &known);
    plan.started[0].prompt_len = file.tokens.len() as u32;
    plan.chunks = vec![Chunk { sequence: 0, start: file.tokens.len() as u32, len: 1, sample: true }];
    plan
}

#[tokio::test]
async fn kept_pages_stand_for_what_was_computed() {
    let file = File::new();
    let want = file.continuation(3);
    let mut coordinator = Played::start().await;
    let _shard = Shard::start(&[coordinator.uri()]).await;
    let mut attached = with_pages(&mut coordinator, 1, &file).await;
    attached.send(ToShard::Retire(Retire { epoch: 7, keep_kv: true }));

    let loaded = attached.loaded(wants(8, 1, 7, &file)).await;
    assert_eq!((loaded.kv_kept_through_step, loaded.kv_blocks), (Some(1), 4));
    attached.serve(8).await;
    // Epoch 8 computes nothing, and another coordinator takes over: whichever epoch it has heard of, the pages are there.
    drop(attached);
    let mut attached = coordinator.shard(2).await;
    assert_eq!(attached.loaded(wants(9, 2, 8, &file)).await.kv_kept_through_step, Some(0));
    attached.serve(9).await;
    assert_eq!(attached.loaded(wants(10, 2, 7, &file)).await.kv_kept_through_step, Some(1));
    attached.serve(10).await;
    attached.send(ToShard::StepPlan(second(10, &file, want[0])));
    assert_eq!(attached.result().await.samples[0].token_id, want[1]);
    attached.send(ToShard::StepPlan(next(10, 2, file.tokens.len() + 1)));
    assert_eq!(attached.result().await.samples[0].token_id, want[2]);
    // Now they are of this epoch, through its step 2; nobody needs to say retire.
    assert_eq!(attached.loaded(wants(11, 2, 10, &file)).await.kv_kept_through_step, Some(2));
}

#[tokio::test]
async fn other_pages_are_not_kept() {
    let file = File::new();
    let mut coordinator = Played::start().await;
    let _shard = Shard::start(&[coordinator.uri()]).await;
    // Told not to keep them.
    let mut attached = with_pages(&mut coordinator, 1, &file).await;
    attached.send(ToShard::Retire(Retire { epoch: 7, keep_kv: false }));
    assert_eq!(attached.loaded(wants(8, 1, 7, &file)).await.kv_kept_through_step, None);
    drop(attached);
    // Of another epoch; and they are gone for the next form.
    let mut attached = with_pages(&mut coordinator, 2, &file).await;
    assert_eq!(attached.loaded(wants(8, 2, 6, &file)).await.kv_kept_through_step, None);
    assert_eq!(attached.loaded(wants(9, 2, 7, &file)).await.kv_kept_through_step, None);
    drop(attached);
    // Not wanted; of blocks of another size; of a later leadership.
    for wrong in [wants(8, 3, 0, &file), Form { block_size: 32, ..wants(8, 3, 7, &file) }, wants(8, 2, 7, &file)] {
        let mut attached = with_pages(&mut coordinator, 3, &file).await;
        assert_eq!(attached.loaded(wrong).await.kv_kept_through_step, None);
    }
}

#[tokio::test]
async fn the_next_leader_is_told_what_full_blocks_hold() {
    let file = File::new();
    let tokens = [file.tokens.as_slice(); 2].concat();
    assert_eq!(tokens.len(), 20, "one block and a bit");
    let mut coordinator = Played::start().await;
    let _shard = Shard::start(&[coordinator.uri()]).await;
    let mut attached = coordinator.shard(1).await;
    assert_eq!(attached.hello.held_pages, None);
    attached.form(Form { term: 1, ..form(7, &file.path) }).await;
    attached.send(ToShard::StepPlan(start(7, &tokens)));
    let want = attached.result().await.samples[0].token_id;
    drop(attached);

    let mut attached = coordinator.shard(2).await;
    assert_eq!(attached.hello.held_pages, Some(HeldPages { rank: 0, world_size: 1, kv_blocks: 4 }));
    let sealed = |epoch| Form { term: 2, keep_sealed_kv: true, ..form(epoch, &file.path) };
    // Its epochs may be others.
    let loaded = attached.loaded(sealed(3)).await;
    let whole = SealedBlocks { blocks: vec![0], seals: Seal::of(&tokens, 16).bytes().to_vec() };
    assert_eq!((loaded.sealed, loaded.kv_kept_through_step, loaded.kv_blocks), (Some(whole.clone()), None, 4));
    // The formation comes to nothing.
    assert_eq!(attached.loaded(sealed(4)).await.sealed, Some(whole));
    attached.serve(4).await;
    // The last four rows, behind the block that is there.
    let mut rest = start(4, &tokens);
    rest.chunks = vec![Chunk { sequence: 0, start: 16, len: 4, sample: true }];
    attached.send(ToShard::StepPlan(rest));
    assert_eq!(attached.result().await.samples[0].token_id, want);
    // The block is written again.
    let other: Vec<u32> = tokens.iter().rev().copied().collect();
    let mut plan = start(4, &other);
    plan.step = 2;
    plan.dropped = vec![0];
    attached.send(ToShard::StepPlan(plan));
    attached.result().await;
    let loaded = attached.loaded(sealed(5)).await;
    let whole = SealedBlocks { blocks: vec![0], seals: Seal::of(&other, 16).bytes().to_vec() };
    assert_eq!(loaded.sealed, Some(whole));
    // Blocks of another size are others, and who asks for those gives these up.
    let larger = Form { block_size: 32, ..sealed(6) };
    assert_eq!(attached.loaded(larger).await.sealed, None);
    assert_eq!(attached.loaded(sealed(7)).await.sealed, None);
}

/// The plan to both ranks; rank 0's first sampled token.
async fn on_both([a, b]: [&mut Attached; 2], plan: StepPlan) -> u32 {
    for shard in [&*a, &*b] {
        shard.send(ToShard::StepPlan(plan.clone()));
    }
    let (result, _) = tokio::join!(a.result(), b.result());
    result.samples[0].token_id
}

/// Both serve in epoch 2 and copy their rows to the spare.
async fn serve_mirrored([a, b]: [&mut Attached; 2], spare: &Attached, file: &File) {
    let target = MirrorTarget {
        shard_id: "spare".to_owned(),
        address: spare.hello.mirror_address.clone(),
        secret: spare.hello.mirror_secret.clone(),
        ranks: 2,
    };
    let mirrored = |rank| Form { term: 1, mirrors: vec![target.clone()], ..of_two(2, rank, file) };
    tokio::join!(a.loaded(mirrored(0)), b.loaded(mirrored(1)));
    tokio::join!(a.serve(2), b.serve(2));
}

#[tokio::test]
async fn a_spare_takes_over_with_mirrored_pages() {
    let file = File::new();
    let want = file.continuation(4);
    let mut coordinator = Played::start().await;
    let _first = Shard::start(&[coordinator.uri()]).await;
    let mut first = coordinator.shard(1).await;
    let _second = Shard::start(&[coordinator.uri()]).await;
    let mut second = coordinator.shard(1).await;
    let _spare = Shard::start(&[coordinator.uri()]).await;
    let mut spare = coordinator.shard(1).await;
    spare.send(ToShard::Prepare(Prepare { form: Some(of_two(1, 0, &file)), ranks: vec![1, 0], reserve_kv: true }));
    spare.prepared().await;
    spare.prepared().await;
    spare.has_loaded = false;

    serve_mirrored([&mut first, &mut second], &spare, &file).await;
    let both = [&mut first, &mut second];
    assert_eq!(on_both(both, start(2, &file.tokens)).await, want[0]);
    let position = file.tokens.len();
    assert_eq!(on_both([&mut first, &mut second], next(2, 2, position)).await, want[1]);
    spare.beat(|beat| (beat.mirrored_epoch, beat.mirrored_step) == (2, 2)).await;

    // The second rank is lost. A first attempt to form comes to nothing; the pages stay.
    drop(second);
    let wants = |epoch, rank| Form { term: 1, keep_kv_of_epoch: 2, ..of_two(epoch, rank, &file) };
    spare.send(ToShard::Form(wants(3, 1)));
    spare.beat(|beat| beat.waits_for_rank == Some(0)).await;
    let (of_first, of_spare) = tokio::join!(first.loaded(wants(4, 0)), spare.loaded(wants(4, 1)));
    assert_eq!((of_first.kv_kept_through_step, of_spare.kv_kept_through_step), (Some(2), Some(2)));
    assert_eq!((of_spare.kv_blocks, spare.has_loaded), (4, false));
    tokio::join!(first.serve(4), spare.serve(4));

    let known: Vec<u32> = file.tokens.iter().chain(&want[..2]).copied().collect();
    let mut plan = start(4, &known);
    plan.started[0].prompt_len = position as u32;
    plan.chunks = vec![Chunk { sequence: 0, start: position as u32 + 1, len: 1, sample: true }];
    assert_eq!(on_both([&mut first, &mut spare], plan).await, want[2]);
    assert_eq!(on_both([&mut first, &mut spare], next(4, 2, position + 2)).await, want[3]);
    // Whoever has taken a rank is no mirror any more.
    spare.beat(|beat| beat.mirrored_epoch == 0).await;
}

#[tokio::test]
async fn a_spare_takes_over_what_full_blocks_hold_when_rank_and_leader_are_lost() {
    let file = File::new();
    let tokens = [file.tokens.as_slice(); 2].concat();
    let mut coordinator = Played::start().await;
    let mut shards = Vec::new();
    let mut attached = Vec::new();
    for _ in 0..3 {
        shards.push(Shard::start(&[coordinator.uri()]).await);
        attached.push(coordinator.shard(1).await);
    }
    let [mut first, mut second, mut spare] = attached.try_into().ok().expect("three shards");
    serve_mirrored([&mut first, &mut second], &spare, &file).await;
    let want = on_both([&mut first, &mut second], start(2, &tokens)).await;
    spare.beat(|beat| (beat.mirrored_epoch, beat.mirrored_step) == (2, 1)).await;

    // All look for the next leader; the second rank is not seated by it.
    drop((first, second, spare));
    let (mut first, mut spare) = (None, None);
    for _ in 0..3 {
        let attached = coordinator.shard(2).await;
        match (attached.hello.held_pages.map(|held| held.rank), &attached.hello.copied_pages) {
            (Some(0), None) => first = Some(attached),
            (Some(1), None) => {}
            (None, Some(copied)) => {
                assert_eq!((copied.world_size, copied.ranks.as_slice()), (2, &[0, 1][..]));
                spare = Some(attached);
            }
            other => panic!("{other:?}"),
        }
    }
    let (mut first, mut spare) = (first.expect("a rank"), spare.expect("a spare"));
    let sealed = |rank| Form { term: 2, keep_sealed_kv: true, ..of_two(1, rank, &file) };
    let (of_first, of_spare) = tokio::join!(first.loaded(sealed(0)), spare.loaded(sealed(1)));
    let whole = Some(SealedBlocks { blocks: vec![0], seals: Seal::of(&tokens, 16).bytes().to_vec() });
    assert_eq!((&of_first.sealed, &of_spare.sealed), (&whole, &whole));
    assert_eq!((of_spare.kv_blocks, of_spare.kv_kept_through_step), (of_first.kv_blocks, None));
    tokio::join!(first.serve(1), spare.serve(1));
    let mut rest = start(1, &tokens);
    rest.chunks = vec![Chunk { sequence: 0, start: 16, len: 4, sample: true }];
    assert_eq!(on_both([&mut first, &mut spare], rest).await, want);
}

#[tokio::test]
async fn a_rank_has_as_many_blocks_as_the_group_had() {
    let file = File::new();
    let mut coordinator = Played::start().await;
    let _shard = Shard::start(&[coordinator.uri()]).await;
    let mut attached = coordinator.shard(1).await;
    let measured = Form { kv_cache_bytes: 0, ..form(1, &file.path) };
    // 4 sequences of 64 positions fill 16 blocks.
    assert_eq!(attached.loaded(measured.clone()).await.kv_blocks, 16);
    assert_eq!(attached.loaded(Form { epoch: 2, kv_blocks: 21, ..measured }).await.kv_blocks, 21);
}
