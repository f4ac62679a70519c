//! Pages and pictures, of nothing, of one measurement and of many.

use super::*;
use crate::sampling::ArrivalSample;
use serde_json::json;

/// What is checked of every picture: it is one element, and knows no number that is none.
#[track_caller]
fn assert_drawn(svg: &str) {
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{svg}");
    assert_eq!(svg.matches("<svg").count(), 1);
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
}

fn samples(count: u64) -> Vec<ArrivalSample> {
    let sample = |n| ArrivalSample {
        at_us: 1000 * n,
        pages_requested: n,
        pages_background: 8 * n,
        pages_precopy: 2 * n,
        pages_zero: n,
        stall_us: 100.0 * n as f64,
        arrived_percent: (0..96).map(|part| ((n * part) / 4).min(100) as u8).collect(),
    };
    (1..=count).map(sample).collect()
}

fn marks() -> Vec<Mark> {
    let mark = |at_us, label: &str| Mark { at_us, label: label.to_owned() };
    vec![mark(5.0, "here"), mark(-1.0, "before"), mark(1e12, "after"), mark(f64::NAN, "never")]
}

#[test]
fn latencies_are_drawn() {
    let series = |counts: &[u64]| BucketSeries { name: "a < b".into(), counts: counts.to_vec() };
    for series in [
        vec![],
        vec![series(&[])],
        vec![series(&[7])],
        vec![series(&[0; 9]), series(&[0, 0, 0, 1])],
        (1..9).map(|n| series(&(0..40).map(|m| n * m).collect::<Vec<_>>())).collect(),
    ] {
        let picture = LatencyBuckets { series, marks: marks() };
        assert_drawn(&picture.draw());
    }
    let none = LatencyBuckets::default().draw();
    assert!(none.contains("no fault needed a page"), "{none}");
}

#[test]
fn rates_and_scaling_are_drawn() {
    let series = |points: &[(f64, f64)]| Series { name: "p50".into(), points: points.to_vec() };
    let many: Vec<_> = (0..300).map(|n| (f64::from(n) * 7.0, f64::from(n).exp2())).collect();
    for points in [
        vec![],
        vec![(0.0, 0.0)],
        vec![(1.0, 60.0)],
        vec![(f64::NAN, 1.0), (1.0, f64::INFINITY)],
        vec![(1.0, 60.0), (2.0, 60.0)],
        many,
    ] {
        let series = vec![series(&points), series(&[]), series(&points)];
        for y_scale in [YScale::Linear, YScale::Log] {
            assert_drawn(&RateCurve { series: series.clone(), y_scale }.draw());
        }
        for floor in [None, Some(Floor { name: "floor".into(), value: 2.5 })] {
            let (x_title, y_title) = ("streams".to_owned(), "GB/s".to_owned());
            let series = series.clone();
            assert_drawn(&Scaling { x_title, y_title, series, floor }.draw());
        }
    }
    assert!(RateCurve::default().draw().contains("nothing was measured"));
}

#[test]
fn time_lines_and_heat_maps_are_drawn() {
    for count in [0, 1, 2, 400] {
        let samples = samples(count);
        let marks = marks();
        let line = TimeLine {
            pages_total: 10 * count,
            vcpus: 2,
            since: "the start",
            samples: &samples,
            marks: &marks,
        };
        assert_drawn(&line.draw());
        for memory_bytes in [0, 2 << 20, 1 << 30, 100 << 30] {
            let map = HeatMap { memory_bytes, since: "the start", samples: &samples };
            assert_drawn(&map.draw());
        }
    }
}

#[test]
fn a_long_heat_map_is_no_large_one() {
    let samples = samples(400);
    let map = HeatMap { memory_bytes: 1 << 30, since: "the start", samples: &samples };
    assert!(map.draw().len() < 250_000, "{} bytes", map.draw().len());
}

#[test]
fn no_text_is_read_as_markup() {
    let evil = "</script><b id='x' onload=\"y\">&";
    let latency = LatencyBuckets {
        series: ["a", "b"].map(|_| BucketSeries { name: evil.into(), counts: vec![1] }).to_vec(),
        marks: Vec::new(),
    };
    let page = Page::new(evil).lead(evil).data(&json!({ "evil": evil, "less": "<!--" })).section(
        Section::new(evil)
            .text(evil)
            .table(&Table::new([evil]).row([evil]).judged_row(Verdict::Short, [evil]))
            .picture(evil, &latency, evil),
    );
    let html = page.to_html();
    assert!(!html.contains("<b") || html.matches("<b").count() == html.matches("<body").count());
    assert_eq!(html.matches("</script").count(), 1, "{html}");
    assert!(!html.contains("<!--"), "{html}");
    let data = html.split_once("id=\"data\">").unwrap().1.split_once("</script>").unwrap().0;
    let data: serde_json::Value = serde_json::from_str(data).unwrap();
    assert_eq!(data, json!({ "evil": evil, "less": "<!--" }));
}

#[test]
fn judged_rows_can_be_told_apart() {
    let table = Table::new(["what", "measured"])
        .judged_row(Verdict::Ok, ["median", "61 µs"])
        .judged_row(Verdict::Short, ["rate", "800.5 MiB/s"])
        .row(["machine", "of another kind"]);
    let html = Page::new("A page").section(Section::new("A table").table(&table)).to_html();
    assert!(html.contains("<tr class=\"ok\"><td>median</td><td class=\"number\">61 µs</td>"));
    assert!(
        html.contains("<tr class=\"short\"><td>rate</td><td class=\"number\">800.5 MiB/s</td>")
    );
    assert!(html.contains("<tr><td>machine</td><td class=\"number\">of another kind</td>"));
    assert!(html.contains("<th>what</th><th class=\"number\">measured</th>"));
}

#[test]
fn a_page_is_written_whole_and_replaces_the_last() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("a/b");
    prepare(&inner).unwrap();
    for title in ["first", "second"] {
        let page = Page::new(title);
        let path = page.write(&inner).unwrap();
        assert_eq!(path, inner.join(FILE_NAME));
        assert_eq!(fs::read_to_string(&path).unwrap(), page.to_html());
    }
    let files: Vec<_> =
        fs::read_dir(&inner).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(files, [FILE_NAME], "nothing else stays");
    let mode = fs::metadata(inner.join(FILE_NAME)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644);
}

#[test]
fn errors_name_the_place_and_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let error = prepare(&file.join("below")).unwrap_err();
    let expected = format!(
        "cannot make the directory {} for the page; name another",
        file.join("below").display()
    );
    assert_eq!(error.to_string(), expected);
    fs::create_dir(directory.path().join(FILE_NAME)).unwrap();
    let error = Page::new("A page").write(directory.path()).unwrap_err();
    assert!(error.to_string().contains("cannot write the page"), "{error}");
}
