//! What is said at a control socket, one JSON object a line.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use afterimage::{Address, CallError};

use crate::bandwidth::Bandwidth;

/// Grows when something changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;
/// A request that is longer is refused.
pub(super) const MAX_LINE: usize = 64 << 10;

/// The first line of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The program.
    pub tool: String,
    /// Its version.
    pub version: String,
    /// What it is in the migration.
    pub role: String,
    /// The session, once there is one.
    pub session: Option<String>,
}

/// Why a request was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// Not in this state, or never in this role; the message says why.
    NotNow,
    /// No such verb.
    Unknown,
    /// Not a request, or with parameters that it does not have.
    BadRequest,
    /// It was tried, and failed.
    Failed,
}

/// A request that was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// For people: what, where, and how to mend it.
    pub message: String,
}

impl Refusal {
    /// Not in this state or role.
    pub fn not_now(message: impl Into<String>) -> Self {
        Self { code: Code::NotNow, message: message.into() }
    }

    /// It was tried in vain.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { code: Code::Failed, message: message.into() }
    }

    /// Nobody could do this.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { code: Code::BadRequest, message: message.into() }
    }
}

impl From<CallError> for Refusal {
    fn from(error: CallError) -> Self {
        match error {
            CallError::NotNow(_) | CallError::ShutDown => Self::not_now(error.to_string()),
            _ => Self::failed(error.to_string()),
        }
    }
}

/// What a side can be asked to do beside telling its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Connect and begin.
    Start,
    /// Stop the vCPUs, and switch over now.
    Switchover,
    /// Go on from a hold.
    Continue,
    /// Hang up until [`Recover`](Self::Recover).
    Pause,
    /// Go on after a pause, at the same or another address.
    Recover,
    /// Take the guest back.
    Cancel,
    /// Declare the destination dead, and take the guest back.
    Fence,
    /// Change parameters of this migration.
    Set,
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Start,
        Self::Switchover,
        Self::Continue,
        Self::Pause,
        Self::Recover,
        Self::Cancel,
        Self::Fence,
        Self::Set,
    ];

    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Switchover => "switchover",
            Self::Continue => "continue",
            Self::Pause => "pause",
            Self::Recover => "recover",
            Self::Cancel => "cancel",
            Self::Fence => "fence",
            Self::Set => "set",
        }
    }
}

/// Where to go on; at the same place without either.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recovery {
    /// Connect here.
    #[serde(default, deserialize_with = "address")]
    pub connect: Option<Address>,
    /// Listen here.
    #[serde(default, deserialize_with = "address")]
    pub listen: Option<Address>,
}

fn address<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Address>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}

/// What of this migration's parameters is to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// What may leave in a second that nobody has asked for.
    #[serde(default)]
    pub bandwidth: Option<Bandwidth>,
    /// The same before the switchover alone.
    #[serde(default)]
    pub precopy_bandwidth: Option<Bandwidth>,
}

/// Subscribing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Subscription {
    /// Between events of progress, in milliseconds; none without.
    #[serde(default)]
    pub(super) progress_ms: Option<u64>,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Query,
    Subscribe(Subscription),
    /// What may take its time.
    Call(Call),
}

/// A request that another thread carries out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Capabilities,
    Plain(Plain),
    Recover(Recovery),
    Set(Change),
}

/// A verb without parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plain {
    Start,
    Switchover,
    Continue,
    Pause,
    Cancel,
    Fence,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// A line as a request, with its number; or why it is none, with its number if it has one.
pub(super) fn parse(line: &[u8]) -> Result<(u64, Request), (Option<u64>, Refusal)> {
    let bad = |id, what: String| (id, Refusal::bad_request(what));
    let mut fields: Map<String, Value> = serde_json::from_slice(line)
        .map_err(|error| bad(None, format!("not a JSON object ({error}): {EXAMPLE}")))?;
    let id = fields.remove("id").and_then(|id| id.as_u64());
    let id = id.ok_or_else(|| bad(None, format!("no \"id\" that is a number: {EXAMPLE}")))?;
    let Some(Value::String(verb)) = fields.remove("do") else {
        return Err(bad(Some(id), format!("no \"do\" that is a string: {EXAMPLE}")));
    };
    let request = request(&verb, fields);
    request.map(|request| (id, request)).map_err(|refusal| (Some(id), refusal))
}

const EXAMPLE: &str = "write one request a line, as {\"id\":1,\"do\":\"query\"}";

fn request(verb: &str, fields: Map<String, Value>) -> Result<Request, Refusal> {
    let call = match verb {
        "subscribe" => return Ok(Request::Subscribe(parameters(verb, fields)?)),
        "recover" => return Ok(Request::Call(Call::Recover(parameters(verb, fields)?))),
        "set" => return Ok(Request::Call(Call::Set(parameters(verb, fields)?))),
        "query" => Request::Query,
        "capabilities" => Request::Call(Call::Capabilities),
        "start" => Request::Call(Call::Plain(Plain::Start)),
        "switchover" => Request::Call(Call::Plain(Plain::Switchover)),
        "continue" => Request::Call(Call::Plain(Plain::Continue)),
        "pause" => Request::Call(Call::Plain(Plain::Pause)),
        "cancel" => Request::Call(Call::Plain(Plain::Cancel)),
        "fence" => Request::Call(Call::Plain(Plain::Fence)),
        _ => {
            let names: Vec<_> = Verb::ALL.into_iter().map(Verb::name).collect();
            let message = format!(
                "nobody knows how to do {:?}: query, capabilities, subscribe, {}",
                shortened(verb),
                names.join(", ")
            );
            return Err(Refusal { code: Code::Unknown, message });
        }
    };
    let Nothing {} = parameters(verb, fields)?;
    Ok(call)
}

fn parameters<T: DeserializeOwned>(verb: &str, fields: Map<String, Value>) -> Result<T, Refusal> {
    serde_json::from_value(Value::Object(fields))
        .map_err(|error| Refusal::bad_request(format!("{verb}: {error}")))
}

/// What a client has written may be long.
fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

/// The answer to a request that was carried out, as a line.
pub(super) fn answer(id: u64, result: Result<Value, Refusal>) -> String {
    match result {
        Ok(ok) => line(&json!({ "id": id, "ok": ok })),
        Err(refusal) => refuse(Some(id), &refusal),
    }
}

/// The answer to a request that was not carried out, as a line.
pub(super) fn refuse(id: Option<u64>, refusal: &Refusal) -> String {
    line(&json!({ "id": id, "error": refusal }))
}

/// As a line.
pub(super) fn line(what: &impl Serialize) -> String {
    serde_json::to_string(what).expect("text and numbers are always JSON") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_with_their_parameters() {
        let parsed = |text: &str| parse(text.as_bytes()).unwrap();
        assert_eq!(parsed(r#"{"id":7,"do":"query"}"#), (7, Request::Query));
        for verb in Verb::ALL {
            let (id, request) = parsed(&format!(r#"{{"do":"{}","id":1}}"#, verb.name()));
            assert!(id == 1 && matches!(request, Request::Call(_)), "{verb:?}: {request:?}");
        }
        let change = Change { bandwidth: Some("100M".parse().unwrap()), precopy_bandwidth: None };
        let set = parsed(r#"{"id":0,"do":"set","bandwidth":"100M"}"#);
        assert_eq!(set, (0, Request::Call(Call::Set(change))));
        let (_, recover) = parsed(r#"{"id":0,"do":"recover","connect":"unix:/a"}"#);
        let connect = Some("unix:/a".parse().unwrap());
        let recovery = Recovery { connect, listen: None };
        assert_eq!(recover, Request::Call(Call::Recover(recovery)));
    }

    #[test]
    fn rubbish_is_told_what_would_be_a_request() {
        let refused = |text: &[u8]| parse(text).unwrap_err();
        for text in [
            &b""[..],
            b"hello",
            b"\xff\xfe",
            b"[]",
            b"{}",
            b"{\"id\":-1,\"do\":\"query\"}",
            b"{\"id\":1}",
            b"{\"id\":1,\"do\":2}",
            b"{\"id\":1,\"do\":\"query\"",
        ] {
            let (_, refusal) = refused(text);
            assert_eq!(refusal.code, Code::BadRequest, "{text:?}");
            assert!(refusal.message.contains("\"do\":\"query\""), "{refusal:?}");
        }
        let deep = "[".repeat(60_000);
        assert_eq!(refused(deep.as_bytes()).1.code, Code::BadRequest);
        let (id, unknown) = refused(br#"{"id":3,"do":"dance"}"#);
        assert_eq!((id, unknown.code), (Some(3), Code::Unknown));
        assert!(unknown.message.contains("switchover"), "{unknown}");
        for text in [
            r#"{"id":3,"do":"query","x":1}"#,
            r#"{"id":3,"do":"set","speed":1}"#,
            r#"{"id":3,"do":"set","bandwidth":"fast"}"#,
            r#"{"id":3,"do":"recover","connect":"nowhere"}"#,
            r#"{"id":3,"do":"subscribe","progress_ms":-1}"#,
        ] {
            let (id, refusal) = refused(text.as_bytes());
            assert_eq!((id, refusal.code), (Some(3), Code::BadRequest), "{text}");
        }
    }
}
