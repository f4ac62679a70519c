//! QEMU's machine protocol (QMP, `docs/interop/qmp-spec` of QEMU): commands and events.
//!
//! Invariant: no event is lost. What comes while a command is being answered is kept for
//! whoever waits for it, with the time at which QEMU says that it happened. No answer is taken for
//! that to another command, though QEMU may answer when nobody waits any more.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde_json::{Value, json};

use super::QmpError;
use super::line::{Deadline, Lines};

/// Something that happened in QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// What: `STOP`, for instance.
    pub name: String,
    /// By the host's wall clock, since 1970.
    pub at: Duration,
    /// What belongs to it.
    pub data: Value,
}

/// A connection to a monitor of QEMU.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    events: VecDeque<Event>,
    /// The number of the last command.
    asked: u64,
    /// As QEMU introduces itself.
    pub version: String,
}

impl Qmp {
    /// Takes the greeting, and leaves the state in which only capabilities are settled.
    ///
    /// # Errors
    /// [`QmpError`] if what speaks is no QMP.
    pub fn greet(mut lines: Lines, deadline: Deadline) -> Result<Self, QmpError> {
        let line = lines.next("greeting", deadline)?;
        let greeting: Value = parse(&lines, &line)?;
        let version = &greeting["QMP"]["version"];
        let number = |part| version["qemu"][part].as_u64().unwrap_or_default();
        let package = version["package"].as_str().unwrap_or_default();
        let version =
            format!("{}.{}.{} {package}", number("major"), number("minor"), number("micro"));
        let version = version.trim().to_owned();
        let mut qmp = Self { lines, events: VecDeque::new(), asked: 0, version };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Has a command carried out, and waits for its answer.
    ///
    /// # Errors
    /// [`QmpError`], also where QEMU refuses it.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let message = self.message_of(command, arguments);
        self.lines.send(&message)?;
        self.answer(command)
    }

    /// The same, with a descriptor beside it.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn execute_with(
        &mut self,
        command: &str,
        arguments: &Value,
        file: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        let message = self.message_of(command, arguments);
        self.lines.send_with(&message, file)?;
        self.answer(command)
    }

    fn message_of(&mut self, command: &str, arguments: &Value) -> String {
        self.asked += 1;
        json!({ "execute": command, "arguments": arguments, "id": self.asked }).to_string()
    }

    fn answer(&mut self, command: &str) -> Result<Value, QmpError> {
        let deadline = soon();
        loop {
            let mut message = self.message(&format!("answer to {command}"), deadline)?;
            if message.get("id").is_some_and(|id| *id != self.asked) {
                continue;
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                return Err(QmpError::Refused {
                    who: self.lines.name().to_owned(),
                    command: command.to_owned(),
                    reason: error["desc"].as_str().unwrap_or("no reason given").to_owned(),
                });
            }
            self.keep(&message);
        }
    }

    /// Switches capabilities of migration on.
    ///
    /// # Errors
    /// [`QmpError`] if QEMU does not know one.
    pub fn capabilities(&mut self, names: &[&str]) -> Result<(), QmpError> {
        let list: Vec<_> =
            names.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        self.execute("migrate-set-capabilities", &json!({ "capabilities": list })).map(drop)
    }

    /// The first event that `wanted` accepts; those before it are forgotten.
    ///
    /// # Errors
    /// [`QmpError`] if it does not come in time.
    pub fn event(
        &mut self,
        awaited: &str,
        deadline: Deadline,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        loop {
            while let Some(event) = self.events.pop_front() {
                tracing::debug!(who = self.lines.name(), name = event.name, data = %event.data);
                if wanted(&event) {
                    return Ok(event);
                }
            }
            let message = self.message(awaited, deadline)?;
            self.keep(&message);
        }
    }

    /// Forgets events that have come so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Which QEMU it is.
    #[must_use]
    pub fn name(&self) -> &str {
        self.lines.name()
    }

    fn message(&mut self, awaited: &str, deadline: Deadline) -> Result<Value, QmpError> {
        let line = self.lines.next(awaited, deadline)?;
        parse(&self.lines, &line)
    }

    fn keep(&mut self, message: &Value) {
        let Some(name) = message["event"].as_str() else { return };
        let time = |part| message["timestamp"][part].as_u64().unwrap_or_default();
        self.events.push_back(Event {
            name: name.to_owned(),
            at: Duration::from_secs(time("seconds")) + Duration::from_micros(time("microseconds")),
            data: message["data"].clone(),
        });
    }
}

/// The deadline of what a running QEMU answers by itself.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn parse(lines: &Lines, line: &str) -> Result<Value, QmpError> {
    serde_json::from_str(line).map_err(|_| lines.misunderstood(line, "a message of QMP"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::line::tests::pair;
    use super::*;

    const GREETING: &str =
        r#"{"QMP":{"version":{"qemu":{"micro":3,"minor":1,"major":11},"package":"P"}}}"#;

    #[test]
    fn events_that_come_before_an_answer_are_kept_with_their_time() {
        let (lines, mut other) = pair();
        let event = r#"{"event":"STOP","timestamp":{"seconds":7,"microseconds":5}}"#;
        writeln!(other, "{GREETING}\n{{\"return\":{{}}}}\n{event}\n{{\"return\":3}}").unwrap();
        let mut qmp = Qmp::greet(lines, soon()).unwrap();
        assert_eq!(qmp.version, "11.1.3 P");
        assert_eq!(qmp.execute("count", &json!({})).unwrap(), 3);
        let stop = qmp.event("STOP", soon(), |event| event.name == "STOP").unwrap();
        assert_eq!(stop.at, Duration::from_micros(7_000_005));
    }

    #[test]
    fn an_answer_that_comes_too_late_is_of_no_other_command() {
        let (lines, mut other) = pair();
        writeln!(other, "{GREETING}\n{{\"return\":{{}},\"id\":1}}").unwrap();
        let mut qmp = Qmp::greet(lines, soon()).unwrap();
        // Nobody waits any more for the first.
        writeln!(other, "{{\"return\":4,\"id\":1}}\n{{\"return\":3,\"id\":2}}").unwrap();
        assert_eq!(qmp.execute("count", &json!({})).unwrap(), 3);
    }

    #[test]
    fn a_refusal_says_who_what_and_why() {
        let (lines, mut other) = pair();
        let refusal = r#"{"error":{"class":"GenericError","desc":"not now"}}"#;
        writeln!(other, "{GREETING}\n{{\"return\":{{}}}}\n{refusal}").unwrap();
        let error = Qmp::greet(lines, soon()).unwrap().execute("migrate", &json!({})).unwrap_err();
        assert_eq!(error.to_string(), "a test refused migrate: not now");
    }
}
