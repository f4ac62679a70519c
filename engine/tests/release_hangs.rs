//! A source whose thread that frees pages hangs, because its ledger's disk does not answer, or
//! panics: nobody waits for it, and nothing is freed until another takes its place.

mod common;

use afterimage::{Background, Release, ReleaseLedger, ThreadHook, ThreadRole};
use common::proxy::{Cut, Proxy};
use common::{Kind, Listening, Pair, Setup, Toucher};
use std::sync::{Arc, Condvar, Mutex, mpsc};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// A guest that runs at the destination and has read a hundred pages there, of a source that
/// frees pages and calls `hook` on its threads.
fn start(listening: Listening, hook: ThreadHook) -> (Pair, Proxy) {
    let setup = Setup { kinds: vec![(Kind::Anonymous, 8 * MIB)], listening, ..Setup::default() };
    let mut proxy = None;
    let pair = Pair::start_with(
        &setup,
        |source, _| {
            source.release = Release::Free(ReleaseLedger::volatile());
            source.background = Background::OnRequest;
            source.threads = hook;
        },
        |address| proxy.insert(Proxy::start(&address)).address(),
    );
    let (pair, proxy) = (pair.expect("no huge pages"), proxy.expect("a detour"));
    pair.switch(&[]);
    touch(&pair, 0);
    (pair, proxy)
}

/// The guest reads a hundred pages at the destination.
fn touch(pair: &Pair, from: u64) {
    let (new, Setup { seed, content, .. }) = (Arc::clone(&pair.new), pair.setup.clone());
    Toucher::start(move || new.check_pages(seed, content, from, from + 100))
        .finish("the guest reads", || pair.dump());
}

/// Holds threads that free pages, as a disk does that does not answer.
#[derive(Clone, Default)]
struct Held(Arc<(Mutex<HeldThreads>, Condvar)>);

#[derive(Default)]
struct HeldThreads {
    is_open: bool,
    came: u32,
}

impl Held {
    fn hook(&self) -> ThreadHook {
        let this = self.clone();
        ThreadHook::new(move |role, _| {
            if role == ThreadRole::Release {
                let (state, changed) = &*this.0;
                let mut state = state.lock().expect("not poisoned");
                state.came += 1;
                drop(changed.wait_while(state, |state| !state.is_open).expect("not poisoned"));
            }
        })
    }

    fn set_open(&self, is_open: bool) {
        self.0.0.lock().expect("not poisoned").is_open = is_open;
        self.0.1.notify_all();
    }

    fn came(&self) -> u32 {
        self.0.0.lock().expect("not poisoned").came
    }
}

#[test]
fn a_release_thread_that_hangs_holds_up_neither_a_recovery_nor_the_end() {
    prologue!("a_release_thread_that_hangs");
    for listening in [Listening::Source, Listening::Destination] {
        let held = Held::default();
        let (pair, proxy) = start(listening, held.hook());
        common::wait_until("a release thread", || pair.dump(), || held.came() == 1);
        for cut in 1..=2 {
            proxy.cut(Cut::Reset, |_| true);
            let is_back = || pair.source.stats().recoveries >= cut;
            common::wait_until("a recovery", || pair.dump(), is_back);
            touch(&pair, 100 * cut);
        }
        assert_eq!(held.came(), 1, "one at a time");
        assert_eq!(pair.source.stats().pages_released, 0);
        held.set_open(true);
        common::wait_until(
            "pages to be freed",
            || pair.dump(),
            || pair.source.stats().pages_released == 300,
        );
        assert_eq!(held.came(), 2);
        held.set_open(false);
        proxy.cut(Cut::Reset, |_| true);
        common::wait_until("the next release thread", || pair.dump(), || held.came() == 3);
        let Pair { source, old, .. } = pair;
        drop(source);
        assert_eq!(old.resident_bytes(), 8 * MIB - 300 * PAGE);
        held.set_open(true);
    }
}

#[test]
fn a_release_thread_that_panics_has_a_successor_on_the_next_connection() {
    prologue!("a_release_thread_that_panics");
    // What the first of them panics with, and is dropped by who joins it.
    let (payload, joined) = mpsc::channel::<()>();
    let payload = Mutex::new(Some(payload));
    let hook = ThreadHook::new(move |role, _| {
        if role == ThreadRole::Release {
            let payload = payload.lock().expect("not poisoned").take();
            if let Some(payload) = payload {
                std::panic::panic_any(payload);
            }
        }
    });
    let (pair, proxy) = start(Listening::Source, hook);
    let end = joined.recv_timeout(common::PATIENCE);
    assert_eq!(end, Err(mpsc::RecvTimeoutError::Disconnected), "its end is noticed");
    proxy.cut(Cut::Reset, |_| true);
    common::wait_until(
        "pages to be freed",
        || pair.dump(),
        || pair.source.stats().pages_released == 100,
    );
}
