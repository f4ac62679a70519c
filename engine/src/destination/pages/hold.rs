//! Places where a test of this module may hold a thread back, to try orders that chance seldom
//! brings about, and where others may end the process (see [`steps`](crate::steps)).

/// Where a thread passes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Pages that are zero have been claimed, and are not complete yet.
    ZeroClaimed,
    /// The planes have been looked at, and a copy is about to be made.
    Looked,
    /// A copy has been made, and its pages are not complete yet.
    Copied,
    /// A page that was asked for lies in the alias, and is not complete yet.
    Written,
    /// What lies in the alias is complete, and has not been shown yet.
    Completed,
    /// Pages that are given back have been emptied, and are still claimed.
    Emptied,
    /// An early copy in a file counts, and is still claimed.
    EarlyCounts,
    /// A page that was discarded while it was written is complete, and still noted as discarded.
    GivenBack,
    /// Events have been read, and the discards among them are not in the planes yet.
    EventsRead,
    /// Events have been dealt with, and are still to be found by a successor.
    EventsDone,
    /// A successor has noted the discards that were left behind.
    Replayed,
}

/// Passes by; another kind of test may end the process here.
#[cfg(not(test))]
pub(super) fn pass(place: Place) {
    crate::steps::pass("destination", &place);
}

#[cfg(test)]
pub(super) use held::pass;

#[cfg(test)]
pub(super) mod held {
    use super::Place;
    use std::cell::RefCell;

    type Holder = Box<dyn FnMut(Place)>;

    thread_local! {
        static HOLDER: RefCell<Option<Holder>> = const { RefCell::new(None) };
    }

    /// Calls `holder` at each place that this thread passes by from here on.
    pub(in super::super) fn hold(holder: impl FnMut(Place) + 'static) {
        HOLDER.set(Some(Box::new(holder)));
    }

    pub(in super::super) fn pass(place: Place) {
        // Taken out meanwhile, so that a holder may pass by a place itself.
        if let Some(mut holder) = HOLDER.take() {
            holder(place);
            HOLDER.set(Some(holder));
        }
    }
}
