//! What a guest must show wherever it ends: that it runs, and that every page is right.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::error::{DemoError, one_line};
use crate::guest::{Guest, MachineState, verify};
use crate::ram::{GuestAddress, GuestRam, PAGE_BYTES};

/// Lets the guest do a round more than `since`, so that it completes one.
pub(super) fn run_a_round(
    guest: &mut dyn Guest,
    since: u64,
    limit: Duration,
) -> Result<(), DemoError> {
    let round = guest.spec().worked_pages() * u64::from(guest.spec().vcpus());
    if guest.wait_for_operations(since + round, limit) || guest.failure().is_some() {
        return Ok(());
    }
    Err(DemoError::Failed(format!(
        "the guest stands still: {} of {round} operations in {} s",
        guest.operations() - since,
        limit.as_secs()
    )))
}

/// Verifies every page of a stopped guest; in words, what was verified or what is wrong.
pub(super) fn check(guest: &dyn Guest, state: &MachineState) -> Result<String, String> {
    if let Some(failure) = guest.failure() {
        return Err(failure);
    }
    verify(guest.ram(), state).map(|report| report.to_string()).map_err(|error| one_line(&error))
}

/// Changes a byte that nobody writes, or one of a tag, so that verification has something
/// to notice.
pub(super) fn corrupt_one_byte(ram: &GuestRam, state: &MachineState) {
    let last_page = state.spec().geometry().address(state.spec().geometry().pages - 1);
    let last_byte = GuestAddress(last_page.0 + PAGE_BYTES - 1);
    ram.byte(last_byte).fetch_xor(1, Ordering::Relaxed);
}
