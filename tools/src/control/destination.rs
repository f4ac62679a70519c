//! Driving a destination.

use std::sync::Arc;

use afterimage::{Agreed, Destination, Endpoint, Plaintext};

use super::controlled::{Controlled, Counts, Parameters};
use super::options;
use super::words::{Recovery, Refusal, Verb};

/// A destination.
pub(crate) struct DestinationControl {
    pub(crate) destination: Arc<Destination>,
    pub(crate) plaintext: Plaintext,
}

impl Controlled for DestinationControl {
    fn counts(&self) -> Counts {
        Counts::Destination(Box::new(self.destination.stats()))
    }

    fn parameters(&self) -> Parameters {
        Parameters::default()
    }

    fn agreed(&self) -> Option<Agreed> {
        self.destination.agreed()
    }

    fn reason_against(&self, verb: Verb) -> Option<String> {
        match verb {
            Verb::Pause | Verb::Recover => None,
            Verb::Start => Some("it has started: connections are made or taken".to_owned()),
            Verb::Continue => Some("nothing is held".to_owned()),
            Verb::Switchover | Verb::Cancel | Verb::Fence | Verb::Set => {
                Some(format!("{} is for the source: ask at its control socket", verb.name()))
            }
        }
    }

    fn pause(&self) -> Result<(), Refusal> {
        Ok(self.destination.pause()?)
    }

    fn endpoint(&self, at: &Recovery) -> Result<Option<Endpoint>, Refusal> {
        options::endpoint(at, self.plaintext)
    }

    fn recover(&self, at: Option<Endpoint>) -> Result<(), Refusal> {
        Ok(self.destination.recover(at)?)
    }
}
