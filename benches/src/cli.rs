//! The command line.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use afterimage_tools::ram::{HUGE_PAGE_BYTES, HugePages};
use afterimage_tools::report_page;
use afterimage_tools::size::{Size, SizeError};
use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::error::BenchError;
use crate::interrupt;
use crate::machine::Machine;
use crate::page;
use crate::pair::Network;
use crate::qemu::{self, QemuError, QemuOptions};
use crate::report::{Report, SCHEMA_VERSION};
use crate::run::{self, Plan};
use crate::suite::{Row, Sizes, Step, Units, rows, sweeps};
use crate::unit::{Think, Unit};
use crate::worker;

/// The command by which this program starts itself to measure.
pub const WORKER: &str = "worker";
/// Its option to spoil what it serves.
pub const CORRUPT: &str = "--corrupt-one-byte";

const EXAMPLES: &str = "\
Examples:
  postcopy-bench --quick                            every row, in about seven minutes
  postcopy-bench                                    every row and the sweeps, larger guests
  postcopy-bench --only fault_idle_p99,cpu_per_gib  some rows
  postcopy-bench --network veth --json > today.json between two network namespaces
  postcopy-bench --quick --report pictures          the same, and a page to look at
  postcopy-bench qemu                               QEMU's own postcopy and the engine, with
                                                    one guest; bring it by benches/qemu/get
  postcopy-bench --list                             the rows, and what they say

Figures are ratios to floors of the same run. docs/benchmarking.md says what each means.

Exit status:
  0  all was measured and verified; rows may fall short
  1  a page had another content than it must have
  2  the command line is wrong
  3  the machine lacks something: rows are missing
  4  something failed, so that rows are missing; or the run was interrupted";

/// Measures the engine against the floors of the machine it runs on: source and destination
/// are two processes, floors and scenarios go by turns, and every page is verified.
#[derive(Clone, Debug, Parser)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[command(name = "postcopy-bench", version, after_help = EXAMPLES, max_term_width = 100)]
struct Options {
    /// Smaller guests, and no sweeps over streams, shapes, sizes and rates
    #[arg(long)]
    quick: bool,

    /// Only these rows, and what they are compared with
    #[arg(long, value_delimiter = ',', value_name = "ROW")]
    only: Vec<String>,

    /// How often everything is measured; medians of fewer than five say little
    #[arg(long, default_value_t = 5, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Guest memory of transfers and of faults under load, a multiple of 4M
    /// [default: 1G; 512M with --quick]
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<Size>,

    /// How both processes are connected: tcp (loopback), unix, veth (between two network
    /// namespaces; needs root) or veth:MBIT for a link of so many Mbit/s
    #[arg(long, default_value = "tcp", value_name = "KIND", value_parser = network)]
    network: Network,

    /// Write one JSON object instead of the table
    #[arg(long, global = true)]
    json: bool,

    /// Change one byte of each source, to see that it is found
    #[arg(long, hide = true)]
    corrupt_one_byte: bool,

    /// Write a page with pictures into this directory: one file, index.html
    #[arg(long, value_name = "DIR", global = true)]
    report: Option<PathBuf>,

    /// List the rows and what they say, and measure nothing
    #[arg(long)]
    list: bool,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Runs QEMU's own postcopy and the engine, with a Linux guest that dirties memory
    Qemu(QemuOptions),
    /// Measures a unit as another process says
    #[command(name = WORKER, hide = true)]
    Worker {
        /// Change one byte of the memory that it serves
        #[arg(long)]
        corrupt_one_byte: bool,
    },
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    // Warnings of engines that are cut off on purpose say nothing here.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    match &options.command {
        Some(Command::Qemu(peer)) => qemu(&options, peer),
        Some(Command::Worker { corrupt_one_byte }) => match worker::run(*corrupt_one_byte) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("postcopy-bench: a measuring process: {error}");
                ExitCode::from(4)
            }
        },
        None if options.list => list(),
        None => bench(&options),
    }
}

impl Options {
    fn sizes(&self) -> Sizes {
        let sizes = if self.quick { Sizes::QUICK } else { Sizes::FULL };
        self.memory.map_or(sizes, |memory| sizes.with_guest(memory.0))
    }
}

fn memory(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: SizeError| error.to_string())?;
    if size.0 == 0 || !size.0.is_multiple_of(2 * HUGE_PAGE_BYTES) {
        return Err("a multiple of 4M is needed".into());
    }
    Ok(size)
}

fn network(text: &str) -> Result<Network, String> {
    match text.split_once(':') {
        None if text == "tcp" => Ok(Network::Tcp),
        None if text == "unix" => Ok(Network::Unix),
        None if text == "veth" => Ok(Network::Veth(None)),
        Some(("veth", rate)) => match rate.parse::<u64>() {
            Ok(rate @ 1..=1_000_000) => Ok(Network::Veth(Some(rate * 1_000_000))),
            _ => Err(format!("{rate:?} is no rate: write Mbit/s, as veth:1000")),
        },
        _ => Err("write tcp, unix, veth or veth:MBIT".into()),
    }
}

fn list() -> ExitCode {
    let lines = rows::all(Sizes::FULL);
    let lines = lines.iter().map(|row| format!("{:<28} {}\n", row.name, row.what));
    print(&lines.collect::<String>());
    ExitCode::SUCCESS
}

fn print(text: &str) {
    // If nobody listens, the exit status still says how it went.
    let _ = io::stdout().write_all(text.as_bytes());
}

fn bench(options: &Options) -> ExitCode {
    let sizes = options.sizes();
    let rows = match chosen(rows::all(sizes), &options.only) {
        Ok(rows) => rows,
        Err(unknown) => {
            eprintln!(
                "postcopy-bench: there is no row {unknown:?}; `postcopy-bench --list` names them"
            );
            return ExitCode::from(2);
        }
    };
    if let Some(directory) = &options.report
        && let Err(error) = report_page::prepare(directory)
    {
        eprintln!("postcopy-bench: {}", BenchError::failed("--report", &error));
        return ExitCode::from(2);
    }
    let steps = steps(options, &rows, sizes);
    let once = once(options, &steps, sizes);
    // Where they are not to be had, rows of huge pages are missing, and the report says why.
    let _huge_pages = HugePages::reserve(huge_pages(steps.iter().chain(&once), sizes));
    let mut machine = Machine::look(options.network.to_string());
    let plan = Plan {
        rounds: options.rounds,
        network: options.network,
        corrupt_one_byte: options.corrupt_one_byte,
        shows_progress: !options.json,
    };
    interrupt::note_signals();
    let measurements = match run::run(&steps, &once, plan) {
        Ok(measurements) => measurements,
        Err(error @ BenchError::Wrong(_)) => return fail(options, &error, 1),
        Err(error) => return fail(options, &error, 4),
    };
    machine.look_again();
    let mut report = Report::of(&rows, &measurements, machine);
    let mut page_error = None;
    if let Some(directory) = &options.report {
        match page::write(directory, &report, &measurements, &Units::new(sizes)) {
            Ok(path) => report.report = Some(path),
            Err(error) => page_error = Some(BenchError::failed("--report", &error)),
        }
    }
    if options.json {
        // Numbers, strings and lists of them: this cannot fail.
        print(&(serde_json::to_string(&report).expect("plain data serialises") + "\n"));
    } else {
        print(&report.to_string());
    }
    if let Some(error) = page_error {
        eprintln!("postcopy-bench: {error}");
        return ExitCode::from(4);
    }
    match (report.failed.is_empty(), report.lacking.is_empty()) {
        (true, true) => ExitCode::SUCCESS,
        (true, false) => ExitCode::from(3),
        (false, _) => ExitCode::from(4),
    }
}

fn fail(options: &Options, error: &BenchError, status: u8) -> ExitCode {
    eprintln!("postcopy-bench: {error}");
    if options.json {
        let failure = serde_json::json!({
            "schema_version": SCHEMA_VERSION,
            "verified": false,
            "exit_status": status,
            "error": error.to_string(),
        });
        print(&format!("{failure}\n"));
    }
    ExitCode::from(status)
}

fn qemu(options: &Options, peer: &QemuOptions) -> ExitCode {
    if let Some(directory) = &options.report
        && let Err(error) = report_page::prepare(directory)
    {
        eprintln!("postcopy-bench: {}", BenchError::failed("--report", &error));
        return ExitCode::from(2);
    }
    let bar = run::spinner(!options.json, peer.to_string());
    let report = qemu::run(peer);
    bar.finish_and_clear();
    let mut report = match report {
        Ok(report) => report,
        Err(error) => {
            let status = match error {
                QemuError::Options(_) => 2,
                QemuError::Missing { .. } | QemuError::Unbuilt { .. } | QemuError::Room { .. } => 3,
                _ => 4,
            };
            let error = BenchError::failed("a guest under QEMU", &error);
            return fail(options, &error, status);
        }
    };
    let mut page_error = None;
    if let Some(directory) = &options.report {
        match qemu::page::write(directory, &report) {
            Ok(path) => report.report = Some(path),
            Err(error) => page_error = Some(BenchError::failed("--report", &error)),
        }
    }
    if options.json {
        let report = Versioned { schema_version: SCHEMA_VERSION, report: &report };
        // Numbers, strings and lists of them: this cannot fail.
        print(&(serde_json::to_string(&report).expect("plain data serialises") + "\n"));
    } else {
        print(&format!("{report}\n"));
    }
    if !report.verified {
        return ExitCode::from(1);
    }
    if let Some(error) = page_error {
        eprintln!("postcopy-bench: {error}");
        return ExitCode::from(4);
    }
    ExitCode::SUCCESS
}

/// A report with the version of its keys.
#[derive(Serialize)]
struct Versioned<'a, T> {
    schema_version: u32,
    #[serde(flatten)]
    report: &'a T,
}

fn chosen(rows: Vec<Row>, only: &[String]) -> Result<Vec<Row>, String> {
    if let Some(unknown) = only.iter().find(|name| rows.iter().all(|row| row.name != **name)) {
        return Err(unknown.clone());
    }
    let is_chosen = |row: &Row| only.is_empty() || only.iter().any(|name| name == row.name);
    Ok(rows.into_iter().filter(is_chosen).collect())
}

/// What is compared stands side by side, as the rows name it.
fn steps(options: &Options, rows: &[Row], sizes: Sizes) -> Vec<Step> {
    let mut steps: Vec<Step> = rows.iter().flat_map(|row| row.steps.clone()).collect();
    if options.only.is_empty() {
        let units = Units::new(sizes);
        steps.extend(units.floors());
        if !options.quick {
            steps.extend(sweeps::all(&units));
        }
    }
    let mut seen = BTreeSet::new();
    steps.retain(|step| seen.insert(*step));
    steps
}

/// What only pictures need: measured once where a run is to be quick.
fn once(options: &Options, steps: &[Step], sizes: Sizes) -> Vec<Step> {
    if options.report.is_none() {
        return Vec::new();
    }
    let units = Units::new(sizes);
    let mut once = vec![Unit::Trace(units.loaded(Think::BackToBack)).into()];
    if options.only.is_empty() {
        once.extend([sweeps::rates(), sweeps::streams(&units), sweeps::switchover()].concat());
    }
    once.retain(|step| !steps.contains(step));
    once
}

/// Huge pages for both sides, and at the source for every shape.
fn huge_pages<'a>(steps: impl Iterator<Item = &'a Step>, sizes: Sizes) -> u64 {
    let plans = steps.filter_map(|step| step.unit.huge_memory());
    let plans: BTreeSet<_> = plans.collect();
    if plans.is_empty() {
        return 0;
    }
    (plans.len() as u64 + 1) * sizes.huge_guest / HUGE_PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }

    #[test]
    fn every_row_has_a_name_of_its_own_and_can_be_chosen() {
        let rows = rows::all(Sizes::QUICK);
        let names: BTreeSet<_> = rows.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), rows.len());
        let some = chosen(rows, &["cpu_per_gib".into()]).unwrap();
        assert_eq!(some.len(), 1);
        assert_eq!(chosen(some, &["nothing".into()]).unwrap_err(), "nothing");
    }

    #[test]
    fn networks_are_understood() {
        assert_eq!(network("veth:1000"), Ok(Network::Veth(Some(1_000_000_000))));
        assert_eq!(network("unix"), Ok(Network::Unix));
        assert!(network("veth:0").is_err() && network("carrier pigeon").is_err());
    }
}
