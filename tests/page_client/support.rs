//! Daemons to talk to, a guest in this process, and its source.

use std::io::{BufRead, BufReader, Read};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage::{
    Background, DestinationMemory, DestinationRegion, DiscardNotice, Endpoint, Events, FaultScope,
    GuestAddress, Listener, Plaintext, Source, SourceEvent, SourceMemory, SourceOptions,
    SourceRegion,
};
use afterimage_tools::attachment::{Attachment, AttachmentEvent};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) const PAGE: u64 = 4096;
/// Long enough for anything on a busy machine; reached only in failure.
pub(crate) const LIMIT: Duration = Duration::from_mins(1);

/// A running command.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    lines: Receiver<String>,
    pub(crate) seen: Vec<String>,
}

impl Daemon {
    pub(crate) fn start<S: AsRef<std::ffi::OsStr>>(program: &str, arguments: &[S]) -> Self {
        Self::start_with(program, arguments, None)
    }

    /// One that ends itself at a step.
    pub(crate) fn start_with<S: AsRef<std::ffi::OsStr>>(
        program: &str,
        arguments: &[S],
        dies_at: Option<&str>,
    ) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        if let Some(step) = dies_at {
            command.env("AFTERIMAGE_KILL_AT", step);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the command starts");
        let errors = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        let pid = child.id();
        thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                // Shown where the test fails.
                println!("{pid}: {line}");
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, seen: Vec::new() }
    }

    /// Waits for a line that holds `text`.
    pub(crate) fn line(&mut self, text: &str) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            let line = self.lines.recv_timeout(until.saturating_duration_since(Instant::now()));
            let Ok(line) = line else {
                panic!("no line with {text:?}; there were {:#?}", self.seen)
            };
            self.seen.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn lines_so_far(&mut self) -> Vec<String> {
        self.seen.extend(self.lines.try_iter());
        self.seen.clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Whether a signal has stopped it.
    pub(crate) fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The name of the command may have spaces in it.
        stat.rsplit(')').next().unwrap().starts_with(" T")
    }

    /// Waits for its end: exit status and what it printed.
    pub(crate) fn end(mut self) -> (i32, String, Vec<String>) {
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let status = self.child.wait().unwrap();
        self.seen.extend(self.lines.iter());
        (status.code().unwrap_or(-1), text, std::mem::take(&mut self.seen))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) const CLIENT: &str = env!("CARGO_BIN_EXE_page-client");
pub(crate) const SERVER: &str = env!("CARGO_BIN_EXE_page-server");
pub(crate) const KEEPER: &str = env!("CARGO_BIN_EXE_afterimage-keeper");

/// What word `word` of page `page` holds at the source.
pub(crate) const fn word_of(page: u64, word: u64) -> u64 {
    if page % 7 == 3 { 0 } else { (page << 16 | word).wrapping_mul(0x5851_f42d_4c95_7f2d) | 1 }
}

/// The same in a file.
pub(crate) fn write_image(path: &Path, pages: u64) {
    let words = (0..pages).flat_map(|page| (0..PAGE / 8).map(move |word| word_of(page, word)));
    std::fs::write(path, words.flat_map(u64::to_le_bytes).collect::<Vec<_>>()).unwrap();
}

/// The guest gives a page up: it is zero from here on.
pub(crate) fn discard(map: &MmapRaw, page: u64) {
    let start = map.as_mut_ptr().wrapping_add((page * PAGE) as usize);
    // What has a file keeps its content with the one, what has none knows not the other.
    for advice in [nix::libc::MADV_REMOVE, nix::libc::MADV_DONTNEED] {
        // SAFETY: a page of our own mapping, of which there are no references but atomics.
        if unsafe { nix::libc::madvise(start.cast(), PAGE as usize, advice) } == 0 {
            return;
        }
    }
    panic!("a page cannot be given up: {}", std::io::Error::last_os_error());
}

/// A source of `pages` pages, in this process.
pub(crate) struct Origin {
    pub(crate) source: Source,
    events: Events<SourceEvent>,
    pub(crate) address: String,
}

impl Origin {
    /// Slow in background until it is told to [hurry](Self::hurry), so that there is time to
    /// die in.
    pub(crate) fn start(pages: u64) -> Self {
        let file = memfd(pages * PAGE);
        let map = MmapOptions::new().len((pages * PAGE) as usize).map_raw(&file).unwrap();
        for page in (0..pages).filter(|page| page % 7 != 3) {
            for word in 0..PAGE / 8 {
                at(&map, page, word).store(word_of(page, word), Ordering::Relaxed);
            }
        }
        let region = SourceRegion::file(GuestAddress(0), file, 0, pages * PAGE).unwrap();
        let memory = Arc::new(SourceMemory::new(vec![region]).unwrap());
        let listener =
            Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), Plaintext::LoopbackOnly).unwrap();
        let address = listener.address().to_string();
        let mut options = SourceOptions::default();
        options.background =
            Background::Limited { bytes_per_second: NonZeroU64::new(1 << 20).unwrap() };
        let (source, events) = Source::start(memory, Endpoint::Listen(listener), options).unwrap();
        Self { source, events, address }
    }

    pub(crate) fn hurry(&self) {
        self.source.set_background(Background::Unlimited);
    }

    pub(crate) fn until(&self, wanted: &SourceEvent) {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let event = self.events.next_timeout(left);
            let event = event.unwrap_or_else(|why| panic!("{why}: {:?}", self.source.stats()));
            if event == *wanted {
                return;
            }
        }
    }
}

pub(crate) fn memfd(length: u64) -> OwnedFd {
    let file = std::fs::File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(length).unwrap();
    file.into()
}

pub(crate) fn at(map: &MmapRaw, page: u64, word: u64) -> &AtomicU64 {
    let offset = (page * PAGE + word * 8) as usize;
    assert!(offset < map.len());
    // SAFETY: inside the mapping, aligned, and reached by atomics only.
    unsafe { AtomicU64::from_ptr(map.as_mut_ptr().add(offset).cast()) }
}

/// A guest of this process, whose memory page-client serves.
pub(crate) struct Vmm {
    pub(crate) map: Arc<MmapRaw>,
    pub(crate) memory: DestinationMemory,
    pub(crate) attachment: Attachment,
    pub(crate) pages: u64,
}

pub(crate) fn register(pages: u64, has_file: bool) -> (Arc<MmapRaw>, DestinationMemory) {
    let length = (pages * PAGE) as usize;
    let file = has_file.then(|| memfd(pages * PAGE));
    let map = match &file {
        Some(file) => MmapOptions::new().len(length).map_raw(file).unwrap(),
        None => MmapRaw::from(MmapOptions::new().len(length).map_anon().unwrap()),
    };
    let start = NonNull::new(map.as_mut_ptr()).unwrap();
    // SAFETY: the mapping is kept beside what serves it, and reached by atomics only.
    let region = unsafe {
        match file {
            Some(file) => DestinationRegion::shared(GuestAddress(0), start, pages * PAGE, file, 0),
            None => DestinationRegion::anonymous(GuestAddress(0), start, pages * PAGE),
        }
    };
    let (scope, notice) = (FaultScope::UserOnly, DiscardNotice::Events);
    let memory = DestinationMemory::register(vec![region], scope, notice).unwrap();
    (Arc::new(map), memory)
}

impl Vmm {
    pub(crate) fn attach(path: &Path, name: &str, pages: u64, has_file: bool) -> Self {
        let (map, memory) = register(pages, has_file);
        let attachment = Attachment::attach(path, name, &memory).unwrap();
        Self { map, memory, attachment, pages }
    }

    /// One that another process restores and starts.
    pub(crate) fn attach_driven(path: &Path, pages: u64) -> Self {
        let (map, memory) = register(pages, true);
        let attachment = Attachment::attach_driven(path, "guest", &memory).unwrap();
        Self { map, memory, attachment, pages }
    }

    /// The next event that is wanted; others than coming and going are not to be.
    pub(crate) fn until(&self, is_wanted: impl Fn(&AttachmentEvent) -> bool) -> AttachmentEvent {
        let until = Instant::now() + LIMIT;
        let mut seen = Vec::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Some(event) = self.attachment.next(left) else { panic!("no event after {seen:?}") };
            if is_wanted(&event) {
                return event;
            }
            seen.push(event);
        }
    }

    /// Restores the guest, and waits until it may run.
    pub(crate) fn run(&self) {
        self.until(|event| matches!(event, AttachmentEvent::State(_)));
        self.attachment.ready();
        self.until(|event| *event == AttachmentEvent::Run);
    }

    /// Every page is what it must be.
    pub(crate) fn check(&self) {
        for page in 0..self.pages {
            check(&self.map, page);
        }
    }
}

pub(crate) fn check(map: &MmapRaw, page: u64) {
    for word in [0, 1, 255, 511] {
        let found = at(map, page, word).load(Ordering::Relaxed);
        assert_eq!(found, word_of(page, word), "page {page}, word {word}");
    }
}

/// A thread that reads pages at random and verifies them, as many as it is let.
pub(crate) struct Vcpu {
    let_go: Sender<u64>,
    done: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Vcpu {
    pub(crate) fn start(vmm: &Vmm, seed: u64) -> Self {
        let (map, pages) = (Arc::clone(&vmm.map), vmm.pages);
        let (let_go, grants) = channel::<u64>();
        let (sender, done) = channel();
        let thread = thread::spawn(move || {
            let mut state = seed;
            for count in grants {
                for _ in 0..count {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(12345);
                    check(&map, (state >> 33) % pages);
                }
                sender.send(()).unwrap();
            }
        });
        Self { let_go, done, thread }
    }

    /// Lets it read so many pages, without waiting for it.
    pub(crate) fn may_go_on(&self, pages: u64) {
        self.let_go.send(pages).unwrap();
    }

    /// Waits until it has read what it may.
    pub(crate) fn has_gone_on(&self) {
        self.done.recv_timeout(LIMIT).expect("the guest stands still, or has read a wrong byte");
    }

    pub(crate) fn stop(self) {
        drop(self.let_go);
        self.thread.join().expect("every page is what it must be");
    }
}
