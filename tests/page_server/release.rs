//! A page server that frees what has arrived.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use afterimage::{Checksums, Endpoint};

use crate::support::{PAGE, Server, Target, pattern, sha256};

const PAGES: u64 = 2048;

#[test]
fn what_has_arrived_is_freed_in_the_file_and_counted() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("ram");
    let bytes = pattern(PAGES, 11);
    fs::write(&path, &bytes).unwrap();
    let before = File::open(&path).unwrap().metadata().unwrap().blocks();
    // Slow enough that most of it is freed while the rest is still coming.
    let mut server = Server::start(&[
        "--listen",
        "tcp:127.0.0.1:0",
        "--memory",
        path.to_str().unwrap(),
        "--release",
        "--bandwidth",
        "4M",
    ]);
    server.line("if the destination dies after it ran the guest, the guest is lost");
    let address = server.address();
    let regions = [(0, PAGES * PAGE)];
    let target = Target::start(&regions, Endpoint::Connect(address), Checksums::Off);
    let fetched = target.finish();
    assert_eq!(sha256(&fetched.contents[0]), sha256(&bytes));
    let (status, report, lines) = server.end();
    assert_eq!(status, 0, "{report} {lines:#?}");
    let released = report["pages_released"].as_u64().unwrap();
    assert!((1..=PAGES).contains(&released), "{report}");
    let after = File::open(&path).unwrap().metadata().unwrap().blocks();
    assert_eq!(before - after, released * PAGE / 512);
}
