//! Real coordinator and shard processes, on free ports, gone when the test ends.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rustix::process::{Pid, Signal, kill_process};

/// Longest that anything may take on a machine that does much else at the time. Reached only by a failing test.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

/// A binary of the workspace, as built by `cargo test --workspace` beside the test that runs.
///
/// # Panics
/// If it is missing or older than its sources: a test must never pass on yesterday's binary.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the running test has a path");
    let folder = test.parent().expect("a file lies in a folder");
    // Tests lie in target/PROFILE/deps, programs one higher.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let binary = folder.join(name);
    let built = modified(&binary)
        .unwrap_or_else(|| panic!("{} is missing: run `cargo test --workspace` or build it first", binary.display()));
    let own = if matches!(name, "coordinator" | "cluster") { Some("coordinator/src") } else { None };
    for folder in ["shard/src", "kernels/src", "cluster/src", "proto/proto", "proto/src"].into_iter().chain(own) {
        let newest = newest_source(&repository().join(folder));
        assert!(newest <= built, "{} is older than {folder}: run `cargo build --workspace` first", binary.display());
    }
    binary
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn newest_source(folder: &Path) -> SystemTime {
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in fs::read_dir(folder).expect("source folders are readable").flatten() {
        let path = entry.path();
        // Unit tests in files of their own are no part of a binary.
        if path.file_stem().and_then(|n| n.to_str()).is_some_and(|n| n == "tests" || n.ends_with("_tests")) {
            continue;
        }
        let time = if path.is_dir() { newest_source(&path) } else { modified(&path).unwrap_or(newest) };
        newest = newest.max(time);
    }
    newest
}

/// A process whose output is kept, killed when dropped.
pub struct Process {
    child: Child,
    log: Log,
    lines: mpsc::Receiver<String>,
    readers: [thread::JoinHandle<()>; 2],
}

/// Lines with the moments at which they came.
type Log = Arc<Mutex<Vec<(Instant, String)>>>;

impl Process {
    /// Starts a binary of the workspace with exactly these arguments and a clean `PHALANX_*` environment.
    pub fn start(name: &str, args: &[String]) -> Self {
        Self::start_in(&[], name, args)
    }

    /// The same as the argument of another program, such as `ip netns exec NAME`.
    pub fn start_in(wrapper: &[String], name: &str, args: &[String]) -> Self {
        let binary = binary(name);
        let mut command = match wrapper.split_first() {
            Some((program, rest)) => {
                let mut command = Command::new(program);
                command.args(rest).arg(binary);
                command
            }
            None => Command::new(binary),
        };
        command.args(args);
        Self::run(command)
    }

    /// Starts any command with a clean `PHALANX_*` environment.
    ///
    /// # Panics
    /// If it can't be started.
    pub fn run(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (key, _) in std::env::vars().filter(|(key, _)| key.starts_with("PHALANX_") && key != "PHALANX_CACHE") {
            command.env_remove(key);
        }
        let mut child = command.spawn().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        let log = Log::default();
        let (sender, lines) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let readers = [keep_lines(stdout, Arc::clone(&log), Some(sender)), keep_lines(stderr, Arc::clone(&log), None)];
        Self { child, log, lines, readers }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything that was written to stdout and stderr so far.
    pub fn log(&self) -> String {
        let log = self.log.lock().expect("readers do not panic");
        log.iter().flat_map(|(_, line)| [line.as_str(), "\n"]).collect()
    }

    /// Lines that came after a moment, with theirs.
    pub fn log_since(&self, moment: Instant) -> Vec<(Instant, String)> {
        let log = self.log.lock().expect("readers do not panic");
        log.iter().filter(|(at, _)| *at >= moment).cloned().collect()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("the child is ours")
    }

    /// Waits for a line of stdout that starts with `prefix`.
    ///
    /// # Panics
    /// If the process ends before, or after [`PATIENCE`]; with the log.
    pub fn wait_for_line(&mut self, prefix: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(Duration::from_millis(200)) {
                Ok(line) if line.starts_with(prefix) => return line,
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(e) => panic!("no line {prefix:?} ({e}); log:\n{}", self.log()),
            }
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        signal_pid(self.pid(), signal);
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// After [`PATIENCE`]; with the log.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the child is ours") {
                self.read_all();
                return status;
            }
            assert!(Instant::now() < deadline, "the process does not end; log:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the last lines of a process that has ended; not for ever: its children may hold the pipes.
    fn read_all(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("---- log of process {} ----\n{}", self.pid(), self.log());
        }
    }
}

fn keep_lines(
    reader: impl BufRead + Send + 'static,
    log: Log,
    sender: Option<mpsc::Sender<String>>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in reader.split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            log.lock().expect("readers do not panic").push((Instant::now(), line.clone()));
            if let Some(sender) = &sender {
                let _ = sender.send(line);
            }
        }
    })
}

/// Sends a signal to a process that may be gone.
pub fn signal_pid(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process lives (a zombie does not).
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !matches!(stat.rsplit(')').next().and_then(|s| s.trim().chars().next()), Some('Z' | 'X')))
}

/// Polls until `condition` holds.
///
/// # Panics
/// After [`PATIENCE`], naming `what`.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(25));
    }
}

/// A coordinator that serves, with its shards.
pub struct Cluster {
    /// The coordinator.
    pub process: Process,
    /// `http://HOST:PORT` of the OpenAI API, `https://` with a certificate.
    pub http: String,
    /// `http://HOST:PORT` of gRPC.
    pub grpc: String,
    // Removed after the processes are gone: declared last.
    _state: tempfile::TempDir,
}

impl Cluster {
    /// Starts `coordinator MODEL ARGS` on free ports and waits until it serves.
    pub fn start(model: &Path, args: &[&str]) -> Self {
        let mut cluster = Self::launch(model, args);
        cluster.wait_ready();
        cluster
    }

    /// Starts the same without waiting: the addresses are known after [`Cluster::wait_ready`] or [`Cluster::wait_listening`].
    pub fn launch(model: &Path, args: &[&str]) -> Self {
        let state = tempfile::tempdir().expect("a temporary folder can be made");
        let mut all = vec![model.display().to_string()];
        all.extend(["--port", "0", "--grpc-port", "0", "--threads-per-shard", "1"].map(str::to_owned));
        // Other stores keep nothing here.
        if !args.contains(&"--store") {
            all.extend(["--state-dir".to_owned(), state.path().display().to_string()]);
        }
        all.extend(args.iter().map(|a| (*a).to_owned()));
        let process = Process::start("coordinator", &all);
        Self { process, http: String::new(), grpc: String::new(), _state: state }
    }

    /// Waits until the coordinator says that it serves.
    pub fn wait_ready(&mut self) {
        let line = self.process.wait_for_line("phalanx ready ");
        self.take_addresses(&line);
    }

    /// Waits until the coordinator listens; it may not serve yet.
    pub fn wait_listening(&mut self) {
        let line = self.process.wait_for_line("phalanx listening ");
        self.take_addresses(&line);
    }

    fn take_addresses(&mut self, line: &str) {
        let word = |prefix: &str| line.split_whitespace().find_map(|w| w.strip_prefix(prefix));
        let http = ["http", "https"].map(|scheme| Some(format!("{scheme}://{}", word(&format!("{scheme}://"))?)));
        self.http = http.into_iter().flatten().next().unwrap_or_else(|| panic!("no URL in {line:?}"));
        self.grpc = format!("http://{}", word("grpc://").unwrap_or_else(|| panic!("no gRPC in {line:?}")));
    }

    /// Process ids of the shards that the coordinator started and that live.
    pub fn local_shards(&self) -> Vec<u32> {
        shards_of(self.process.pid())
    }

    /// Interrupts the coordinator as Ctrl-C does and waits for its end.
    pub fn interrupt(mut self) -> ExitStatus {
        self.process.signal(Signal::INT);
        self.process.wait()
    }
}

/// Live children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|p| p.parse::<u32>().ok()).filter(|p| is_alive(*p)));
    }
    found.sort_unstable();
    found
}

/// Live shards that a coordinator started. (It also has a process that tries grammars.)
pub fn shards_of(coordinator: u32) -> Vec<u32> {
    let is_shard = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).next() == Some(b"shard")
    };
    let mut found = children(coordinator);
    found.retain(is_shard);
    found
}

/// Names in `/dev/shm` that are ours.
pub fn shared_memory_files() -> Vec<String> {
    let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|n| n.contains("phalanx"));
    names.sort();
    names
}
