//! Which coordinator a shard follows, and how it leaves.

use std::time::Duration;

use phalanx_proto::v1::{
    LeaderResponse, Shutdown, coordinator_message::Message as ToShard, shard_message::Message as FromShard,
};
use phalanx_shard::link::End;

use crate::played::{File, Played, Shard, form, leads, start};

#[tokio::test]
async fn a_standby_refers_to_the_leader() {
    let (standby, mut leader) = (Played::start().await, Played::start().await);
    standby.says(|says| says.refers_to = Some(leader.uri()));
    let _shard = Shard::start(&[standby.uri()]).await;
    leader.shard(1).await;
}

#[tokio::test]
async fn the_leader_is_asked_for() {
    let (standby, mut leader) = (Played::start().await, Played::start().await);
    // It knows who leads; another shard's attempt would not be refused.
    standby.says(|says| says.leader = Some(LeaderResponse { is_leader: false, ..leads(4, &leader.address) }));
    leader.says(|says| says.leader = Some(leads(4, &leader.address.clone())));
    let _shard = Shard::start(&["http://127.0.0.1:1".to_owned(), standby.uri()]).await;
    leader.shard(4).await;
}

#[tokio::test]
async fn a_newer_leader_is_followed() {
    let file = File::new();
    let (mut old, mut new) = (Played::start().await, Played::start().await);
    old.says(|says| says.leader = Some(leads(3, "")));
    let _shard = Shard::start(&[old.uri(), new.uri()]).await;
    let mut attached = old.shard(3).await;
    let weight_bytes = attached.form(form(5, &file.path)).await;
    new.says(|says| says.leader = Some(leads(4, "")));
    let mut followed = new.shard(4).await;
    attached.closed().await;
    // It was told which leadership the shard knew, and has the weights.
    new.says(|says| assert_eq!(says.asked_with_term, Some(3)));
    assert_eq!(followed.form(form(6, &file.path)).await, weight_bytes);
    assert!(!followed.has_loaded);
}

#[tokio::test]
async fn an_older_leadership_is_not_followed() {
    let file = File::new();
    let mut coordinator = Played::start().await;
    let _shard = Shard::start(&[coordinator.uri()]).await;
    drop(coordinator.shard(5).await);
    coordinator.shard(4).await.closed().await;
    coordinator.shard(5).await.form(form(1, &file.path)).await;
}

#[tokio::test]
async fn a_shard_that_leaves_serves_until_it_may_go() {
    let file = File::new();
    let mut coordinator = Played::start().await;
    let shard = Shard::start(&[coordinator.uri()]).await;
    let mut attached = coordinator.shard(1).await;
    attached.form(form(1, &file.path)).await;
    shard.leave.send_replace(Some("SIGTERM".to_owned()));
    match attached.next().await {
        FromShard::Leaving(leaving) => assert_eq!(leaving.reason, "SIGTERM"),
        other => panic!("want to be asked for leave, got {other:?}"),
    }
    attached.send(ToShard::StepPlan(start(1, &file.tokens)));
    assert_eq!(attached.result().await.samples[0].token_id, file.continuation(1)[0]);
    attached.send(ToShard::Shutdown(Shutdown { reason: "its rank is another's".into() }));
    assert_eq!(shard.end().await, End::Shutdown("its rank is another's".to_owned()));
}

#[tokio::test]
async fn nobody_waits_for_leave_that_nobody_gives() {
    // A coordinator of a version without terms.
    let mut coordinator = Played::start().await;
    let shard = Shard::start(&[coordinator.uri()]).await;
    let _attached = coordinator.shard(0).await;
    shard.leave.send_replace(Some("SIGTERM".to_owned()));
    assert!(matches!(shard.end().await, End::Left(_)));

    // One that goes away.
    let shard = Shard::start(&[coordinator.uri()]).await;
    let mut attached = coordinator.shard(1).await;
    shard.leave.send_replace(Some("SIGTERM".to_owned()));
    assert!(matches!(attached.next().await, FromShard::Leaving(_)));
    drop(attached);
    assert!(matches!(shard.end().await, End::Left(_)));

    // One that does not answer.
    let shard = Shard::patient(&[coordinator.uri()], Duration::from_millis(50)).await;
    let _attached = coordinator.shard(1).await;
    shard.leave.send_replace(Some("SIGTERM".to_owned()));
    assert!(matches!(shard.end().await, End::Left(_)));

    // None at all.
    let shard = Shard::start(&["http://127.0.0.1:1".to_owned()]).await;
    shard.leave.send_replace(Some("SIGTERM".to_owned()));
    assert!(matches!(shard.end().await, End::Left(_)));
}
