//! Floor 2: a fault, answered from memory of the same process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{anonymous, next_fault, register};
use crate::error::{BenchError, Doing};
use crate::guest;
use crate::memory::{self, Memory, PAGE};
use crate::outcome::Outcome;
use crate::sys::Uffd;
use crate::unit::{Think, Wait};

const BYTES: u64 = 16 << 20;

/// Faults on every page.
///
/// # Errors
/// Without userfaultfd, or if a page is not what it must be.
pub fn run(wait: Wait) -> Result<Outcome, BenchError> {
    let content = Memory::filled(anonymous(BYTES))?;
    let memory = Memory::empty(anonymous(BYTES))?;
    let uffd = Uffd::new(0).doing("userfaultfd")?;
    register(&uffd, &memory, false)?;
    let start = memory.address(0) as u64;
    let done = AtomicBool::new(false);
    let latencies = thread::scope(|scope| {
        let handler = scope.spawn(|| {
            while let Some(address) = next_fault(&uffd, wait, &done)? {
                let page = address & !(PAGE - 1);
                // SAFETY: nobody writes the content.
                let bytes = unsafe { memory::bytes(&content, page - start, PAGE as usize) }?;
                uffd.copy(page, bytes).doing("UFFDIO_COPY")?;
            }
            Ok::<_, BenchError>(())
        });
        let pages = memory::shuffled(BYTES / PAGE).into_iter().map(|page| memory.address(page));
        // SAFETY: the handler serves this memory until `done`.
        let latencies = unsafe { guest::touch(pages, Think::BackToBack, &done) };
        done.store(true, Ordering::Release);
        handler.join().expect("the handler does not panic")?;
        latencies
    })?;
    memory.verify()?;
    Ok(Outcome::of(latencies))
}
