//! `--probe`.

use std::process::ExitCode;

use afterimage::{FaultScope, FindingState, Probe};
use serde::Serialize;

use super::report::SCHEMA_VERSION;

/// Something is lacking.
const LACKING: u8 = 5;

#[derive(Serialize)]
struct ProbeReport<'p> {
    schema_version: u32,
    tool: &'static str,
    version: &'static str,
    /// Whether guests on KVM can be served.
    ok: bool,
    findings: Vec<FindingReport<'p>>,
}

#[derive(Serialize)]
struct FindingReport<'p> {
    name: &'p str,
    state: String,
    need: String,
    found: &'p str,
    meaning: &'p str,
    remedy: &'p str,
}

/// Prints what the machine has.
pub(super) fn show(json: bool) -> ExitCode {
    let probe = afterimage::probe();
    let is_ok = probe.missing(FaultScope::KernelAndUser).next().is_none();
    if json {
        println!("{}", to_json(&probe, is_ok));
    } else {
        print!("{probe}");
        let lacking = probe.findings.iter().filter(|it| it.state == FindingState::Lacking);
        println!(
            "{} things are lacking; {}",
            lacking.count(),
            if is_ok {
                "none that a guest on KVM needs"
            } else {
                "a guest on KVM cannot get its memory here"
            }
        );
    }
    if is_ok { ExitCode::SUCCESS } else { ExitCode::from(LACKING) }
}

fn to_json(probe: &Probe, ok: bool) -> String {
    let findings = probe.findings.iter().map(|it| FindingReport {
        name: &it.name,
        state: it.state.to_string(),
        need: it.need.to_string(),
        found: &it.found,
        meaning: &it.meaning,
        remedy: &it.remedy,
    });
    let report = ProbeReport {
        schema_version: SCHEMA_VERSION,
        tool: "page-server",
        version: env!("CARGO_PKG_VERSION"),
        ok,
        findings: findings.collect(),
    };
    serde_json::to_string(&report).expect("text and numbers are always JSON")
}
