//! A source, a page-client, and a VMM whose memory it is to serve.

use std::cell::RefCell;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use afterimage_tools::attachment::{AttachmentEvent, Driver};
use tempfile::TempDir;

use crate::content;
use crate::process::{LIMIT, Process, library, role};

pub(crate) struct Scene {
    /// In memory, as guest memory is.
    directory: TempDir,
    pub(crate) server: Option<Process>,
    pub(crate) client: Option<Process>,
    keeper: Option<Process>,
    client_arguments: Vec<String>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        Self { directory, server: None, client: None, keeper: None, client_arguments: Vec::new() }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.path(name))
    }

    fn attach_path(&self) -> PathBuf {
        self.directory.path().join("attach")
    }

    /// A page-server of files of so many pages.
    pub(crate) fn serve(&mut self, pages: &[u64], options: &[&str]) {
        let (mut arguments, mut first) = (Vec::new(), 0);
        for (number, pages) in pages.iter().enumerate() {
            let image = self.directory.path().join(format!("image{number}"));
            content::write(&image, 0, first, *pages);
            first += pages;
            arguments.extend(["--memory".to_owned(), image.display().to_string()]);
        }
        arguments.extend(options.iter().map(|&option| option.to_owned()));
        self.serve_as(&arguments);
    }

    /// A page-server with these arguments, and an address.
    pub(crate) fn serve_as(&mut self, arguments: &[String]) {
        let (listen, mut all) = (self.unix("pages"), vec!["--listen"]);
        all.push(&listen);
        all.extend(arguments.iter().map(String::as_str));
        let mut server = Process::start(role("page_server", &all));
        server.hear_of("listening on");
        self.server = Some(server);
    }

    pub(crate) fn open_client(&mut self) {
        let (attach, connect) = (self.unix("attach"), self.unix("pages"));
        self.client_arguments = vec!["--attach".into(), attach, "--connect".into(), connect];
        self.start_client();
        self.client.as_mut().unwrap().hear_of("listening on");
    }

    /// One that may be killed.
    pub(crate) fn open_kept_client(&mut self) {
        let at = self.unix("keeper");
        let mut keeper = Process::start(role("keeper", &[&at]));
        keeper.hear_of("listening on");
        self.keeper = Some(keeper);
        let (attach, connect) = (self.unix("attach"), self.unix("pages"));
        let state = self.path("state");
        let options = ["--attach", &attach, "--connect", &connect, "--keeper", &at];
        let options = options.into_iter().chain(["--guest", "vm7", "--state", &state]);
        self.client_arguments = options.map(str::to_owned).collect();
        self.start_client();
        self.client.as_mut().unwrap().hear_of("listening on");
    }

    pub(crate) fn start_client(&mut self) {
        let arguments: Vec<_> = self.client_arguments.iter().map(String::as_str).collect();
        self.client = Some(Process::start(role("page_client", &arguments)));
    }

    /// A program that maps memory, of which this is named.
    pub(crate) fn vmm(&self, memory: &str) -> Process {
        self.vmm_with(memory, |_| ())
    }

    pub(crate) fn vmm_with(&self, memory: &str, change: impl FnOnce(&mut Command)) -> Process {
        let mut command = role("vmm", &[]);
        command.env("LD_PRELOAD", library());
        self.name(&mut command, memory);
        change(&mut command);
        Process::start(command)
    }

    /// Names the memory of a program, and where it is to be handed over.
    pub(crate) fn name(&self, command: &mut Command, memory: &str) {
        command.env("AFTERIMAGE_MEMORY", memory).env("AFTERIMAGE_GUEST", "guest");
        command.env("AFTERIMAGE_SOCKET", self.unix("attach"));
    }

    /// Who restores the guest, and lets it run.
    pub(crate) fn drive(&self) -> Driving {
        let driver = Driver::connect(&self.attach_path(), "guest").unwrap();
        let driving = Driving { driver, seen: RefCell::default() };
        driving.until(&AttachmentEvent::Attached);
        driving.until(&AttachmentEvent::State(Vec::new()));
        driving.driver.ready();
        driving.until(&AttachmentEvent::Run);
        driving.driver.started();
        driving
    }

    /// Everybody ends well, and the library too.
    pub(crate) fn ends(&mut self, driving: &Driving, vmm: &mut Process) {
        self.arrives(driving);
        // The thread that listened has gone, and with it all that the library did.
        let until = Instant::now() + LIMIT;
        while vmm.ask("threads").contains("afterimage") {
            assert!(Instant::now() < until, "the thread does not end");
        }
    }
}

impl Scene {
    /// Who has brought the memory ends well.
    pub(crate) fn arrives(&mut self, driving: &Driving) {
        driving.until(&AttachmentEvent::AllArrived);
        driving.until(&AttachmentEvent::Finished);
        self.both_end();
    }

    /// The same, whether or not the driver has come back to hear of it: it is not waited for.
    pub(crate) fn both_end(&mut self) {
        for side in [self.client.take(), self.server.take()] {
            let (status, said, complaints) = side.unwrap().end();
            assert_eq!(status, 0, "{complaints:#?}");
            assert!(said.iter().any(|it| it == "finished"), "{said:#?}");
        }
    }
}

pub(crate) struct Driving {
    driver: Driver,
    /// Small memory has all arrived before the guest may run.
    seen: RefCell<Vec<AttachmentEvent>>,
}

impl Driving {
    /// Waits for an event, which may have come before others that were waited for.
    pub(crate) fn until(&self, wanted: &AttachmentEvent) {
        let (until, mut seen) = (Instant::now() + LIMIT, self.seen.borrow_mut());
        while !seen.contains(wanted) {
            let left = until.saturating_duration_since(Instant::now());
            let Some(event) = self.driver.next(left) else {
                panic!("no {wanted:?} after {seen:?}")
            };
            seen.push(event);
        }
    }
}
