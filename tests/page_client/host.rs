//! A host on which a guest is to run: a directory, a keeper perhaps, and how page-client is
//! started there.

use std::path::PathBuf;

use afterimage_tools::keeper::Keeper;
use nix::sys::signal::Signal;

use crate::support::{CLIENT, Daemon, KEEPER};

pub(crate) struct Host {
    directory: tempfile::TempDir,
    keeper: Option<Daemon>,
    arguments: Vec<String>,
}

impl Host {
    /// Where page-client keeps nothing beyond its death.
    pub(crate) fn alone(source: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut host = Self { directory, keeper: None, arguments: vec!["--json".to_owned()] };
        host.add("--attach", &host.unix("attach"));
        host.add("--connect", source);
        host
    }

    pub(crate) fn with_keeper(source: &str) -> Self {
        let mut host = Self::alone(source);
        host.keeper = Some(start_keeper(&host.unix("keeper")));
        host.add("--keeper", &host.unix("keeper"));
        host.add("--guest", "vm7");
        host.add("--state", &host.path("state"));
        host
    }

    fn add(&mut self, option: &str, value: &str) {
        self.arguments.extend([option.to_owned(), value.to_owned()]);
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.path(name))
    }

    pub(crate) fn attach_path(&self) -> PathBuf {
        self.directory.path().join("attach")
    }

    /// Starts page-client with another value from here on.
    pub(crate) fn set(&mut self, option: &str, value: &str) {
        let at = self.arguments.iter().position(|it| it == option).unwrap();
        value.clone_into(&mut self.arguments[at + 1]);
    }

    pub(crate) fn client(&self) -> Daemon {
        Daemon::start(CLIENT, &self.arguments)
    }

    /// One that ends itself at a step.
    pub(crate) fn dying_client(&self, step: &str) -> Daemon {
        Daemon::start_with(CLIENT, &self.arguments, Some(step))
    }

    /// A page-client that waits for a guest.
    pub(crate) fn open_client(&self) -> Daemon {
        let mut client = self.client();
        client.line("a VMM can have its memory served");
        client
    }

    pub(crate) fn keeper(&mut self) -> &mut Daemon {
        self.keeper.as_mut().expect("this host has one")
    }

    /// How many guests the keeper has.
    pub(crate) fn kept(&self) -> usize {
        let path = self.directory.path().join("keeper");
        Keeper::connect(&path, "a test").unwrap().list().unwrap().len()
    }

    pub(crate) fn restart_keeper(&mut self) {
        self.keeper().signal(Signal::SIGKILL);
        self.keeper().child.wait().unwrap();
        self.keeper = Some(start_keeper(&self.unix("keeper")));
    }
}

/// A keeper that can be connected to.
pub(crate) fn start_keeper(address: &str) -> Daemon {
    let mut keeper = Daemon::start(KEEPER, &["--listen", address]);
    keeper.line("listening on");
    keeper
}
