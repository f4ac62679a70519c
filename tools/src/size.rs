//! Sizes of memory as people write and read them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes, written as `512M`, `4G`, `1.5GiB` or `4096`. All units are binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Size(pub u64);

/// Text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no size: write a number of bytes, or one with K, M, G or T, as 512M or 4G")]
pub struct SizeError {
    text: String,
}

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || SizeError { text: text.to_owned() };
        let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let unit = unit.trim_start().to_ascii_uppercase();
        let unit = unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit);
        let shift = match unit.chars().next() {
            None => 0,
            Some(letter) if unit.len() == 1 => {
                UNITS.iter().find(|(name, _)| *name == letter).ok_or_else(error)?.1
            }
            Some(_) => return Err(error()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            let bytes = whole.checked_mul(1 << shift).ok_or_else(error)?;
            return Ok(Self(bytes));
        }
        let number: f64 = number.parse().map_err(|_| error())?;
        let bytes = number * f64::from(shift).exp2();
        // Above 2^53 a fraction of a byte is nothing that anybody means.
        if shift == 0 || !(0.0..9.0e15).contains(&bytes) {
            return Err(error());
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().rev().find(|(_, shift)| self.0 >> shift > 0);
        let Some((name, shift)) = unit else {
            return write!(f, "{} bytes", self.0);
        };
        let value = self.0 as f64 / f64::from(*shift).exp2();
        let digits = usize::from(value.fract() > 0.0) * if value < 10.0 { 2 } else { 1 };
        write!(f, "{value:.digits$} {name}iB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_all_usual_forms() {
        for (text, bytes) in [
            ("4096", 4096),
            ("4k", 4096),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("4 GB", 4 << 30),
            ("1.5G", 3 << 29),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_what_would_be() {
        for text in ["", "G", "4X", "-1", "4GG", "1.5", "1..5G", "99999999999T", "4 G x"] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.contains("512M or 4G"), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit() {
        for (bytes, text) in [
            (12, "12 bytes"),
            (4096, "4 KiB"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1.50 GiB"),
            (1234 << 20, "1.21 GiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
