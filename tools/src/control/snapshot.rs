//! Driving a snapshot, which any number of destinations get.

use std::sync::{Arc, Mutex, PoisonError};

use afterimage::SnapshotServer;

use super::controlled::{Controlled, Counts, Parameters};
use super::source::bandwidth;
use super::words::{Change, Refusal, Verb};
use crate::bandwidth::Bandwidth;

/// A snapshot's server, and its parameters.
pub(crate) struct SnapshotControl {
    pub(crate) server: Arc<SnapshotServer>,
    pub(crate) pages: u64,
    pub(crate) streams: u16,
    pub(crate) bandwidth: Mutex<Bandwidth>,
}

impl Controlled for SnapshotControl {
    fn counts(&self) -> Counts {
        Counts::Snapshot(self.server.stats().destinations, self.pages)
    }

    fn parameters(&self) -> Parameters {
        let bandwidth = *self.bandwidth.lock().unwrap_or_else(PoisonError::into_inner);
        Parameters { bandwidth: Some(bandwidth), streams: Some(self.streams) }
    }

    fn reason_against(&self, verb: Verb) -> Option<String> {
        (verb != Verb::Set).then(|| {
            format!(
                "{} is for a migration, and this is a snapshot, which no guest leaves; a \
                 destination that goes away changes nothing for the others",
                verb.name()
            )
        })
    }

    fn set(&self, change: &Change) -> Result<(), Refusal> {
        let bandwidth = bandwidth(change)?;
        self.server.set_background(bandwidth.into());
        *self.bandwidth.lock().unwrap_or_else(PoisonError::into_inner) = bandwidth;
        Ok(())
    }
}
