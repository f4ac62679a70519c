//! A moment of a migration as lines of text.

use std::fmt::Write;

use serde_json::Value;

use crate::size::Size;

/// The widest bar.
const WIDTH: u64 = 40;

/// How fast things go, from two moments.
#[derive(Debug, Default)]
pub(super) struct Rate {
    before: Option<(u64, u64)>,
}

impl Rate {
    /// Bytes a second since the last time, if there was one.
    pub(super) fn next(&mut self, at_us: u64, bytes: u64) -> Option<f64> {
        let before = self.before.replace((at_us, bytes));
        let (before_us, before_bytes) = before.filter(|(before_us, _)| *before_us < at_us)?;
        let grown = bytes.saturating_sub(before_bytes);
        Some(grown as f64 * 1e6 / (at_us - before_us) as f64)
    }
}

/// What a moment is made of.
#[derive(Debug)]
pub(super) struct Moment<'a> {
    state: &'a Value,
    total: u64,
    present: u64,
}

impl<'a> Moment<'a> {
    /// Of a state; `None` if nothing has been counted yet.
    pub(super) fn of(state: &'a Value) -> Option<Self> {
        let total = state["counts"]["pages_total"].as_u64().filter(|total| *total > 0)?;
        let missing = state["counts"]["pages_missing"].as_u64().unwrap_or(total);
        Some(Self { state, total, present: total - missing.min(total) })
    }

    pub(super) fn at_us(&self) -> u64 {
        self.state["at_us"].as_u64().unwrap_or(0)
    }

    fn memory(&self) -> u64 {
        self.state["memory_bytes"].as_u64().unwrap_or(0)
    }

    /// Of guest memory, at the destination.
    pub(super) fn bytes(&self) -> u64 {
        let share = u128::from(self.memory()) * u128::from(self.present) / u128::from(self.total);
        share as u64
    }

    /// In one line.
    pub(super) fn line(&self, rate: Option<f64>) -> String {
        let text = |name: &str| self.state[name].as_str().unwrap_or("?").to_owned();
        let mut line = format!(
            "{:8.1} s  {:<11} {:<6} {:5.1} %  {} of {}",
            self.at_us() as f64 / 1e6,
            text("phase"),
            text("link"),
            self.present as f64 * 100.0 / self.total as f64,
            Size(self.bytes()),
            Size(self.memory()),
        );
        if let Some(rate) = rate {
            let _ = write!(line, "  {}/s", Size(rate as u64));
            let missing = self.memory().saturating_sub(self.bytes());
            if rate >= 1.0 && missing > 0 {
                let _ = write!(line, "  {:.0} s to go", (missing as f64 / rate).ceil());
            }
        }
        line
    }

    /// As a picture in lines.
    pub(super) fn picture(&self, rate: Option<f64>) -> String {
        let counts = &self.state["counts"];
        let bar = bar(self.present, self.total);
        let mut shown = format!("  [{bar:<width$}]\n{}\n", self.line(rate), width = WIDTH as usize);
        let of = |name: &str| counts[name].as_u64().unwrap_or(0);
        let _ = writeln!(
            shown,
            "  pages    {} by fault, {} in background, {} zero, {} missing",
            of("pages_requested"),
            of("pages_background"),
            of("pages_zero"),
            of("pages_missing"),
        );
        if let Some(bandwidth) = self.state["parameters"]["bandwidth"].as_str() {
            let _ = writeln!(shown, "  limit    {bandwidth}");
        }
        if let Some(dirty) = counts["dirty_bytes_per_s"].as_f64() {
            let _ = writeln!(shown, "  dirtied  {}/s", Size(dirty as u64));
        }
        if let Some(latency) = counts.get("fault_latency_us") {
            shown += &histogram(latency);
        }
        shown
    }
}

/// Fault latencies by powers of two, a line each.
pub(super) fn histogram(latency: &Value) -> String {
    let buckets: Vec<_> =
        latency["buckets"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
    let most = buckets.iter().copied().max().unwrap_or(0);
    let mut shown = String::new();
    let of = |name: &str| latency[name].as_f64().unwrap_or(0.0);
    if most == 0 {
        return shown;
    }
    let _ = writeln!(
        shown,
        "  faults   {:.0}; half in {:.0} µs, 99 % in {:.0} µs, all in {:.0} µs",
        of("count"),
        of("p50"),
        of("p99"),
        of("max"),
    );
    let first = buckets.iter().position(|count| *count > 0).unwrap_or(0);
    for (at, count) in buckets.iter().enumerate().skip(first) {
        let below = 1_u64 << (at + 1).min(63);
        let _ = writeln!(shown, "  < {below:>9} µs {count:>9} {}", bar(*count, most));
    }
    shown
}

/// A bar for a part of the whole; something is never shown as nothing.
fn bar(part: u64, whole: u64) -> String {
    let length = u128::from(part) * u128::from(WIDTH) / u128::from(whole.max(1));
    "#".repeat((length as usize).max(usize::from(part > 0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_moment_tells_how_far_and_how_long() {
        let state = json!({
            "at_us": 2_000_000, "phase": "running", "link": "up", "memory_bytes": 4096 * 1000,
            "parameters": {"bandwidth": "1048576"},
            "counts": {
                "pages_total": 1000, "pages_missing": 250, "pages_requested": 50,
                "fault_latency_us": {
                    "count": 3, "p50": 5.0, "p99": 9.0, "max": 9.5, "buckets": [0, 0, 2, 1]
                },
            },
        });
        let moment = Moment::of(&state).unwrap();
        assert_eq!(moment.bytes(), 4096 * 750);
        let mut rate = Rate::default();
        assert_eq!(rate.next(1_000_000, 0), None);
        let rate = rate.next(moment.at_us(), moment.bytes());
        let line = moment.line(rate);
        assert!(line.contains("75.0 %") && line.contains("1 s to go"), "{line}");
        let picture = moment.picture(rate);
        assert!(picture.contains("<        16 µs         1 ####################\n"), "{picture}");
        assert!(picture.contains("50 by fault"), "{picture}");
    }

    #[test]
    fn nothing_is_shown_of_what_has_not_begun() {
        assert!(Moment::of(&json!({"counts": null})).is_none());
        assert_eq!(histogram(&json!({"buckets": []})), "");
    }
}
