//! `demo --report`: the page with pictures, as its readers and their programs find it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const DEMO: &str = env!("CARGO_BIN_EXE_demo");

fn demo(directory: &Path, arguments: &str) -> Output {
    println!("demo --report {} {arguments}", directory.display());
    Command::new(DEMO)
        .arg("--report")
        .arg(directory)
        .args(arguments.split_whitespace())
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// What the page has for programs to read.
fn data(html: &str) -> Value {
    let begin = "<script type=\"application/json\" id=\"data\">";
    let (_, data) = html.split_once(begin).expect("the page has data");
    serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap()
}

/// Three pictures, and nothing that is loaded or run.
fn check_html(html: &str) {
    assert_eq!(html.matches("<svg ").count(), 3);
    for id in ["latency", "time-line", "heat-map"] {
        assert_eq!(html.matches(&format!("<svg id=\"{id}\"")).count(), 1, "{id}");
    }
    assert_eq!(html.matches("<figcaption>").count(), 3, "each says how to read it");
    let loads = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for load in ["http", " src=", "url(", "@import", "<iframe", "<object", "<img"] {
        assert!(!loads.contains(load), "the page has {load}");
    }
    assert_eq!(html.matches("<script").count(), 1, "the data, which is not run");
}

/// Samples that begin before the first page and end with the last.
fn check_samples(samples: &Value, report: &Value) {
    let samples = samples.as_array().unwrap();
    assert!((1..=400).contains(&samples.len()), "{} samples", samples.len());
    let arrived = |sample: &Value| {
        let of = |key: &str| sample[key].as_u64().unwrap();
        of("pages_requested") + of("pages_background") + of("pages_zero")
    };
    let percents = |sample: &Value| -> Vec<u64> {
        let all = sample["arrived_percent"].as_array().unwrap();
        all.iter().map(|percent| percent.as_u64().unwrap()).collect()
    };
    for pair in samples.windows(2) {
        assert!(pair[0]["at_us"].as_u64() < pair[1]["at_us"].as_u64(), "{pair:?}");
        assert!(pair[0]["stall_us"].as_f64() <= pair[1]["stall_us"].as_f64(), "{pair:?}");
        assert!(arrived(&pair[0]) <= arrived(&pair[1]), "{pair:?}");
        let (before, after) = (percents(&pair[0]), percents(&pair[1]));
        assert!(before.iter().zip(&after).all(|(before, after)| before <= after), "{pair:?}");
    }
    let last = samples.last().unwrap();
    assert_eq!(Some(arrived(last)), report["pages_total"].as_u64(), "{last}");
    assert!(percents(last).iter().all(|percent| *percent == 100), "{last}");
}

/// Moves, and checks that the page says what the object says.
fn moves_with_a_page(arguments: &str) -> Value {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().join("not/there/yet");
    let output = demo(&directory, &format!("--json {arguments}"));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let path = directory.join("index.html");
    assert_eq!(report["report"].as_str(), path.to_str(), "{report}");
    let html = fs::read_to_string(path).unwrap();
    check_html(&html);
    let mut data = data(&html);
    let samples = data.as_object_mut().unwrap().remove("samples").unwrap();
    assert_eq!(data, report, "the page has the same numbers");
    check_samples(&samples, &report);
    report
}

#[test]
fn the_page_has_pictures_and_the_numbers_of_the_report() {
    moves_with_a_page("--memory 64M");
    moves_with_a_page("--memory 128M --guest threads --vcpus 4 --streams 2 --backing memfd");
}

#[test]
fn a_tiny_migration_has_a_page() {
    let report = moves_with_a_page("--memory 4M --guest threads --vcpus 1");
    assert_eq!(report["pages_total"], 1024);
}

#[test]
fn a_guest_that_was_handed_over_has_a_page() {
    let report = moves_with_a_page("--memory 64M --guest threads --handoff");
    assert_eq!(report["handoff"], true);
}

#[test]
fn the_text_says_where_the_page_is() {
    let directory = tempfile::tempdir().unwrap();
    let output = demo(directory.path(), "--memory 16M --guest threads");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let path = directory.path().join("index.html");
    let text = String::from_utf8(output.stdout).unwrap();
    let expected = format!("\nPictures of it are in {}.\n", path.display());
    assert!(text.ends_with(&expected), "{text}");
    let html = fs::read_to_string(path).unwrap();
    assert!(html.contains("<h1>Postcopy migration of a running guest of 16 MiB</h1>"));
}

#[test]
fn a_move_that_was_wrong_is_marked_on_the_page() {
    let directory = tempfile::tempdir().unwrap();
    let output = demo(directory.path(), "--memory 16M --guest threads --corrupt-one-byte");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let html = fs::read_to_string(directory.path().join("index.html")).unwrap();
    assert!(html.contains("<tr class=\"short\"><td>verified</td>"), "{html}");
}

#[test]
fn a_directory_that_cannot_be_is_refused_before_anything_moves() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let output = demo(&file, "--json --memory 16M --guest threads");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let error = report["error"].as_str().unwrap();
    assert_eq!(report["exit_status"], 2);
    assert!(error.starts_with("--report: cannot make the directory"), "{error}");
    assert!(error.contains("name another"), "{error}");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("demo: {error}\n"));
}

#[test]
fn a_page_that_cannot_be_written_is_an_error_after_the_move() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("index.html")).unwrap();
    let output = demo(directory.path(), "--json --memory 16M --guest threads");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["verified"], true, "what was measured is still told: {report}");
    assert_eq!(report.get("report"), None, "{report}");
    let errors = String::from_utf8(output.stderr).unwrap();
    let last = errors.lines().last().unwrap();
    assert!(
        last.starts_with("demo: the guest moved, but there is no page: cannot write"),
        "{last}"
    );
}
