//! A process that plays a role, as its parent has it.
//!
//! Invariant: when it is dropped, it has ended and been waited for.

use std::io::{self, BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::thread;

use crossbeam_channel::Sender;
use nix::sys::signal::Signal;

use super::error::DemoError;
use super::messages::{Message, Setup, write_line};
use super::options::Role;
use super::report::RoleProcess;

/// A process that plays a role. Dropped, it ends.
pub(super) struct Process {
    pub(super) role: Role,
    child: Child,
    /// Closed when the process has nothing more to hear.
    commands: Option<ChildStdin>,
}

/// What a process has said, or that it will say nothing more.
pub(super) type Said = (RoleProcess, Option<Result<Message, serde_json::Error>>);

impl Process {
    pub(super) fn start(role: Role, setup: &Setup, said: Sender<Said>) -> Result<Self, DemoError> {
        let failed =
            |error| DemoError::failed(&format!("cannot start the {}", role.name()), &error);
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = std::process::Command::new(program)
            .args(["--role", role.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let commands = child.stdin.take();
        let output = child.stdout.take();
        let mut process = Self { role, child, commands };
        process.tell(setup)?;
        let output = output.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        let who = process.name();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if said.send((who, Some(serde_json::from_str(&line)))).is_err() {
                    return;
                }
            }
            // If the parent has stopped listening, it has ended the process as well.
            let _ = said.send((who, None));
        });
        Ok(process)
    }

    /// Its role and its id.
    pub(super) fn name(&self) -> RoleProcess {
        RoleProcess { role: self.role, pid: self.child.id() }
    }

    /// Says something to the process.
    pub(super) fn tell(&mut self, what: &impl serde::Serialize) -> Result<(), DemoError> {
        let commands = self.commands.as_mut().ok_or(io::ErrorKind::BrokenPipe);
        commands.map_err(io::Error::from).and_then(|commands| write_line(commands, what)).map_err(
            |error| DemoError::failed(&format!("the {} does not listen", self.role.name()), &error),
        )
    }

    /// Kills it, and waits until the kernel has taken it apart. `false` if it had ended well by
    /// itself.
    pub(super) fn kill(&mut self) -> Result<bool, DemoError> {
        let name = self.role.name();
        self.child
            .kill()
            .map_err(|error| DemoError::failed(&format!("cannot kill the {name}"), &error))?;
        let status = self.collect()?;
        if status.success() || status.signal() == Some(Signal::SIGKILL as i32) {
            return Ok(!status.success());
        }
        Err(DemoError::Failed(format!("the {name} was to be killed, and ended by {status}")))
    }

    /// Collects a process whose output has ended, which the kernel is taking apart.
    pub(super) fn collect(&mut self) -> Result<ExitStatus, DemoError> {
        self.child.wait().map_err(|error| DemoError::failed("cannot wait for a process", &error))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
