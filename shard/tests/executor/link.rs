//! A whole shard, link and engine, under a coordinator that the test plays.

use std::{net::TcpListener, path::Path, pin::Pin, time::Duration};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use futures::Stream;
use phalanx_cluster::checkpoint::{self, Checkpoint};
use phalanx_kernels::ops::Precision;
use phalanx_proto::v1::{
    Chunk, CoordinatorMessage, Failed, Form, Hello, Peer, Prepare, Retire, SequenceStart, Serve, ShardMessage,
    Shutdown, StatusRequest, StatusResponse, StepPlan, StepResult, Welcome,
    cluster_server::{Cluster, ClusterServer},
    coordinator_message::Message as ToShard,
    shard_message::Message as FromShard,
};
use phalanx_shard::{
    device::DeviceConfig,
    engine::{RankConfig, actor},
    link::{End, Link},
    offline::{LocalRequest, greedy},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::{
    StreamExt,
    wrappers::{TcpListenerStream, UnboundedReceiverStream},
};
use tonic::{Request, Response, Status, Streaming};

use crate::tiny::{TinyModel, prompt, small};

/// One attached shard, as the coordinator sees it.
struct Attached {
    from_shard: Streaming<ShardMessage>,
    to_shard: mpsc::UnboundedSender<Result<CoordinatorMessage, Status>>,
}

/// Accepts shards and gives them to the test.
struct Accept(mpsc::UnboundedSender<Attached>);

#[tonic::async_trait]
impl Cluster for Accept {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<CoordinatorMessage, Status>> + Send>>;

    async fn attach(&self, request: Request<Streaming<ShardMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let (to_shard, messages) = mpsc::unbounded_channel();
        let attached = Attached { from_shard: request.into_inner(), to_shard };
        self.0.send(attached).map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(messages))))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

impl Attached {
    fn send(&self, message: ToShard) {
        self.to_shard.send(Ok(CoordinatorMessage { message: Some(message) })).expect("the shard is attached");
    }

    /// The next message that is no sign of life or progress.
    async fn next(&mut self) -> FromShard {
        loop {
            let message = self.from_shard.message().await.expect("an open stream").expect("an open stream");
            match message.message.expect("a known message") {
                FromShard::Heartbeat(_) | FromShard::LoadProgress(_) => {}
                other => return other,
            }
        }
    }

    async fn hello(&mut self) -> Hello {
        match self.next().await {
            FromShard::Hello(hello) => hello,
            other => panic!("want hello first, got {other:?}"),
        }
    }

    /// Takes the shard through loading to serving; returns the bytes of weights.
    async fn form(&mut self, form: Form) -> u64 {
        let epoch = form.epoch;
        self.send(ToShard::Form(form));
        let FromShard::Loaded(loaded) = self.next().await else { panic!("not loaded") };
        assert_eq!(loaded.epoch, epoch);
        // 64 KiB of pages were asked for.
        assert_eq!(u64::from(loaded.kv_blocks), 65_536 / loaded.kv_bytes_per_block);
        self.send(ToShard::Serve(Serve { epoch, kv_blocks: 4 }));
        let FromShard::Ready(ready) = self.next().await else { panic!("not ready") };
        assert_eq!(ready.kv_bytes, 4 * loaded.kv_bytes_per_block);
        loaded.weight_bytes
    }

    async fn result(&mut self) -> StepResult {
        match self.next().await {
            FromShard::StepResult(result) => result,
            other => panic!("want a result, got {other:?}"),
        }
    }

    async fn failed(&mut self) -> Failed {
        match self.next().await {
            FromShard::Failed(failed) => failed,
            other => panic!("want a failure, got {other:?}"),
        }
    }
}

/// Writes the model as a GGUF file.
fn write_gguf(model: &TinyModel, path: &Path) {
    let c = &model.config;
    let number = |n: usize| gguf_file::Value::U32(n as u32);
    let metadata = [
        ("general.architecture", gguf_file::Value::String(c.architecture.clone())),
        ("llama.block_count", number(c.n_layers)),
        ("llama.embedding_length", number(c.hidden)),
        ("llama.feed_forward_length", number(c.ffn)),
        ("llama.attention.head_count", number(c.n_heads)),
        ("llama.attention.head_count_kv", number(c.n_kv_heads)),
        ("llama.attention.key_length", number(c.head_dim)),
        ("llama.attention.value_length", number(c.head_dim)),
        ("llama.rope.dimension_count", number(c.rope.dims)),
        ("llama.context_length", number(c.context_length)),
        ("llama.attention.layer_norm_rms_epsilon", gguf_file::Value::F32(c.norm_eps)),
    ];
    let metadata: Vec<(&str, &gguf_file::Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(String, QTensor)> = model
        .tensors()
        .iter()
        .map(|info| {
            let values = model.values[&info.name].clone();
            let tensor = match info.rows {
                1 => Tensor::from_vec(values, info.cols, &Device::Cpu),
                rows => Tensor::from_vec(values, (rows, info.cols), &Device::Cpu),
            };
            let tensor = QTensor::quantize(&tensor.expect("a tensor"), GgmlDType::F32).expect("a tensor");
            (info.name.clone(), tensor)
        })
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::fs::File::create(path).expect("a file");
    gguf_file::write(&mut file, &metadata, &tensors).expect("a written file");
}

fn form(epoch: u64, path: &Path, host_id: &str) -> Form {
    Form {
        epoch,
        rank: 0,
        world_size: 1,
        model: path.to_str().expect("a path").to_owned(),
        model_hash: checkpoint::open(path).expect("a good file").identity().to_owned(),
        dtype: "auto".to_owned(),
        peers: vec![Peer { rank: 0, host_id: host_id.to_owned(), weight: 1.0, ..Peer::default() }],
        collective_secret: vec![1; 16],
        block_size: 16,
        kv_cache_bytes: 65_536,
        max_step_rows: 64,
        max_sequences: 4,
        max_model_len: 64,
        ..Form::default()
    }
}

fn start(epoch: u64, tokens: &[u32]) -> StepPlan {
    StepPlan {
        epoch,
        step: 1,
        started: vec![SequenceStart {
            sequence: 0,
            token_ids: tokens.to_vec(),
            prompt_len: tokens.len() as u32,
            sampling: Some(greedy()),
            blocks: vec![0, 1],
        }],
        chunks: vec![Chunk { sequence: 0, start: 0, len: tokens.len() as u32, sample: true }],
        ..StepPlan::default()
    }
}

fn next(epoch: u64, step: u64, position: usize) -> StepPlan {
    let chunks = vec![Chunk { sequence: 0, start: position as u32, len: 1, sample: true }];
    StepPlan { epoch, step, chunks, ..StepPlan::default() }
}

#[tokio::test]
async fn a_shard_serves_fails_reattaches_and_shuts_down() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tiny.gguf");
    let model = TinyModel::new("llama", true);
    write_gguf(&model, &path);
    let tokens = prompt(3, 10);
    let request = LocalRequest { prompt: tokens.clone(), max_tokens: 3, sampling: greedy() };
    let want = model.group(small(1, Precision::Auto)).generate(&[request]).expect("good plans").remove(0).tokens;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (accepted, mut shards) = mpsc::unbounded_channel();
    let serve = tonic::transport::Server::builder()
        .add_service(ClusterServer::new(Accept(accepted)))
        .serve_with_incoming(TcpListenerStream::new(listener).filter(|_| true));
    tokio::spawn(serve);

    let device = DeviceConfig { name: "cpu".into(), threads: 1, isa: None };
    let collective_listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let config = RankConfig { device, collective: None, listener: collective_listener, host_id: "here".into() };
    let engine = actor::start(config).await.expect("an engine");
    let hello = Hello { shard_id: "a".into(), incarnation: 7, host_id: "here".into(), ..Hello::default() };
    // The first coordinator does not exist: the second is taken.
    let uris = ["http://127.0.0.1:1".parse().expect("a URI"), format!("http://{address}").parse().expect("a URI")];
    let (_leave, told_to_leave) = watch::channel(None);
    let link = Link::new(&uris, hello, &engine, told_to_leave, Duration::from_secs(30)).expect("a thread");
    let shard = tokio::spawn(link.run());

    let mut attached = shards.recv().await.expect("a shard");
    assert_eq!(attached.hello().await.incarnation, 7);
    attached.send(ToShard::Welcome(Welcome { heartbeat_ms: 20, ..Welcome::default() }));
    let weight_bytes = attached.form(form(3, &path, "here")).await;

    // Both plans are sent before the first result: the shard knows the token that it samples.
    attached.send(ToShard::StepPlan(start(3, &tokens)));
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
    let other = Form { model_hash: "0".repeat(64), ..form(4, &path, "here") };
    attached.send(ToShard::Form(other));
    assert!(attached.failed().await.error.contains("SHA-256"));
    let nowhere = Form { model: "/does/not/exist.gguf".into(), ..form(5, &path, "here") };
    attached.send(ToShard::Form(nowhere));
    assert!(attached.failed().await.error.contains("/does/not/exist.gguf"));

    // A new group has no sequences, and the same weights.
    assert_eq!(attached.form(form(6, &path, "here")).await, weight_bytes);
    attached.send(ToShard::StepPlan(StepPlan { epoch: 6, ..next(6, 1, tokens.len()) }));
    assert!(attached.failed().await.error.contains("not known"));
    attached.send(ToShard::Retire(Retire { epoch: 6, keep_kv: false }));

    // A slice that is loaded already is prepared at once.
    attached.send(ToShard::Prepare(Prepare { form: Some(form(6, &path, "here")), ranks: vec![0] }));
    let FromShard::Prepared(prepared) = attached.next().await else { panic!("not prepared") };
    assert_eq!((prepared.epoch, prepared.rank, prepared.weight_bytes), (6, 0, weight_bytes));

    // Pages that are kept stand for what was computed in the epoch before.
    attached.form(form(7, &path, "here")).await;
    attached.send(ToShard::StepPlan(start(7, &tokens)));
    assert_eq!(attached.result().await.samples[0].token_id, want[0]);
    attached.send(ToShard::Retire(Retire { epoch: 7, keep_kv: true }));
    attached.send(ToShard::Form(Form { keep_kv_of_epoch: 7, ..form(8, &path, "here") }));
    let FromShard::Loaded(loaded) = attached.next().await else { panic!("not loaded") };
    assert_eq!((loaded.kv_kept_through_step, loaded.kv_blocks), (Some(1), 4));
    attached.send(ToShard::Serve(Serve { epoch: 8, kv_blocks: 4 }));
    let FromShard::Ready(_) = attached.next().await else { panic!("not ready") };
    let known: Vec<u32> = tokens.iter().chain(&want[..1]).copied().collect();
    let mut plan = start(8, &known);
    plan.started[0].prompt_len = tokens.len() as u32;
    plan.chunks = vec![Chunk { sequence: 0, start: tokens.len() as u32, len: 1, sample: true }];
    attached.send(ToShard::StepPlan(plan));
    assert_eq!(attached.result().await.samples[0].token_id, want[1]);

    // The stream breaks: the shard comes again, and epochs may count anew.
    drop(attached);
    let mut attached = shards.recv().await.expect("the shard again");
    attached.hello().await;
    assert_eq!(attached.form(form(1, &path, "here")).await, weight_bytes);
    attached.send(ToShard::StepPlan(start(1, &tokens)));
    assert_eq!(attached.result().await.samples[0].token_id, want[0]);

    attached.send(ToShard::Shutdown(Shutdown { reason: "the test is over".into() }));
    let end = tokio::time::timeout(Duration::from_secs(20), shard)
        .await
        .expect("the link ends")
        .expect("the link does not panic");
    assert_eq!(end, End::Shutdown("the test is over".to_owned()));
    engine.actor.stop(None);
    let ended = tokio::task::spawn_blocking(|| engine.thread.join()).await.expect("a joined thread");
    assert!(matches!(ended, Ok(Ok(()))));
}
