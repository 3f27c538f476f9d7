//! Latency of a sum over two ranks, each a process of its own.
//!
//! `cargo run --release -p phalanx-kernels --example collective_latency [shm|tcp] [n ...]`

use std::{
    net::TcpListener,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use phalanx_kernels::collective::{Collective, CollectiveConfig, CollectiveError, PeerAddress, connect};

const CHILD: &str = "PHALANX_COLLECTIVE_LATENCY_ADDRESS";
const N_SUMS: usize = 3000;

fn config(rank: usize, address: &str) -> CollectiveConfig {
    let peer = |address: &str| PeerAddress { host_id: "here".to_owned(), address: address.to_owned() };
    CollectiveConfig {
        epoch: 1,
        rank,
        world_size: 2,
        secret: address.as_bytes().to_vec(),
        peers: vec![peer(address), peer("")],
        time_limit: Duration::from_secs(10),
    }
}

/// Microseconds of each sum of `n` numbers, sorted.
fn measure(collective: &mut dyn Collective, n: usize) -> Result<Vec<f64>, CollectiveError> {
    let mut values = vec![1_i64; n];
    let mut times = Vec::with_capacity(N_SUMS);
    for _ in 0..N_SUMS.min(200_000_000 / (n + 1)) {
        let start = Instant::now();
        collective.all_reduce(&mut values)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn bench(kind: &str, sizes: &[usize]) -> Result<(), Box<dyn std::error::Error>> {
    if let Ok(address) = std::env::var(CHILD) {
        let mut collective = connect(&config(1, &address), None, Some(kind))?;
        for n in sizes {
            measure(&mut *collective, *n)?;
        }
        return Ok(());
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let mut child =
        Command::new(std::env::current_exe()?).args(std::env::args_os().skip(1)).env(CHILD, &address).spawn()?;
    let mut collective = connect(&config(0, &address), Some(&listener), Some(kind))?;
    println!("{:>4} {:>8} {:>12} {:>12} {:>12}", "kind", "n i64", "p10 us", "median us", "p99 us");
    for n in sizes {
        let times = measure(&mut *collective, *n)?;
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        println!("{kind:>4} {n:>8} {:>12.1} {:>12.1} {:>12.1}", at(0.1), at(0.5), at(0.99));
    }
    drop(collective);
    child.wait()?;
    Ok(())
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let kind = arguments.next().unwrap_or_else(|| "shm".to_owned());
    let sizes: Vec<usize> = arguments.filter_map(|size| size.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![1, 576, 4096, 73_728] } else { sizes };
    match bench(&kind, &sizes) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
