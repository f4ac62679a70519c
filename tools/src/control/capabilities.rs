//! What this side can do, and why not the rest.

use afterimage::{FaultScope, FindingState, Probe};
use serde_json::{Map, Value, json};

use super::board::Board;
use super::words::Verb;

/// Verbs with the reason where one is not possible, what both sides have agreed on, and what the
/// machine has. Takes some
/// milliseconds.
pub(super) fn tell(board: &Board) -> Value {
    let reasons = board.ask(|subject| Ok(Verb::ALL.map(|verb| subject.reason_against(verb))));
    let verb = |(at, verb): (usize, Verb)| {
        let reason = match &reasons {
            Ok(reasons) => reasons[at].clone(),
            Err(refusal) => Some(refusal.message.clone()),
        };
        (verb.name().to_owned(), json!({ "possible": reason.is_none(), "reason": reason }))
    };
    let verbs: Map<_, _> = Verb::ALL.into_iter().enumerate().map(verb).collect();
    let agreed = board.ask(|subject| Ok(subject.agreed())).ok().flatten();
    let session = agreed.map(|it| json!({ "checksums": it.checksums, "precopy": it.precopy }));
    json!({ "verbs": verbs, "session": session, "machine": machine(&afterimage::probe()) })
}

fn machine(probe: &Probe) -> Value {
    let findings = probe.findings.iter().map(|it| {
        json!({
            "name": it.name,
            "ok": it.state == FindingState::Ok,
            "need": it.need.to_string(),
            "found": it.found,
            "meaning": it.meaning,
            "remedy": it.remedy,
        })
    });
    json!({
        "serves_kvm": probe.missing(FaultScope::KernelAndUser).next().is_none(),
        "findings": findings.collect::<Vec<_>>(),
    })
}
