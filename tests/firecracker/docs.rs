//! The commands of docs/firecracker.md, run as they are written, with the client of these tests in
//! Firecracker's place.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::memory::{Kind, Layout};
use crate::support::{CLIENT, PAGE, SERVER, write_image};
use crate::vmm::LAYOUT;

const PAGE_OF_DOCS: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/firecracker.md"));

const PAGES: u64 = 1024;
/// What the VM does in the end.
const CHECK: &str = "check 0 1024";

/// The commands of one section.
pub(crate) fn commands(heading: &str) -> Vec<String> {
    let section = PAGE_OF_DOCS.split("\n## ").find(|it| it.starts_with(heading));
    let section = section.unwrap_or_else(|| panic!("no section {heading:?}"));
    let blocks = section.split("```sh\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap().to_owned()).collect()
}

/// A directory with a snapshot, and programs by the names that the docs use.
struct Desk {
    directory: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout { kind: Kind::Private, lengths: vec![PAGES * PAGE] };
        write_image(&directory.path().join("vm.mem"), layout.pages());
        fs::write(directory.path().join("vm.state"), b"what Firecracker reads").unwrap();
        let bin = directory.path().join("bin");
        install(&bin);
        // Its API is not what is tested: it listens, and `curl` starts the VM.
        program(&bin.join("firecracker"), "test \"$1\" = --api-sock || exit 2");
        // Runs as long as the shell that has made `hold`, and keeps it open.
        let vmm = format!(
            "exec 9>&-\n\
             case \"$*\" in *'\"backend_type\": \"Uffd\"'*'\"backend_path\": \"uffd.sock\"'*) ;; \
             *) echo 'no such request' >&2; exit 2;; esac\n\
             test -e vm.state || exit 2\n\
             (printf '%s\\n' 'connect uffd.sock' hand-over '{CHECK}'; cat hold) |\n\
             {LAYOUT}='{}' '{}' --exact vmm::role_vmm --nocapture --test-threads=1 \
             > vmm.log 2>&1 &",
            serde_json::to_string(&layout).unwrap(),
            std::env::current_exe().unwrap().display(),
        );
        program(&bin.join("curl"), &vmm);
        Self { directory }
    }

    /// Runs these, one after the other as a person would. The VM has every page at the end.
    fn run(&self, script: &str) {
        let path = self.directory.path();
        let mut shell = Command::new("sh");
        shell
            .current_dir(path)
            .env("PATH", search_path(&path.join("bin")))
            .stdin(Stdio::piped())
            .stderr(Stdio::null());
        let mut shell = shell.spawn().unwrap();
        let script = format!(
            "mkfifo hold\nexec 9<>hold\n{script}\
             timeout 60 sh -c 'until grep -q \"vmm: {CHECK}\" vmm.log; do :; done' || exit 1\n"
        );
        shell.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let status = shell.wait().unwrap();
        let said = fs::read_to_string(path.join("vmm.log")).unwrap_or_default();
        assert!(status.success(), "{said}");
    }
}

/// The commands by the names that the docs use, in a directory `bin`.
pub(crate) fn install(bin: &Path) {
    fs::create_dir(bin).unwrap();
    symlink(CLIENT, bin.join("page-client")).unwrap();
    symlink(SERVER, bin.join("page-server")).unwrap();
}

/// The search path of a shell with these first.
pub(crate) fn search_path(bin: &Path) -> String {
    format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())
}

fn program(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A person looks whether the line is there; a script, whether the socket is.
pub(crate) const SOCKET_IS_THERE: &str = "\nuntil test -S uffd.sock; do :; done\n";

#[test]
fn a_vm_is_restored_from_a_file_by_the_commands_of_the_docs() {
    let desk = Desk::new();
    let [handler, load] = &commands("From a file")[..] else { panic!("two blocks") };
    desk.run(&format!("{handler}handler=$!{SOCKET_IS_THERE}{load}wait $handler || exit 1\n"));
    let report = fs::read_to_string(desk.directory.path().join("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["outcome"], "finished", "{report}");
    assert_eq!(report["pages_complete"], PAGES, "{report}");
}

#[test]
fn a_vm_is_restored_from_another_machine_by_the_commands_of_the_docs() {
    let desk = Desk::new();
    let [server, handler] = &commands("From another machine")[..] else { panic!("two blocks") };
    let [_, load] = &commands("From a file")[..] else { panic!("two blocks") };
    // A port of this test's own: others run on this machine.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let script = format!(
        "{server}server=$!\n{handler}handler=$!{SOCKET_IS_THERE}{load}wait $handler || exit 1\n\
         kill $server\nwait $server || exit 1\n"
    );
    desk.run(&script.replace("127.0.0.1:4000", &format!("127.0.0.1:{port}")));
}

#[test]
fn every_option_in_the_docs_is_one() {
    let help = |program: &str| {
        let output = Command::new(program).arg("--help").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let known = [help(CLIENT), help(SERVER)].concat();
    let options = PAGE_OF_DOCS.split(|c: char| !(c.is_ascii_lowercase() || c == '-'));
    for option in options.filter(|word| word.starts_with("--") && word.len() > 4) {
        let of_another = ["--api-sock", "--unix-socket"].contains(&option);
        assert!(of_another || known.contains(option), "{option} is no option");
    }
}
