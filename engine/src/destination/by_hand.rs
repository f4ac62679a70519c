//! Pausing and recovering a destination by hand.

use super::driver::Input;
use super::{CallError, Destination, Endpoint};

impl Destination {
    /// Hangs up, and neither connects nor accepts anything until [`recover`](Self::recover):
    /// whoever connects is told to try later. What has arrived stays, vCPUs that need no missing
    /// page go on, and the others wait. [`DestinationEvent::Paused`](super::DestinationEvent::Paused)
    /// follows. Pausing what is paused changes nothing.
    ///
    /// # Errors
    /// [`CallError`] if the session is over.
    pub fn pause(&self) -> Result<(), CallError> {
        self.ask(Input::Pause)
    }

    /// Goes on after a [`pause`](Self::pause), begins where
    /// [`first_connection`](super::DestinationOptions::first_connection) waits for this, or goes
    /// on at once where a lost link is waiting to be made again: at another endpoint, or with
    /// `None` at the same. An endpoint that was replaced is given up: its listener stops
    /// listening. (A listening socket that this process inherited as a descriptor is left open to
    /// whoever else holds it.)
    ///
    /// Returns before anybody is found:
    /// [`DestinationEvent::Attached`](super::DestinationEvent::Attached) follows then. Until
    /// then it goes on trying, and may be called again.
    ///
    /// # Errors
    /// [`CallError`] if nothing is paused because the session is connected, or if it is over.
    pub fn recover(&self, endpoint: Option<Endpoint>) -> Result<(), CallError> {
        self.ask(|reply| Input::Recover(endpoint, reply))
    }
}
