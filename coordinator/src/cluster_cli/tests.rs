//! The commands against coordinators that a test plays.

use std::sync::Arc;

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{DrainResponse, PlanResponse, RolloutEvent, StatusResponse};
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;

use super::*;
use crate::admin::{
    AdminError, Control, LeaderAddress, RollingRestart, RolloutEvents, RolloutPhase,
    debug::Loads,
    service::AdminService,
    testing::{self, FakeControl},
};

async fn serve(control: impl Control) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tonic::transport::Server::builder().add_service(AdminService::server(Arc::new(control)));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    url
}

/// Runs a command line; returns what it would say of a failure.
async fn cluster(line: &str) -> Result<(), String> {
    let args = std::iter::once(CLUSTER).chain(line.split_whitespace());
    let matches = spec().try_get_matches_from(args).map_err(|e| e.to_string())?;
    run(matches).await.map_err(|e| e.to_string())
}

#[test]
fn the_command_line_is_well_formed() {
    spec().debug_assert();
    for command in COMMANDS {
        let name = (command.spec)().get_name().to_owned();
        assert!(is_command(OsStr::new(&name)));
        assert_eq!(COMMANDS.iter().filter(|c| (c.spec)().get_name() == name).count(), 1, "{name}");
    }
    assert!(!is_command(OsStr::new("model.gguf")));
}

#[tokio::test]
async fn wrong_command_lines_are_refused() {
    for line in [
        "",
        "drain",
        "rollout",
        "rollout backwards",
        "status local-0",
        "rollout restart --timeout 0",
        "plan --coordinator ftp://h:1",
    ] {
        assert!(cluster(line).await.is_err(), "{line}");
    }
}

#[tokio::test]
async fn commands_reach_the_coordinator_and_its_refusals_come_back() {
    let url = serve(FakeControl).await;
    for line in
        ["drain local-1", "undrain local-1", "plan", "plan --json", "rollout restart", "rollout restart --timeout 5"]
    {
        cluster(&format!("{line} --coordinator {url}")).await.unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    let error = cluster(&format!("drain nobody --coordinator {url}")).await.unwrap_err();
    assert!(error.contains("\"nobody\"") && error.contains("attached are local-0"), "{error}");
    let error = cluster(&format!("drain local-0 --coordinator {url}")).await.unwrap_err();
    assert_eq!(error, "nobody can take rank 0");
    let error = cluster(&format!("step-down --coordinator {url}")).await.unwrap_err();
    assert_eq!(error, "there is no standby");
}

#[tokio::test]
async fn coordinators_are_tried_in_order() {
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = cluster(&format!("plan --coordinator http://{closed}")).await.unwrap_err();
    assert!(error.contains(&closed.to_string()) && error.contains("--coordinator"), "{error}");
    let url = serve(FakeControl).await;
    cluster(&format!("plan --coordinator http://{closed},{url}")).await.unwrap();
}

/// Does nothing but name the leader.
struct Standby(Option<LeaderAddress>);

impl Standby {
    fn refuse<T>(&self) -> Result<T, AdminError> {
        Err(AdminError::NotLeader(self.0.clone()))
    }
}

#[tonic::async_trait]
impl Control for Standby {
    async fn status(&self) -> Result<StatusResponse, AdminError> {
        self.refuse()
    }
    async fn drain(&self, _: ShardId) -> Result<DrainResponse, AdminError> {
        self.refuse()
    }
    async fn undrain(&self, _: ShardId) -> Result<(), AdminError> {
        self.refuse()
    }
    async fn rollout_restart(&self, _: RollingRestart) -> Result<RolloutEvents, AdminError> {
        self.refuse()
    }
    async fn plan(&self) -> Result<PlanResponse, AdminError> {
        self.refuse()
    }
    async fn loads(&self) -> Result<Loads, AdminError> {
        self.refuse()
    }
    async fn step_down(&self) -> Result<String, AdminError> {
        self.refuse()
    }
}

#[tokio::test]
async fn a_standby_s_word_about_the_leader_is_followed_once() {
    let leader = serve(FakeControl).await;
    let named = |grpc: String| Some(LeaderAddress { http: String::new(), grpc });
    let standby = serve(Standby(named(leader))).await;
    cluster(&format!("undrain local-1 --coordinator {standby}")).await.unwrap();
    let confused = serve(Standby(named(standby))).await;
    let error = cluster(&format!("undrain local-1 --coordinator {confused}")).await.unwrap_err();
    assert!(error.contains("does not lead") && error.contains("try again"), "{error}");
    let lost = serve(Standby(None)).await;
    let error = cluster(&format!("undrain local-1 --coordinator {lost}")).await.unwrap_err();
    assert!(error.contains("no leader is known"), "{error}");
}

/// Gives up its first rollout after one shard.
struct Interrupted(std::sync::atomic::AtomicBool);

#[tonic::async_trait]
impl Control for Interrupted {
    async fn status(&self) -> Result<StatusResponse, AdminError> {
        FakeControl.status().await
    }
    async fn drain(&self, shard: ShardId) -> Result<DrainResponse, AdminError> {
        FakeControl.drain(shard).await
    }
    async fn undrain(&self, shard: ShardId) -> Result<(), AdminError> {
        FakeControl.undrain(shard).await
    }
    async fn rollout_restart(&self, rollout: RollingRestart) -> Result<RolloutEvents, AdminError> {
        if self.0.swap(true, std::sync::atomic::Ordering::SeqCst) {
            assert_eq!(rollout.but, [ShardId("local-0".to_owned())], "it is restarted already");
            return FakeControl.rollout_restart(rollout).await;
        }
        let (sender, events) = mpsc::unbounded_channel();
        let phase = RolloutPhase::Returned.name().to_owned();
        let event = RolloutEvent { shard_id: "local-0".to_owned(), phase, done: 1, total: 3, stall_ms: 1 };
        sender.send(Ok(event)).unwrap();
        sender.send(Err(AdminError::GivenUp("another coordinator leads".to_owned()))).unwrap();
        Ok(events)
    }
    async fn plan(&self) -> Result<PlanResponse, AdminError> {
        FakeControl.plan().await
    }
    async fn loads(&self) -> Result<Loads, AdminError> {
        FakeControl.loads().await
    }
    async fn step_down(&self) -> Result<String, AdminError> {
        FakeControl.step_down().await
    }
}

#[tokio::test]
async fn a_rollout_goes_on_under_the_next_leader() {
    let url = serve(Interrupted(std::sync::atomic::AtomicBool::new(false))).await;
    cluster(&format!("rollout restart --coordinator {url}")).await.unwrap();
}

#[tokio::test]
async fn a_plan_names_successors() {
    let shown = plan::shown(&FakeControl.plan().await.unwrap());
    assert!(shown.contains("local-2 (loaded)") && shown.contains("local-2 (loads first)"), "{shown}");
    assert!(shown.ends_with("If a rank is lost now: local-2 takes it"), "{shown}");
}

#[test]
fn a_drain_says_who_took_over() {
    let answer = DrainResponse { successor: "local-2".to_owned(), stall_ms: 120, epoch: 8 };
    let said = drain::drained("local-1", &answer);
    assert_eq!(said, "local-1 is drained; local-2 has its rank since epoch 8; requests stood still for 120 ms");
    assert_eq!(drain::drained("local-1", &DrainResponse::default()), "local-1 is drained; it had no rank");
}

#[test]
fn a_status_is_a_table_that_tools_can_split() {
    let shown = status::shown(&testing::status());
    let cells = |start: &str| -> Vec<&str> {
        shown
            .lines()
            .find(|l| l.trim_start().starts_with(start))
            .unwrap()
            .split("  ")
            .map(str::trim)
            .filter(|c| !c.is_empty())
            .collect()
    };
    assert_eq!(
        cells("local-2"),
        [
            "local-2",
            "spare",
            "-",
            "1,0",
            "cpu (2 threads)",
            "127.0.0.1",
            "102",
            "80.0 MiB",
            "-",
            "170 MiB",
            "12 ms",
            "0.1.0"
        ]
    );
    assert_eq!(cells("c-1"), ["c-1", "leader", "127.0.0.1:8000", "127.0.0.1:50051"]);
    assert_eq!(cells("epoch"), ["epoch", "7"]);
    assert_eq!(cells("load"), ["load", "3 requests: 2 sequences run, 1 wait; 5 % of 2048 KV blocks in use"]);
}

#[test]
fn a_member_can_not_move_the_cursor() {
    let mut status = testing::status();
    status.members[0].device = "cpu\u{1b}[2J".to_owned();
    assert!(!status::shown(&status).contains('\u{1b}'));
}

#[test]
fn only_what_matters_is_a_change() {
    let before = testing::status();
    let mut now = testing::status();
    now.members[0].resident_bytes += 1;
    now.members[0].silent_ms += 30;
    now.load = None;
    assert_eq!(status::changes(&before, &now), Vec::<String>::new());
    now.members.remove(1);
    now.members[1].rank = Some(1);
    now.members[1].role = "rank".to_owned();
    now.epoch = 8;
    assert_eq!(
        status::changes(&before, &now),
        [
            "group: term 3, epoch 8, world size 2, serving",
            "shard local-1: gone",
            "shard local-2: rank 1, loaded 1,0, pid 102, version 0.1.0",
        ]
    );
}

#[test]
fn sizes_have_three_digits() {
    for (n, want) in [(0, "0 B"), (999, "999 B"), (1023, "1.00 KiB"), (80 << 20, "80.0 MiB"), (1 << 40, "1.00 TiB")] {
        assert_eq!(text::bytes(n), want);
    }
}
