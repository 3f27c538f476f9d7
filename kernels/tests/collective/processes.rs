//! Ranks that are processes, one of which is killed.

use super::*;

const CHILD: &str = "PHALANX_TEST_COLLECTIVE_CHILD";

/// This binary again, as a rank that sums until an error.
fn spawn_child(kind: &str, config: &CollectiveConfig) -> Child {
    let peers: Vec<_> = config.peers.iter().map(|peer| peer.address.as_str()).collect();
    Command::new(std::env::current_exe().expect("Linux knows"))
        .args(["--exact", "processes::runs_as_a_child", "--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{kind} {} {} {}", config.epoch, config.rank, peers.join(",")))
        .stdout(Stdio::piped())
        .spawn()
        .expect("this binary runs")
}

// Does nothing unless a test below started this process.
#[test]
fn runs_as_a_child() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let [kind, epoch, rank, peers] = order.split(' ').collect::<Vec<_>>()[..] else { panic!("orders: {order}") };
    let peers: Vec<_> =
        peers.split(',').map(|address| PeerAddress { host_id: "here".into(), address: address.into() }).collect();
    let config = CollectiveConfig {
        epoch: epoch.parse().expect("a number"),
        rank: rank.parse().expect("a number"),
        world_size: peers.len(),
        secret: b"the secret of this epoch".to_vec(),
        peers,
        time_limit: AMPLE,
    };
    let mut collective = connect(&config, None, Some(kind)).expect("the parent is there");
    let error = loop {
        let mut values = vec![config.rank as i64; 576];
        if let Err(error) = collective.all_reduce(&mut values) {
            break error;
        }
        assert!(values.iter().all(|value| *value == (0..config.world_size as i64).sum()));
    };
    println!("\nended with {error:?}");
}

#[test]
fn a_killed_process_is_lost_at_once() {
    for (kind, world_size) in [("shm", 2), ("shm", 3), ("tcp", 2)] {
        let group = members(world_size, AMPLE);
        let mut children: Vec<_> = group[1..].iter().map(|member| spawn_child(kind, &member.config)).collect();
        let mut collective = connect(&group[0].config, Some(&group[0].listener), Some(kind)).expect("children come");
        for _ in 0..50 {
            let mut values = vec![0; 576];
            collective.all_reduce(&mut values).expect("children sum");
            assert!(values.iter().all(|value| *value == (0..world_size as i64).sum()));
        }
        // SIGKILL, and not reaped: it stays a zombie while we look.
        children[0].kill().expect("it runs");
        let start = Instant::now();
        let error = loop {
            if let Err(error) = collective.all_reduce(&mut [0; 576]) {
                break error;
            }
        };
        assert!(start.elapsed() < SOON, "{kind}: {:?}", start.elapsed());
        assert!(matches!(error, CollectiveError::PeerLost { .. }), "{kind}: {error:?}");
        drop(collective);
        assert_eq!(shared_memory_files(group[0].config.epoch), Vec::<String>::new());
        children[0].wait().expect("it was killed");
        // The other child noticed as well, and says so.
        for child in &mut children[1..] {
            let output = BufReader::new(child.stdout.take().expect("piped"));
            let lines: Vec<_> = output.lines().map_while(Result::ok).collect();
            assert!(lines.iter().any(|line| line.starts_with("ended with PeerLost")), "{lines:?}");
            assert!(child.wait().expect("it ended").success());
        }
    }
}
