//! What the engine's integration tests share: guests with known content, both sides of a
//! session, waits that end, a peer that speaks the wire by hand, a proxy that cuts.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::missing_panics_doc, missing_docs, missing_debug_implementations)]
#![allow(unused_imports, reason = "likewise")]
#![allow(unreachable_pub, reason = "shared by several test binaries")]

pub mod attacked;
pub mod children;
pub mod counters;
pub mod lone;
pub mod memory;
pub mod moving;
pub mod peer;
pub mod proxy;
pub mod random;
pub mod session;
pub mod small_disk;
pub mod victim;

pub use lone::{LoneDestination, LoneSource};
pub use memory::{Content, Kind, Memory};
pub use moving::{Moving, precopy, tracker_of};
pub use random::Random;
pub use session::{EventLog, Listening, Pair, Setup, Transport};

use std::io::Write;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long anything may take. A busy machine needs a tenth of it.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// What the operator says that this machine has (`AFTERIMAGE_REQUIRE=userfaultfd,hugetlb`):
/// there a skip is a failure.
pub fn skip(lacking: &str, why: &str) {
    let required = std::env::var("AFTERIMAGE_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|name| name.trim() == lacking),
        "AFTERIMAGE_REQUIRE names {lacking}, which this machine lacks: {why}"
    );
    // Past the capture of the test harness: a skip is heard.
    let _ = writeln!(std::io::stderr(), "SKIPPED: this machine lacks {lacking}: {why}");
}

/// Whether this machine can run the engine at all; says so if not.
pub fn has_userfaultfd() -> bool {
    static ANSWER: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let why = ANSWER.get_or_init(|| {
        let memory = Memory::new(&[(Kind::Anonymous, 4096)]);
        memory.register(afterimage::DiscardNotice::Called).err().map(|error| error.to_string())
    });
    match why {
        Some(why) => {
            skip("userfaultfd", why);
            false
        }
        None => true,
    }
}

/// Faults of what: of everything, where this process may.
pub fn scope() -> afterimage::FaultScope {
    if nix::unistd::geteuid().is_root() {
        afterimage::FaultScope::KernelAndUser
    } else {
        afterimage::FaultScope::UserOnly
    }
}

/// Waits until `is_so`, looking again and again; panics with what it waited for.
pub fn wait_until(what: &str, dump: impl Fn() -> String, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}\n{}", dump());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs on a thread of its own what may wait for a page that never comes. The thread is left
/// behind then: nothing can end it but the end of the process.
pub struct Toucher<T> {
    answer: mpsc::Receiver<T>,
}

impl<T: Send + 'static> Toucher<T> {
    pub fn start(touch: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, answer) = mpsc::channel();
        std::thread::spawn(move || sender.send(touch()));
        Self { answer }
    }

    pub fn finish(self, what: &str, dump: impl Fn() -> String) -> T {
        match self.answer.recv_timeout(PATIENCE) {
            Ok(value) => value,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                panic!("not in {PATIENCE:?}: {what}\n{}", dump())
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{what}: the thread panicked"),
        }
    }

    pub fn is_waiting(&self) -> bool {
        matches!(self.answer.try_recv(), Err(mpsc::TryRecvError::Empty))
    }
}

/// Ends the process, with a message, if a test does not: the last resort against a hang in a
/// destructor.
pub struct Watchdog {
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    pub fn start(name: &'static str) -> Self {
        let (alive, gone) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if gone.recv_timeout(PATIENCE * 3) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = writeln!(std::io::stderr(), "{name} hangs; the process is ended");
                std::process::abort();
            }
        });
        Self { _alive: alive }
    }
}

/// Fills its caller's frame: skips without userfaultfd, and guards against hanging.
#[macro_export]
macro_rules! prologue {
    ($name:literal) => {
        if !$crate::common::has_userfaultfd() {
            return;
        }
        let _watchdog = $crate::common::Watchdog::start($name);
    };
}

/// Bytes of memory that this process has resident.
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).expect("a field of status");
        line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("a number") * 1024
    };
    field("RssAnon:")
}
