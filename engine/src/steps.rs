//! Places in the engine's work at which a test may end the process, to see that a successor
//! goes on. Without the feature `steps` they are nothing.
//!
//! `AFTERIMAGE_KILL_AT=PART+PART#N` ends this process with SIGKILL when it passes by a step
//! for the Nth time (1 without) whose name holds all parts. A name is the side, a colon, and
//! what is about to be done: an action of the session as Rust shows it
//! (`destination:Persist(… Running …)`), or a place of the data path (`destination:Copied`).

use std::fmt::Debug;

/// Nothing.
#[cfg(not(feature = "steps"))]
pub(crate) const fn pass(_side: &str, _step: &(impl Debug + ?Sized)) {}

#[cfg(feature = "steps")]
pub(crate) use armed::pass;

#[cfg(feature = "steps")]
mod armed {
    use super::Debug;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::getpid;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Where the process is to end.
    struct Order {
        parts: Vec<String>,
        passes: AtomicU64,
    }

    static ORDER: OnceLock<Option<Order>> = OnceLock::new();

    fn order() -> Option<Order> {
        let text = std::env::var("AFTERIMAGE_KILL_AT").ok()?;
        let (name, passes) = text.split_once('#').unwrap_or((&text, "1"));
        let passes = AtomicU64::new(passes.parse().ok()?);
        Some(Order { parts: name.split('+').map(str::to_owned).collect(), passes })
    }

    /// Ends the process if this is the step.
    pub(crate) fn pass(side: &str, step: &(impl Debug + ?Sized)) {
        let Some(order) = ORDER.get_or_init(order) else { return };
        let name = format!("{side}:{step:?}");
        let is_it = order.parts.iter().all(|part| name.contains(part));
        if is_it && order.passes.fetch_sub(1, Ordering::AcqRel) == 1 {
            tracing::warn!(step = name, "ending the process at this step");
            // Cannot fail: it is this process.
            let _ = kill(getpid(), Signal::SIGKILL);
        }
    }
}
