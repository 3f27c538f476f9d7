//! A coordinator that a test plays, a shard in this process, and a small model as a file.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use futures::Stream;
use phalanx_cluster::checkpoint::{self, Checkpoint};
use phalanx_kernels::ops::Precision;
use phalanx_proto::dial::Dialer;
use phalanx_proto::v1::{
    Chunk, CoordinatorMessage, Failed, Form, Heartbeat, Hello, JournalEntry, JournalRequest, LeaderRequest,
    LeaderResponse, Loaded, Peer, Prepared, SequenceStart, Serve, ShardMessage, StatusRequest, StatusResponse,
    StepPlan, StepResult, Welcome,
    cluster_server::{Cluster, ClusterServer},
    coordinator_message::Message as ToShard,
    leadership_server::{Leadership, LeadershipServer},
    shard_message::Message as FromShard,
};
use phalanx_shard::{
    device::DeviceConfig,
    engine::{
        RankConfig,
        actor::{self, EngineHandle},
    },
    link::{End, Link},
    mirror::{Receiver, Store},
    offline::{LocalRequest, greedy},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::tiny::{TinyModel, prompt, small};

/// Longer than anything takes.
const AMPLE: Duration = Duration::from_secs(30);

/// A coordinator.
pub struct Played {
    pub address: String,
    pub says: Arc<Mutex<Says>>,
    shards: mpsc::UnboundedReceiver<Attached>,
}

/// What it answers.
#[derive(Default)]
pub struct Says {
    /// Who leads; nothing: it does not know the question.
    pub leader: Option<LeaderResponse>,
    /// Shards are refused, and sent there.
    pub refers_to: Option<String>,
    /// Of the last question.
    pub asked_with_term: Option<u64>,
}

struct Service {
    says: Arc<Mutex<Says>>,
    accepted: mpsc::UnboundedSender<Attached>,
}

impl Played {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let (accepted, shards) = mpsc::unbounded_channel();
        let says = Arc::new(Mutex::new(Says::default()));
        let service = || Service { says: says.clone(), accepted: accepted.clone() };
        let serve = tonic::transport::Server::builder()
            .add_service(ClusterServer::new(service()))
            .add_service(LeadershipServer::new(service()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(serve);
        Self { address, says, shards }
    }

    pub fn uri(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn says(&self, change: impl FnOnce(&mut Says)) {
        change(&mut self.says.lock().expect("no panic"));
    }

    /// The next shard that attaches; it said hello and was welcomed under this term.
    pub async fn shard(&mut self, term: u64) -> Attached {
        let mut attached = timeout(AMPLE, self.shards.recv()).await.expect("a shard in time").expect("a shard");
        attached.hello = attached.hello().await;
        assert_eq!(attached.hello.incarnation, 7);
        attached.send(ToShard::Welcome(Welcome { heartbeat_ms: 20, term, ..Welcome::default() }));
        attached
    }
}

/// Of a leader.
pub fn leads(term: u64, address: &str) -> LeaderResponse {
    LeaderResponse { term, is_leader: true, grpc_address: address.to_owned(), ..LeaderResponse::default() }
}

#[tonic::async_trait]
impl Leadership for Service {
    type JournalStream = Pin<Box<dyn Stream<Item = Result<JournalEntry, Status>> + Send>>;

    async fn leader(&self, request: Request<LeaderRequest>) -> Result<Response<LeaderResponse>, Status> {
        let mut says = self.says.lock().expect("no panic");
        says.asked_with_term = Some(request.into_inner().known_term);
        says.leader.clone().map(Response::new).ok_or_else(|| Status::unimplemented("not played"))
    }

    async fn journal(&self, _: Request<JournalRequest>) -> Result<Response<Self::JournalStream>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

/// A shard.
pub struct Shard {
    pub leave: watch::Sender<Option<String>>,
    pub engine: EngineHandle,
    _mirror: Receiver,
    link: JoinHandle<End>,
}

impl Shard {
    /// Of these coordinators.
    pub async fn start(coordinators: &[String]) -> Self {
        Self::patient(coordinators, AMPLE).await
    }

    /// The same; it waits so long for leave.
    pub async fn patient(coordinators: &[String], leave_limit: Duration) -> Self {
        let device = DeviceConfig { name: "cpu".into(), threads: 1, isa: None };
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let mirror = Receiver::start(([127, 0, 0, 1], 0).into(), Store::new(1 << 30)).expect("a port");
        let config = RankConfig {
            device,
            collective: None,
            listener,
            host_id: "here".into(),
            mirror: Some(mirror.store().clone()),
        };
        let engine = actor::start(config).await.expect("an engine");
        let hello = Hello {
            shard_id: "a".into(),
            incarnation: 7,
            host_id: "here".into(),
            mirror_address: mirror.address().to_string(),
            mirror_secret: mirror.secret().to_vec(),
            ..Hello::default()
        };
        let uris: Vec<_> = coordinators.iter().map(|text| text.parse().expect("a URI")).collect();
        let (leave, told_to_leave) = watch::channel(None);
        let link = Link::new(&uris, Dialer::default(), hello, &engine, told_to_leave, leave_limit).expect("a thread");
        Self { leave, engine, _mirror: mirror, link: tokio::spawn(link.run()) }
    }

    /// Why its link has ended.
    pub async fn end(self) -> End {
        let end = timeout(AMPLE, self.link).await.expect("the link ends").expect("the link does not panic");
        self.engine.actor.stop(None);
        let ended = tokio::task::spawn_blocking(|| self.engine.thread.join()).await.expect("a joined thread");
        assert!(matches!(ended, Ok(Ok(()))));
        end
    }
}

/// One attached shard, as the coordinator sees it.
pub struct Attached {
    from_shard: Streaming<ShardMessage>,
    to_shard: mpsc::UnboundedSender<Result<CoordinatorMessage, Status>>,
    pub hello: Hello,
    /// Its last sign of life.
    pub beat: Heartbeat,
    /// Whether it said that it loads something.
    pub has_loaded: bool,
}

#[tonic::async_trait]
impl Cluster for Service {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<CoordinatorMessage, Status>> + Send>>;

    async fn attach(&self, request: Request<Streaming<ShardMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        if let Some(leader) = &self.says.lock().expect("no panic").refers_to {
            let mut refusal = Status::failed_precondition("a standby");
            refusal.metadata_mut().insert("phalanx-leader", leader.parse().expect("a metadata value"));
            return Err(refusal);
        }
        let (to_shard, messages) = mpsc::unbounded_channel();
        let attached = Attached {
            from_shard: request.into_inner(),
            to_shard,
            hello: Hello::default(),
            beat: Heartbeat::default(),
            has_loaded: false,
        };
        self.accepted.send(attached).map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(messages))))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

impl Attached {
    pub fn send(&self, message: ToShard) {
        self.to_shard.send(Ok(CoordinatorMessage { message: Some(message) })).expect("the shard is attached");
    }

    /// The next message that is no sign of life or progress.
    pub async fn next(&mut self) -> FromShard {
        loop {
            let message = self.from_shard.message().await.expect("an open stream").expect("an open stream");
            match message.message.expect("a known message") {
                FromShard::Heartbeat(beat) => self.beat = beat,
                FromShard::LoadProgress(_) => self.has_loaded = true,
                other => return other,
            }
        }
    }

    pub async fn hello(&mut self) -> Hello {
        match self.next().await {
            FromShard::Hello(hello) => hello,
            other => panic!("want hello first, got {other:?}"),
        }
    }

    /// Takes the shard through loading to serving; returns the bytes of weights.
    pub async fn form(&mut self, form: Form) -> u64 {
        let epoch = form.epoch;
        let loaded = self.loaded(form).await;
        // 64 KiB of pages were asked for.
        assert_eq!(u64::from(loaded.kv_blocks), 65_536 / loaded.kv_bytes_per_block);
        assert_eq!(self.serve(epoch).await, 4 * loaded.kv_bytes_per_block);
        loaded.weight_bytes
    }

    /// Lets the shard take a rank.
    pub async fn loaded(&mut self, form: Form) -> Loaded {
        let epoch = form.epoch;
        self.send(ToShard::Form(form));
        let FromShard::Loaded(loaded) = self.next().await else { panic!("not loaded") };
        assert_eq!(loaded.epoch, epoch);
        loaded
    }

    /// Lets it serve with 4 blocks; returns their bytes.
    pub async fn serve(&mut self, epoch: u64) -> u64 {
        self.send(ToShard::Serve(Serve { epoch, kv_blocks: 4 }));
        let FromShard::Ready(ready) = self.next().await else { panic!("not ready") };
        ready.kv_bytes
    }

    pub async fn prepared(&mut self) -> Prepared {
        match self.next().await {
            FromShard::Prepared(prepared) => prepared,
            other => panic!("want a prepared slice, got {other:?}"),
        }
    }

    /// A sign of life that is as it should be; nothing else comes before it.
    pub async fn beat(&mut self, is_good: impl Fn(&Heartbeat) -> bool) {
        let wait = async {
            loop {
                match self.from_shard.message().await.expect("an open stream").and_then(|m| m.message) {
                    Some(FromShard::Heartbeat(beat)) if is_good(&beat) => return,
                    Some(FromShard::Heartbeat(_)) => {}
                    other => panic!("want a heartbeat, got {other:?}"),
                }
            }
        };
        timeout(AMPLE, wait).await.expect("a good heartbeat in time");
    }

    /// The shard has ended this stream.
    pub async fn closed(&mut self) {
        while let Ok(Some(_)) = timeout(AMPLE, self.from_shard.message()).await.expect("an end in time") {}
    }

    pub async fn result(&mut self) -> StepResult {
        match self.next().await {
            FromShard::StepResult(result) => result,
            other => panic!("want a result, got {other:?}"),
        }
    }

    pub async fn failed(&mut self) -> Failed {
        match self.next().await {
            FromShard::Failed(failed) => failed,
            other => panic!("want a failure, got {other:?}"),
        }
    }
}

/// A model in a file.
pub struct File {
    pub model: TinyModel,
    pub path: PathBuf,
    pub tokens: Vec<u32>,
    _folder: tempfile::TempDir,
}

impl File {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        let model = TinyModel::new("llama", true);
        write_gguf(&model, &path);
        Self { model, path, tokens: prompt(3, 10), _folder: folder }
    }

    /// The tokens that follow the prompt.
    pub fn continuation(&self, n: usize) -> Vec<u32> {
        let request = LocalRequest { prompt: self.tokens.clone(), max_tokens: n, sampling: greedy() };
        self.model.group(small(1, Precision::Auto)).generate(&[request]).expect("good plans").remove(0).tokens
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

pub fn form(epoch: u64, path: &Path) -> Form {
    Form {
        epoch,
        rank: 0,
        world_size: 1,
        model: path.to_str().expect("a path").to_owned(),
        model_hash: checkpoint::open(path).expect("a good file").identity().to_owned(),
        dtype: "auto".to_owned(),
        peers: vec![Peer { rank: 0, host_id: "here".to_owned(), weight: 1.0, ..Peer::default() }],
        // Of each test its own, as its file is: ranks of two tests that know the same secret would meet.
        collective_secret: path.as_os_str().as_encoded_bytes().to_vec(),
        block_size: 16,
        kv_cache_bytes: 65_536,
        max_step_rows: 64,
        max_sequences: 4,
        max_model_len: 64,
        ..Form::default()
    }
}

pub fn start(epoch: u64, tokens: &[u32]) -> StepPlan {
    StepPlan {
        epoch,
        step: 1,
        started: vec![SequenceStart {
            sequence: 0,
            token_ids: tokens.to_vec(),
            prompt_len: tokens.len() as u32,
            sampling: Some(greedy()),
            blocks: vec![0, 1],
            cache_root: Vec::new(),
        }],
        chunks: vec![Chunk { sequence: 0, start: 0, len: tokens.len() as u32, sample: true }],
        ..StepPlan::default()
    }
}

pub fn next(epoch: u64, step: u64, position: usize) -> StepPlan {
    let chunks = vec![Chunk { sequence: 0, start: position as u32, len: 1, sample: true }];
    StepPlan { epoch, step, chunks, ..StepPlan::default() }
}
