//! The content of a state file as text, without the file.
//!
//! ```text
//! afterimage-state 1
//! side=source
//! session=5ed8f7b3c2a14f6d8e9b0a1c2d3e4f50
//! epoch=3
//! ownership=given
//! incarnation=04c683f758ed30a602a94fe627384d97
//! regions=2
//! bytes=8388608
//! layout=9a3c01e7
//! note.guest=web1
//! crc32c=5f2e8c1d
//! ```
//!
//! Every key stands once. A key that is not known is kept where it is when the record is
//! replaced, so that an older release loses nothing that a newer one wrote; but if it begins
//! with `must_` it may not be overlooked, and the file is refused.

use super::error::Wrong;
use crate::destination::{DestinationOwnership, DestinationRecord};
use crate::source::{Incarnation, SessionId, SourceOwnership, SourcePages, SourceRecord};
use afterimage_protocol::layout::GuestLayout;
use afterimage_protocol::wire::Epoch;
use std::fmt;

const FIRST_LINE: &str = "afterimage-state ";
const VERSION: &str = "1";
/// The last line, and what it stands for: everything before it.
const CHECKSUM: &str = "crc32c=";
const NOTE: &str = "note.";
/// Unknown keys that begin so may not be overlooked.
const MUST: &str = "must_";

/// A layout in a few numbers: enough to tell one guest's memory from another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutDigest {
    regions: u64,
    bytes: u64,
    crc32c: u32,
}

impl LayoutDigest {
    /// Of addresses, lengths and page sizes, in the order of addresses.
    pub(super) fn of(layout: &GuestLayout) -> Self {
        let (regions, crc32c) = (layout.regions().len() as u64, layout.checksum());
        Self { regions, bytes: layout.bytes(), crc32c }
    }
}

impl fmt::Display for LayoutDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { regions, bytes, crc32c } = self;
        write!(f, "{regions} regions, {bytes} bytes (layout {crc32c:08x})")
    }
}

/// A record as keys and values.
pub trait Fields: Copy + fmt::Debug + Send + 'static {
    /// `source` or `destination`.
    #[doc(hidden)]
    const SIDE: &'static str;
    /// The keys that make up the record, in order.
    #[doc(hidden)]
    const KEYS: &'static [&'static str];

    /// The value of each key.
    #[doc(hidden)]
    fn values(&self) -> Vec<String>;

    /// The record, from a value for each key; the key whose value cannot be right otherwise.
    #[doc(hidden)]
    fn from_values(values: &[&str]) -> Result<Self, &'static str>;
}

const KEYS: &[&str] = &["session", "epoch", "ownership", "incarnation"];

impl Fields for SourceRecord {
    const SIDE: &'static str = "source";
    const KEYS: &'static [&'static str] =
        &["session", "epoch", "ownership", "incarnation", "pages"];

    fn values(&self) -> Vec<String> {
        let Self { session, epoch, ownership, incarnation, pages } = self;
        let pages = match pages {
            SourcePages::Whole => "whole",
            SourcePages::Released => "released",
        };
        let ownership = match ownership {
            SourceOwnership::Owner => "owner",
            SourceOwnership::Given => "given",
            SourceOwnership::Reclaimed => "reclaimed",
            SourceOwnership::Fenced => "fenced",
            SourceOwnership::Finished => "finished",
        };
        let names = [session.to_string(), epoch.0.to_string(), ownership.into()];
        names.into_iter().chain([incarnation.to_string(), pages.into()]).collect()
    }

    fn from_values(values: &[&str]) -> Result<Self, &'static str> {
        let (session, epoch, incarnation) = names(values)?;
        let ownership = match values[2] {
            "owner" => SourceOwnership::Owner,
            "given" => SourceOwnership::Given,
            "reclaimed" => SourceOwnership::Reclaimed,
            "fenced" => SourceOwnership::Fenced,
            "finished" => SourceOwnership::Finished,
            _ => return Err("ownership"),
        };
        let pages = match values[4] {
            "whole" => SourcePages::Whole,
            "released" => SourcePages::Released,
            _ => return Err("pages"),
        };
        Ok(Self { session, epoch, ownership, incarnation, pages })
    }
}

impl Fields for DestinationRecord {
    const SIDE: &'static str = "destination";
    const KEYS: &'static [&'static str] = KEYS;

    fn values(&self) -> Vec<String> {
        let Self { session, incarnation, epoch, ownership } = self;
        let ownership = match ownership {
            DestinationOwnership::Waiting => "waiting",
            DestinationOwnership::Refused => "refused",
            DestinationOwnership::Running => "running",
        };
        vec![session.to_string(), epoch.0.to_string(), ownership.into(), incarnation.to_string()]
    }

    fn from_values(values: &[&str]) -> Result<Self, &'static str> {
        let (session, epoch, incarnation) = names(values)?;
        let ownership = match values[2] {
            "waiting" => DestinationOwnership::Waiting,
            "refused" => DestinationOwnership::Refused,
            "running" => DestinationOwnership::Running,
            _ => return Err("ownership"),
        };
        Ok(Self { session, incarnation, epoch, ownership })
    }
}

fn names(values: &[&str]) -> Result<(SessionId, Epoch, Incarnation), &'static str> {
    let session = id(values[0]).ok_or("session")?;
    let epoch = number(values[1]).and_then(|it| u32::try_from(it).ok()).ok_or("epoch")?;
    let incarnation = id(values[3]).ok_or("incarnation")?;
    Ok((SessionId(session), Epoch(epoch), Incarnation(incarnation)))
}

fn id(text: &str) -> Option<[u8; 16]> {
    Some(hexadecimal(text, 32)?.to_be_bytes())
}

fn hexadecimal(text: &str, digits: usize) -> Option<u128> {
    let is_plain = text.bytes().all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f'));
    (text.len() == digits && is_plain).then(|| u128::from_str_radix(text, 16).ok())?
}

fn number(text: &str) -> Option<u64> {
    // `parse` would take a sign too.
    text.bytes().all(|it| it.is_ascii_digit()).then(|| text.parse().ok())?
}

/// What a state file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text<R> {
    pub(super) record: R,
    pub(super) layout: LayoutDigest,
    /// Notes, and keys that are not known here, in the order of the file.
    others: Vec<(String, String)>,
}

impl<R: Fields> Text<R> {
    pub(super) const fn new(record: R, layout: LayoutDigest) -> Self {
        Self { record, layout, others: Vec::new() }
    }

    /// The same with another record.
    pub(super) fn with(&self, record: R) -> Self {
        Self { record, ..self.clone() }
    }

    /// The same with a note.
    pub(super) fn with_note(&self, key: &str, value: &str) -> Self {
        let mut text = self.clone();
        let plain = |it: char| it.is_ascii_lowercase() || it.is_ascii_digit() || it == '_';
        let key = format!("{NOTE}{}", key.replace(|it| !plain(it), "_"));
        let value = value.replace(char::is_control, "?");
        match text.others.iter_mut().find(|(other, _)| *other == key) {
            Some((_, other)) => *other = value,
            None => text.others.push((key, value)),
        }
        text
    }

    pub(super) fn noted(&self, key: &str) -> Option<&str> {
        let is_it = |other: &str| other.strip_prefix(NOTE) == Some(key);
        self.others.iter().find(|(other, _)| is_it(other)).map(|(_, value)| value.as_str())
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let LayoutDigest { regions, bytes, crc32c } = self.layout;
        let mut text = format!("{FIRST_LINE}{VERSION}\nside={}\n", R::SIDE);
        let mut line = |key: &str, value: &str| text.extend([key, "=", value, "\n"]);
        for (key, value) in R::KEYS.iter().zip(self.record.values()) {
            line(key, &value);
        }
        line("regions", &regions.to_string());
        line("bytes", &bytes.to_string());
        line("layout", &format!("{crc32c:08x}"));
        for (key, value) in &self.others {
            line(key, value);
        }
        let checksum = crc32c::crc32c(text.as_bytes());
        text.extend([CHECKSUM, &format!("{checksum:08x}"), "\n"]);
        text.into_bytes()
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Wrong> {
        let damaged = |what: &str| Wrong::Damaged(what.to_owned());
        if bytes.is_empty() {
            return Err(damaged("it is empty"));
        }
        let text = checked(bytes)?;
        let mut pairs = Vec::new();
        for line in text.lines().skip(1) {
            let (key, value) = line.split_once('=').ok_or_else(|| damaged("a line has no ="))?;
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(Wrong::Damaged(format!("{key} stands twice")));
            }
            pairs.push((key, value));
        }
        let mut take = |key: &str| {
            let at = pairs.iter().position(|(other, _)| *other == key);
            let at = at.ok_or_else(|| Wrong::Damaged(format!("{key} is not there")))?;
            Ok(pairs.remove(at).1)
        };
        let theirs = take("side")?;
        if theirs != R::SIDE {
            return Err(Wrong::Side { theirs: theirs.to_owned(), ours: R::SIDE });
        }
        let values = R::KEYS.iter().map(|key| take(key)).collect::<Result<Vec<_>, _>>()?;
        let record = R::from_values(&values).map_err(senseless)?;
        let layout = LayoutDigest {
            regions: number(take("regions")?).ok_or_else(|| senseless("regions"))?,
            bytes: number(take("bytes")?).ok_or_else(|| senseless("bytes"))?,
            crc32c: hexadecimal(take("layout")?, 8).ok_or_else(|| senseless("layout"))? as u32,
        };
        if let Some((key, _)) = pairs.iter().find(|(key, _)| key.starts_with(MUST)) {
            return Err(Wrong::Unknown((*key).to_owned()));
        }
        let others = pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
        Ok(Self { record, layout, others: others.collect() })
    }
}

fn senseless(key: &str) -> Wrong {
    Wrong::Damaged(format!("{key} has a value that it cannot have"))
}

/// The text without its checksum, which is right.
fn checked(bytes: &[u8]) -> Result<&str, Wrong> {
    let damaged = |what: &str| Wrong::Damaged(what.to_owned());
    let Some(version) = bytes.strip_prefix(FIRST_LINE.as_bytes()) else {
        let is_cut = FIRST_LINE.as_bytes().starts_with(bytes);
        return Err(if is_cut { damaged("it is cut short") } else { Wrong::Stranger });
    };
    let Some(end) = version.iter().position(|it| *it == b'\n') else {
        return Err(damaged("it is cut short"));
    };
    let version = String::from_utf8_lossy(&version[..end]);
    if version != VERSION {
        return Err(Wrong::Version(version.replace(char::is_control, "?")));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is no text"))?;
    let whole = text.strip_suffix('\n').ok_or_else(|| damaged("it is cut short"))?;
    let start = whole.rfind('\n').map_or(0, |at| at + 1);
    let Some(checksum) = whole[start..].strip_prefix(CHECKSUM) else {
        return Err(damaged("it is cut short"));
    };
    if hexadecimal(checksum, 8) != Some(crc32c::crc32c(&bytes[..start]).into()) {
        return Err(damaged("its checksum is another: a write went wrong, or somebody edited it"));
    }
    Ok(&text[..start])
}

#[cfg(test)]
mod tests;
