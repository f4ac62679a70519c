//! Answers in words.

use std::fmt::Write;

use serde_json::Value;

use super::options::Command;
use super::view;
use crate::control::Greeting;

/// An answer to a command, in lines.
pub(super) fn show(command: &Command, greeting: &Greeting, answer: &Value) -> String {
    match command {
        Command::Query => query(greeting, answer),
        Command::Capabilities => capabilities(answer),
        _ => "done\n".to_owned(),
    }
}

fn query(greeting: &Greeting, state: &Value) -> String {
    let text = |name: &str| state[name].as_str().unwrap_or("none yet").to_owned();
    let mut shown = format!(
        "{} {} ({})\n  session    {}\n  phase      {}\n  link       {}\n",
        greeting.tool,
        greeting.version,
        greeting.role,
        text("session"),
        text("phase"),
        text("link"),
    );
    for (name, value) in state["parameters"].as_object().into_iter().flatten() {
        let _ = writeln!(shown, "  {name:<10} {}", plain(value));
    }
    for (name, value) in state["counts"].as_object().into_iter().flatten() {
        if !value.is_object() {
            let _ = writeln!(shown, "  {name:<18} {}", plain(value));
        }
    }
    if let Some(latency) = state["counts"].get("fault_latency_us") {
        shown += &view::histogram(latency);
    }
    if let Some(message) = state["trouble"]["message"].as_str() {
        let _ = writeln!(shown, "  trouble    {message}");
    }
    shown
}

fn capabilities(answer: &Value) -> String {
    let mut shown = String::new();
    for (verb, can) in answer["verbs"].as_object().into_iter().flatten() {
        let reason = can["reason"].as_str();
        let _ = match reason {
            None => writeln!(shown, "  {verb:<11} yes"),
            Some(reason) => writeln!(shown, "  {verb:<11} no: {reason}"),
        };
    }
    for finding in answer["machine"]["findings"].as_array().into_iter().flatten() {
        if finding["ok"] == false {
            let of = |name: &str| plain(&finding[name]);
            let _ = writeln!(shown, "  lacking: {}: {}; {}", of("name"), of("found"), of("remedy"));
        }
    }
    shown
}

/// Text without its quotation marks.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
