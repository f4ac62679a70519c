//! The control socket and the metrics of real processes, driven as a manager would.

mod acting;
mod cancel;
mod ctl;
mod demo;
mod hostile;
mod manager;
mod metrics;
mod places;
mod states;
mod support;
mod waits;
