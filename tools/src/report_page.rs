//! One page of HTML that shows measurements: text, tables and pictures.
//!
//! Responsible for how the page looks and for writing it; what is measured and said is its
//! callers' affair. A [`Page`] has [`Section`]s; a section has paragraphs, [`Table`]s and
//! [`Picture`]s:
//!
//! | picture | shows |
//! | --- | --- |
//! | [`LatencyBuckets`] | how long faults took, in buckets of powers of two |
//! | [`RateCurve`] | fault latency against the rate of the background |
//! | [`TimeLine`] | pages by the way they came, and the stall, over time |
//! | [`HeatMap`] | which parts of guest memory have arrived, over time |
//! | [`Scaling`] | a value against streams or memory |
//!
//! Invariant: the page is one file that loads nothing and runs nothing, and no text that is
//! given here is read as markup.
//!
//! ```
//! use afterimage_tools::report_page::{BucketSeries, LatencyBuckets, Page, Section, Table};
//!
//! let latency = LatencyBuckets {
//!     series: vec![BucketSeries { name: "idle".into(), counts: vec![0, 3, 9, 1] }],
//!     marks: Vec::new(),
//! };
//! let page = Page::new("A fault").section(
//!     Section::new("Latency")
//!         .text("Thirteen faults on an idle machine.")
//!         .table(&Table::new(["median", "longest"]).row(["5 µs", "9 µs"]))
//!         .picture("latency", &latency, "Each bar is a share of all faults."),
//! );
//! assert!(page.to_html().contains("<svg id=\"latency\""));
//! ```

mod frame;
mod heat_map;
mod latency;
mod lines;
mod style;
#[cfg(test)]
mod tests;
mod time_line;

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

pub use heat_map::HeatMap;
pub use latency::{BucketSeries, LatencyBuckets};
pub use lines::{Floor, RateCurve, Scaling, Series, YScale};
pub use time_line::TimeLine;

/// The name of the file in the directory that a page is written to.
pub const FILE_NAME: &str = "index.html";

/// Something that can be drawn.
pub trait Picture {
    /// The picture as an `svg` element. Without data, it says so.
    fn draw(&self) -> String;
}

/// A moment or a value on an axis of time, with its name; drawn as a vertical line.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// Where, in microseconds of the axis.
    pub at_us: f64,
    /// Its name, of a few words.
    pub label: String,
}

/// A page.
#[derive(Clone, Debug)]
pub struct Page {
    title: String,
    lead: Vec<String>,
    sections: Vec<Section>,
    data: Option<String>,
}

impl Page {
    /// A page with nothing but a title.
    #[must_use]
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), lead: Vec::new(), sections: Vec::new(), data: None }
    }

    /// Adds a paragraph under the title.
    #[must_use]
    pub fn lead(mut self, text: impl Into<String>) -> Self {
        self.lead.push(text.into());
        self
    }

    /// Adds a section at the end.
    #[must_use]
    pub fn section(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }

    /// Puts the numbers themselves into the page, where nobody sees them but programs: in
    /// the element `script` of type `application/json` and id `data`.
    #[must_use]
    pub fn data(mut self, data: &serde_json::Value) -> Self {
        // In JSON this character is found in strings only, and may be written so there.
        // Without it nothing in the data can end the element.
        self.data = Some(data.to_string().replace('<', "\\u003c"));
        self
    }

    /// The whole page.
    #[must_use]
    pub fn to_html(&self) -> String {
        let mut html = String::new();
        let title = escape(&self.title);
        html.push_str("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
        html.push_str("<meta name=\"viewport\" content=\"width=device-width\">\n");
        html.push_str("<meta name=\"color-scheme\" content=\"light\">\n");
        // Nothing is fetched, not even an icon.
        html.push_str("<link rel=\"icon\" href=\"data:,\">\n");
        // Writing to a string does not fail, here and below.
        let _ = write!(html, "<title>{title}</title>\n<style>\n{}</style>\n</head>\n", style::CSS);
        let _ = write!(html, "<body>\n<main>\n<h1>{title}</h1>\n");
        for text in &self.lead {
            let _ = writeln!(html, "<p class=\"lead\">{}</p>", escape(text));
        }
        for section in &self.sections {
            section.write_html(&mut html);
        }
        html.push_str("</main>\n");
        if let Some(data) = &self.data {
            let _ = writeln!(html, "<script type=\"application/json\" id=\"data\">{data}</script>");
        }
        html.push_str("</body>\n</html>\n");
        html
    }

    /// Writes the page into a directory, which is made if there is none, as
    /// [`FILE_NAME`]; returns its path. Whoever opens that sees the old page or the new one,
    /// never a part.
    ///
    /// # Errors
    /// [`PageError`]: the directory cannot be made, or not be written to.
    pub fn write(&self, directory: &Path) -> Result<PathBuf, PageError> {
        let mut file = new_file(directory)?;
        let path = directory.join(FILE_NAME);
        let failed = |source| PageError::File { path: path.clone(), source };
        file.write_all(self.to_html().as_bytes()).map_err(failed)?;
        // Others may read it, as any file that a program writes.
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(path)
    }
}

/// Makes the directory for a page and sees that it can be written to, before anything is
/// measured in vain.
///
/// # Errors
/// [`PageError`], as [`Page::write`] would say.
pub fn prepare(directory: &Path) -> Result<(), PageError> {
    new_file(directory).map(drop)
}

/// A file that goes when it is dropped.
fn new_file(directory: &Path) -> Result<NamedTempFile, PageError> {
    let path = || directory.to_owned();
    fs::create_dir_all(directory)
        .map_err(|source| PageError::Directory { path: path(), source })?;
    NamedTempFile::new_in(directory)
        .map_err(|source| PageError::Unwritable { path: path(), source })
}

/// Why a page was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// The directory is not there and cannot be made.
    #[error("cannot make the directory {} for the page; name another", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No file can be made in the directory.
    #[error(
        "cannot write into the directory {} for the page; name one of your own", path.display()
    )]
    Unwritable {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The page itself cannot be written.
    #[error("cannot write the page {}; see that there is room, and no directory", path.display())]
    File {
        /// The page.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A part of a page, with a heading.
#[derive(Clone, Debug)]
pub struct Section {
    heading: String,
    /// What follows the heading, as HTML.
    body: String,
}

impl Section {
    /// A section with nothing but a heading.
    #[must_use]
    pub fn new(heading: impl Into<String>) -> Self {
        Self { heading: heading.into(), body: String::new() }
    }

    /// Adds a paragraph.
    #[must_use]
    pub fn text(mut self, text: impl AsRef<str>) -> Self {
        let _ = writeln!(self.body, "<p>{}</p>", escape(text.as_ref()));
        self
    }

    /// Adds a table.
    #[must_use]
    pub fn table(mut self, table: &Table) -> Self {
        table.write_html(&mut self.body);
        self
    }

    /// Adds a picture, with an id of letters and dashes that the page does not have yet, and
    /// a caption that says how to read it.
    #[must_use]
    pub fn picture(mut self, id: &str, picture: &(impl Picture + ?Sized), caption: &str) -> Self {
        let (id, caption) = (escape(id), escape(caption));
        let svg = picture.draw();
        let svg = svg.strip_prefix("<svg ").unwrap_or(&svg);
        let _ = writeln!(
            self.body,
            "<figure>\n<svg id=\"{id}\" role=\"img\" aria-label=\"{caption}\" {svg}\
             <figcaption>{caption}</figcaption>\n</figure>"
        );
        self
    }

    fn write_html(&self, html: &mut String) {
        let heading = escape(&self.heading);
        let _ = write!(html, "<section>\n<h2>{heading}</h2>\n{}</section>\n", self.body);
    }
}

/// What a row of a table is found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Short of what it should be.
    Short,
}

/// A table of text.
#[derive(Clone, Debug, Default)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<(Vec<String>, Option<Verdict>)>,
}

impl Table {
    /// A table without rows. With an empty header it has none.
    #[must_use]
    pub fn new<T: Into<String>>(header: impl IntoIterator<Item = T>) -> Self {
        Self { header: header.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    #[must_use]
    pub fn row<T: Into<String>>(mut self, cells: impl IntoIterator<Item = T>) -> Self {
        self.rows.push((cells.into_iter().map(Into::into).collect(), None));
        self
    }

    /// Adds a row that was judged.
    #[must_use]
    pub fn judged_row<T: Into<String>>(
        mut self,
        verdict: Verdict,
        cells: impl IntoIterator<Item = T>,
    ) -> Self {
        self.rows.push((cells.into_iter().map(Into::into).collect(), Some(verdict)));
        self
    }

    /// Whether more than half of what stands in a column are numbers, which stand at the
    /// right.
    fn has_numbers(&self, column: usize) -> bool {
        let cells = || self.rows.iter().filter_map(|(cells, _)| cells.get(column));
        let filled = cells().filter(|cell| !cell.is_empty()).count();
        2 * cells().filter(|cell| is_number(cell)).count() > filled
    }

    fn write_html(&self, html: &mut String) {
        let write = |html: &mut String, element: &str, cells: &[String]| {
            for (column, cell) in cells.iter().enumerate() {
                let class = if self.has_numbers(column) { " class=\"number\"" } else { "" };
                let _ = write!(html, "<{element}{class}>{}</{element}>", escape(cell));
            }
            html.push_str("</tr>\n");
        };
        html.push_str("<div class=\"table\"><table>\n");
        if !self.header.is_empty() {
            html.push_str("<thead>\n<tr>");
            write(html, "th", &self.header);
            html.push_str("</thead>\n");
        }
        html.push_str("<tbody>\n");
        for (cells, verdict) in &self.rows {
            html.push_str(match verdict {
                None => "<tr>",
                Some(Verdict::Ok) => "<tr class=\"ok\">",
                Some(Verdict::Short) => "<tr class=\"short\">",
            });
            write(html, "td", cells);
        }
        html.push_str("</tbody>\n</table></div>\n");
    }
}

/// Whether a cell holds a number, perhaps with a unit.
fn is_number(cell: &str) -> bool {
    cell.split_whitespace().count() <= 2 && cell.starts_with(|first: char| first.is_ascii_digit())
}

/// Text as HTML that shows it, in elements and in attributes.
fn escape(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            other => html.push(other),
        }
    }
    html
}
