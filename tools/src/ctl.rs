//! `afterimage-ctl`: drives and watches a migration by its control socket.
//!
//! Answers for the command line, for how answers are shown, and for the live view; what is asked
//! for is done on the other side ([`control`](crate::control)).

mod connection;
mod options;
mod show;
mod view;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

use crate::control::Code;
use connection::{Connection, Failure};
use options::{Command, Options};

/// It was not possible, or nobody is there.
const FAILED: u8 = 1;
/// The command line, or what the server calls a bad request.
const USAGE: u8 = 2;
/// Not in this state or role.
const NOT_NOW: u8 = 3;

/// Runs the command with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(status) => status,
        Err(failure) => {
            eprintln!("afterimage-ctl: {failure}");
            ExitCode::from(match failure {
                Failure::Refused(refusal) => match refusal.code {
                    Code::NotNow => NOT_NOW,
                    Code::BadRequest | Code::Unknown => USAGE,
                    Code::Failed => FAILED,
                },
                Failure::Usage(_) => USAGE,
                Failure::Connection(_) => FAILED,
            })
        }
    }
}

fn run(options: &Options) -> Result<ExitCode, Failure> {
    let mut connection = Connection::open(&options.socket, options.timeout)?;
    let answer = connection.ask(request(&options.command))?;
    if let Command::Watch(how) = &options.command {
        return watch::watch(&mut connection, &answer, how, options.json);
    }
    if options.json {
        println!("{answer}");
    } else {
        print!("{}", show::show(&options.command, connection.greeting(), &answer));
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be asked, without its number.
fn request(command: &Command) -> Value {
    match command {
        Command::Query => json!({ "do": "query" }),
        Command::Capabilities => json!({ "do": "capabilities" }),
        Command::Start => json!({ "do": "start" }),
        Command::Switchover => json!({ "do": "switchover" }),
        Command::Continue => json!({ "do": "continue" }),
        Command::Pause => json!({ "do": "pause" }),
        Command::Cancel => json!({ "do": "cancel" }),
        Command::Fence => json!({ "do": "fence" }),
        Command::Set(set) => json!({ "do": "set", "bandwidth": set.bandwidth }),
        Command::Recover(at) => {
            let mut request = json!({ "do": "recover" });
            for (name, address) in [("connect", &at.connect), ("listen", &at.listen)] {
                if let Some(address) = address {
                    request[name] = json!(address.to_string());
                }
            }
            request
        }
        Command::Watch(how) => {
            json!({ "do": "subscribe", "progress_ms": how.interval.as_millis() as u64 })
        }
    }
}
