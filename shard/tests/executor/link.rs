//! A whole shard, link and engine, under a coordinator that the test plays.

use phalanx_proto::v1::{Form, Retire, Shutdown, StepPlan, coordinator_message::Message as ToShard};
use phalanx_shard::link::End;

use crate::played::{File, Played, Shard, form, next, start};

#[tokio::test]
async fn a_shard_serves_fails_reattaches_and_shuts_down() {
    let file = File::new();
    let (path, tokens, want) = (&file.path, &file.tokens, file.continuation(3));
    let mut coordinator = Played::start().await;
    // The first coordinator does not exist: the second is taken.
    let shard = Shard::start(&["http://127.0.0.1:1".to_owned(), coordinator.uri()]).await;
    let mut attached = coordinator.shard(0).await;
    let weight_bytes = attached.form(form(3, path)).await;

    // Both plans are sent before the first result: the shard knows the token that it samples.
    attached.send(ToShard::StepPlan(start(3, tokens)));
    attached.send(ToShard::StepPlan(next(3, 2, tokens.len())));
    let (first, second) = (attached.result().await, attached.result().await);
    assert_eq!((first.step, second.step), (1, 2));
    assert_eq!([first.samples[0].token_id, second.samples[0].token_id], want[..2]);

    // A plan of another epoch has no effect; a step out of order fails the group.
    attached.send(ToShard::StepPlan(next(2, 3, tokens.len() + 1)));
    attached.send(ToShard::StepPlan(next(3, 4, tokens.len() + 1)));
    let failed = attached.failed().await;
    assert_eq!((failed.epoch, failed.step), (3, 4));
    assert!(failed.error.contains("want step 3"), "{}", failed.error);

    // Another file is refused, and so is a path that leads nowhere.
    let other = Form { model_hash: "0".repeat(64), ..form(4, path) };
    attached.send(ToShard::Form(other));
    assert!(attached.failed().await.error.contains("SHA-256"));
    let nowhere = Form { model: "/does/not/exist.gguf".into(), ..form(5, path) };
    attached.send(ToShard::Form(nowhere));
    assert!(attached.failed().await.error.contains("/does/not/exist.gguf"));

    // A new group has no sequences, and the same weights.
    assert_eq!(attached.form(form(6, path)).await, weight_bytes);
    attached.send(ToShard::StepPlan(StepPlan { epoch: 6, ..next(6, 1, tokens.len()) }));
    assert!(attached.failed().await.error.contains("not known"));
    attached.send(ToShard::Retire(Retire { epoch: 6, keep_kv: false }));

    // The stream breaks: the shard comes again, and epochs may count anew.
    drop(attached);
    let mut attached = coordinator.shard(0).await;
    assert_eq!(attached.form(form(1, path)).await, weight_bytes);
    attached.send(ToShard::StepPlan(start(1, tokens)));
    assert_eq!(attached.result().await.samples[0].token_id, want[0]);

    attached.send(ToShard::Shutdown(Shutdown { reason: "the test is over".into() }));
    assert_eq!(shard.end().await, End::Shutdown("the test is over".to_owned()));
}
