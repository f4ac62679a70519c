//! State files on real file systems: durable, used by one process, whole or not there.

mod common;

use afterimage::{
    DestinationEvent, DestinationStateFile, GuestAddress, GuestLayout, PageSize, Region,
    SourceEvent, SourceOptions, SourceOwnership, SourceRecord, SourceStateFile, StateFileError,
    StateSection,
};
use common::children::{Role, argument, say};
use common::{Memory, Pair, Setup};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

fn layout(pages: u64) -> GuestLayout {
    let region =
        Region::new(GuestAddress(0), pages * 4096, PageSize::KIB_4, afterimage::Backing::Shared);
    GuestLayout::new(vec![region]).unwrap()
}

fn begun(path: &Path) -> (SourceStateFile, SourceRecord) {
    let file = SourceStateFile::open(path).unwrap();
    let record = file.begin(&layout(2), SourceStateFile::fresh()).unwrap();
    (file, record)
}

#[test]
fn a_successor_finds_what_was_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let (file, mut record) = begun(&path);
    assert_eq!(record.ownership, SourceOwnership::Owner);
    file.note("guest", "web1").unwrap();
    record.epoch = record.epoch.next();
    record.ownership = SourceOwnership::Given;
    file.write(&record).unwrap();
    drop(file);
    let file = SourceStateFile::open(&path).unwrap();
    assert_eq!(file.record(), Some(record));
    assert_eq!(file.begin(&layout(2), SourceStateFile::fresh()).unwrap(), record);
    assert_eq!(file.noted("guest").as_deref(), Some("web1"));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "others need not know");
    assert!(!directory.path().join("state.new").exists());
}

#[test]
fn a_second_user_is_told_who_the_first_is_until_its_last_ledger_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let (file, _) = begun(&path);
    let ledger = file.ledger();
    drop(file);
    let error = SourceStateFile::open(&path).unwrap_err().to_string();
    let holder = format!("process {}", std::process::id());
    assert!(error.contains(&holder) && error.contains("stop that process"), "{error}");
    // The lock is not on the file itself, which every write replaces.
    let linked = directory.path().join("link");
    symlink(&path, &linked).unwrap();
    assert!(matches!(SourceStateFile::open(&linked), Err(StateFileError::InUse { .. })));
    drop(ledger);
    let file = SourceStateFile::open(&linked).unwrap();
    let record = file.record().unwrap();
    file.write(&record).unwrap();
    assert!(fs::symlink_metadata(&linked).unwrap().is_symlink(), "what it stands for is replaced");
}

#[test]
fn a_killed_process_holds_nothing_and_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let role = Role::start("role_writer", path.to_str().unwrap());
    let mut epoch = 0;
    for _ in 0..20 {
        epoch = role.hear("an epoch").parse().unwrap();
        let error = SourceStateFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", role.id())), "{error}");
    }
    // Killed at any moment of a write.
    drop(role);
    let file = SourceStateFile::open(&path).unwrap();
    assert!(file.record().unwrap().epoch.0 >= epoch, "{:?} is older than {epoch}", file.record());
}

/// Writes again and again.
#[test]
fn role_writer() {
    let Some(path) = argument("role_writer") else { return };
    let (file, mut record) = begun(Path::new(&path));
    loop {
        record.epoch = record.epoch.next();
        file.write(&record).unwrap();
        say(&record.epoch.0.to_string());
    }
}

#[test]
fn what_is_not_this_sessions_is_refused_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let (file, _) = begun(&path);
    let error = file.begin(&layout(3), SourceStateFile::fresh()).unwrap_err().to_string();
    assert!(error.contains("8192 bytes") && error.contains("12288 bytes"), "{error}");
    drop(file);
    let whole = fs::read(&path).unwrap();
    let error = DestinationStateFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("that of a source"), "{error}");
    let text = String::from_utf8(whole.clone()).unwrap();
    for (bytes, expected) in [
        (whole[..whole.len() - 1].to_vec(), "damaged (it is cut short)"),
        (whole[..whole.len() / 2].to_vec(), "damaged (it is cut short)"),
        (Vec::new(), "damaged (it is empty)"),
        (text.replace("=owner", "=given").into(), "its checksum is another"),
        (text.replace("state 1", "state 9").into(), "has form 9"),
        (b"#!/bin/sh\n".to_vec(), "is no state file"),
        (vec![b'a'; 1 << 20], "is no state file"),
    ] {
        fs::write(&path, &bytes).unwrap();
        let error = SourceStateFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    assert!(matches!(
        SourceStateFile::open(directory.path()),
        Err(StateFileError::Stranger { .. })
    ));
    let nowhere = directory.path().join("none/state");
    let error = SourceStateFile::open(&nowhere).unwrap_err().to_string();
    assert!(error.contains("make its directory first"), "{error}");
}

#[test]
fn a_fence_is_durable_and_only_for_sessions_that_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let file = SourceStateFile::open(&path).unwrap();
    assert!(matches!(file.fence(), Err(StateFileError::Empty { .. })));
    drop(file);
    assert!(!path.exists(), "looking makes no record");
    let (file, mut record) = begun(&path);
    record.ownership = SourceOwnership::Given;
    file.write(&record).unwrap();
    let fenced = file.fence().unwrap();
    assert_eq!((fenced.ownership, fenced.epoch), (SourceOwnership::Fenced, record.epoch.next()));
    assert!(fenced.may_run());
    assert_eq!(file.fence().unwrap(), fenced, "once is enough");
    drop(file);
    let file = SourceStateFile::open(&path).unwrap();
    assert_eq!(file.record(), Some(fenced));
    for ownership in [SourceOwnership::Reclaimed, SourceOwnership::Finished] {
        file.write(&SourceRecord { ownership, ..record }).unwrap();
        let error = file.fence().unwrap_err().to_string();
        assert!(error.contains("cannot be fenced"), "{error}");
    }
}

#[test]
fn destinations_have_files_of_their_own() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let (record, ledger) = DestinationStateFile::open_or_create(&path, &layout(1)).unwrap();
    let _: &afterimage::DestinationLedger = &ledger;
    drop(ledger);
    assert_eq!(DestinationStateFile::open(&path).unwrap().record(), Some(record));
    let error = SourceStateFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("that of a destination"), "{error}");
}

/// Leaves no room; the file that takes it.
fn fill(directory: &Path) -> PathBuf {
    let path = directory.join("filler");
    let mut file = File::create(&path).unwrap();
    let error = std::iter::repeat_with(|| file.write_all(&[1; 4096])).find_map(Result::err);
    assert_eq!(error.unwrap().kind(), ErrorKind::StorageFull);
    path
}

#[test]
fn a_full_disk_keeps_the_old_record_and_takes_the_new_one_when_there_is_room() {
    common::small_disk::on_a_small_disk("64k", |directory| {
        let path = directory.join("state");
        let (file, old) = begun(&path);
        let filler = fill(directory);
        let new = SourceRecord { ownership: SourceOwnership::Given, ..old };
        let error = file.write(&new).unwrap_err();
        assert!(error.to_string().contains("make room there"), "{error}");
        assert_eq!(file.record(), Some(old));
        drop(file);
        let file = SourceStateFile::open(&path).unwrap();
        assert_eq!(file.record(), Some(old), "what is there is whole");
        fs::remove_file(filler).unwrap();
        file.write(&new).unwrap();
        drop(file);
        assert_eq!(SourceStateFile::open(&path).unwrap().record(), Some(new));
    });
}

#[test]
fn a_session_on_a_full_disk_says_so_and_goes_on_when_there_is_room() {
    prologue!("a_session_on_a_full_disk_says_so_and_goes_on_when_there_is_room");
    common::small_disk::on_a_small_disk("64k", |directory| {
        let path = directory.join("state");
        let setup = Setup::default();
        let file = SourceStateFile::open(&path).unwrap();
        let memory = Memory::new(&setup.kinds);
        let record = file.begin(memory.as_source().layout(), SourceStateFile::fresh()).unwrap();
        let filler = fill(directory);
        let ledger = file.ledger();
        let change = |source: &mut SourceOptions, _: &mut _| {
            (source.record, source.ledger) = (record, ledger);
        };
        let pair = Pair::start_with(&setup, change, |address| address).unwrap();
        pair.wait_source(&SourceEvent::PersistFailed);
        assert_eq!(file.record(), Some(record));
        fs::remove_file(&filler).unwrap();
        pair.at_source.wait(
            "a destination",
            || pair.dump(),
            |event| matches!(event, SourceEvent::Attached(_)),
        );
        // Full again, when the guest is to be given away.
        fill(directory);
        let state = StateSection { name: "cpu".into(), version: 1, bytes: vec![1] };
        pair.prepare(&[state]);
        pair.wait_source(&SourceEvent::PersistFailed);
        assert_eq!(file.record().unwrap().ownership, SourceOwnership::Owner);
        let said = pair.at_destination.rest();
        assert!(!said.contains(&DestinationEvent::Run), "it runs what nobody gave: {said:?}");
        fs::remove_file(&filler).unwrap();
        pair.finish();
        pair.check_content();
        assert_eq!(file.record().unwrap().ownership, SourceOwnership::Finished);
    });
}
