//! Rules that can be broken on purpose, to see that somebody notices.

use std::fmt;
use std::str::FromStr;

macro_rules! mutants {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)*) => {
        /// A rule that is broken. All are rules of a driver, of the memory beneath it or of whoever
        /// manages it; the session machines themselves are the real ones.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Mutant { $($(#[doc = $doc])+ $name,)* }

        impl Mutant {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

mutants! {
    /// The destination acknowledges a piece when it begins to come in.
    AckBeforeComplete = "ack-before-complete",
    /// A piece is received through the alias before its pages are claimed.
    ClaimAfterWrite = "claim-after-write",
    /// Frames count whatever their epoch and generation.
    NoEpochCheck = "no-epoch-check",
    /// The source frees what it has sent.
    ReleaseBeforeAck = "release-before-ack",
    /// The source frees pages as soon as it knows that the destination runs the guest.
    ReleaseBeforeRecord = "release-before-record",
    /// The source frees pages and notes afterwards which they were.
    ReleaseBeforeNoted = "release-before-noted",
    /// A source that is started again does not know that pages were freed.
    ReleaseForgotten = "release-forgotten",
    /// A record is said to be durable before it is.
    OwnershipWithoutRecord = "ownership-without-record",
    /// Who waits for a page is not woken when its claim is given back.
    NoWakeOnGiveBack = "no-wake-on-give-back",
    /// Half a page stays in the file when its claim is given back.
    ZeroWithoutEmptying = "zero-without-emptying",
    /// What was under way on a dead channel is not handed out again.
    RequeueForgotten = "requeue-forgotten",
    /// Looking at the planes and placing a page are two steps.
    DiscardWithoutGate = "discard-without-gate",
    /// Other memory is let in after the guest was given.
    NewIncarnationAfterGiven = "new-incarnation-after-given",
    /// Pages are sent while the guest still runs at the source.
    ServeBeforeFrozen = "serve-before-frozen",
    /// What was discarded while it was being written is forgotten in a restart.
    DiscardsForgotten = "discards-forgotten",
    /// A destination that reconnects does not say what it has.
    PlanesNotSent = "planes-not-sent",
    /// The source does not listen to what the destination has when it reconnects.
    ReceivedIgnored = "received-ignored",
    /// A discard that a dead handler had read is not entered by the next one.
    EventBufferLost = "event-buffer-lost",
    /// Half pages of a dead handler stay in the file.
    TakeoverWithoutEmptying = "takeover-without-emptying",
    /// Pages that a dead handler had claimed stay claimed.
    ClaimsKeptAtTakeover = "claims-kept-at-takeover",
    /// Whoever waited for a page when the handler died is not woken by the next one.
    NoWakeAtTakeover = "no-wake-at-takeover",
    /// Pages that are given back are not asked for.
    GivenBackNotAsked = "given-back-not-asked",
    /// The guest starts while the record that it runs is being written.
    RunBeforeRecorded = "run-before-recorded",
    /// The destination lets the source take the guest back while it records that it runs.
    TakeBackWhileRecording = "take-back-while-recording",
    /// The destination lets a connection in whose epoch has passed.
    OlderEpochAccepted = "older-epoch-accepted",
    /// The source lets a data connection in whose generation has passed.
    OlderGenerationAccepted = "older-generation-accepted",
    /// The source serves a destination that was fenced.
    FencedAnswered = "fenced-answered",
    /// Nobody looks at the clock: silence ends nothing.
    SilenceIgnored = "silence-ignored",
    /// A data channel over which nothing moves is never given up.
    StallIgnored = "stall-ignored",
    /// Who gives a data channel up, and does not make the next, does not say so.
    RenewNotSaid = "renew-not-said",
    /// A connection attempt without an answer is never given up.
    AttemptWithoutEnd = "attempt-without-end",
    /// What the guest wrote last is not told as stale.
    LastWritesNotTold = "last-writes-not-told",
    /// Early copies are kept that come after memory was final.
    EarlyAfterSettled = "early-after-settled",
    /// Early copies are kept that come while the destination is told what is stale.
    EarlyAfterStale = "early-after-stale",
    /// Early copies are kept of whichever pass.
    PassNumberIgnored = "pass-number-ignored",
    /// A pass begins while pages of the one before are under way.
    PassBeforeAcknowledged = "pass-before-acknowledged",
    /// Pages of a pass leave before it was taken in.
    PassNotWaitedFor = "pass-not-waited-for",
    /// After a reconnection the source holds all early copies for up to date.
    VouchForEverything = "vouch-for-everything",
    /// Acknowledgements of copies that are stale count.
    StaleAckHeeded = "stale-ack-heeded",
    /// A zero page is not emptied where an older copy lies.
    ZeroOverOldCopy = "zero-over-old-copy",
    /// Early copies that nobody knows of any more stay mapped.
    OldCopiesKept = "old-copies-kept",
    /// Requests are answered while the guest still runs at the source.
    AnsweredBeforeFrozen = "answered-before-frozen",
    /// The guest is resumed although the destination runs it.
    DenialIgnored = "denial-ignored",
    /// Nobody tells the session that the guest is held.
    HoldIgnored = "hold-ignored",
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mutant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|mutant| mutant.name() == text).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|mutant| mutant.name()).collect();
            format!("no mutant is called {text:?}; there are {}", names.join(", "))
        })
    }
}
