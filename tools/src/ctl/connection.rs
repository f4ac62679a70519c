//! The client's end of a control socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use afterimage::Address;
use serde_json::Value;

use crate::control::{Greeting, Refusal, SCHEMA_VERSION};

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Connection(String),
    #[error(transparent)]
    Refused(Refusal),
}

/// A connection that has been greeted.
pub(super) struct Connection {
    stream: BufReader<UnixStream>,
    greeting: Greeting,
    timeout: Duration,
    last_id: u64,
}

impl Connection {
    pub(super) fn open(address: &Address, timeout: Duration) -> Result<Self, Failure> {
        let Address::Unix(path) = address else {
            return Err(Failure::Usage(format!("--socket {address}: give unix:PATH")));
        };
        if timeout.is_zero() {
            return Err(Failure::Usage("--timeout must be longer than 0".to_owned()));
        }
        let stream = UnixStream::connect(path)
            .and_then(|stream| stream.set_read_timeout(Some(timeout)).map(|()| stream))
            .map_err(|error| Failure::Connection(cannot_connect(address, &error)))?;
        let mut stream = BufReader::new(stream);
        let line = read_line(&mut stream, timeout)?.ok_or_else(hung_up)?;
        // One who cannot let another in says so instead.
        let value: Value = serde_json::from_str(&line).map_err(|error| no_sense(&error))?;
        if let Some(refusal) = refusal(&value) {
            return Err(Failure::Refused(refusal));
        }
        let greeting: Greeting = serde_json::from_value(value).map_err(|error| no_sense(&error))?;
        if greeting.schema_version != SCHEMA_VERSION {
            let theirs = greeting.schema_version;
            return Err(Failure::Connection(format!(
                "{} {} speaks version {theirs} of the control protocol, and this is \
                 {SCHEMA_VERSION}: use the afterimage-ctl of its release",
                greeting.tool, greeting.version
            )));
        }
        Ok(Self { stream, greeting, timeout, last_id: 0 })
    }

    pub(super) const fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Asks, and waits for the answer.
    pub(super) fn ask(&mut self, mut request: Value) -> Result<Value, Failure> {
        self.last_id += 1;
        request["id"] = self.last_id.into();
        let line = request.to_string() + "\n";
        let sent = self.stream.get_mut().write_all(line.as_bytes());
        sent.map_err(|error| Failure::Connection(format!("could not ask: {error}")))?;
        loop {
            let mut answer = self.next()?.ok_or_else(hung_up)?;
            if answer["id"] != self.last_id {
                continue;
            }
            return match refusal(&answer) {
                Some(refusal) => Err(Failure::Refused(refusal)),
                None => Ok(answer["ok"].take()),
            };
        }
    }

    /// Waits so much longer than it would for an answer.
    pub(super) fn wait_longer(&mut self, time: Duration) -> Result<(), Failure> {
        self.timeout += time;
        let set = self.stream.get_ref().set_read_timeout(Some(self.timeout));
        set.map_err(|error| Failure::Connection(format!("could not wait: {error}")))
    }

    /// The next line; `None` once there are no more.
    pub(super) fn next(&mut self) -> Result<Option<Value>, Failure> {
        let Some(line) = read_line(&mut self.stream, self.timeout)? else { return Ok(None) };
        serde_json::from_str(&line).map(Some).map_err(|error| no_sense(&error))
    }
}

fn read_line(
    stream: &mut BufReader<UnixStream>,
    timeout: Duration,
) -> Result<Option<String>, Failure> {
    let mut line = String::new();
    match stream.read_line(&mut line) {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(line)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Failure::Connection(
            format!("no answer in {timeout:?}: the process may be stopped; see --timeout"),
        )),
        // What was still under way when it ended.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(Failure::Connection(format!("the connection has failed: {error}"))),
    }
}

fn refusal(value: &Value) -> Option<Refusal> {
    serde_json::from_value(value.get("error")?.clone()).ok()
}

fn hung_up() -> Failure {
    Failure::Connection("the other side has hung up before it answered".to_owned())
}

fn no_sense(error: &serde_json::Error) -> Failure {
    Failure::Connection(format!("what the socket says is no control protocol: {error}"))
}

fn cannot_connect(address: &Address, error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => {
            "; start the process with --control and this address, and see that it lives"
        }
        io::ErrorKind::ConnectionRefused => "; its process has ended",
        io::ErrorKind::PermissionDenied => "; be the user that started the process, or root",
        _ => "",
    };
    format!("could not connect to {address}: {error}{remedy}")
}
