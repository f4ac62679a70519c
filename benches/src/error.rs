//! Why a measurement was not made.

use serde::{Deserialize, Serialize};

/// Why a measurement was not made. Travels from the measuring processes to the one that
/// reports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BenchError {
    /// The machine has not what it takes; others of its measurements may still be made.
    #[error("{0}")]
    Lacking(String),
    /// A page has another content than it must have. Nothing else counts then.
    #[error("wrong content: {0}")]
    Wrong(String),
    /// Somebody wanted it to end.
    #[error("interrupted; what had been measured is not reported")]
    Interrupted,
    /// Something failed.
    #[error("{0}")]
    Failed(String),
}

impl BenchError {
    /// The error of an operation, with its reasons on one line.
    pub fn failed(operation: &str, error: &dyn std::error::Error) -> Self {
        let mut text = format!("{operation}: {error}");
        let mut next = error.source();
        while let Some(reason) = next {
            text.push_str(": ");
            text.push_str(&reason.to_string());
            next = reason.source();
        }
        Self::Failed(text)
    }
}

/// Says what was being done when something failed.
pub trait Doing<T> {
    /// The value, or [`BenchError::Failed`] that begins with `operation`.
    ///
    /// # Errors
    /// As said.
    fn doing(self, operation: &str) -> Result<T, BenchError>;
}

impl<T, E: std::error::Error> Doing<T> for Result<T, E> {
    fn doing(self, operation: &str) -> Result<T, BenchError> {
        self.map_err(|error| BenchError::failed(operation, &error))
    }
}
