//! A source whose ledger's disk does not answer: its thread hangs, and nobody waits for it.

mod common;

use afterimage::{Background, Release, ReleaseLedger, ThreadHook, ThreadRole};
use common::proxy::{Cut, Proxy};
use common::{Kind, Listening, Pair, Setup, Toucher};
use std::sync::{Arc, Condvar, Mutex};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

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
        let setup =
            Setup { kinds: vec![(Kind::Anonymous, 8 * MIB)], listening, ..Setup::default() };
        let mut proxy = None;
        let pair = Pair::start_with(
            &setup,
            |source, _| {
                source.release = Release::Free(ReleaseLedger::volatile());
                source.background = Background::OnRequest;
                source.threads = held.hook();
            },
            |address| proxy.insert(Proxy::start(&address)).address(),
        );
        let (pair, proxy) = (pair.expect("no huge pages"), proxy.expect("a detour"));
        pair.switch(&[]);
        touch(&pair, 0);
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
