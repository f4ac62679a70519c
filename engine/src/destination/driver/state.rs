//! Device state as it comes in: kept until all of it is there, or told section by section.

use super::super::{DestinationEvent, StateDelivery};
use super::Driver;
use crate::source::StateSection;
use afterimage_protocol::wire::{Refusal, RefuseCode};

/// The most device state that is kept for the VMM at once.
const MAX_STATE_BYTES: usize = 1 << 30;

impl Driver {
    /// All of it comes again.
    pub(super) fn reset_state(&mut self) {
        self.state.clear();
        (self.state_bytes, self.is_section_open) = (0, false);
        if std::mem::take(&mut self.has_told_section) {
            self.events.send(DestinationEvent::StateRestarted);
        }
    }

    pub(super) fn take_section(&mut self, name: String, version: u32, last: bool, bytes: &[u8]) {
        self.state_bytes += bytes.len();
        if self.state_bytes > MAX_STATE_BYTES {
            let reason = format!("more than {MAX_STATE_BYTES} bytes of device state");
            self.session.disconnected();
            self.hang_up(Some(Refusal::new(RefuseCode::Protocol, reason)));
            return;
        }
        match self.state.last_mut() {
            Some(open) if self.is_section_open && open.name == name => {
                open.bytes.extend_from_slice(bytes);
            }
            _ => self.state.push(StateSection { name, version, bytes: bytes.to_vec() }),
        }
        self.is_section_open = !last;
        if last && self.options.state == StateDelivery::BySection {
            self.state_bytes = 0;
            for section in self.state.drain(..) {
                self.has_told_section = true;
                self.events.send(DestinationEvent::Section(section));
            }
        }
    }
}
