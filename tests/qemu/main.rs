//! Unmodified QEMUs whose guest moves by afterimage-qemu: it verifies its memory all the time,
//! and its serial port shows that it lived on, and that no page was wrong.

mod backends;
mod boot;
mod document;
mod failures;
mod linux;
mod moves;
mod outages;
mod support;
