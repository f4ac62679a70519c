//! The rate of the background, as people write it.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use afterimage::Background;
use serde::{Deserialize, Serialize};

use crate::size::Size;

/// How fast pages leave that nobody has asked for, written as `unlimited`, `on-request`, or a
/// size that leaves in a second, as `100M`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Bandwidth {
    /// As fast as it goes.
    #[default]
    Unlimited,
    /// At most so many bytes a second.
    Limited(NonZeroU64),
    /// Nothing leaves that nobody has asked for.
    OnRequest,
}

/// Text that is no bandwidth.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no bandwidth: write unlimited, on-request, or the bytes that may leave in a \
     second, as 100M or 1.5G"
)]
pub struct BandwidthError {
    text: String,
}

impl FromStr for Bandwidth {
    type Err = BandwidthError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "unlimited" => return Ok(Self::Unlimited),
            "on-request" => return Ok(Self::OnRequest),
            _ => {}
        }
        let bytes = text.parse::<Size>().ok().and_then(|size| NonZeroU64::new(size.0));
        bytes.map(Self::Limited).ok_or_else(|| BandwidthError { text: text.to_owned() })
    }
}

/// Exactly, so that it can be read again.
impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => f.write_str("unlimited"),
            Self::Limited(bytes) => write!(f, "{bytes}"),
            Self::OnRequest => f.write_str("on-request"),
        }
    }
}

impl TryFrom<String> for Bandwidth {
    type Error = BandwidthError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Bandwidth> for String {
    fn from(bandwidth: Bandwidth) -> Self {
        bandwidth.to_string()
    }
}

impl From<Bandwidth> for Background {
    fn from(bandwidth: Bandwidth) -> Self {
        match bandwidth {
            Bandwidth::Unlimited => Self::Unlimited,
            Bandwidth::Limited(bytes_per_second) => Self::Limited { bytes_per_second },
            Bandwidth::OnRequest => Self::OnRequest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(bytes: u64) -> Bandwidth {
        Bandwidth::Limited(NonZeroU64::new(bytes).unwrap())
    }

    #[test]
    fn words_and_sizes_are_read_and_written_again() {
        for (text, bandwidth) in [
            ("unlimited", Bandwidth::Unlimited),
            ("on-request", Bandwidth::OnRequest),
            ("100M", limited(100 << 20)),
            ("1.5G", limited(3 << 29)),
            ("12345", limited(12345)),
        ] {
            assert_eq!(text.parse(), Ok(bandwidth), "{text}");
            assert_eq!(bandwidth.to_string().parse(), Ok(bandwidth), "{bandwidth}");
        }
    }

    #[test]
    fn other_text_is_refused_with_what_could_be_written() {
        for text in ["", "0", "fast", "-1", "0K", "Unlimited", "10 MB/s"] {
            let error = text.parse::<Bandwidth>().unwrap_err().to_string();
            assert!(error.contains("unlimited, on-request") && error.contains("100M"), "{error}");
        }
    }
}
